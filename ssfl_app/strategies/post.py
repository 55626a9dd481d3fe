"""The post room: who is who, what a message carries beside its model, and which answers are good ones.

Mask protocol: the mask goes down once per client, as a bitmap with the first message that needs it. Every message
carries the digest of (names, shapes, mask). A client that does not hold that mask (restarted, joined late)
answers "need mask" and gets the message again with the mask: no exception, no lost round.

Refusal: an answer that is for another round or digest, or whose arrays and facts are not what they must be, is
refused by name and counted. It never reaches an algorithm.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from ssfl_app.exchange import Courier, Outcome, RunFailed
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Arrays, PayloadError
from ssfl_app.strategies.settings import RunOptions
from ssfl_app.wire import Facts, Packer, Parcel, read_record

Check = Callable[[Parcel], None]
"""Raises PayloadError on an answer that an algorithm must not see."""


@dataclass(frozen=True)
class Reply:
    """A checked answer of one client; `samples` weighs it in a mean."""

    client: int
    arrays: Arrays
    facts: Facts
    samples: int


class Post:
    """Writes messages to clients by number, carries them, and opens the replies one at a time.

    Parameters
    ----------
    run : RunOptions
        The room ``run``.
    mask_travels : bool
        Whether clients must be given the mask to read a message: the codec down is `SharedMask`.

    Attributes
    ----------
    outcome : Outcome
        Of the exchange that is going on, or the last one.
    """

    def __init__(self, run: RunOptions, mask_travels: bool) -> None:
        self.outcome = Outcome()
        self._run, self._mask_travels = run, mask_travels
        self._roster: dict[int, int] = {}  # client -> node
        self._packer = Packer()
        self._letters: dict[int, tuple[str, Parcel, Mask | None]] = {}  # of the exchange that is going on
        self._holds: dict[int, str] = {}  # client -> digest of the mask it answered under
        self._bitmap: tuple[str, npt.NDArray[np.uint8]] = ("", np.zeros(0, np.uint8))
        self._client_of: dict[str, int] = {}  # message id -> client

    # ---- who is who --------------------------------------------------------------------------

    def meet(self, grid: Grid) -> dict[int, Facts]:
        """Wait until every client is connected, and return what each says of itself.

        Raises
        ------
        RunFailed
            Some did not come within run.join-timeout, two claim one number, or one cannot start.
        """
        end, asked, sites = time.monotonic() + self._run.join_timeout, set[int](), dict[int, Facts]()
        while True:
            new = sorted(set(grid.get_node_ids()) - asked)
            asked.update(new)
            for node, facts in self._greet(grid, new, max(1.0, end - time.monotonic())):
                number = int(facts["client"])
                if number in sites:
                    raise RunFailed(f"two nodes say that they are client {number}; each needs its own partition-id")
                if 0 <= number < self._run.clients:
                    self._roster[number], sites[number] = node, facts
            missing = sorted(set(range(self._run.clients)) - set(sites))
            if not missing:
                return sites
            if time.monotonic() > end:
                names = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
                raise RunFailed(
                    f"{len(sites)} of {self._run.clients} clients joined within run.join-timeout "
                    f"{self._run.join_timeout:g} s; missing: {names}"
                )
            time.sleep(0.1)

    def _greet(self, grid: Grid, nodes: list[int], timeout: float) -> Iterator[tuple[int, Facts]]:
        courier = Courier(grid, timeout)
        hello = self._packer.record(Parcel())
        courier.send({i: Message(hello, node, "query.hello", ttl=timeout) for i, node in enumerate(nodes)})
        for i, reply in courier.replies():
            yield nodes[i], read_record(reply.content).facts
        if courier.outcome.refused:
            raise RunFailed("a client cannot start: " + next(iter(courier.outcome.refused.values())))

    # ---- out ---------------------------------------------------------------------------------

    def write(
        self,
        kind: str,
        round_: int,
        parcels: Iterable[tuple[int, Parcel]],
        mask: Mask | None,
        config: Mapping[str, Any],
    ) -> list[Message]:
        """Return one message of Flower's type `kind` per client.

        `mask` is the one the parcels are encoded under, None for a question. `config` holds further facts.
        """
        self._packer, self._letters = Packer(), {}
        messages = []
        for client, parcel in parcels:
            facts = {**config, "round": round_, **parcel.facts}
            if mask is not None:
                facts["digest"] = mask.digest
            self._letters[client] = (kind, Parcel(parcel.arrays, facts), mask)
            knows = mask is None or self._holds.get(client) == mask.digest
            messages.append(self._message(client, with_mask=self._mask_travels and not knows))
        return messages

    def _message(self, client: int, *, with_mask: bool) -> Message:
        kind, parcel, mask = self._letters[client]
        if with_mask and mask is not None:
            if self._bitmap[0] != mask.digest:
                self._bitmap = (mask.digest, mask.packed())
            parcel = Parcel({**parcel.arrays, "mask": self._bitmap[1]}, parcel.facts)
        group = str(parcel.facts["round"])
        # Time to live = round timeout: Flower's default of 12 hours would let replies come rounds later.
        ttl = self._run.round_timeout
        return Message(self._packer.record(parcel), self._roster[client], kind, ttl=ttl, group_id=group)

    def carry(self, grid: Grid, messages: Iterable[Message]) -> Iterator[Message]:
        """Send messages that `write` made and yield the replies as they come."""
        courier = Courier(grid, self._run.round_timeout)
        self.outcome = courier.outcome
        client_at = {node: client for client, node in self._roster.items()}
        self._push(courier, {client_at[message.metadata.dst_node_id]: message for message in messages})
        again: set[int] = set()
        for client, reply in courier.replies():
            self.outcome.up += sum(_sizes(reply).values())
            if _asks_for_mask(reply) and client not in again and self._letters[client][2] is not None:
                again.add(client)
                self._push(courier, {client: self._message(client, with_mask=True)})
                continue
            self._client_of[reply.metadata.reply_to_message_id] = client
            yield reply
            del reply

    def _push(self, courier: Courier, messages: dict[int, Message]) -> None:
        for message in messages.values():
            sizes = _sizes(message)
            self.outcome.mask_down += sizes.pop("mask", 0)
            self.outcome.down += sum(sizes.values())
        courier.send(messages)

    # ---- in ----------------------------------------------------------------------------------

    def open(self, replies: Iterable[Message], check: Check, share: float, what: str) -> Iterator[Reply]:
        """Yield the good replies; refuse the others by name.

        Raises
        ------
        RunFailed
            After the last reply, if fewer than `share` of the clients answered well.
        """
        for message in replies:
            client = self._client_of.pop(message.metadata.reply_to_message_id)
            try:
                reply = self._read(client, message, check)
            except PayloadError as error:
                self.outcome.refused[client] = str(error)
                continue
            self.outcome.ok.append(client)
            mask = self._letters[client][2]
            if mask is not None:
                self._holds[client] = mask.digest
            yield reply
            del message, reply
        self.outcome.need(share, what)

    def _read(self, client: int, message: Message, check: Check) -> Reply:
        parcel = read_record(message.content)
        _, letter, _ = self._letters[client]
        facts = parcel.facts
        if facts.get("need"):
            raise PayloadError(f"asks for {facts['need']!r} again")
        for name in ("round", "digest"):
            if name in letter.facts and facts.get(name) != letter.facts[name]:
                raise PayloadError(f"{name} is {facts.get(name)!r}; it must be {letter.facts[name]!r}")
        samples = facts.get("samples")
        if type(samples) is not int or samples < 0:
            raise PayloadError(f"samples is {samples!r}; it must be a whole number of at least 0")
        check(parcel)
        return Reply(client, parcel.arrays, facts, samples)


def _sizes(message: Message) -> dict[str, int]:
    # Counted on the encoded payload itself. By key: `.array_records` would build a reference cycle.
    arrays: Any = message.content.get("arrays") or {}
    return {name: len(array.data) for name, array in arrays.items()}


def _asks_for_mask(message: Message) -> bool:
    facts = message.content.get("facts")
    return isinstance(facts, ConfigRecord) and facts.get("need") == "mask"
