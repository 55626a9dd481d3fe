"""The server side of sums: answers of nodes that are whole numbers, which are added and used in no other way.

With ``values="fixed32"`` they come in the clear, with ``secure_aggregation=True`` masked; both sums have the same
bits. `ssfl_app.core.sums` has the protocol; here nodes are numbered by rank, and the weights, which the server does
not know, are added beside the values.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ssfl_app.comm.messenger import Further, Reply
from ssfl_app.comm.payload import Metadata, Payload
from ssfl_app.core.summand import MOST, MOST_WEIGHT, RANGE, UNIT
from ssfl_app.core.sums import ClearSum, SecureSum, SumMessenger
from ssfl_app.locks import RunFailed
from ssfl_app.plugin.secure import KIND, NUMBER, THRESHOLD, terms_of_work
from ssfl_app.privacy.masking import LEAST_NEIGHBOURS, FalseShares, TooFew
from ssfl_app.sparsity.fixed import FixedPoint, signed
from ssfl_app.sparsity.values import Allowed, PayloadError, read_array

LEAST_NODES = LEAST_NEIGHBOURS + 1
"""Nodes of a masked sum, at least: of two each would learn the other's values."""

_TYPE, _MOST = np.uint32, 2**31 - 1


class _Messenger(SumMessenger, Protocol):
    """What is used of a `NodeMessenger` here."""

    keys: dict[int, bytes]


@dataclass(frozen=True)
class SumOptions:
    """The arguments of `SSFL` that concern sums: `range` is its update_range, `secure` its secure_aggregation."""

    range: float
    most_examples: int
    secure: bool
    threshold: float
    seed: int


@dataclass(frozen=True)
class NodeMean:
    """The weighted mean of what nodes answered, float64, shape (size,), their weight, and how much they clipped."""

    values: npt.NDArray[np.float64]
    weight: int
    clipped: int


class _Numbered:
    """A messenger as `SecureSum` uses one, to clients that are called by their rank among `nodes`."""

    def __init__(self, messenger: _Messenger, nodes: list[int], threshold: float) -> None:
        self.session, self.next_exchange = messenger.session, messenger.next_exchange
        self._messenger, self._nodes, self._threshold = messenger, nodes, threshold
        self.keys = {number: messenger.keys[node] for number, node in enumerate(nodes)}

    def told(self, number: int) -> Metadata:
        """Return what a node is told in both exchanges beside what clients are."""
        return {NUMBER: number, THRESHOLD: self._threshold}

    def ask_more(self, further: Further) -> None:
        """Ask the nodes with these numbers."""
        number_of = {node: number for number, node in enumerate(self._nodes)}
        payloads = {
            self._nodes[number]: Payload(payload.arrays, {**payload.metadata, **self.told(number)})
            for number, payload in further.payloads.items()
        }

        def check(node: int, payload: Payload) -> None:
            further.check(number_of[node], payload)

        def take(reply: Reply) -> None:
            further.take(replace(reply, client=number_of[reply.client]))

        self._messenger.ask_more(replace(further, payloads=payloads, check=check, take=take))


class NodeSum:
    """The answers of nodes in one exchange.

    Parameters
    ----------
    messenger : NodeMessenger
        Who asks; it knows the keys of the nodes where answers are masked.
    nodes : iterable of int
        Who is asked.
    size : int
        Values of an answer.
    options : SumOptions
    most : int
        Largest weight of an answer.
    round_ : int
    what : str
        What is asked, for people and for the nodes, which bind their masks to it.

    Raises
    ------
    RunFailed
        They are too many for the sum.
    """

    def __init__(
        self,
        messenger: _Messenger,
        nodes: Iterable[int],
        size: int,
        options: SumOptions,
        *,
        most: int,
        round_: int,
        what: str,
    ) -> None:
        self.nodes, self._size, self._most, self._options, self._what = sorted(nodes), size, most, options, what
        self._number = {node: place for place, node in enumerate(self.nodes)}
        count, self._in = len(self.nodes), 0
        if count * most > _MOST:
            raise RunFailed(
                f"{what}: most_examples is {most}; with {count} nodes it is at most {_MOST // count}: their sum "
                "has 32 bits"
            )
        try:
            self.fixed = FixedPoint.of(KIND, options.range, float(count * most), count)
        except ValueError as error:
            raise RunFailed(f"{what}: {error}") from error
        self._numbers = size + 2  # how many values were clipped, and the weight
        self._sum: SecureSum | ClearSum = ClearSum(self._numbers, _TYPE)
        if options.secure:
            self._numbered = _Numbered(messenger, self.nodes, options.threshold)
            self._sum = SecureSum(
                self._numbered,
                self._numbered.keys,
                self._numbers,
                _TYPE,
                seed=options.seed,
                threshold=options.threshold,
                round_=round_,
                what=what,
            )

    @property
    def secure(self) -> bool:
        """Whether the answers are masked."""
        return self._options.secure

    def outgoing(self, node: int, payload: Payload, config: Mapping[str, object]) -> Payload:
        """Return the message of a node with what it needs to answer."""
        number = self._number[node]
        facts: Metadata = {UNIT: self.fixed.step, RANGE: self.fixed.range, MOST: self.fixed.most}
        asked = Payload(payload.arrays, {**payload.metadata, **facts, MOST_WEIGHT: self._most})
        told = self._sum.told(number, asked, terms_of_work(asked.metadata, config))
        own = {**told.metadata, **(self._numbered.told(number) if self.secure else {})}
        return Payload({**asked.arrays, **told.arrays}, {**asked.metadata, **own})

    def allowed(self) -> Allowed:
        """Return the arrays of an answer."""
        return {"values": (_TYPE, self._numbers), **self._sum.allowed()}

    def check(self, node: int, payload: Payload) -> None:
        """Raise PayloadError unless an answer may be added: a clear one within its range, any with all its parts."""
        if node not in self._number:
            raise PayloadError("it was not asked for its key before this exchange")
        values = read_array(payload.arrays, "values", _TYPE, self._numbers)
        self._sum.check(self._number[node], payload.arrays)
        if self.secure:
            return
        weight = int(values[-1])
        if not 1 <= weight <= self._most:
            raise PayloadError(f"its weight is {weight}; it is a whole number from 1 to {self._most}")
        if not self.fixed.in_range(values, weight, self._size):
            raise PayloadError(f"a value is beyond update_range, {self.fixed.range:g}, by the weight {weight}")

    def add(self, node: int, payload: Payload) -> None:
        """Add a checked answer."""
        self._sum.add(self._number[node], payload.arrays["values"], payload.arrays)
        self._in += 1

    def finish(self) -> NodeMean:
        """Return the mean; with secure aggregation ask for what removes the masks.

        Raises
        ------
        RunFailed
            Too few nodes answered, or the sum is beyond what good answers add up to.
        """
        try:
            total = self._sum.total()
        except TooFew as error:
            whose = "" if error.client is None else f" of node {self.nodes[error.client]}"
            raise RunFailed(
                f"{self._what}: {error.left} neighbours{whose} are left; at least {error.needed} are needed "
                f"(threshold is {self._options.threshold:g})"
            ) from error
        except FalseShares as error:
            nodes = ", ".join(str(self.nodes[number]) for number in error.clients)
            raise RunFailed(f"{self._what}: false shares of a secret, by one of nodes {nodes}") from error
        clipped, weight = (int(number) for number in signed(total[self._size :]))
        if not self._in <= weight <= self._in * self._most or not self.fixed.in_range(total, weight, self._size):
            raise RunFailed(f"{self._what}: the sum is beyond update_range, {self.fixed.range:g}: a node lied")
        return NodeMean(self.fixed.mean(total[: self._size], weight), weight, clipped)
