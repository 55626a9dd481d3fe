"""`SparseStrategy`, the server side of an algorithm: hooks whose defaults are FedAvg's.

The base does once what Flower leaves open: cohorts that depend on (seed, round) only and are the same for every
strategy, streamed aggregation, and going on after an interruption. The round loop is in `rounds`, messages are
in `ssfl_app.comm.messenger`, the client side is in `client`.
"""

import functools
import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import nn

from ssfl_app.callbacks.base import RunCallback
from ssfl_app.comm.exchange import LAST, Closes, Deadlines
from ssfl_app.comm.membership import ClientRegistry
from ssfl_app.comm.messenger import ClientMessenger, Outgoing, Reply
from ssfl_app.comm.payload import Payload, shared_buffers
from ssfl_app.core.aggregation import Aggregator, ReplyMean, ReplySum, both, within_norm
from ssfl_app.core.buffering import Buffer, check_buffer, check_mask, renewed_on_nodes, sent_values
from ssfl_app.core.client import ClientAlgorithm, encode_with
from ssfl_app.core.clock import Clock, find_profile
from ssfl_app.core.closing import AT_WORK, Closing, Taken
from ssfl_app.core.means import MAX_WEIGHT
from ssfl_app.core.options import FromSettings, Section, Settings
from ssfl_app.core.own_start import OwnStart
from ssfl_app.core.robust import distance, there
from ssfl_app.core.rounds import ClientRoundLoop, Query
from ssfl_app.core.sums import Summation, check_sums, expected_counts, training_sum
from ssfl_app.core.validation import check_epsilon, check_number, check_samples, check_tested, stored
from ssfl_app.data.summary import DataSummary
from ssfl_app.metrics import ACCURACY, Metric
from ssfl_app.options import ConfigError
from ssfl_app.privacy.ledger import Ledger
from ssfl_app.seeding import generator
from ssfl_app.sparsity.channels import whole_widths
from ssfl_app.sparsity.codec import Codec, LinearCodec, MaskedValues
from ssfl_app.sparsity.layout import Layout, State, Vector
from ssfl_app.sparsity.mask import Mask, alive_count, check_floor, none_alive
from ssfl_app.sparsity.values import SUMMED_TYPES, Allowed, Arrays, PayloadError
from ssfl_app.training.narrow import flops, of_widths


@dataclass(frozen=True)
class ServerContext:
    """What a strategy is made with, once and for all.

    Attributes
    ----------
    layout : Layout
        Of the model.
    settings : Settings
        The options of the run.
    workbench, input_shape : nn.Module or None, tuple of int
        A model of this layout that the server may compute with, holding any weights, and (channels, height, width)
        of its input; None for a strategy that stands alone.
    callback : RunCallback or None
        Sees the run go by.
    folder : Path or None
        Where simulated clients keep their files.
    token : str or None
        What real clients call this run in the names of their files.
    dealt : callable or None
        What the server knows that it deals to a client; None: a client holds what it said in the handshake.
    metric : Metric
        What the values are that are called accuracy here.
    ledger : Ledger or None
        What is spent of the privacy of clients, with privacy.level "client".
    tokens : bool
        Whether the inputs of the model are integers.
    replay : mapping of int to Taken, or None
        By round, whose replies count, in a run that is played again.
    """

    layout: Layout
    settings: Settings
    workbench: nn.Module | None = None
    input_shape: tuple[int, ...] | None = None
    callback: RunCallback | None = None
    folder: Path | None = None
    token: str | None = None
    dealt: Callable[[int], DataSummary] | None = None
    metric: Metric = ACCURACY
    ledger: Ledger | None = None
    tokens: bool = False
    replay: Mapping[int, Taken] | None = None


class SparseStrategy(OwnStart):
    """A federated algorithm on a fixed set of numbered clients.

    Attributes
    ----------
    name : str
        In the registry, the configuration and all tables.
    client : type of ClientAlgorithm
        The client side; its codecs are those of the strategy.
    full_participation : bool
        Whether every client trains in every round, as peers without a server do.
    uses_density : bool
        Whether mask.density changes anything.
    has_floor : bool
        Whether mask.min-per-layer may be more than 0.
    has_global_model : bool
        Whether somebody uses `model()`; False: it is not tested, and clients report a personal accuracy only.
    one_mask : bool
        Whether there is one mask, of all clients, that only `before_training` and `before_round` change, or none:
        dead weights can then be frozen (mask.dead).
    granularities : tuple of str
        The values of mask.granularity that the strategy knows.
    error_feedback_ok : bool
        Whether the strategy can make up for rounding: both ends know which coordinates travel, the same ones for all
        clients, and a client has no other state that it keeps between rounds.
    state, mask : State, Mask
        The global model and what is alive in it.
    peer_bytes : int
        What the exchange of this round would cost between peers without a server; 0 for methods that have one.
    accuracy, personal_accuracy : dict of int to float
        Of each client in the last evaluation: of the global model, and of the client's own one if it has one.
    losses : dict of int to float
        Training loss of each client that answered well in the last round; with privacy.level "record" of none.
    epsilons : dict of int to float
        With privacy.level "record": what each client last told that all rounds it has begun cost.
    clock : Clock or None
        Tells how long clients of clock.profile would have taken.
    clipped : int
        Values that clients clipped since the round began, where their answers are only added.
    swapped : dict of str to float
        Where the mask moved a little at the end of the round: "weights", how many came into it and as many left, and
        "norm", the Euclidean length of the values that left.
    update_norms : dict of int to float
        Length of each update that came in the last round (`update_norm`), of refused ones too: with the default
        aggregator, or with failures.norm-factor.
    """

    name: ClassVar[str]
    client: ClassVar[type[ClientAlgorithm]] = ClientAlgorithm
    full_participation: ClassVar[bool] = False
    uses_density: ClassVar[bool] = True
    has_floor: ClassVar[bool] = True
    has_global_model: ClassVar[bool] = True
    one_mask: ClassVar[bool] = False
    error_feedback_ok: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, context: ServerContext) -> None:
        layout, settings = context.layout, context.settings
        floor = settings.mask.min_per_layer
        if floor and not self.has_floor:
            raise ConfigError(f"mask.min-per-layer is {floor}; it is 0 with strategy {self.name}")
        if settings.mask.frozen and not self.one_mask:
            rule = f"it is 'zero' with strategy {self.name}, which has no mask that all clients share and keep"
            raise ConfigError(f"mask.dead is 'frozen'; {rule}")
        if settings.stop.metric in ("central", "local") and not self.has_global_model:
            raise ConfigError(
                f"stop.metric is {settings.stop.metric!r}; it is auto or personal with strategy {self.name}, "
                "which has no global model"
            )
        if settings.privacy.private and settings.stop.metric in ("local", "personal"):
            rule = f"it is auto or central with privacy.level {settings.privacy.level!r}: clients tell no accuracy"
            raise ConfigError(f"stop.metric is {settings.stop.metric!r}; {rule}")
        if self.uses_density and settings.mask.granularity not in self.granularities:
            rule = f"it is {' or '.join(map(repr, self.granularities))} with strategy {self.name}"
            raise ConfigError(f"mask.granularity is {settings.mask.granularity!r}; {rule}")
        if settings.mask.frozen and settings.mask.granularity == "channel":
            rule = "it is 'zero' with mask.granularity 'channel', which leaves a network without dead weights"
            raise ConfigError(f"mask.dead is 'frozen'; {rule}")
        self.context, self.layout, self.settings, self.callback = context, layout, settings, context.callback
        if self.uses_density and layout.prunable_size and not self.alive():
            raise ConfigError(f"mask.{none_alive(layout, settings.mask.density)}")
        self.state: State = {}
        self.mask = Mask.dense(layout)
        run, wire = settings.run, settings.wire
        self.messenger = ClientMessenger(
            ClientRegistry(run.clients, run.join_timeout, context.settings.privacy.secure_aggregation),
            run.round_timeout,
            mask_travels=issubclass(self.client.down, MaskedValues),
            bitmaps=wire.bitmaps,
            folder=context.folder,
            token=context.token,
            dealt=context.dealt,
            work=functools.partial(self.client.work, settings),
        )
        self.peer_bytes = 0
        self.accuracy: dict[int, float] = {}
        self.personal_accuracy: dict[int, float] = {}
        self.losses: dict[int, float] = {}
        self.epsilons: dict[int, float] = {}
        self.update_norms: dict[int, float] = {}
        self._next_round = 0  # 0: `before_training` is still to come
        self._encoded: tuple[State, Mask, type[Codec], Arrays] | None = None
        self._there: tuple[State, Mask, list[Vector]] | None = None  # what `state` has where replies carry values
        self._cohort: tuple[int, list[int]] = (0, [])
        self._last_accepted = np.zeros(settings.run.clients, dtype=np.int64)  # client -> its last good round
        self._made_in_round = 0  # the round that made `state`
        self._residual: Vector | None = None  # what rounding took from the models sent before this one
        self._lost: Vector | None = None  # and from this one
        if settings.wire.error_feedback and not self.error_feedback_ok:
            raise ConfigError(
                f"wire.error-feedback is true; it is false with strategy {self.name}, where clients have masks, "
                "models or memories of their own"
            )
        self.client.check_privacy(settings, self.name)
        if run.fold != "mean" and not self.has_default_aggregator():
            raise ConfigError(
                f"run.fold is {run.fold!r}; it is 'mean' with strategy {self.name}, which has a fold of its own"
            )
        self.clipped, self.swapped = 0, dict[str, float]()
        self.clock: Clock | None = None
        if settings.clock.profile:
            self.clock = Clock(find_profile(settings.clock.profile), run.seed, self.forward_flops)
        self._deadlines = Deadlines(run.deadline, run.clients) if run.deadline else None
        self._closing: Closing | None = None
        if context.replay or (self.clock is not None and run.closes_early):
            kind = Buffer if run.buffer else Closing
            self._closing = kind(run, self.clock, context.replay, self._deadlines)
        self._busy: dict[int, str] = {}  # who is not asked in this round
        self._flops: tuple[Layout, int] | None = None  # of the network of this layout
        self._summation: Summation | None = None  # of the training that goes on
        check_sums(self)
        check_buffer(self)

    @classmethod
    def private_discoveries(cls, settings: Settings) -> int:
        """Return how many searches for the mask the budget of privacy.level "client" pays for. Default: none.

        A strategy whose `Summation` of a question has a `Release` begins that many "discovery" in its ledger.
        """
        return 0

    @classmethod
    def feeds_ones(cls, settings: Settings) -> str:
        """Return the key, with its value, for which the server computes with an input of ones; "" if it does not."""
        return ""

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        """Return the options that either half reads, beside those of all strategies, by their section's name."""
        scopes = [vars(base) for half in (cls, cls.client) for base in half.__mro__]
        read = [value.kind for scope in scopes for value in scope.values() if isinstance(value, FromSettings)]
        return {kind.section: kind for kind in read}

    # ---- the hooks ---------------------------------------------------------------------------

    def alive(self) -> int:
        """Return how many weights mask.density leaves alive; a strategy that leaves none is not made."""
        return self._alive_count(self.settings.mask.density)

    def _alive_count(self, density: float) -> int:
        return alive_count(self.layout, density, self.settings.mask.scope, self.settings.mask.min_per_layer)

    def top_count(self, density: float) -> int:
        """Return how many weights a ranking leaves alive at a density, with mask.scope and mask.min-per-layer.

        Raises
        ------
        ConfigError
            mask.min-per-layer reserves more.
        """
        try:
            check_floor(self.layout, density, self.settings.mask.scope, self.settings.mask.min_per_layer)
        except ValueError as error:
            raise ConfigError(f"mask.{error}") from error
        return self._alive_count(density)

    def before_training(self, ask: Query) -> None:
        """Find out what must be known before round 1. Default: nothing."""

    def before_round(self, round_: int, ask: Query) -> None:
        """Find out what must be known before this round. Default: nothing."""

    def train_payload(self, round_: int, client: int) -> Payload:
        """Return what goes down to this client. Default: the global model under `mask_for`, encoded once a mask."""
        memo, mask, codec = self._encoded, self.mask_for(client), self.codec_down(round_)
        if memo is None or memo[0] is not self.state or memo[1] is not mask or memo[2] is not type(codec):
            self._encoded = memo = None  # the old one goes before the new one comes
            self._encoded = memo = (self.state, mask, type(codec), shared_buffers(self._written(codec, mask)))
        return Payload(memo[3])

    def _written(self, codec: Codec, mask: Mask) -> Arrays:
        """Return the global model as it goes down."""
        if not self.settings.wire.error_feedback:
            return codec.encode(self.layout, self.state, mask)
        # A model is encoded twice where a run goes on: it makes up for the same residual again and leaves the same.
        arrays, self._lost = encode_with(codec, self.layout, self.state, mask, self._residual)
        return arrays

    def sent_down(self, round_: int) -> tuple[State, Mask]:
        """Return the global model as clients have it who got it in a round, and the mask."""
        codec = self.codec_down(round_)
        if codec.values == "fp32":
            return self.state, self.mask
        return codec.decode(codec.encode(self.layout, self.state, self.mask), self.layout, self.mask)

    def aggregator(self, round_: int) -> Aggregator:
        """Return what takes the replies of a round and changes the global model. Default: their weighted mean."""
        mean = ReplyMean(self, round_) if self._summation is None else ReplySum(self, round_, self._summation)

        def finish() -> None:
            self.state = mean.finish()

        return Aggregator(mean.add, finish)

    def beside(self, round_: int) -> Aggregator | None:
        """Return what takes what the replies of a round bring beside the model, and finishes after it. Default: none.

        It makes no other mean of the models, so that all that goes with the default `aggregator` goes with it.
        """
        return None

    def eval_payload(self, round_: int, client: int) -> Payload:
        """Return the model this client evaluates. Default: the one it would be sent to train."""
        return self.train_payload(round_, client)

    def mask_for(self, client: int) -> Mask:
        """Return the mask that this client's messages are encoded under. Default: the global one."""
        return self.mask

    def model(self) -> State:
        """Return the model that this strategy stands for at this moment. Default: `state`."""
        return self.state

    def answers(self, round_: int, question: str | None = None) -> Allowed:
        """Return the arrays that answers may have, to a question or to training. Default: none; those of `codec_up`.

        An answer with others is refused unopened.
        """
        return self.codec_up(round_).allowed(self.layout) if question is None else {}

    def densities(self) -> tuple[float, float]:
        """Return alive / prunable and alive / all coordinates of the model in use. Default: those of `mask`."""
        return density_pair(self.mask)

    def update_norm(self, reply: Reply) -> float | None:
        """Return how far the values of a reply are from the server's, as a Euclidean length; None: it has none.

        Default: over the coordinates that it carries, from `state`.
        """
        codec, mask = self.codec_up(reply.round), self.mask_for(reply.client)
        if not isinstance(codec, LinearCodec):
            flat, sent = self.decoded(reply)
            return distance(flat[sent.transmitted], there(self.layout, self.state, sent.transmitted))
        memo = self._there
        if memo is None or memo[0] is not self.state or memo[1] is not mask:
            old = there(self.layout, self.state, codec.positions(self.layout, mask))
            self._there = memo = self.state, mask, old
        return distance(codec.vector(reply.arrays, self.layout, mask), memo[2])

    # ---- what hooks use ----------------------------------------------------------------------

    def weight(self, reply: Reply) -> int:
        """Return the weight of a reply in the mean of a round: its samples, or 1."""
        return reply.samples if self.settings.run.weighting == "samples" else 1

    def has_default_aggregator(self) -> bool:
        """Return whether the mean of a round is the default one."""
        return type(self).aggregator is SparseStrategy.aggregator

    def codec_down(self, round_: int) -> Codec:
        """Return the codec of models sent to clients in a round."""
        return self.client.codec_down(self.settings, round_)(self.settings.wire.down_values, self._rounder())

    def codec_up(self, round_: int) -> Codec:
        """Return the codec of models sent back in a round."""
        return self.client.codec_up(self.settings, round_)(self.settings.wire.up_values)

    def _rounder(self) -> np.random.Generator | None:
        # By the round that made the model, not the one it is sent in: that is the same when a run goes on.
        if self.settings.wire.rounding == "nearest":
            return None
        return generator(self.settings.run.seed, "rounding-down", self._made_in_round)

    def decoded(self, reply: Reply) -> tuple[Vector, Mask]:
        """Return the model of a reply, float32, shape (layout.size,), 0 where nothing was sent, and its mask."""
        codec = self.codec_up(reply.round)
        state, mask = codec.decode(reply.arrays, self.layout, self.mask_for(reply.client))
        return self.layout.flatten(state), mask

    def cohort(self, round_: int) -> list[int]:
        """Return the clients that train in a round; the same for every strategy that samples."""
        run, present = self.settings.run, self.present(round_)
        if self.full_participation:
            return list(present)
        if self.settings.privacy.level == "client":
            return self._drawn_secretly(round_)
        if run.buffer and self._cohort[0] == round_:
            return list(self._cohort[1])
        asked = min(run.asked, len(present))
        chosen = generator(run.seed, "cohort", round_).choice(len(present), asked, replace=False)
        return sorted(int(client) for client in chosen)

    def _drawn_secretly(self, round_: int) -> list[int]:
        # Each client by itself, by a seed that nobody knows: who takes part is what the noise hides. Kept, since a
        # round asks more than once.
        if self._cohort[0] != round_:
            run, rng = self.settings.run, generator(secrets.randbits(128), "cohort", round_)
            self._cohort = round_, np.flatnonzero(rng.random(run.clients) < run.cohort / run.clients).tolist()
        return list(self._cohort[1])

    def expected_counts(self, round_: int) -> dict[str, int]:
        """Return what a record has of messages and bytes where the cohort is secret (`sums.expected_counts`)."""
        return expected_counts(self, round_)

    @property
    def mask_travels(self) -> bool:
        """Whether a client that lacks the mask is sent it. Default: if the model comes down under it."""
        return issubclass(self.client.down, MaskedValues)

    @property
    def ledger(self) -> Ledger | None:
        """What is spent of the privacy of clients, with privacy.level "client"."""
        return self.context.ledger

    @property
    def epsilon(self) -> float | None:
        """What was spent so far: of all clients, or with privacy.level "record" of the one that spent most."""
        if self.ledger is not None:
            return self.ledger.epsilon
        return max(self.epsilons.values(), default=None)

    @property
    def _silent(self) -> bool:
        # Clients tell no loss and no accuracy: what is no part of a private model has no noise.
        return self.settings.privacy.private

    def forward_flops(self) -> int:
        """Return the floating-point operations of a forward pass of one sample by the network of this moment."""
        if self._flops is None or self._flops[0] != self.layout:
            context = self.context
            if context.workbench is None or context.input_shape is None:
                raise RuntimeError(
                    "clock.profile is given; the server counts operations with the model, and has none"
                )
            model, whole = context.workbench, context.layout
            if self.layout != whole:
                model = of_widths(model, whole, whole_widths(self.layout))
            self._flops = self.layout, flops(model, context.input_shape, context.tokens)
        return self._flops[1]

    def closes(self, asked: int) -> Closes | None:
        """Return when a round of so many real nodes closes; None: with the last reply."""
        run = self.settings.run
        if self._closing is not None or not run.closes_early:
            return None
        share = self.settings.failures.min_ok_fraction
        return Closes(run.closes_at(asked + len(self._busy)), self._deadlines, share, bool(run.buffer))

    def _at_work(self, round_: int) -> dict[int, str]:
        """Return who is still at work on the message of an earlier round, and is asked nothing."""
        if self._closing is not None:
            return self._closing.busy(round_)
        return dict.fromkeys(self.messenger.still_at_work(), AT_WORK)

    def evaluated(self, round_: int) -> bool:
        """Return whether the model is tested after a round."""
        run = self.settings.run
        return round_ % run.evaluate_every == 0 or round_ == run.rounds

    def present(self, round_: int) -> range:
        """Return the clients that take part in a round: all, unless some join late."""
        return range(self.settings.shift.present(self.settings.run.clients, round_))

    def state_dict(self) -> Arrays:
        """Return all that `load_state_dict` needs, as flat arrays."""
        state, mask = self.layout.flatten(self.state), self.mask.packed()
        kept: Arrays = {"state": state, "mask": mask, "since": self._last_accepted}
        if self.clock is not None:  # a mask that is sent once more takes no time
            kept["holds"] = self.messenger.masks_held(self.settings.run.clients)
            if self.messenger.mask_before is not None:
                kept["mask-before"] = self.messenger.mask_before.packed()
        if self._closing is not None:
            kept |= self._closing.state_dict()
        if self._deadlines is not None:
            kept["took"] = self._deadlines.seconds.flatten()
        if self._silent:
            kept["epsilons"] = np.array([self.epsilons.get(k, 0.0) for k in range(self.settings.run.clients)])
        return kept if self._residual is None else kept | {"residual": self._residual}

    def load_state_dict(self, round_: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue after `round_`, from a snapshot taken there.

        Raises
        ------
        KeyError, ValueError
            It is a snapshot of another strategy, model or number of clients.
        """
        self.state = self.layout.unflatten(stored(arrays, "state", "float32", self.layout.size))
        self.mask = Mask.unpack(self.layout, np.asarray(arrays["mask"], dtype=np.uint8))
        self._last_accepted = stored(arrays, "since", "int64", self.settings.run.clients).copy()
        if not ((self._last_accepted >= 0) & (self._last_accepted <= round_)).all():
            raise ValueError(f"array 'since' has rounds beyond 0 to {round_}")
        if self.clock is not None:
            held = stored(arrays, "holds", "uint8", 32 * self.settings.run.clients)
            self.messenger.restore_masks_held(held)
            if "mask-before" in arrays:
                packed = np.asarray(arrays["mask-before"], dtype=np.uint8)
                self.messenger.mask_before = Mask.unpack(self.layout, packed)
        if self._closing is not None:
            self._closing.load_state_dict(arrays)
        if self._deadlines is not None:
            took = stored(arrays, "took", "float64", LAST * self.settings.run.clients)
            self._deadlines.seconds[:] = took.reshape(-1, LAST)
        if self._silent:
            spent = stored(arrays, "epsilons", "float64", self.settings.run.clients)
            self.epsilons = {client: float(value) for client, value in enumerate(spent) if value}
        if "residual" in arrays:
            self._residual = stored(arrays, "residual", "float32", self.layout.size)
        self._next_round, self._made_in_round = round_ + 1, round_

    def _outgoing(self, client: int, payload: Payload) -> Outgoing:
        stateful = self.client.stateful or self.settings.wire.error_feedback
        since = {"since": int(self._last_accepted[client])} if stateful else {}
        return client, Payload(payload.arrays, {**since, **payload.metadata}), self.mask_for(client)

    # ---- Flower's interface ------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the training messages of a round. The model is `self.state`; `arrays` is not read."""
        self.check_playing()
        cohort = self._free(server_round)
        self._summation, outgoing = None, self._outgoing
        if self.settings.wire.up_values in SUMMED_TYPES:
            self._summation = summation = training_sum(self, server_round, cohort)

            def outgoing(client: int, payload: Payload) -> Outgoing:
                return self._outgoing(client, summation.outgoing(client, payload))

        payloads = (outgoing(client, self.train_payload(server_round, client)) for client in cohort)
        return self.messenger.build_messages("train", server_round, payloads, config)

    def _free(self, round_: int) -> list[int]:
        """Return who of the cohort is asked: nobody who is still at work; with run.buffer as many as have ended."""
        run, at_work, cohort = self.settings.run, self._at_work(round_), self.cohort(round_)
        self._busy = {client: why for client, why in at_work.items() if run.buffer or client in cohort}
        free = [client for client in cohort if client not in at_work]
        if run.buffer:
            order = generator(run.seed, "fill-up", round_).permutation(len(free))
            free = sorted(free[int(place)] for place in order[: max(0, len(cohort) - len(at_work))])
            self._cohort = round_, free
        return free

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[None, MetricRecord]:
        """Aggregate the replies into `self.state` and return their mean loss, if told; refuse bad ones by name.

        Raises
        ------
        RunFailed
            Too few clients answered well. The global model is unchanged.
        """
        seen: dict[int, tuple[int, float | None]] = {}
        failures, what = self.settings.failures, f"training in round {server_round}"
        report = self.messenger.report
        report.busy, report.asked = self._busy, report.asked + len(self._busy)
        if self.settings.run.buffer:
            report.asked = self.settings.run.closes_at(report.asked)
        self.update_norms = {}
        self._encoded = None  # it holds the model that this round replaces
        began = functools.cache(functools.partial(sent_values, self, server_round))
        mean = both(self.aggregator(server_round), self.beside(server_round))

        def count(reply: Reply) -> None:
            told = reply.metadata.get("loss")
            seen[reply.client] = (reply.samples, None if told is None else float(told))
            mean.add(reply)

        aggregator = Aggregator(count, mean.finish)
        if failures.norm_factor and not self.context.replay:  # whom it left out is recorded
            aggregator = within_norm(self, aggregator, what)
        if self._closing is not None:
            aggregator = self._closing.on_time(self, aggregator, server_round)

        summation = self._summation
        allowed = self.answers(server_round) if summation is None else summation.allowed()

        def take(reply: Reply) -> None:
            if reply.round != server_round:
                try:
                    reply = renewed_on_nodes(self, reply, began(), server_round)
                except PayloadError as error:
                    report.refuse(reply.client, str(error))
                    return
            if "epsilon" in reply.metadata:
                self.epsilons[reply.client] = float(reply.metadata["epsilon"])
            if summation is None and (failures.norm_factor or self.has_default_aggregator()):
                norm = self.update_norm(reply)
                if norm is not None:
                    self.update_norms[reply.client] = norm
            aggregator.add(reply)

        # A sum of differential privacy is told whoever is in it.
        late = isinstance(self._closing, Buffer)  # its old updates come when all new ones are there
        share = None if self.ledger is not None or late else failures.min_ok_fraction
        self.messenger.receive(replies, allowed, self.check_trained, take, share, what)
        self._there = None  # before a vector is made of the sums
        aggregator.finish()
        self._made_in_round, self._residual, self._lost = server_round, self._lost, None
        if self.ledger is None:  # else who took part would lie in the checkpoint
            self._last_accepted[list(seen)] = server_round
        told = {client: (n, loss) for client, (n, loss) in sorted(seen.items()) if loss is not None}
        self.losses = {client: loss for client, (_, loss) in told.items()}
        if summation is not None:
            self._summation = None
            return None, MetricRecord({} if summation.loss is None else {"loss": summation.loss})
        if not told:
            return None, MetricRecord()
        # fsum is exact before it rounds, so the order of arrival does not show here either.
        samples = sum(n for n, _ in told.values())
        return None, MetricRecord({"loss": math.fsum(n * loss for n, loss in told.values()) / samples})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return an evaluation message for every client, in rounds that are evaluated; none if they tell nothing."""
        self.check_playing()
        if self._silent or not self.evaluated(server_round):
            return []
        # Who was late may still be at work.
        at_work = {*self.messenger.report.late, *self._at_work(server_round)}
        clients = [client for client in range(self.settings.run.clients) if client not in at_work]
        payloads = (self._outgoing(client, self.eval_payload(server_round, client)) for client in clients)
        return self.messenger.build_messages("evaluate", server_round, payloads, config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the unweighted mean accuracies over the clients that answered, each on its own test images.

        "accuracy" is that of the global model, "personal_accuracy" that of their own ones; None if nobody has either:
        that costs a number in the table, not the run.
        """
        self.accuracy, self.personal_accuracy = {}, {}
        both = {"accuracy": self.accuracy, "personal_accuracy": self.personal_accuracy}

        def take(reply: Reply) -> None:
            for name, known in both.items():
                if reply.samples and name in reply.metadata:
                    known[reply.client] = float(reply.metadata[name])

        check = functools.partial(check_tested, self.context.metric)
        self.messenger.receive(replies, {}, check, take, None, f"evaluation in round {server_round}")
        means: dict[str, Any] = {name: math.fsum(k.values()) / len(k) for name, k in both.items() if k}
        return MetricRecord(means) if means else None

    def summary(self) -> None:
        """Print nothing: whoever watches the run describes it."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the algorithm; arguments and result are those of Flower's `Strategy.start`.

        Continues where `load_state_dict` left off; then `initial_arrays` is not read. `timeout` is not read either:
        it is run.round-timeout of the settings.

        Raises
        ------
        RunFailed
            Clients are missing, too few answered in a round, or Ray lost an actor.
        """
        if not self.state:
            self.state = {n: torch.from_numpy(initial_arrays[n].numpy().copy()) for n, _ in self.layout.shapes}
        del initial_arrays  # a model's size, for the whole run
        configs = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        with self.playing():
            return ClientRoundLoop(self, self.messenger, grid, configs, evaluate_fn).run(self._next_round, num_rounds)

    # ---- checks ------------------------------------------------------------------------------

    def check_samples(self, payload: Payload) -> None:
        """Raise PayloadError unless the reply's samples can weigh it in a mean over all clients."""
        check_samples(payload, MAX_WEIGHT // self.settings.run.clients)

    def check_trained(self, client: int, payload: Payload) -> None:
        """Raise PayloadError unless an aggregator may see this reply. Default: loss, samples and the model."""
        if self.settings.privacy.level == "record":
            check_epsilon(payload)
        if self._summation is not None:
            self._summation.check(client, payload)
            return
        if not self._silent:
            check_number(payload, "loss")
        self.check_samples(payload)
        if self.settings.run.buffer:
            check_mask(self, payload)
        self.codec_up(payload.round).check(payload.arrays, self.layout, self.mask_for(client))


def density_pair(*masks: Mask) -> tuple[float, float]:
    """Return alive / prunable and alive / all coordinates, means over `masks` of one layout."""
    layout, alive = masks[0].layout, math.fsum(mask.count for mask in masks) / len(masks)
    rest = layout.size - layout.prunable_size
    return alive / max(1, layout.prunable_size), (alive + rest) / max(1, layout.size)
