"""Exchanges whose answers the server adds and does nothing else with, in the clear or masked.

With wire.up-values (of updates) or ssfl.score-values (of scores) fixed32 or fixed16, clients answer with whole
numbers (`ssfl_app.sparsity.fixed`). With privacy.secure-aggregation they mask them, and the server learns their sum
by a second exchange (`ssfl_app.privacy.masking` has the protocol). Both sums have the same bits.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from ssfl_app.comm.messenger import ClientMessenger, Further, Reply
from ssfl_app.comm.payload import Metadata, Payload
from ssfl_app.core.client import ClientAlgorithm
from ssfl_app.core.options import Settings
from ssfl_app.core.summand import (
    ABOUT,
    CLIP,
    EXCHANGE,
    LOSS_UNIT,
    MOST,
    NOISE,
    OWN,
    PEERS,
    RANGE,
    RING,
    UNIT,
    about_bytes,
    question_digest,
    terms_of,
)
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.privacy.clipping import squared_length
from ssfl_app.privacy.ledger import Ledger
from ssfl_app.privacy.masking import (
    LEAST_NEIGHBOURS,
    MOST_NEIGHBOURS,
    FalseShares,
    MaskedSum,
    RingTree,
    TooFew,
    allowed,
    neighbours,
    peers_bytes,
    ring_bytes,
    ring_order,
    second_bytes,
    write_peers,
)
from ssfl_app.privacy.noise import gaussian, shares
from ssfl_app.sparsity.codec import Codec, LinearCodec
from ssfl_app.sparsity.fixed import FixedPoint, Summand, signed
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import SUMMED_TYPES, Allowed, Arrays, PayloadError, read_array


class _Algorithm(Protocol):
    """What is used of a strategy here (`SparseStrategy` says what each part means)."""

    name: ClassVar[str]
    client: ClassVar[type[ClientAlgorithm]]
    layout: Layout
    mask: Mask
    settings: Settings
    messenger: ClientMessenger

    @property
    def ledger(self) -> Ledger | None: ...
    def codec_up(self, round_: int) -> Codec: ...
    def has_default_aggregator(self) -> bool: ...
    def cohort(self, round_: int) -> list[int]: ...
    def train_payload(self, round_: int, client: int) -> Payload: ...
    @property
    def mask_travels(self) -> bool: ...


def check_sums(strategy: _Algorithm) -> None:
    """Raise ConfigError unless what the configuration adds only can be added only, and fits.

    Raises
    ------
    ConfigError
        Something else is done with answers than to add them, one by one: named with its key.
    """
    settings, name = strategy.settings, strategy.name
    private = settings.privacy.level == "client"
    secure, run = settings.privacy.secure_aggregation, settings.run
    scores = settings.sections["ssfl"].score_values if strategy.client.summed else ""
    keys = {"wire.up-values": settings.wire.up_values} | ({"ssfl.score-values": scores} if scores else {})
    summed = {key: value for key, value in keys.items() if value in SUMMED_TYPES}
    needs = [
        why for why, holds in (("privacy.secure-aggregation", secure), ("privacy.level 'client'", private)) if holds
    ]
    if needs and len(summed) < len(keys):
        key, value = next((key, value) for key, value in keys.items() if key not in summed)
        raise ConfigError(
            f"{key} is {value!r}; it is 'fixed32' with privacy.secure-aggregation: whole numbers add up"
        )
    if not summed:
        return
    cause = f"with {needs[0]}" if needs else "{} is {!r}".format(*next(iter(summed.items())))
    if "wire.up-values" in summed and not strategy.has_default_aggregator():
        raise ConfigError(f"{cause}; with strategy {name} the server does more with models than to average them")
    if needs and set(strategy.client.query_types) - set(strategy.client.summed):
        question = strategy.client.query_types[0]
        raise ConfigError(f"{cause}; with strategy {name} the server reads each answer to {question!r}")
    if private and strategy.client.stateful:
        rule = "clients keep models, by which the run folder would tell who took part"
        raise ConfigError(f"strategy is {name!r}; with privacy.level 'client' it is another one: with this {rule}")
    refused = {
        "run.fold": (run.fold, "mean"),
        "failures.norm-factor": (settings.failures.norm_factor, 0.0),
        "wire.error-feedback": (settings.wire.error_feedback, False),
        "shift.stream": (settings.shift.stream, "none"),  # weights are what the greeting says of samples
    }
    if scores:
        options = settings.sections["ssfl"]
        refused |= {"ssfl.score-fold": (options.score_fold, "mean")}
        refused |= {"ssfl.refresh": (options.refresh, "never")} if options.refresh in ("drift", "continuous") else {}
    if private:
        refused |= {"run.weighting": (run.weighting, "uniform"), "shift.round": (settings.shift.round, 0)}
        asked = "private-channels" if settings.mask.granularity == "channel" else "private-densities"
        refused |= {"ssfl.discovery": (settings.sections["ssfl"].discovery, asked)} if scores else {}
    for key, (value, needed) in refused.items():
        if value != needed:
            raise ConfigError(f"{key} is {value!r}; it is {needed!r}: {cause}, the server learns sums only")
    try:
        for value in summed.values():
            FixedPoint.of(value, settings.wire.range, run.clients, run.asked)
    except ValueError as error:
        raise ConfigError(f"{cause}; {error}. It is fixed32 for so many") from error
    if secure and run.cohort <= LEAST_NEIGHBOURS:
        fewest = LEAST_NEIGHBOURS + 1
        raise ConfigError(f"run.cohort is {run.cohort}; it is at least {fewest} with privacy.secure-aggregation")


def training_sum(strategy: _Algorithm, round_: int, cohort: list[int]) -> "Summation":
    """Return the sum of the updates of a round."""
    codec = strategy.codec_up(round_)
    assert isinstance(codec, LinearCodec)  # `check_sums`
    settings, ledger = strategy.settings, strategy.ledger
    release = None
    if settings.privacy.level == "client":
        if ledger is None:
            raise RunFailed("privacy.level is 'client'; without a ledger nobody knows what is spent")
        release = Release(settings.privacy.clip, ledger.budget.noise_multiplier, settings.run.cohort)
        if settings.privacy.secure_aggregation and len(cohort) <= LEAST_NEIGHBOURS:
            drawn = f"training in round {round_}: {len(cohort)} clients were drawn"
            raise RunFailed(
                f"{drawn}; a masked sum is of {LEAST_NEIGHBOURS + 1} at least. Delta has the chance of this"
            )
    summation = Summation(
        strategy,
        cohort,
        codec.count(strategy.layout, strategy.mask),
        codec.values,
        by_samples=settings.run.weighting == "samples",
        round_=round_,
        what=f"training under {strategy.mask.digest}",
        loss=settings.privacy.level == "none",
        release=release,
    )
    if ledger is not None:
        ledger.begin("round")
    return summation


def expected_counts(strategy: _Algorithm, round_: int) -> dict[str, int]:
    """Return messages and bytes of a round as if as many clients took part as are expected.

    How many were drawn no noise covers: with one client more it is another number, and adds to epsilon. So with
    privacy.level "client" records have what follows from the configuration alone.
    """
    settings, layout, mask, codec = strategy.settings, strategy.layout, strategy.mask, strategy.codec_up(round_)
    run, kind = settings.run, SUMMED_TYPES[settings.wire.up_values]
    assert isinstance(codec, LinearCodec)  # `check_sums`
    down = strategy.train_payload(round_, 0).nbytes
    up = codec.count(layout, mask) * np.dtype(kind).itemsize
    if settings.privacy.secure_aggregation:
        near = min(run.cohort - 1, MOST_NEIGHBOURS)
        second_down, second_up = second_bytes(near)
        down += peers_bytes(near) + ring_bytes(run.cohort) + second_down
        up += sum(size for _, size in allowed(near).values()) + second_up
    share, bitmap = run.cohort / run.clients, 0
    if strategy.mask_travels and mask.count < mask.alive.size:
        bitmap = round(run.cohort * (1 - share) ** (round_ - 1)) * mask.packed().nbytes  # to those who are new
    return {
        "messages_train_down": run.cohort,
        "messages_train_up": run.cohort,
        "bytes_train_down": run.cohort * down,
        "bytes_train_up": run.cohort * up,
        "bytes_mask_down": bitmap,
    }


class ClearSum:
    """The sum of summands that come as they are."""

    def __init__(self, size: int, dtype: npt.DTypeLike) -> None:
        self._sum = np.zeros(size, dtype=dtype)

    def told(self, client: int, asked: Payload, terms: str = "") -> Payload:
        """Return what a client is told to write its summand, besides what it is asked: nothing."""
        return Payload()

    def allowed(self) -> Allowed:
        """Return the arrays beside a summand: none."""
        return {}

    def check(self, client: int, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Accept what is beside a summand."""

    def add(self, client: int, values: Summand, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Add one."""
        self._sum += values

    def total(self) -> Summand:
        """Return the sum modulo 2**32 or 2**16."""
        return self._sum


class SumMessenger(Protocol):
    """What a masked sum uses of a messenger."""

    session: str

    def next_exchange(self) -> int:
        """Return the number of a new exchange."""
        ...

    def ask_more(self, further: Further) -> None:
        """Ask clients whose answers are in for more."""
        ...


class SecureSum:
    """The sum of summands that come masked; what `ClearSum` does, and the second exchange.

    Parameters
    ----------
    messenger : Messenger
        Who asks in the second exchange.
    keys : dict of int to bytes
        The public key of each client that is asked.
    size, dtype
        Of summands.
    seed : int
        Of the graph of neighbours.
    threshold : float
        ``privacy.threshold``.
    round_ : int
    what : str
        What is asked, for people and for the clients, which bind their masks to it.
    token : str
        Of the run, as clients know it.
    terms : str
        `terms_of` the options that clients work by.
    common : dict
        Facts that messages get after `told` has seen them.
    """

    def __init__(
        self,
        messenger: SumMessenger,
        keys: Mapping[int, bytes],
        size: int,
        dtype: npt.DTypeLike,
        *,
        seed: int,
        threshold: float,
        round_: int,
        what: str,
        token: str = "",
        terms: str = "",
        common: Metadata | None = None,
    ) -> None:
        self._messenger, self._round, self._keys = messenger, round_, dict(keys)
        self._size, self._dtype, self._threshold = size, dtype, threshold
        self._what, self._token, self._terms, self._common = what, token, terms, dict(common or {})
        self._exchange = messenger.next_exchange()
        # The same for all that ask the same: a client sees of its neighbours who is in a sum.
        where = f"{round_}/{what}"
        order = ring_order(keys, seed, where)
        self._graph, self._ring = neighbours(keys, seed, where), RingTree(order, keys) if order else None
        self._most = max(map(len, self._graph.values()), default=0)
        self._opened: MaskedSum | None = None
        self._facts: Metadata = {}

    def told(self, client: int, asked: Payload, terms: str = "") -> Payload:
        """Return what a client is told besides what it is asked, which is the same for all and binds their masks.

        `terms` are further ones, which its message has.
        """
        if self._opened is None:
            digest = question_digest(Payload(asked.arrays, {**asked.metadata, **self._common}), self._terms + terms)
            about = f"{self._messenger.session}/{self._exchange}/{self._what}/{digest}"
            bound = about_bytes(self._token, self._exchange, about, self._threshold)
            self._opened = MaskedSum(self._size, self._dtype, self._graph, self._keys, bound, self._threshold)
            self._facts = {EXCHANGE: self._exchange, ABOUT: about}
        return Payload(self._around(client), self._facts | {OWN: self._keys[client]})

    def _around(self, client: int) -> Arrays:
        peers: Arrays = {PEERS: write_peers(self._masked.peers(client))}
        return peers if self._ring is None else peers | {RING: self._ring.told(client).written()}

    @property
    def _masked(self) -> MaskedSum:
        if self._opened is None:
            raise ValueError("nobody was told what is asked, so nobody can have answered")
        return self._opened

    def allowed(self) -> Allowed:
        """Return the arrays beside a summand."""
        return allowed(self._most)

    def check(self, client: int, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Raise PayloadError unless the arrays beside a summand are all there."""
        self._masked.check(client, arrays)

    def add(self, client: int, values: Summand, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Add one."""
        self._masked.add(client, values, arrays)

    def total(self) -> Summand:
        """Ask for what removes the masks; return the sum modulo 2**32 or 2**16.

        Raises
        ------
        TooFew, FalseShares
            As `MaskedSum` has them.
        """
        masked, payloads = self._masked, dict[int, Payload]()
        for client, arrays in masked.requests().items():
            payloads[client] = Payload(arrays, self._facts | {OWN: self._keys[client]})

        def check(client: int, payload: Payload) -> None:
            masked.check_answer(client, payload.arrays)

        def take(reply: Reply) -> None:
            masked.answer(reply.client, reply.arrays)

        self._messenger.ask_more(Further("unmask", self._round, payloads, allowed(self._most), check, take))
        return masked.total()


@dataclass(frozen=True)
class Release:
    """What makes a sum one of differential privacy, of clients (`ssfl_app.privacy.accounting` has the definitions).

    Attributes
    ----------
    clip : float
        Largest Euclidean length of what a client adds.
    multiplier : float
        Standard deviation of the noise, by `clip`; 0: there is none.
    expected : float
        How many clients are expected; the sum is divided by it, whoever came.
    """

    clip: float
    multiplier: float
    expected: float

    def sigma(self, step: float) -> float:
        """Return the standard deviation of the noise in steps."""
        return self.multiplier * self.clip / step

    def headroom(self, clients: int) -> float:
        """Return how many times `clip` a coordinate of the sum, with its noise, may be."""
        return clients + 10 * self.multiplier * math.sqrt(2)  # shares sum to more noise where more answer


@dataclass
class Summed:
    """What an exchange found: means over the clients whose answers are in it, weighted.

    Attributes
    ----------
    mean : array of float64, shape (size,)
    clipped : int
        Values that clients clipped.
    """

    mean: npt.NDArray[np.float64]
    clipped: int


def _asked_as(question: str, mask: Mask) -> Metadata:
    """Return the fact by which a client knows what it is asked: a question, or training under a mask."""
    return {"question": question} if question else {"digest": mask.digest}


class Summation:
    """The answers of one exchange; after `finish`, `loss` is the mean training loss that they tell.

    Parameters
    ----------
    strategy : SparseStrategy
        Whose messages these are; its `messenger` plays the second exchange.
    clients : iterable of int
        Who is asked.
    size : int
        Values of an answer.
    kind : str
        Of `SUMMED_TYPES`.
    by_samples : bool
        Whether a client weighs as many training samples as it holds, or 1.
    round_ : int
    what : str
        What is asked, for people and for the clients, which bind their masks to it.
    question : str
        As the message has it; "": it is a training.
    loss : bool
        Whether clients tell their training loss, too.
    release : Release, optional
        The sum is one of differential privacy; then nothing else is told, and all clients weigh 1.

    Raises
    ------
    RunFailed
        A client did not say what it holds; steps are too coarse for a release; with secure aggregation a node has
        no key, or too few are asked.
    """

    def __init__(
        self,
        strategy: _Algorithm,
        clients: Iterable[int],
        size: int,
        kind: str,
        *,
        by_samples: bool,
        round_: int,
        what: str,
        question: str = "",
        loss: bool = False,
        release: Release | None = None,
    ) -> None:
        self.loss = None if release or not loss else 0.0
        self._messenger, self._privacy, self._what = strategy.messenger, strategy.settings.privacy, what
        self._size, asked = size, sorted(clients)
        self.weights = {client: self._held(client) if by_samples else 1 for client in asked}
        self._dtype, self._in, self._release = SUMMED_TYPES[kind], set[int](), release
        if release is None:
            self._most_weight = float(sum(self.weights.values()))
            self.fixed = FixedPoint.of(kind, strategy.settings.wire.range, self._most_weight, len(asked))
            self._numbers = size + (2 if loss else 1)
        else:
            self._most_weight = release.headroom(strategy.settings.run.clients)
            self.fixed = FixedPoint.of(kind, release.clip, self._most_weight, strategy.settings.run.clients)
            self._numbers = size
            steps = release.clip / self.fixed.step
            if steps < math.sqrt(size):  # what an update has in a coordinate is less than a step
                rule = f"{what}: {size} values of length {release.clip:g} are {steps:g} steps long and round to 0"
                raise RunFailed(f"{rule}: take wire.up-values 'fixed32'")
        self._facts: Metadata = {UNIT: self.fixed.step, RANGE: self.fixed.range, MOST: self.fixed.most}
        self._facts |= {LOSS_UNIT: self.fixed.loss_step} if loss and release is None else {}
        self._facts |= {} if release is None else {CLIP: release.clip, NOISE: self._share(release, len(asked))}
        self._sum: SecureSum | ClearSum = ClearSum(self._numbers, self._dtype)
        if self._privacy.secure_aggregation:
            registry = self._messenger.registry
            self._sum = SecureSum(
                self._messenger,
                {client: registry.key_of(client) for client in asked},
                self._numbers,
                self._dtype,
                seed=strategy.settings.run.seed,
                threshold=self._privacy.threshold,
                round_=round_,
                what=what,
                token=self._messenger.token or "",
                terms=terms_of(strategy.settings),
                common={
                    "round": round_,
                    **({"question": question} if question else {"digest": strategy.mask.digest}),
                },
            )

    @property
    def _clear(self) -> bool:
        return isinstance(self._sum, ClearSum)

    @property
    def _least(self) -> int:
        """How many must be in the sum, so that their shares of the noise are all of it."""
        return max(1, math.ceil(self._privacy.threshold * len(self.weights)))

    def _share(self, release: Release, asked: int) -> float:
        """Return the standard deviation of a client's share of the noise, in steps; 0: the server adds all of it."""
        sigma = release.sigma(self.fixed.step)
        return shares(sigma, self._least) if sigma and self._privacy.secure_aggregation and asked else 0.0

    def _held(self, client: int) -> int:
        held = self._messenger.held(client)
        if held is None:
            raise RunFailed(f"{self._what}: client {client} did not say at the handshake how many samples it holds")
        return held

    def outgoing(self, client: int, payload: Payload) -> Payload:
        """Return the message of a client with what it needs to answer; besides that it is the same for all."""
        asked = Payload(payload.arrays, {**payload.metadata, **self._facts})
        told = self._sum.told(client, asked)
        return Payload({**asked.arrays, **told.arrays}, {**asked.metadata, **told.metadata})

    def allowed(self) -> Allowed:
        """Return the arrays of an answer."""
        return {"values": (self._dtype, self._numbers), **self._sum.allowed()}

    def check(self, client: int, payload: Payload) -> None:
        """Raise PayloadError unless an answer may be added: a clear one within its range, any with all its parts."""
        values, samples = read_array(payload.arrays, "values", self._dtype, self._numbers), self.weights[client]
        if self._release is not None:
            limit = math.floor((Fraction(self._release.clip) / Fraction(self.fixed.step)) ** 2)
            whole = signed(values).astype(np.int64)
            if self._clear and squared_length(whole) > limit:
                raise PayloadError(f"its vector is longer than {self._release.clip:g}, to which clients clip them")
        elif payload.metadata["samples"] != self._messenger.held(client):
            told = payload.metadata["samples"]
            raise PayloadError(f"samples is {told!r}; this client holds {self._messenger.held(client)}")
        self._sum.check(client, payload.arrays)
        if self._clear and self._release is None and not self.fixed.in_range(values, samples, self._size):
            raise PayloadError(f"a value is beyond wire.range, {self.fixed.range:g}, by the weight {samples}")

    def add(self, reply: Reply) -> None:
        """Add a checked answer."""
        self._sum.add(reply.client, reply.arrays["values"], reply.arrays)
        self._in.add(reply.client)

    def finish(self) -> Summed:
        """Return the means; with secure aggregation ask for what removes the masks.

        Raises
        ------
        RunFailed
            Too few clients answered, or the sum is beyond what good answers add up to.
        """
        try:
            total = self._sum.total()
        except (TooFew, FalseShares) as error:
            why = [f"; client {who}: {note}" for who, note in sorted(self._messenger.report.notes.items())[:1]]
            rule = f"privacy.threshold is {self._privacy.threshold:g}"
            raise RunFailed(f"{self._what}: {error}; {rule}{''.join(why)}") from error
        weight: float = sum(self.weights[client] for client in self._in)
        if self._release is not None:
            return self._released(self._release, total)
        if not self.fixed.in_range(total, weight, self._size):
            raise RunFailed(f"{self._what}: the sum is beyond wire.range, {self.fixed.range:g}: a client lied")
        numbers = signed(total)
        if self.loss is not None:
            self.loss = self.fixed.mean_loss(int(numbers[self._size + 1]), weight)
        return Summed(self.fixed.mean(total[: self._size], weight), int(numbers[self._size]))

    def _released(self, release: Release, total: Summand) -> Summed:
        """Return the mean with its noise, by the number of clients that is expected."""
        sigma, noised = release.sigma(self.fixed.step), total
        if self._clear and sigma:
            noised = self.fixed.modulo(signed(total).astype(np.int64) + gaussian(sigma, total.size))
        elif sigma and len(self._in) < self._least:
            raise RunFailed(f"{self._what}: {len(self._in)} clients answered; with {self._least} the noise is whole")
        return Summed(self.fixed.mean(noised, release.expected), 0)
