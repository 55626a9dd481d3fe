"""SSFL and its controls: one global mask, found before round 1 and kept.

Ohib et al., "SSFL: Discovering Sparse Unified Subnetworks at Initialization for Efficient Federated Learning",
TMLR 2026, arXiv 2405.09037, algorithm 1:

1. every client k scores each weight on one class-balanced minibatch, ``s_k = |dL_k/dw * w|`` at the common w0;
   the clients make w0 from the run's seed; the question names its digest, and w0 is sent where that disagrees;
2. the server averages, ``s = sum_k n_k s_k / sum_k n_k``, and keeps the top ``density`` as the global mask m;
3. FedAvg inside the mask: clients train ``m * w`` with masked gradients, only alive values and the dense remainder
   (biases, norms) travel.

Step 1 and 2 can be done by other criteria than SNIP's (ssfl.criterion): `criteria.py` has them.

Controls with the same rounds and bytes: `random` draws m uniformly (over all layers, or layer by layer with
mask.scope "layer"); `shuffled` permutes SSFL's m inside every layer, so it has SSFL's density per layer and none of
its choice of weights.

Departures: w0 is one initialisation made by the server (version 1 of the paper averages the clients' own, which would
shrink it); ties keep the lower index, so exactly floor(density * prunable) weights are alive where the paper's ">="
may keep more; weights average by samples as in the author's code (version 1: uniformly; run.weighting has both).
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from ssfl_app.core.aggregation import Aggregator
from ssfl_app.core.algorithm import Payload, Query, ServerContext
from ssfl_app.core.options import ConfigError, FromSettings, MaskOptions, Settings
from ssfl_app.core.validation import stored
from ssfl_app.privacy.densities import drawn_mask
from ssfl_app.seeding import generator
from ssfl_app.sparsity.channels import Ranks, ranks_in_layers, unit_count, unit_spans
from ssfl_app.sparsity.layout import Bits, Layout, State
from ssfl_app.sparsity.mask import Mask, Scope
from ssfl_app.sparsity.patterns import SIDE, shuffled_blocks, two_of_four
from ssfl_app.sparsity.values import Allowed, Arrays, PayloadError, allowed_values, read_array
from ssfl_app.strategies.shared.narrowing import NarrowingClient, NarrowingStrategy
from ssfl_app.strategies.shared.scoring import ScoringClient, SsflOptions, patterned
from ssfl_app.strategies.ssfl.continuous import MaskMove, check_continuous, score_beside
from ssfl_app.strategies.ssfl.criteria import (
    CHANNELS,
    DENSITIES,
    QUESTIONS,
    channel_means,
    check_granularity,
    find_mask,
    score_weights,
    steps_of,
)
from ssfl_app.strategies.ssfl.refresh import MaskRefresh, lifted_weights, reveal_dead_weights


def random_mask(layout: Layout, wanted: MaskOptions, seed: int) -> Mask:
    """Return the mask of `random`."""
    if wanted.granularity in PATTERNS:
        drawn = generator(seed, "random-mask").random(layout.prunable_size, dtype=np.float32)
        return patterned(layout, drawn, wanted)
    return Mask.random(layout, wanted.density, generator(seed, "random-mask"), wanted.scope)


def shuffled_mask(found: Mask, seed: int, granularity: str = "weight") -> Mask:
    """Return the mask of `shuffled`, from the one that SSFL found."""
    if granularity == "block":
        return shuffled_blocks(found.layout, found, generator(seed, "shuffle"))
    if granularity == "2:4":
        drawn = generator(seed, "shuffle").random(found.layout.prunable_size, dtype=np.float32)
        return two_of_four(found.layout, drawn)
    return found.shuffle(generator(seed, "shuffle"))


def random_ranks(layout: Layout, scope: Scope, seed: int) -> Ranks:
    """Return the ranks of units of `random`, shape (units,): the same chance for all, or the same share a layer."""
    drawn = generator(seed, "random-mask").random(unit_count(layout))
    return ranks_in_layers(layout, drawn) if scope == "layer" else drawn


def shuffled_units(layout: Layout, kept: Bits, seed: int) -> Bits:
    """Return the units of `shuffled`, bool, shape (units,): as many of each layer as `kept` has, others."""
    kept, rng = kept.copy(), generator(seed, "shuffle")
    for span in unit_spans(layout):
        kept[span] = rng.permutation(kept[span])
    return kept


PATTERNS = ("2:4", "block")
"""Values of mask.granularity whose masks are of weights, in a pattern."""

COUNTS = "layer-counts"
"""Array beside a model: how many weights each layer keeps, in the layout's order."""


class MaskedClient(NarrowingClient):
    """FedAvg's client, paid for the alive values only."""

    record_level = True


class SaliencyClient(ScoringClient, MaskedClient):
    """Scores weights as ssfl.criterion says."""

    query_types = (*QUESTIONS, DENSITIES, CHANNELS)
    summed = query_types

    def train(self, payload: Payload) -> Payload:
        """Train the model that came down and return it; in a round that moves the mask, with scores at what came."""
        if not self.scoring.moves(payload.round, self.settings.run.rounds):
            return super().train(payload)
        mask = self.load(payload)
        scores = score_beside(self, mask, payload.round)
        reply = self.reply(payload, mask, self.fit(payload.round, mask))
        return Payload({**reply.arrays, **scores}, reply.metadata)

    def answer_query(self, question: str, payload: Payload) -> Payload:
        """Return the scores at the dense weights the question is about."""
        if question not in self.query_types:
            return super().answer_query(question, payload)
        refresh = "alive" in payload.arrays and "values" not in payload.arrays
        return score_weights(self, question, payload, lifted_weights(self, payload) if refresh else None)

    def known_mask(self, payload: Payload, digest: str) -> Mask:
        """Return the shared mask; one of private densities is drawn here, of what each layer keeps."""
        told = payload.arrays.get(COUNTS)
        if told is not None and "mask" not in payload.arrays and self.context.mask(digest) is None:
            layout = self.context.layout
            counts = read_array(payload.arrays, COUNTS, np.int32, len(layout.prunable)).tolist()
            if any(
                not 0 <= count <= size for count, size in zip(counts, layout.prunable_sizes.values(), strict=True)
            ):
                raise PayloadError(f"{COUNTS} are {counts}; a layer keeps from 0 to all of its weights")
            drawn = drawn_mask(layout, dict(zip(layout.prunable, counts, strict=True)), self.settings.run.seed)
            if drawn.digest == digest:
                self.context.memory.keep(digest, drawn.packed())
        return super().known_mask(payload, digest)


class FixedMask(NarrowingStrategy):
    """FedAvg inside a mask that `before_training` finds; or in a network with fewer channels, which it makes."""

    client = MaskedClient
    error_feedback_ok = True
    one_mask = True
    granularities = (*NarrowingStrategy.granularities, *PATTERNS)

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        wanted = self.settings.mask
        if wanted.granularity == "2:4" and wanted.density != 0.5:
            raise ConfigError(f"mask.density is {wanted.density}; it is 0.5 with mask.granularity '2:4'")
        if wanted.granularity == "block" and self.alive() < SIDE**2:
            raise ConfigError(
                f"mask.density is {wanted.density}; it leaves {self.alive()} weights, less than a block"
            )

    def before_training(self, ask: Query) -> None:
        """Find the mask and apply it to the initial weights; or the channels, and take the weights that they have."""
        if self.by_channel:
            self.narrow(self.find_channels(ask))
            return
        self.mask = self.find_mask(ask)
        self.state = self.under_mask(self.state, self.state)

    def under_mask(self, state: State, initial: State) -> State:
        """Return a model whose dead weights are 0, or with mask.dead "frozen" what they are initially."""
        return self.mask.apply(state, initial if self.settings.mask.frozen else None)

    def find_mask(self, ask: Query) -> Mask:
        """Return the global mask, before round 1."""
        raise NotImplementedError

    def find_channels(self, ask: Query) -> Bits:
        """Return the units that stay, bool, shape (units,), before round 1."""
        raise NotImplementedError


class Ssfl(FixedMask):
    """The mask of the highest mean saliency."""

    name = "ssfl"
    client = SaliencyClient
    options = FromSettings(SsflOptions)

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        steps_of(self.settings)  # refuses steps where there are none
        check_granularity(self.settings)
        check_continuous(self.settings)
        self._move: MaskMove | None = None  # of the round that goes on
        self._initial: State = {}  # kept where a refresh may need it
        self._refresher = MaskRefresh(self.options, self.settings.run.clients)

    @classmethod
    def private_discoveries(cls, settings: Settings) -> int:
        """Return 1 where ssfl.discovery is a private one, else 0."""
        return int(SsflOptions.from_settings(settings).discovery != "scores")

    @classmethod
    def feeds_ones(cls, settings: Settings) -> str:
        """Return the criterion of synaptic flow."""
        return "ssfl.criterion is 'synflow'" if SsflOptions.from_settings(settings).criterion == "synflow" else ""

    def alive(self) -> int:
        """Return how many weights the ranking leaves alive; refuse a floor that it cannot hold."""
        return self.top_count(self.settings.mask.density)

    def before_training(self, ask: Query) -> None:
        """Find the mask at w0, unless dense rounds come first."""
        if self.options.refresh != "never":
            self._initial = self.state
        if not self.options.warmup_rounds:
            super().before_training(ask)

    def before_round(self, round_: int, ask: Query) -> None:
        """After the dense rounds find the mask at the weights of that moment; refresh it when that is due."""
        warmup = self.options.warmup_rounds
        if warmup and round_ == warmup + 1:
            self.mask = self.find_mask(ask, round_, self.state)
            self.state = self.mask.apply(self.state)
        elif self._refresher.due(round_, self.losses) and round_ > warmup:
            lifted, question = self._refresher.query(self.mask, self.state, self._initial)
            trained, self.state = self.state, lifted  # what a client is sent that cannot make it itself
            try:
                mask = self.find_mask(ask, round_, lifted, question)
            finally:
                self.state = trained
            self.mask = mask
            self.state = self.under_mask(self._refresher.start(trained, lifted, self._initial), self._initial)

    def beside(self, round_: int) -> Aggregator | None:
        """Take the scores of a round that moves the mask, and move it."""
        move = self._moving(round_)
        if move is None:
            return None

        def finish() -> None:
            self._move, after = None, move.mask()
            left, come = move.before.alive & ~after.alive, after.alive & ~move.before.alive
            if not come.any():
                return
            values = self.layout.flatten_prunable(self.state)[left].astype(np.float64)
            self.swapped = {"weights": int(np.count_nonzero(come)), "norm": float(np.linalg.norm(values))}
            lifted = reveal_dead_weights(move.before, self.state, self._initial)
            self.messenger.mask_before, self.mask = move.before, after
            self.state = self.under_mask(
                self.state if self.options.refresh_weights == "zero" else lifted, self._initial
            )

        return Aggregator(move.add, finish)

    def _moving(self, round_: int) -> MaskMove | None:
        """Return the move of a round; None if its mask stays."""
        if not self.options.moves(round_, self.settings.run.rounds):
            return None
        if self._move is None or self._move.round != round_:
            self._move = MaskMove(self.mask, self.settings, round_)
        return self._move

    def check_trained(self, client: int, payload: Payload) -> None:
        """Refuse scores that are none, too."""
        super().check_trained(client, payload)
        move = self._moving(payload.round)
        if move is not None:
            move.check(payload)

    @property
    def mask_travels(self) -> bool:
        """Whether a client that lacks the mask is sent it: one of private densities it draws."""
        return super().mask_travels and self.options.discovery != "private-densities"

    def train_payload(self, round_: int, client: int) -> Payload:
        """Return the model; and, if a client can draw the mask itself, what each layer keeps."""
        payload = super().train_payload(round_, client)
        if self.options.discovery != "private-densities" or self.mask.count == self.mask.alive.size:
            return payload
        counts = np.array([alive for _, alive, _ in self.mask.layers()], dtype=np.int32)
        return Payload({**payload.arrays, COUNTS: counts}, payload.metadata)

    def state_dict(self) -> Arrays:
        """Return all that `load_state_dict` needs."""
        initial = {"initial": self.layout.flatten(self._initial)} if self._initial else {}
        return super().state_dict() | initial | self._refresher.state_dict()

    def load_state_dict(self, round_: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue after `round_`."""
        super().load_state_dict(round_, arrays)
        if "initial" in arrays:
            self._initial = self.layout.unflatten(stored(arrays, "initial", "float32", self.layout.size))
        self._refresher.load_state_dict(arrays)

    def find_mask(
        self, ask: Query, round_: int = 0, state: State | None = None, carry: Payload | None = None
    ) -> Mask:
        """Ask the clients of a round for what ssfl.criterion needs, and keep the top.

        `state` and `carry`: the weights it is about, if they are not the initial ones (`criteria.find_mask`).
        """
        mask = find_mask(self, ask, self.asked(round_), state, carry, round_)
        if self.options.discovery == "private-densities":
            for client in range(self.settings.run.clients):  # each draws it
                self.messenger.mark_mask_held(client, mask)
        return mask

    def find_channels(self, ask: Query) -> Bits:
        """Ask the clients for a score a channel, and keep the top of them."""
        return self.kept_units(channel_means(self, ask, self.asked(0)))

    def answers(self, round_: int, question: str | None = None) -> Allowed:
        """Return a score for each weight, or channel, for a question; beside a model, where the mask moves."""
        if question is None:
            move = self._moving(round_)
            return {**super().answers(round_), **({} if move is None else move.vector.allowed())}
        layout = self.layout
        count = unit_count(layout) if self.by_channel else layout.prunable_size
        return allowed_values(self.options.score_values, count)

    def asked(self, round_: int) -> list[int]:
        """Return the clients that are asked for scores: all that are there, or a random share of at least one."""
        clients, share = len(self.present(round_)), self.options.saliency_share
        # As the decimal it is written as: in binary 0.07 * 100 is above 7 and would ask 8 clients.
        count = max(1, math.ceil(Fraction(repr(share)) * clients))
        chosen = generator(self.settings.run.seed, "saliency-share").choice(clients, count, replace=False)
        return sorted(int(client) for client in chosen)


class Shuffled(Ssfl):
    """SSFL's mask with the bits permuted inside every layer."""

    name = "shuffled"

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        if self.options.refresh == "continuous":
            rule = "it is never, scheduled or drift with strategy shuffled: moves by scores would undo it bit by bit"
            raise ConfigError(f"ssfl.refresh is 'continuous'; {rule}")
        if self.options.discovery != "scores":
            drawn = self.options.discovery == "private-densities"
            rule = "it is 'scores' with strategy shuffled" + drawn * "; that of ssfl is random inside the layers, too"
            raise ConfigError(f"ssfl.discovery is {self.options.discovery!r}; {rule}")

    def find_mask(
        self, ask: Query, round_: int = 0, state: State | None = None, carry: Payload | None = None
    ) -> Mask:
        """Return SSFL's mask, shuffled."""
        found = super().find_mask(ask, round_, state, carry)
        return shuffled_mask(found, self.settings.run.seed, self.settings.mask.granularity)

    def find_channels(self, ask: Query) -> Bits:
        """Return as many units of each layer as SSFL keeps, others."""
        return shuffled_units(self.layout, super().find_channels(ask), self.settings.run.seed)


class Random(FixedMask):
    """A uniformly random mask; nobody is asked."""

    name = "random"
    has_floor = False

    def find_mask(self, ask: Query) -> Mask:
        """Draw the mask."""
        return random_mask(self.layout, self.settings.mask, self.settings.run.seed)

    def find_channels(self, ask: Query) -> Bits:
        """Draw the units."""
        return self.kept_units(random_ranks(self.layout, self.settings.mask.scope, self.settings.run.seed))
