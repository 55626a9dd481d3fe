"""SSFL and its controls: one global mask, found before round 1 and kept.

Ohib et al., "SSFL: Discovering Sparse Unified Subnetworks at Initialization for Efficient Federated Learning",
TMLR 2026, arXiv 2405.09037, algorithm 1:

1. every client k scores each weight on one class-balanced minibatch, ``s_k = |dL_k/dw * w|`` at the common w0;
   the clients make w0 from the run's seed; the question names its digest, and w0 is sent where that disagrees;
2. the server averages, ``s = sum_k n_k s_k / sum_k n_k``, and keeps the top ``density`` as the global mask m;
3. FedAvg inside the mask: clients train ``m * w`` with masked gradients, only alive values and the dense remainder
   (biases, norms) travel.

Controls with the same rounds and bytes: `random` draws m uniformly (over all layers, or layer by layer with
mask.scope "layer"); `shuffled` permutes SSFL's m inside every layer, so it has SSFL's density per layer and none of
its choice of weights.

Departures: w0 is one initialisation made by the server (version 1 of the paper averages the clients' own, which would
shrink it); ties keep the lower index, so exactly floor(density * prunable) weights are alive where the paper's ">="
may keep more; weights average by samples as in the author's code (version 1: uniformly; run.weighting has both).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

from ssfl_app.aggregate import WeightedMean
from ssfl_app.options import ConfigError, at_least, choice, fraction
from ssfl_app.seeding import generator
from ssfl_app.sparsity.codec import SharedMask
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask, Scope, keep_count
from ssfl_app.sparsity.values import check_values, read_values
from ssfl_app.strategies.base import SparseStrategy
from ssfl_app.strategies.course import Ask
from ssfl_app.strategies.rule import ClientRule
from ssfl_app.strategies.scoring import snip_scores
from ssfl_app.strategies.settings import Settings
from ssfl_app.wire import Parcel


@dataclass(frozen=True)
class SsflOptions:
    """Keys of the room ``ssfl``."""

    saliency_batches: int = at_least(1)
    saliency_batch_size: int = at_least(1)
    saliency_weighting: str = choice("samples", "uniform")
    saliency_share: float = fraction()


class MaskedClient(ClientRule):
    """FedAvg's client, paid for the alive values only."""

    down = SharedMask
    up = SharedMask


class SaliencyClient(MaskedClient):
    """Answers the question "saliency" with the mean score of each prunable weight over its minibatches."""

    questions = ("saliency",)

    def setup(self, question: str, parcel: Parcel) -> Parcel:
        """Return the scores, float32, shape (prunable,), at the dense weights the question is about."""
        if question not in self.questions:
            return super().setup(question, parcel)
        options = cast(SsflOptions, self.settings.own["ssfl"])
        state = self.initial_weights(parcel)
        scores = snip_scores(self, state, options.saliency_batches, options.saliency_batch_size)
        return Parcel({"values": scores}, {"samples": len(self.site.train)})


class FixedMask(SparseStrategy):
    """FedAvg inside a mask that `setup` finds."""

    client = MaskedClient

    def setup(self, ask: Ask) -> None:
        """Find the mask and apply it to the initial weights."""
        self.mask = self.find_mask(ask)
        self.state = self.mask.apply(self.state)

    def find_mask(self, ask: Ask) -> Mask:
        """Return the global mask."""
        raise NotImplementedError


class Ssfl(FixedMask):
    """The mask of the highest mean saliency."""

    name = "ssfl"
    client = SaliencyClient
    rooms = {"ssfl": SsflOptions}  # noqa: RUF012  (ClassVar of the base)

    def __init__(self, layout: Layout, settings: Settings) -> None:
        super().__init__(layout, settings)
        floor = settings.mask.min_per_layer
        reserved = sum(min(floor, span.stop - span.start) for span in layout.prunable_spans.values())
        alive = keep_count(settings.mask.density, layout.prunable_size)
        if reserved > alive:
            raise ConfigError(
                f"mask.min-per-layer is {floor}; it is small enough for the {alive} alive weights in all"
            )

    def find_mask(self, ask: Ask) -> Mask:
        """Ask clients for scores, average them as they come, keep the top."""
        options = cast(SsflOptions, self.settings.own["ssfl"])
        mean = WeightedMean(self.layout.prunable_size)
        for reply in ask("saliency", self.asked(options.saliency_share), self._check_scores):
            weight = reply.samples if options.saliency_weighting == "samples" else 1
            mean.add(reply.arrays["values"], weight)
            del reply
        scores, wanted = mean.value(), self.settings.mask
        del mean
        return Mask.top(
            self.layout, scores, wanted.density, cast(Scope, wanted.scope), min_per_layer=wanted.min_per_layer
        )

    def asked(self, share: float) -> Iterable[int]:
        """Return the clients that are asked for scores: all that are there, or a random share of at least one."""
        run, clients = self.settings.run, len(self.present(0))
        # As the decimal it is written as: in binary 0.07 * 100 is above 7 and would ask 8 clients.
        count = max(1, math.ceil(Fraction(repr(share)) * clients))
        chosen = generator(run.seed, "saliency-share").choice(clients, count, replace=False)
        return sorted(int(client) for client in chosen)

    def _check_scores(self, client: int, parcel: Parcel) -> None:
        self.check_samples(parcel)
        check_values(read_values(parcel.arrays, "fp32", self.layout.prunable_size))


class Shuffled(Ssfl):
    """SSFL's mask with the bits permuted inside every layer."""

    name = "shuffled"

    def find_mask(self, ask: Ask) -> Mask:
        """Return SSFL's mask, shuffled."""
        return super().find_mask(ask).shuffle(generator(self.settings.run.seed, "shuffle"))


class Random(FixedMask):
    """A uniformly random mask; nobody is asked."""

    name = "random"

    def __init__(self, layout: Layout, settings: Settings) -> None:
        super().__init__(layout, settings)
        if settings.mask.min_per_layer:
            raise ConfigError(f"mask.min-per-layer is {settings.mask.min_per_layer}; it is 0 with strategy random")

    def find_mask(self, ask: Ask) -> Mask:
        """Draw the mask."""
        wanted, rng = self.settings.mask, generator(self.settings.run.seed, "random-mask")
        return Mask.random(self.layout, wanted.density, rng, cast(Scope, wanted.scope))
