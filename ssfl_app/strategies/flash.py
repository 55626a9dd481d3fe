"""FLASH: a random mask whose layer densities a few clients find out, fixed before round 1; and its joint variant.

Babakniya, Kundu, Prakash, Niu and Avestimehr, "Revisiting sparsity hunting in federated learning: why does sparsity
consensus matter?", TMLR 2023.

`flash` (there: SPDST). Stage 1: a share of the clients starts from the common initial weights and one random mask and
trains with *sparse learning*: after every epoch but the last each layer loses its smallest weights, a share
``prune-rate * (1 - epoch / epochs)`` of those alive, and as many random ones come alive, dealt to the layers in
proportion to the mean magnitude of their alive weights. They send layer densities only; the server averages them,
scales them to `mask.density` and draws a random mask of these layer densities. Stage 2: FedAvg in that mask.

`flash-joint` (there: JMWST). In rounds 1, 1 + flash.joint-every, ... clients train with sparse learning and send the
mask they end with; the server averages the weights, what a client does not hold counting as 0, and keeps the largest
of each layer, as many as the mean of the clients' layer densities says. In the other rounds the mask stays.

Sparse learning over one epoch changes the mask in the middle, between random halves of the images.

Departures: linear layers are pruned too, and means are weighted by run.weighting (published: conv only, uniform). The
first mask is exact in total (there: a coin for each weight), and so is every later one (there: mean densities are
scaled down where they are too large, never up). Regrowth may fill a layer (there: 99 %), and nearly dense layers are
pruned like others. Stage 2 starts from the run's initial weights. The public code tests the average before it masks
it; here the masked model is tested.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ssfl_app.core.aggregation import Aggregator
from ssfl_app.core.algorithm import ClientAlgorithm, Payload, Query, Reply, SparseStrategy
from ssfl_app.core.means import WeightedMean
from ssfl_app.core.options import FromSettings, Section, Settings, at_least, fraction
from ssfl_app.seeding import generator
from ssfl_app.sparsity.codec import BitmapAndValues, Codec, MaskedValues, read_mask
from ssfl_app.sparsity.densities import Counts, rescaled
from ssfl_app.sparsity.dynamic import drop, grow, layer_densities, top_mask
from ssfl_app.sparsity.dynamic import random_mask as drawn_mask
from ssfl_app.sparsity.layout import Layout, Vector, load_state, state_of
from ssfl_app.sparsity.mask import Mask, alive_count
from ssfl_app.sparsity.values import Allowed, PayloadError, allowed_values, check_values, read_values


@dataclass(frozen=True)
class FlashOptions(Section):
    """Keys of the section ``flash``."""

    section = "flash"

    stage_clients: float = fraction(
        0.1, "share of the clients that finds layer densities, at least one client, in (0, 1]"
    )
    stage_epochs: int = at_least(1, 10, "epochs of sparse learning there")
    prune_rate: float = fraction(0.25, "share of a layer that sparse learning moves at first; it falls to 0 linearly")
    joint_every: int = at_least(1, 1, "flash-joint: rounds from one change of the mask to the next")

    def changes(self, round_: int) -> bool:
        """Return whether the joint variant changes the mask in this round."""
        return (round_ - 1) % self.joint_every == 0


def first_mask(layout: Layout, density: float, seed: int) -> Mask:
    """Return the random mask that stage 1 starts from; both ends draw it."""
    return Mask.random(layout, density, generator(seed, "flash-start"))


def last_mask(layout: Layout, shares: Vector, density: float, seed: int) -> Mask:
    """Return the random mask of the layer densities that stage 1 found, in the order of the layout."""
    return drawn_mask(layout, counts_of(layout, shares, density), generator(seed, "flash-mask"))


def counts_of(layout: Layout, shares: Vector, density: float) -> Counts:
    """Return how many weights of each layer are alive, by the mean of the clients' layer densities."""
    return rescaled(layout, dict(zip(layout.prunable, shares.tolist(), strict=True)), density)


def check_shares(layout: Layout, shares: Vector, wanted: int) -> None:
    """Raise PayloadError unless these are layer densities of a mask with `wanted` alive weights."""
    check_values(shares)
    # Densities of less than one weight would add up to an empty mask, as zeros do.
    if shares.min() < 0 or shares.max() > 1 or shares.max() * layout.prunable_size < 1:
        raise PayloadError(
            f"layer densities are from {shares.min():g} to {shares.max():g}; each is in 0..1, not all are 0"
        )
    # Sparse learning moves weights and keeps their number, so a client can promote one layer only at the cost of
    # others.
    alive = float(np.dot(shares.astype(np.float64), list(layout.prunable_sizes.values())))
    if abs(alive - wanted) > 1 + 1e-6 * layout.prunable_size:
        raise PayloadError(f"layer densities add up to {alive:.0f} alive weights; sparse learning keeps {wanted}")


def dealt(total: int, shares: Mapping[str, float], room: Counts) -> Counts:
    """Return counts in proportion to the shares, none above its room, that add up to `total`, at most all room.

    What a full layer cannot take goes to the others, in proportion again; to one of share 0 only when they are full.
    """
    exact = {name: Fraction(share) for name, share in shares.items()}
    # Those that fill up first come first: where one is not filled, none after it is.
    order = sorted(room, key=lambda name: room[name] / exact[name] if exact[name] else math.inf)
    counts, whole = dict.fromkeys(room, 0), sum(exact.values())
    for name in order:
        part = total * exact[name] / whole if whole else Fraction(total)
        counts[name] = min(room[name], math.floor(part + Fraction(1, 2)))
        total, whole = total - counts[name], whole - exact[name]
    return counts


def evolved(mask: Mask, magnitudes: Vector, rate: Fraction, rng: np.random.Generator) -> Mask:
    """Return the mask after one step of sparse learning.

    Each layer loses `rate` of its alive coordinates, rounded up; they may come back at once. `magnitudes` is |w|,
    float32, shape (prunable,).
    """
    fired = {name: math.ceil(rate * alive) for name, alive, _ in mask.layers()}
    left, means = drop(mask, magnitudes, fired), dict[str, float]()
    for name, span in mask.layout.prunable_spans.items():
        alive = magnitudes[span][mask.alive[span]]
        means[name] = float(alive.mean(dtype=np.float64)) if alive.size else 0.0
    room = {name: size - alive for name, alive, size in left.layers()}
    return grow(left, dealt(sum(fired.values()), means, room), rng)


def learned(
    mask: Mask, trainings: int, prune_rate: float, rng: np.random.Generator, train: Callable[[int, Mask], Vector]
) -> Mask:
    """Return the mask that sparse learning ends with; `train` returns the prunable |w| of a training, from 0 on."""
    magnitudes = np.zeros(0, dtype=np.float32)
    for done in range(trainings):
        if done:
            rate = Fraction(repr(prune_rate)) * (1 - Fraction(done, trainings))
            mask = evolved(mask, magnitudes, rate, rng)
        magnitudes = train(done, mask)
    return mask


def shares_of(mask: Mask) -> Vector:
    """Return the density of each prunable tensor, in the order of the layout."""
    return np.array(list(layer_densities(mask).values()), dtype=np.float32)


class FlashClient(ClientAlgorithm):
    """Answers "layer_densities" by sparse learning; trains as FedAvg's client does, inside the mask."""

    down = MaskedValues
    up = MaskedValues
    query_types = ("layer_densities",)
    options = FromSettings(FlashOptions)

    @classmethod
    def uses(cls, settings: Settings) -> int:
        """Return the epochs of stage 1 too."""
        return super().uses(settings) + FlashOptions.from_settings(settings).stage_epochs

    def answer_query(self, question: str, payload: Payload) -> Payload:
        """Return the layer densities, float32, shape (prunable tensors,), that sparse learning ends with."""
        if question not in self.query_types:
            return super().answer_query(question, payload)
        load_state(self.context.model, self.initial_weights(payload))
        start = first_mask(self.context.layout, self.settings.mask.density, self.settings.run.seed)
        mask, _ = self.learn(0, start, self.options.stage_epochs, "flash-stage", self.settings.local.lr)
        return Payload({"values": shares_of(mask)}, {"samples": len(self.context.train)})

    def learn(
        self, round_: int, mask: Mask, epochs: int, purpose: str, lr: float | None = None
    ) -> tuple[Mask, float]:
        """Train the workbench's model with sparse learning; return the mask it ends with and the mean loss."""
        site, rng = self.context, generator(self.settings.run.seed, purpose, round_, self.context.client_id)
        parts = [site.train] * epochs
        if epochs == 1 and len(site.train) >= 2 * site.trainer.fewest:
            parts = [site.train.take(half) for half in np.array_split(rng.permutation(len(site.train)), 2)]
        losses = list[float]()

        def train(done: int, mask: Mask) -> Vector:
            losses.append(self.fit(round_, mask, purpose=f"{purpose}-{done}", data=parts[done], lr=lr, epochs=1))
            return np.abs(site.layout.flatten_prunable(state_of(site.model)))

        mask = learned(mask, len(parts), self.options.prune_rate, rng, train)
        total = sum(len(images) * loss for images, loss in zip(parts, losses, strict=True))
        return mask, total / sum(map(len, parts))


class FlashJointClient(FlashClient):
    """Moves the mask while it trains, in the rounds for that."""

    @classmethod
    def codec_up(cls, settings: Settings, round_: int) -> type[Codec]:
        """Return how the model goes up: with its mask in rounds that change the mask."""
        return BitmapAndValues if FlashOptions.from_settings(settings).changes(round_) else MaskedValues

    def train(self, payload: Payload) -> Payload:
        """Train, with sparse learning in rounds that change the mask; return the alive values, and the new mask."""
        mask, round_ = self.load(payload), payload.round
        if self.options.changes(round_):
            found, loss = self.learn(round_, mask, self.settings.local.epochs, "flash-joint")
            return self.reply(payload, found, loss)
        return self.reply(payload, mask, self.fit(round_, mask))


class Flash(SparseStrategy):
    """FedAvg inside a random mask of the layer densities that stage 1 found."""

    name = "flash"
    client = FlashClient
    options = FromSettings(FlashOptions)
    has_floor = False
    error_feedback_ok = True

    def before_training(self, ask: Query) -> None:
        """Ask for layer densities, draw the mask and apply it to the initial weights."""
        shares = WeightedMean(len(self.layout.prunable))

        def take(reply: Reply) -> None:
            shares.add(reply.arrays["values"], self.weight(reply))

        ask("layer_densities", self.asked(), self._check_shares, take)
        self.mask = last_mask(self.layout, shares.value(), self.settings.mask.density, self.settings.run.seed)
        self.state = self.mask.apply(self.state)

    def answers(self, round_: int, question: str | None = None) -> Allowed:
        """Return the densities of the layers for a question."""
        layers = allowed_values("fp32", len(self.layout.prunable))
        return super().answers(round_) if question is None else layers

    def asked(self) -> list[int]:
        """Return the clients of stage 1: a random share of those that are there, rounded down, at least one."""
        clients = len(self.present(0))
        count = max(1, math.floor(Fraction(repr(self.options.stage_clients)) * clients))
        chosen = generator(self.settings.run.seed, "flash-clients").choice(clients, count, replace=False)
        return sorted(int(client) for client in chosen)

    def _check_shares(self, client: int, payload: Payload) -> None:
        self.check_samples(payload)
        shares = read_values(payload.arrays, "fp32", len(self.layout.prunable))
        check_shares(self.layout, shares, alive_count(self.layout, self.settings.mask.density))


class FlashJoint(Flash):
    """The mask moves with the weights."""

    name = "flash-joint"
    client = FlashJointClient
    error_feedback_ok = False

    def aggregator(self, round_: int) -> Aggregator:
        """Average weights, and layer densities if the mask changes; keep the largest weights of each layer."""
        if not self.options.changes(round_):
            return super().aggregator(round_)
        weights, shares = WeightedMean(self.layout.size), WeightedMean(len(self.layout.prunable))

        def add(reply: Reply) -> None:
            values, mask = self.decoded(reply)
            weights.add(values, self.weight(reply))
            shares.add(shares_of(mask), self.weight(reply))

        def finish() -> None:
            flat = weights.value()
            counts = counts_of(self.layout, shares.value(), self.settings.mask.density)
            self.mask = top_mask(self.layout, abs(flat[self.layout.is_prunable]), counts)
            self.state = self.mask.apply(self.layout.unflatten(flat))

        return Aggregator(add, finish)

    def check_trained(self, client: int, payload: Payload) -> None:
        """Refuse a mask of another density too: the mean would take it for a layer's sensitivity."""
        super().check_trained(client, payload)
        count = (
            read_mask(payload.arrays, self.layout).count if self.options.changes(payload.round) else self.mask.count
        )
        if count != self.mask.count:
            raise PayloadError(f"a mask has {count} alive weights; it came down with {self.mask.count}")
