"""What a client answers where the server only adds: a summand, masked under privacy.secure-aggregation.

The server's side is `ssfl_app.core.sums`; the protocol of the masks is that of `ssfl_app.privacy.masking`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ssfl_app.comm.payload import RUN, WITH_MASK, ClientState, Metadata, Payload
from ssfl_app.privacy.clipping import clipped
from ssfl_app.privacy.keys import KeyPair, fingerprint
from ssfl_app.privacy.masking import Masker, Peer, Ring, read_peers
from ssfl_app.privacy.noise import LEAST_SHARE, gaussian
from ssfl_app.sparsity.fixed import FixedPoint, Summand, signed
from ssfl_app.sparsity.values import Arrays, PayloadError, read_array
from ssfl_app.text import quoted

if TYPE_CHECKING:  # they import torch
    from ssfl_app.core.options import Settings
    from ssfl_app.sparsity.layout import Vector

UNIT, LOSS_UNIT, RANGE, MOST, MOST_WEIGHT = "unit", "loss-unit", "range", "most", "most-weight"
CLIP, NOISE = "clip", "noise"
EXCHANGE, ABOUT, OWN = "exchange", "about", "own-key"
PEERS, RING = "own-peers", "own-ring"
_ASKED = ("question", "ssfl", "digest", "weights", "step")
_ALIKE = (
    *_ASKED,
    *("round", UNIT, LOSS_UNIT, RANGE, MOST, MOST_WEIGHT, CLIP, NOISE),
)
"""Facts and arrays of a message whose answer is added; OWN is the key that the server has of its client.

With MOST_WEIGHT the server does not know the weights, at most so large: they are added up beside the values.
With CLIP the sum is a release of differential privacy (privacy.level "client"): the vector of a client is at most so
long, nothing stands beside it, and each client adds a share of the noise, of NOISE steps, if that is not 0.
"""


@dataclass(frozen=True)
class Identity:
    """What a client masks with, and whom.

    Attributes
    ----------
    keys : KeyPair
    pins : frozenset of str
        Fingerprints of those that it masks together with; none: any.
    least : int
        Clients of a sum, at least.
    """

    keys: KeyPair
    pins: frozenset[str] = frozenset()
    least: int = 0

    def check(self, clients: int, what: str) -> None:
        """Raise PayloadError if a sum has fewer clients than are demanded here."""
        if clients < self.least:
            rule = f"this node was started with --least-clients {self.least}"
            raise PayloadError(f"{what} {clients} clients; {rule}")


def about_bytes(token: str, exchange: int, about: str, threshold: float) -> bytes:
    """Return what masks and shares of an exchange are bound to.

    `token` is the run's by which a client remembers what it answered: what is told under one is useless with another.
    """
    return f"{token}|{exchange}|{threshold!r}|{about}".encode()


def terms_of(settings: Settings) -> str:
    """Return the options that make an answer what it is."""
    run, parts = settings.run, (settings.mask, settings.local, settings.wire, settings.privacy)
    return repr((run.seed, run.weighting, run.rounds, *parts, sorted(settings.sections.items())))


def question_digest(
    payload: Payload, terms: str, checked: Collection[str] = (), reads: Collection[str] | None = None
) -> str:
    """Return the digest of all that the clients of an exchange are asked alike: arrays, and these facts.

    Their masks are bound to it. So no server can tell one of them another step or model than the others, by which
    the others' answers are 0 and the sum is that of one client (Pasquini et al., "Eluding secure aggregation", CCS
    2022). A mask goes to those that lack it, and its reader checks it against its digest, which is one of the facts.
    `checked` are further arrays that the client has held against one of them. With `reads` it is the digest of what
    the answer is made of: those arrays and, without round and steps, those facts; under another number or in finer
    steps it is the same answer.
    """
    facts = payload.metadata
    alike = _ALIKE if reads is None else [name for name in _ASKED if name in reads]
    left_out = {PEERS, RING, *WITH_MASK, *checked, *(() if reads is None else payload.arrays.keys() - set(reads))}
    digest = hashlib.blake2b(repr([facts.get(name) for name in alike]).encode() + terms.encode(), digest_size=16)
    for name in sorted(payload.arrays.keys() - left_out):
        array = payload.arrays[name]
        digest.update(f"|{name} {array.dtype.name} {array.size}|".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def fixed_point(metadata: Mapping[str, object], kind: str) -> FixedPoint:
    """Return how values of this kind are written, as a message states it; PayloadError if it is not stated."""
    facts = {name: metadata.get(name) for name in (UNIT, RANGE)} | {LOSS_UNIT: metadata.get(LOSS_UNIT, 1.0)}
    for name, value in facts.items():
        if not isinstance(value, float) or not 0 < value < math.inf:
            raise PayloadError(f"{name} is {quoted(value)}; with values of {kind} it is a number above 0")
    most = metadata.get(MOST)
    if type(most) is not int or most < 1:
        raise PayloadError(f"{MOST} is {quoted(most)}; it is a whole number of at least 1")
    step, range_, loss_step = (float(facts[name]) for name in (UNIT, RANGE, LOSS_UNIT))  # type: ignore[arg-type]
    return FixedPoint(kind, step, range_, loss_step, most)


class SummandWriter:
    """Writes the answers of one client.

    Parameters
    ----------
    number : int
        Of the client.
    identity : callable
        Returns what it masks with.
    memory : ClientState
        Which exchanges it answered already.
    secure : bool
        Whether it masks.
    threshold : float
        privacy.threshold.
    level : str
        privacy.level.
    terms : str
        `terms_of` the options.
    bound : str
        What else in its message masks are bound to, though it makes no other question of it.
    """

    def __init__(
        self,
        number: int,
        identity: Callable[[], Identity],
        memory: ClientState,
        secure: bool,
        threshold: float,
        level: str = "none",
        terms: str = "",
        bound: str = "",
    ) -> None:
        self._number, self._identity, self._memory, self._bound = number, identity, memory, bound
        self._secure, self._threshold, self._level, self._terms = secure, threshold, level, terms

    def write(
        self,
        payload: Payload,
        values: Vector,
        kind: str,
        weight: int,
        rng: np.random.Generator | None = None,
        loss: float | None = None,
        checked: Collection[str] = (),
        reads: Collection[str] | None = None,
    ) -> Arrays:
        """Return the arrays of an answer to `payload`: a summand of `values`, and of a training its loss.

        `checked` are those of its arrays, beside a mask, whose digest is a fact of it and was compared.
        `reads` names the arrays and the facts that `values` are made of; default: all. What else stands in a message
        makes no other question of it, of whose answers another sum might be told.

        Raises
        ------
        PayloadError
            The message does not say what is needed, or asks for a second answer under the same masks.
        """
        fixed = fixed_point(payload.metadata, kind)
        if self._level == "client" and CLIP not in payload.metadata:
            raise PayloadError(f"the message has no {CLIP}, and privacy.level is 'client'")
        if self._level != "none" and LOSS_UNIT in payload.metadata:
            raise PayloadError(
                f"the message has {LOSS_UNIT}; with privacy.level {self._level!r} a client tells no loss"
            )
        if CLIP in payload.metadata:
            summand = self._released(payload, fixed, values)
        else:
            most = payload.metadata.get(MOST_WEIGHT)
            if most is not None and (type(most) is not int or not 1 <= weight <= most):
                # Without the weight: it reaches the server as a sum.
                raise PayloadError(f"the weight is beyond {MOST_WEIGHT}, {quoted(most)}, or below 1")
            summand, _ = fixed.write(values, weight, rng, loss if LOSS_UNIT in payload.metadata else None)
            summand = summand if most is None else fixed.modulo(np.append(signed(summand).astype(np.int64), weight))
        if not self._secure:
            return {"values": summand}
        kept = {name: _bytes(payload, name).hex() for name in (PEERS, RING)}
        masker, _ = self._masker(payload, summand.dtype, kept)
        if not str(payload.metadata[ABOUT]).endswith(
            f"/{question_digest(payload, self._terms + self._bound, checked)}"
        ):
            raise PayloadError(f"{ABOUT} is not about this message: the server asks its clients different things")
        question = question_digest(
            payload, self._terms, checked, {*_ASKED, *payload.arrays} if reads is None else reads
        )
        # Less noise hides no answer; at another level there is none that the run promised.
        hidden = self._level == "client" and float(payload.metadata[NOISE]) >= LEAST_SHARE
        asked = 0 if hidden else _number(question.encode())
        self._memory.note_masked(self._exchange(payload), asked, **kept)
        shares = masker.mask(summand)
        return {"values": summand, **shares}

    def _released(self, payload: Payload, fixed: FixedPoint, values: Vector) -> Summand:
        """Return values of bounded length, with this client's share of the noise."""
        clip, noise = payload.metadata[CLIP], payload.metadata.get(NOISE)
        if not isinstance(clip, float) or not isinstance(noise, float) or not 0 < clip < math.inf or noise < 0:
            raise PayloadError(f"{CLIP} is {quoted(clip)} and {NOISE} {quoted(noise)}; they are numbers above 0")
        # That a client has no finite update tells of its data: it counts as none.
        finite = values if np.isfinite(values).all() else np.zeros_like(values)
        try:
            whole = clipped(finite, clip, fixed.step)
            return fixed.modulo(whole + gaussian(noise, whole.size) if noise else whole)
        except ValueError as error:
            raise PayloadError(str(error)) from error

    def unmask(self, payload: Payload) -> Payload:
        """Return the shares that unmask the sum of an exchange, once; PayloadError if they must not be told."""
        exchange = self._exchange(payload)
        if not self._secure:
            raise PayloadError("privacy.secure-aggregation is false; there is nothing to unmask")
        masker, clients = self._masker(payload, np.uint32, self._memory.masked(exchange))
        answer = masker.unmask(payload.arrays)
        dropped = np.unique(read_array(payload.arrays, "dropped", np.uint32, None))
        self._identity().check(clients - dropped.size, "the sum is of")
        over = sorted(peer.public for peer in masker.people if peer.number not in dropped)
        self._memory.note_unmasked(exchange, _number(b"".join(over)))
        return Payload(answer, {"samples": 0})

    def _exchange(self, payload: Payload) -> int:
        exchange = payload.metadata.get(EXCHANGE)
        if type(exchange) is not int or exchange < 1:
            raise PayloadError(f"{EXCHANGE} is {quoted(exchange)}; with secure aggregation it is a number from 1")
        return exchange

    def _masker(self, payload: Payload, dtype: npt.DTypeLike, kept: Mapping[str, str]) -> tuple[Masker, int]:
        """Return this client in an exchange, and how many clients are asked in it."""
        identity, exchange, about = self._identity(), self._exchange(payload), payload.metadata.get(ABOUT)
        if not isinstance(about, str) or len(about) > 512:
            raise PayloadError(f"{ABOUT} is {quoted(about)}; it is a line")
        if payload.metadata.get(OWN) != identity.keys.public:
            raise PayloadError("the server has another key of this client than it works with")
        bound = about_bytes(str(payload.metadata.get(RUN, "")), exchange, about, self._threshold)
        peers, ring = (np.frombuffer(bytes.fromhex(kept[name]), np.uint8) for name in (PEERS, RING))
        near = read_peers(peers)
        told = Ring.read(ring, len(near)) if ring.size else None
        clients = len(near) + 1 if told is None else told.clients
        self._check(near, identity.pins)
        identity.check(clients, "the exchange is of")
        masker = Masker(identity.keys, self._number, near, bound, self._threshold, dtype, ring=told)
        return masker, clients

    def _check(self, peers: tuple[Peer, ...], pins: frozenset[str]) -> None:
        strangers = [peer for peer in peers if pins and fingerprint(peer.public) not in pins]
        if strangers:
            who = f"client {strangers[0].number} has the key {fingerprint(strangers[0].public)}"
            raise PayloadError(f"{who}; it is none of those that are pinned here")


def _bytes(payload: Payload, name: str) -> bytes:
    if name == RING and name not in payload.arrays:
        return b""
    return read_array(payload.arrays, name, np.uint8, None).tobytes()


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "little") or 1


def told(metadata: Metadata) -> Metadata:
    """Return the metadata of an answer without what is told as a sum."""
    return {name: value for name, value in metadata.items() if name != "loss"}
