"""Top-k: dense models down, each client's largest coordinates up.

Ohib et al., "SSFL", arXiv 2405.09037 version 1 (its baseline: each client shares its top-k weights and the server
averages); Guastella et al., "SparsyFed", ICLR 2025 (its Top-K baseline); Stich, Cordonnier and Jaggi, "Sparsified SGD
with memory", NeurIPS 2018 (error feedback). Client k trains the global model w to w_k, all of it, and sends the
floor(density * prunable) coordinates of largest magnitude, with the dense remainder (biases, norms):

- `topk.of` "weights": of w_k. The new w is the mean of what came up. With `topk.mean` "zeros" what a client did not
  send counts as 0, so a coordinate shrinks by the share of clients that sent it; with "overlap" it is the mean over
  those that sent it, and the old value where nobody did.
- "update": of w_k - w. The server adds the mean over all clients of the cohort, 0 where one did not send. With
  `topk.error-feedback` client k keeps what it did not send and adds it to its next update before it chooses:
  ``d = w_k - w + e_k``, sends ``top(d)``, ``e_k <- d - top(d)``.

The mask of the global model is the union of the masks that came up for weights with zeros, and dense otherwise; what
goes down is always dense.

Departures: exactly k coordinates, the lower index first among equals; places travel as a bitmap (`topk.index`), or as
int32 positions, which is less below density 1/32. Means are weighted by samples (run.weighting); v1's is uniform.
"""

from dataclasses import dataclass

import numpy as np

from ssfl_app.core.aggregation import Aggregator, ReplyOverlapMean, ReplyZerosMean
from ssfl_app.core.algorithm import ClientAlgorithm, Payload, Reply, ServerContext, SparseStrategy
from ssfl_app.core.options import ConfigError, FromSettings, MaskOptions, Section, Settings, anything, choice
from ssfl_app.core.robust import distance
from ssfl_app.sparsity.codec import BitmapAndValues, Codec, Indexed
from ssfl_app.sparsity.layout import Layout, Vector, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Arrays, PayloadError


@dataclass(frozen=True)
class TopkOptions(Section):
    """Keys of the section ``topk``."""

    section = "topk"

    of: str = choice("weights", "update", about="what a client sends the largest coordinates of")
    mean: str = choice("zeros", "overlap", about="what a client did not send counts as 0, or does not count")
    index: str = choice("bitmap", "int32", about="how places travel; int32 is less below density 1/32")
    error_feedback: bool = anything(
        "true or false", False, "with update: add what was not sent to the client's next update"
    )

    @property
    def codec(self) -> type[Codec]:
        """How the chosen coordinates travel."""
        return {"bitmap": BitmapAndValues, "int32": Indexed}[self.index]

    def check(self) -> None:
        """Raise ConfigError for options that exclude each other."""
        if self.of == "weights" and self.error_feedback:
            raise ConfigError("topk.error-feedback is true; with topk.of 'weights' it is false")
        if self.of == "update" and self.mean == "overlap":
            raise ConfigError("topk.mean is 'overlap'; with topk.of 'update' it is 'zeros'")


def chosen(layout: Layout, values: Vector, wanted: MaskOptions) -> Mask:
    """Return the mask of the largest prunable coordinates of a vector of all coordinates."""
    scores = np.abs(values[layout.is_prunable])
    return Mask.top(layout, scores, wanted.density, wanted.scope, min_per_layer=wanted.min_per_layer)


def split(layout: Layout, values: Vector, wanted: MaskOptions, codec: Codec) -> tuple[Arrays, Vector]:
    """Return what goes up of a vector of all coordinates, and what is left of it, shape (layout.size,)."""
    mask = chosen(layout, values, wanted)
    arrays = codec.encode(layout, layout.unflatten(values), mask)
    sent, _ = codec.decode(arrays, layout, mask)  # as the server reads it: rounding is left, too
    return arrays, values - layout.flatten(sent)


class TopkClient(ClientAlgorithm):
    """Trains everything and sends the largest."""

    stateful = True
    options = FromSettings(TopkOptions)

    @classmethod
    def codec_up(cls, settings: Settings, round_: int) -> type[Codec]:
        """Return how the chosen coordinates travel."""
        return TopkOptions.from_settings(settings).codec

    def train(self, payload: Payload) -> Payload:
        """Train the model that came down; return its largest coordinates, or those of its change."""
        options, layout = self.options, self.context.layout
        self.load(payload)
        old = layout.flatten(state_of(self.context.model))
        loss = self.fit(payload.round)
        values = layout.flatten(state_of(self.context.model))
        if options.of == "update":
            values -= old
        if options.error_feedback:
            kept = self.load_client_state(payload)
            values += np.float32(0) if kept is None else kept["residual"]
        up = self.codec_up(self.settings, payload.round)(self.settings.wire.up_values, self.rounder(payload))
        arrays, left = split(layout, values, self.settings.mask, up)
        if options.error_feedback:
            self.save_client_state(payload, {"residual": left})
        return Payload(arrays, self.metadata(payload, loss))


class Topk(SparseStrategy):
    """Averages models or updates of which each client sent a part."""

    name = "topk"
    client = TopkClient
    options = FromSettings(TopkOptions)

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        self.options.check()
        self._dense = self.mask
        self._count = self.top_count(self.settings.mask.density)

    def mask_for(self, client: int) -> Mask:
        """Return the dense mask: whole models go down."""
        return self._dense

    def aggregator(self, round_: int) -> Aggregator:
        """Replace the model by the mean, or add the mean to it."""
        mean = ReplyOverlapMean(self) if self.options.mean == "overlap" else ReplyZerosMean(self)

        def finish() -> None:
            values, mask = mean.finish(self.state)
            if self.options.of == "update":
                values += self.layout.flatten(self.state)
            else:
                self.mask = mask
            self.state = self.layout.unflatten(values)

        return Aggregator(mean.add, finish)

    def update_norm(self, reply: Reply) -> float | None:
        """Return the length of what came up, which is an update itself with topk.of "update"."""
        if self.options.of == "weights":
            return super().update_norm(reply)
        values, mask = self.decoded(reply)
        return distance(values[mask.transmitted])

    def check_trained(self, client: int, payload: Payload) -> None:
        """Refuse as ever, and what carries another number of coordinates than was asked for."""
        super().check_trained(client, payload)
        count = payload.arrays["values"].size - (self.layout.size - self.layout.prunable_size)
        if count != self._count:
            raise PayloadError(f"{count} weights came up; mask.density {self.settings.mask.density} is {self._count}")
