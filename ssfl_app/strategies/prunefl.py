"""PruneFL: one client prunes the model while it trains alone; later all clients help to move the mask.

Jiang, Wang, Valls, Ko, Lee, Leung and Tassiulas, "Model pruning enables efficient federated learning on edge
devices", IEEE TNNLS 2022. A *readjustment* of the mask, given the squared gradients g^2 of all prunable weights

1. removes a share of each layer's alive weights, those of smallest |w| (prunefl.scope "global": of all together);
2. adds weights of any layer, removed or dead, in the order of g_j^2, while ``g_j^2 > mean of g^2 over the alive``:
   that is what training gains in a unit of time if each weight costs the same time. They start at 0; what was removed
   and comes back keeps its value.

*Stage 1*, before round 1: a random client trains from w0 alone, first densely, and readjusts after each of up to
`checks` local rounds, until the number of alive weights changed by at most a tenth from one readjustment to the next
five times running. It sends model and mask.
*Stage 2*: FedAvg inside the mask; in every round that `every` divides, clients also send g^2 at the weights that came
down, and the server readjusts after the mean, removing the share ``prune * 0.5 ** (round / 10000)``.

prunefl.density says what ends step 2: "target" (floor(mask.density * P) weights are alive, or nothing was added as
there are more already) or "max" (the rule above, at the latest there; the density is then an outcome).

With A alive of P prunable coordinates and R others, fp32: stage 1 costs ``4 (A + R) + ceil(P / 8)`` up; a client and
round ``4 (A + R)`` each way, ``4 P`` more up in a round that readjusts and ceil(P / 8) more down after it.

Departures: every weight costs the same time (published: measured on the authors' machines, for each layer of their
nets, and a constant for the rest of a round). Biases' g^2 are left out of the mean. g^2 is the mean over one pass of
minibatches at one model (there: summed along local steps); it is that of the cross-entropy without augmentation.
Checks of stage 1 are a local round apart from the first one on, with the first round's learning rate (there: 50
rounds of one pass over 200 images, up to 1000 rounds, and none until training accuracy is 1.5 / classes).
"""

from dataclasses import dataclass

import numpy as np

from ssfl_app.core.aggregation import Aggregator, ReplyMean
from ssfl_app.core.algorithm import ClientAlgorithm, Payload, Query, Reply, SparseStrategy
from ssfl_app.core.means import WeightedMean
from ssfl_app.core.options import FromSettings, Section, Settings, at_least, choice, fraction
from ssfl_app.core.robust import ScoreFold
from ssfl_app.seeding import generator
from ssfl_app.sparsity.codec import BitmapAndValues, MaskedValues, read_mask
from ssfl_app.sparsity.dynamic import drop
from ssfl_app.sparsity.layout import Layout, Vector, load_state, state_of
from ssfl_app.sparsity.mask import Mask, keep_count, largest
from ssfl_app.sparsity.values import MAX_VALUE, Allowed, PayloadError, check_values, read_array
from ssfl_app.strategies.shared.scoring import SsflOptions

HALF_LIFE = 10_000
"""Rounds after which half as many weights are removed."""

SETTLED, CALM = 0.1, 5
"""Stage 1 ends after this many readjustments in a row that changed the count by at most this share."""


@dataclass(frozen=True)
class PruneFlOptions(Section):
    """Keys of the section ``prunefl``."""

    section = "prunefl"

    checks: int = at_least(
        0, 20, "most readjustments of the one client that prunes first, a local round apart; 0: none"
    )
    every: int = at_least(1, 50, "rounds from one readjustment to the next")
    prune: float = fraction(0.3, "share of the alive weights that one removes, before it adds some")
    scope: str = choice("layer", "global", about="the share goes in each layer, or among all weights together")
    density: str = choice(
        "target", "max", about="mask.density is kept, or is the most that the published rule may add"
    )


def readjusted(
    options: PruneFlOptions, mask: Mask, magnitudes: Vector, squares: Vector, share: float, most: int
) -> Mask:
    """Return the mask after a readjustment by |w| and g^2, float32, shape (prunable,).

    A share of the alive weights, in (0, 1], is removed, rounded down. Nothing is added beyond `most` alive weights;
    with the density "target" they are filled up whatever g^2 is.
    """
    if options.scope == "layer":
        alive = drop(mask, magnitudes, {name: keep_count(share, count) for name, count, _ in mask.layers()}).alive
    else:
        alive = largest(np.where(mask.alive, magnitudes, np.float32(-1)), mask.count - keep_count(share, mask.count))
    alive, kept = alive.copy(), int(np.count_nonzero(alive))
    outside = np.flatnonzero(~alive)
    order = outside[largest(squares[outside], min(outside.size, max(0, most - kept)))]
    if options.density != "target" and order.size:
        order = order[np.argsort(-squares[order], kind="stable")]
        gains = squares[order].astype(np.float64)
        before = squares[alive].sum(dtype=np.float64) + np.cumsum(gains) - gains
        worth = gains > before / np.maximum(1, kept + np.arange(order.size))
        order = order[: order.size if worth.all() else int(np.argmin(worth))]
    alive[order] = True
    return Mask(mask.layout, alive)


def pruned_counts(options: PruneFlOptions, density: float, layout: Layout) -> tuple[int, int]:
    """Return the least and the most alive weights that stage 1 can end with: a client's word has limits.

    With the density "target" all that is open is how a share is rounded down in each layer. With "max" fewer may have
    been added.
    """
    size, calm = layout.prunable_size, 0
    most, rounded = keep_count(density, size), len(layout.prunable) - 1 if options.scope == "layer" else 0
    low = high = size
    for check in range(options.checks):
        left = low - keep_count(options.prune, low)
        low = left if options.density == "max" else max(left, most)
        if calm < CALM:  # who removes less cannot have been calm for longer before
            before, removed = high, max(0, keep_count(options.prune, high) - rounded)
            high = max(before - removed, most)
            calm = _calm(check, calm, before, high)
    return low, high


def _calm(check: int, calm: int, before: int, after: int) -> int:
    # The first one, from a dense model, is compared with nothing.
    return calm + 1 if check and abs(after - before) <= SETTLED * before else 0


class PruneFlClient(ClientAlgorithm):
    """FedAvg's client, which also tells squared gradients; one of them prunes alone first."""

    down = MaskedValues
    up = MaskedValues
    query_types = ("initial_pruning",)
    options = FromSettings(PruneFlOptions)

    @classmethod
    def uses(cls, settings: Settings) -> int:
        """Return the local rounds of stage 1 too, each with its gradients."""
        return super().uses(settings) + PruneFlOptions.from_settings(settings).checks * (settings.local.epochs + 1)

    def answer_query(self, question: str, payload: Payload) -> Payload:
        """Return the model and the mask of stage 1."""
        if question not in self.query_types:
            return super().answer_query(question, payload)
        site, options, calm = self.context, self.options, 0
        load_state(site.model, self.initial_weights(payload))
        mask, most = site.dense, keep_count(self.settings.mask.density, site.layout.prunable_size)
        for check in range(options.checks):
            if calm == CALM:
                break
            # Round 0 would have another rate than the first one.
            self.fit(0, mask, purpose=f"prunefl-{check}", lr=self.settings.local.lr)
            weights = np.abs(site.layout.flatten_prunable(state_of(site.model)))
            squares = self.squares(0, f"prunefl-squares-{check}")
            before, mask = mask, readjusted(options, mask, weights, squares, options.prune, most)
            calm = _calm(check, calm, before.count, mask.count)
        return Payload(
            BitmapAndValues().encode(site.layout, state_of(site.model), mask), {"samples": len(site.train)}
        )

    def train(self, payload: Payload) -> Payload:
        """Train as ever; in rounds that readjust send the squared gradients at the model that came down as well."""
        round_ = payload.round
        if round_ % self.options.every:
            return super().train(payload)
        mask = self.load(payload)
        squares = self.squares(round_, "prunefl-squares")
        reply = self.reply(payload, mask, self.fit(round_, mask))
        return Payload({**reply.arrays, "squares": squares}, reply.metadata)

    def squares(self, round_: int, purpose: str) -> Vector:
        """Return the mean of g^2 over one pass of minibatches, at the model on the workbench."""
        site, size = self.context, self.settings.local.batch_size
        site.enough(len(site.train), "squared gradients")
        order = generator(self.settings.run.seed, purpose, round_, site.client_id).permutation(len(site.train))
        mean = WeightedMean(site.layout.prunable_size)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            gradient = site.trainer.gradient(site.model, site.train.take(chosen))
            # At a model that somebody spoilt gradients may be so large that their squares are no scores any more.
            squares = np.minimum(np.square(site.layout.flatten_prunable(gradient)), np.float32(MAX_VALUE))
            mean.add(squares, len(chosen))
        return mean.value()


class PruneFl(SparseStrategy):
    """Takes the first mask from one client and readjusts it by what all of them tell."""

    name = "prunefl"
    client = PruneFlClient
    options = FromSettings(PruneFlOptions)
    scoring = FromSettings(SsflOptions)
    has_floor = False

    def before_training(self, ask: Query) -> None:
        """Have one client prune."""
        if not self.options.checks:
            return
        present = self.present(0)
        client = present[int(generator(self.settings.run.seed, "prunefl-client").choice(len(present)))]

        def take(reply: Reply) -> None:
            self.state, self.mask = BitmapAndValues().decode(reply.arrays, self.layout)

        ask("initial_pruning", [client], self._check_pruned, take)

    def answers(self, round_: int, question: str | None = None) -> Allowed:
        """Return a model and its mask for stage 1, and the squares beside a model after that."""
        if question is not None:
            return BitmapAndValues().allowed(self.layout)
        return {**super().answers(round_), "squares": (np.float32, self.layout.prunable_size)}

    def check_trained(self, client: int, payload: Payload) -> None:
        """Refuse bad squares too, in rounds that readjust."""
        super().check_trained(client, payload)
        if payload.round % self.options.every == 0:
            squares = read_array(payload.arrays, "squares", np.float32, self.layout.prunable_size)
            check_values(squares)
            if squares.min() < 0:
                raise PayloadError(f"squares reach {squares.min():g}; they must be at least 0")

    def aggregator(self, round_: int) -> Aggregator:
        """Take the mean; readjust the mask when that is due."""
        options, density = self.options, self.settings.mask.density
        if round_ % options.every:
            return super().aggregator(round_)
        mean = ReplyMean(self, round_)
        squares = ScoreFold(self.scoring.score_fold, self.layout.prunable_size)

        def add(reply: Reply) -> None:
            squares.add(reply.client, reply.arrays["squares"], self.weight(reply))
            mean.add(reply)

        def finish() -> None:
            state, most = mean.finish(), keep_count(density, self.layout.prunable_size)
            weights, share = np.abs(self.layout.flatten_prunable(state)), options.prune * 0.5 ** (round_ / HALF_LIFE)
            self.mask = readjusted(options, self.mask, weights, squares.value(), share, most)
            self.state = self.mask.apply(state)

        return Aggregator(add, finish)

    def _check_pruned(self, client: int, payload: Payload) -> None:
        self.check_samples(payload)
        BitmapAndValues().check(payload.arrays, self.layout, self.mask)
        low, high = pruned_counts(self.options, self.settings.mask.density, self.layout)
        count = read_mask(payload.arrays, self.layout).count
        if not low <= count <= high:
            raise PayloadError(f"a mask has {count} alive weights; stage 1 ends with {low} to {high}")
