"""ZeroFL: dense models that compute with their largest weights only, and send a little more than these.

Qiu et al., "ZeroFL: Efficient on-device training for federated learning with local sparsity", ICLR 2022; the local
training is SWAT (Raihan and Aamodt, "Sparse weight activation training", NeurIPS 2020). A client trains the global
model w to w_k: each layer computes with its floor(density * size) largest weights, chosen anew in every step, and
hands their dense gradient to all of its weights; activations kept for weight gradients are pruned to the same
density. The first layer does neither. No weight is ever masked. It sends a share of density + zerofl.r-mask (at most
1) of the prunable coordinates, and the dense remainder (biases, norms); which, and what of them, `zerofl.uplink`:

================  ===============  =========  =======================
uplink            at the largest   sends      the server
================  ===============  =========  =======================
top-weights       |w_k|            w_k        takes the mean
top-weights-diff  |w_k|            w_k - w    adds the mean
top-diff          |w_k - w|        w_k - w    adds the mean
================  ===============  =========  =======================

The mean is FedAvg's over the cohort, 0 where a client did not send: with "top-weights" a coordinate shrinks by the
share of clients that sent it, and is 0 if none did; with differences it then keeps its value. Whole models go down.
Clients test, and `model()` is, the model that computes: the largest weights of each layer, the first one dense.

Departures: there is no public code; that the mean of "top-weights" counts zeros is how we read the paper's FedAvg on
sparse tensors. What is sent is ranked over all layers (mask.scope), the first one among them, so with "top-weights"
weights of it can become 0; places travel as a bitmap, where the paper has CSR. The SWAT modules in SparsyFed's code
overwrite w by its largest weights in each step; as in the paper, ours stays dense.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ssfl_app.core.aggregation import Aggregator, ReplyZerosMean
from ssfl_app.core.algorithm import ClientAlgorithm, Metadata, Payload, Query, Reply, ServerContext, SparseStrategy
from ssfl_app.core.options import FromSettings, Section, Settings, choice, option
from ssfl_app.core.robust import distance
from ssfl_app.sparsity.codec import BitmapAndValues, read_mask
from ssfl_app.sparsity.layout import Layout, State, Vector, state_of
from ssfl_app.sparsity.mask import Mask, alive_count
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.strategies.shared.scoring import ranked
from ssfl_app.training.reparam import sparse_activations, top_weights


@dataclass(frozen=True)
class ZeroFlOptions(Section):
    """Keys of the section ``zerofl``."""

    section = "zerofl"

    uplink: str = choice("top-weights", "top-weights-diff", "top-diff", about="what a client sends")
    r_mask: float = option(
        "a fraction in [0, 1]",
        lambda value: 0 <= value <= 1,
        0.1,
        "share of the weights that is sent on top of mask.density, in [0, 1]",
    )


def sent_share(settings: Settings) -> float:
    """Return which share of the prunable coordinates travels up."""
    # As the decimals they are written as: in binary 0.7 + 0.1 is below 0.8.
    shares = settings.mask.density, ZeroFlOptions.from_settings(settings).r_mask
    return float(min(sum(Fraction(repr(share)) for share in shares), Fraction(1)))


def sent_mask(layout: Layout, values: Vector, settings: Settings) -> Mask:
    """Return the mask of what travels up: the largest prunable coordinates of a vector of all coordinates."""
    return ranked(layout, np.abs(values[layout.is_prunable]), settings.mask, sent_share(settings))


def used_mask(layout: Layout, state: State, density: float) -> Mask:
    """Return the mask of the weights that compute: the largest of each layer, and all of the first."""
    mask = Mask.top(layout, np.abs(layout.flatten_prunable(state)), density, "layer")
    first = np.zeros(layout.prunable_size, dtype=np.bool_)
    first[layout.prunable_spans[layout.prunable[0]]] = True
    return mask | Mask(layout, first)


class ZeroFlClient(ClientAlgorithm):
    """Trains a dense model that computes sparsely, and sends a part of it."""

    up = BitmapAndValues
    reparametrises = True
    options = FromSettings(ZeroFlOptions)

    def train(self, payload: Payload) -> Payload:
        """Train the model that came down; return the largest of its weights, or of their changes."""
        options, layout = self.options, self.context.layout
        self.load(payload)
        old = layout.flatten(state_of(self.context.model))
        keep = dict.fromkeys(layout.prunable, self.settings.mask.density) | {layout.prunable[0]: 1.0}
        with self.sparse(), sparse_activations(self.context.model, keep):
            loss = self.fit(payload.round)
        new = layout.flatten(state_of(self.context.model))
        mask = sent_mask(layout, new - old if options.uplink == "top-diff" else new, self.settings)
        values = new if options.uplink == "top-weights" else new - old
        return self.reply(payload, mask, loss, layout.unflatten(values))

    def evaluate(self, payload: Payload) -> Metadata:
        """Test the model that came down, with its largest weights."""
        self.load(payload)
        with self.sparse():
            return self.tested(payload)

    def sparse(self) -> AbstractContextManager[None]:
        """Return the context in which the workbench computes with its largest weights."""
        return top_weights(self.context.model, self.settings.mask.density, dense=self.context.layout.prunable[:1])


class ZeroFl(SparseStrategy):
    """Averages what came up; its `mask` is that of the weights that compute, its `state` is dense."""

    name = "zerofl"
    client = ZeroFlClient
    options = FromSettings(ZeroFlOptions)

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        self._dense = self.mask
        self._count = self.top_count(sent_share(self.settings))

    def alive(self) -> int:
        """Return how many weights compute, beside the first layer's."""
        return alive_count(self.layout, self.settings.mask.density, "layer")

    def before_training(self, ask: Query) -> None:
        """Find the weights that compute."""
        self.mask = used_mask(self.layout, self.state, self.settings.mask.density)

    def mask_for(self, client: int) -> Mask:
        """Return the dense mask: whole models go down."""
        return self._dense

    def aggregator(self, round_: int) -> Aggregator:
        """Replace the model by the mean, or add the mean to it."""
        mean = ReplyZerosMean(self)

        def finish() -> None:
            values, _ = mean.finish(self.state)
            if self.options.uplink != "top-weights":
                values += self.layout.flatten(self.state)
            self.state = self.layout.unflatten(values)
            self.mask = used_mask(self.layout, self.state, self.settings.mask.density)

        return Aggregator(mean.add, finish)

    def model(self) -> State:
        """Return the weights that compute."""
        return self.mask.apply(self.state)

    def update_norm(self, reply: Reply) -> float | None:
        """Return the length of what came up, which is an update itself unless zerofl.uplink is "top-weights"."""
        if self.options.uplink == "top-weights":
            return super().update_norm(reply)
        values, mask = self.decoded(reply)
        return distance(values[mask.transmitted])

    def check_trained(self, client: int, payload: Payload) -> None:
        """Refuse as ever, and another number of coordinates than was asked for."""
        super().check_trained(client, payload)
        count = read_mask(payload.arrays, self.layout).count
        if count != self._count:
            raise PayloadError(f"{count} weights came up; density and zerofl.r-mask make {self._count}")
