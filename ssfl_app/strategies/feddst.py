"""FedDST: FedAvg inside one global mask that clients move now and then.

Bibikar, Vikalo, Wang and Chen, "Federated dynamic sparse training: computing less, communicating less, yet learning
better", AAAI 2022, algorithm 1. The first mask is random, with Erdos-Renyi-Kernel layer densities. Rounds are FedAvg
inside the mask, but in rounds 1, 1 + every, ... of the first `until` of a run

1. a client trains, removes the share ``a = alpha / 2 (1 + cos(pi (r - 1) / end))`` of each layer's alive weights, the
   smallest, and lets as many dead ones come alive at 0, those of largest |dL/dw| on one minibatch; it trains on and
   sends its values and its mask m_k;
2. the server takes ``sum n_k m_k w_k / sum n_k m_k`` on the union of the masks, and keeps the largest of each layer.
   Every layer keeps its number of alive weights for ever.

With A alive of P prunable coordinates and R others, per client and round, fp32: down and up ``4 (A + R)``; in a round
that moves masks ceil(P / 8) more up, and after it once ceil(P / 8) more down.

Departures. A weight has to train before the server may judge it: the mask moves before the last local epoch, or, with
one, before it. With published settings it moves after the last one, what came alive is sent as 0 and goes at once.
Only dead weights come alive, those just removed among them, which then keep their value; the public code ranks alive
ones too and sets them to 0. Layer densities are proportional to Erdos-Renyi-Kernel's, at most 1, and mask.density is
that of all prunable weights together (the code scales sparsities and lets layers exceed 1). The first mask is random
(there: of the largest initial weights). It moves in round 1 first (there in the second round), and the share has one
factor alpha, as in the paper (there ``alpha^2 / 2 (1 + cos)``). alpha is the code's default; its scripts for CIFAR
have 0.01. `feddst.proximal` is FedProx's mu; the gradient of step 1 is without it.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssfl_app.core.aggregation import Aggregator
from ssfl_app.core.algorithm import ClientAlgorithm, Payload, Query, Reply, ServerContext, SparseStrategy
from ssfl_app.core.means import OverlapMean
from ssfl_app.core.options import FromSettings, Section, Settings, at_least, fraction
from ssfl_app.seeding import generator
from ssfl_app.sparsity.codec import BitmapAndValues, Codec, MaskedValues, read_mask
from ssfl_app.sparsity.densities import Counts, rescaled
from ssfl_app.sparsity.dynamic import cosine_drop, drop, grow, random_mask, top_mask
from ssfl_app.sparsity.layout import Layout, state_of
from ssfl_app.sparsity.mask import Mask, keep_count
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.strategies.shared.proximal import proximal


@dataclass(frozen=True)
class FedDstOptions(Section):
    """Keys of the section ``feddst``."""

    section = "feddst"

    every: int = at_least(1, 10, "rounds from one move of the mask to the next; the first one is in round 1")
    until: float = fraction(0.5, "share of the rounds in which the mask may move, in (0, 1]")
    alpha: float = fraction(0.5, "share of a layer that moves in round 1; it falls to 0 along a cosine")
    proximal: float = at_least(0, 0.0, "mu of FedProx; 0: none")

    def moves(self, round_: int, rounds: int) -> bool:
        """Return whether masks move in this round."""
        return (round_ - 1) % self.every == 0 and round_ <= keep_count(self.until, rounds)

    def share(self, round_: int, rounds: int) -> float:
        """Return which share of its alive weights a layer exchanges in a round that moves masks."""
        return cosine_drop(self.alpha, round_ - 1, keep_count(self.until, rounds))


def layer_counts(layout: Layout, density: float) -> Counts:
    """Return the alive weights of each layer, floor(density * prunable) in all, as Erdos-Renyi-Kernel shares them."""
    shapes = dict(layout.shapes)
    return rescaled(layout, {name: sum(shapes[name]) / math.prod(shapes[name]) for name in layout.prunable}, density)


class FedDstClient(ClientAlgorithm):
    """Trains inside the global mask, and moves it in the rounds for that."""

    down = MaskedValues
    options = FromSettings(FedDstOptions)

    @classmethod
    def codec_up(cls, settings: Settings, round_: int) -> type[Codec]:
        """Return how the model goes up: with its mask in rounds that move masks."""
        return (
            BitmapAndValues
            if FedDstOptions.from_settings(settings).moves(round_, settings.run.rounds)
            else MaskedValues
        )

    def train(self, payload: Payload) -> Payload:
        """Return the alive values, and their mask if it moved."""
        options, run = self.options, self.settings.run
        mask, round_, epochs = self.load(payload), payload.round, self.settings.local.epochs
        changes: dict[str, Any] = {}
        if options.proximal:
            changes["penalty"] = proximal(self.context.model, options.proximal)
        if not options.moves(round_, run.rounds):
            return self.reply(payload, mask, self.fit(round_, mask, **changes))
        total = 0.0
        if epochs > 1:
            total = (epochs - 1) * self.fit(round_, mask, epochs=epochs - 1, **changes)
        moved = self.moved(round_, mask, options.share(round_, run.rounds))
        total += self.fit(round_, moved, purpose="feddst-moved", epochs=1, **changes)
        return self.reply(payload, moved, total / epochs)

    def moved(self, round_: int, mask: Mask, share: float) -> Mask:
        """Return the mask after each layer exchanged this share of its alive weights, by those on the workbench."""
        site = self.context
        counts = {name: math.floor(share * alive) for name, alive, _ in mask.layers()}
        left = drop(mask, np.abs(site.layout.flatten_prunable(state_of(site.model))), counts)
        rng = generator(self.settings.run.seed, "feddst-regrow", round_, site.client_id)
        chosen = rng.permutation(len(site.train))[: self.settings.local.batch_size]
        gradient = site.trainer.gradient(site.model, site.train.take(chosen))
        return grow(left, counts, np.abs(site.layout.flatten_prunable(gradient)))


class FedDst(SparseStrategy):
    """Merges masks by the magnitude of the mean weights."""

    name = "feddst"
    client = FedDstClient
    options = FromSettings(FedDstOptions)
    has_floor = False

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        self.counts = layer_counts(self.layout, self.settings.mask.density)

    def before_training(self, ask: Query) -> None:
        """Draw the first mask and apply it to the initial weights."""
        self.mask = random_mask(self.layout, self.counts, generator(self.settings.run.seed, "feddst-mask"))
        self.state = self.mask.apply(self.state)

    def check_trained(self, client: int, payload: Payload) -> None:
        """Refuse a mask that moved weights from one layer to another, too."""
        super().check_trained(client, payload)
        if not self.options.moves(payload.round, self.settings.run.rounds):
            return
        for name, alive, _ in read_mask(payload.arrays, self.layout).layers():
            if alive != self.counts[name]:
                raise PayloadError(f"a mask has {alive} alive weights in {name}; it must have {self.counts[name]}")

    def aggregator(self, round_: int) -> Aggregator:
        """Take the mean; where masks moved, over the owners, and keep the largest weights that somebody owns."""
        if not self.options.moves(round_, self.settings.run.rounds):
            return super().aggregator(round_)
        mean = OverlapMean(self.layout.size)

        def add(reply: Reply) -> None:
            values, mask = self.decoded(reply)
            mean.add(values, mask.transmitted, self.weight(reply))

        def finish() -> None:
            flat, prunable = mean.value(np.zeros(self.layout.size, dtype=np.float32)), self.layout.is_prunable
            owned = mean.weights()[prunable] > 0
            magnitudes = np.where(owned, np.abs(flat[prunable]), np.float32(-1))  # an owned weight may be 0
            self.mask = top_mask(self.layout, magnitudes, self.counts)
            self.state = self.mask.apply(self.layout.unflatten(flat))

        return Aggregator(add, finish)
