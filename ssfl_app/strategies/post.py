"""The post room: who is who, what a message carries beside its model, and which answers are good ones.

Mask protocol: the mask goes down once per client, as a bitmap with the first message that needs it. Every message
carries the digest of (names, shapes, mask). A client that does not hold that mask (restarted, joined late)
answers "need mask" and gets the message again with the mask: no exception, no lost round. Initial weights work the
same way: a question names their digest, and a client that makes others from the seed asks for them.

Refusal: an answer that is for another round or digest, or whose arrays and facts are not what they must be, is
refused by name and counted. It never reaches an algorithm.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from ssfl_app.exchange import Courier, Outcome
from ssfl_app.local.holdings import Holding
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Allowed, Arrays, PayloadError
from ssfl_app.strategies.checks import MOST_WORK, check_counts
from ssfl_app.strategies.roster import Roster
from ssfl_app.strategies.settings import RunOptions
from ssfl_app.text import in_a_line, quoted
from ssfl_app.wire import MASKS, Facts, Packer, Parcel, read_record

FOLDER = "folder"
"""Fact of a message in simulation: where simulated clients keep their files."""

RUN = "run"
"""Fact of a message in deployment: 16 hex digits that tell this run's files on a node from another run's."""

CLIENT = "client"
"""Fact of a message to a site with data of its own: the number that its name has in this run."""

Check = Callable[[int, Parcel], None]
"""check(client, parcel) raises PayloadError on an answer that an algorithm must not see."""

Addressed = tuple[int, Parcel, Mask | None]
"""Client, what it is sent, and the mask that is encoded under; None for a question."""


@dataclass(frozen=True)
class Reply:
    """A checked answer of one client; `samples` weighs it in a mean."""

    client: int
    arrays: Arrays
    facts: Facts
    samples: int


@dataclass(frozen=True)
class Letter:
    """What was written to a client, and what may be sent after: attachments by the name a client asks for them."""

    kind: str
    parcel: Parcel
    mask: Mask | None
    attachments: Mapping[str, Callable[[], Arrays]]


class Post:
    """Writes messages to clients by number, carries them, and opens the replies one at a time.

    Parameters
    ----------
    run : RunOptions
        The room ``run``.
    mask_travels : bool
        Whether clients must be given the mask to read a message: the codec down is `SharedMask`.
    bitmaps : str
        As `Packer` has it.

    Attributes
    ----------
    outcome : Outcome
        Of the exchange that is going on, or the last one.
    folder : Path or None
        Where simulated clients keep their files.
    token : str or None
        What real clients call this run in the names of their files.
    roster : Roster
        Who is who.
    dealt : callable or None
        What the server knows that it deals to a client; None: a client holds what it said at the greeting.
    work : callable
        Most images that go through the model of a client which holds so many, each as often as it is used, for one
        message.
    """

    def __init__(self, run: RunOptions, mask_travels: bool, bitmaps: str = "plain") -> None:
        self.report = Outcome()
        self.folder: Path | None = None
        self.token: str | None = None
        self.roster = Roster(run)
        self.dealt: Callable[[int], Holding] | None = None
        self.work: Callable[[int], int] = lambda images: MOST_WORK
        self._run, self._mask_travels, self._bitmaps = run, mask_travels, bitmaps
        self._packer = Packer(bitmaps)
        self._letters: dict[int, Letter] = {}  # of the exchange that is going on
        self._holds: dict[int, str] = {}  # client -> digest of the mask it answered under
        self._client_of: dict[str, int] = {}  # message id -> client

    # ---- who is who --------------------------------------------------------------------------

    def wait_for_clients(self, grid: Grid) -> dict[int, Facts]:
        """Wait until every client is connected, and return what each says of itself.

        Raises
        ------
        RunFailed
            As `Roster.meet` does.
        """
        return self.roster.wait_for_clients(grid)

    def readmit(self, grid: Grid) -> dict[str, Any]:
        """Let nodes that were set up anew take their old places; return what a round's record says of it."""
        back, strangers = self.roster.readmit(grid)
        for client in back:
            self._holds.pop(client, None)
        told = {"rejoined": back, "strangers": {str(node): strangers[node] for node in sorted(strangers)}}
        return {name: value for name, value in told.items() if value}

    # ---- out ---------------------------------------------------------------------------------

    def build_messages(
        self,
        kind: str,
        round_: int,
        parcels: Iterable[Addressed],
        config: Mapping[str, Any],
        attachments: Mapping[str, Callable[[], Arrays]] | None = None,
    ) -> list[Message]:
        """Return one message of Flower's type `kind` per client.

        `config` holds further facts. `attachments` are made and sent to clients that ask for them.
        """
        self._packer, self._letters = Packer(self._bitmaps), {}
        # Packed when the first client needs it, and the same array for all, so that it is serialised once.
        bitmap = functools.cache(lambda mask: {"mask": mask.packed()})
        common = {**config, "round": round_} | ({} if self.folder is None else {FOLDER: str(self.folder)})
        common |= {} if self.token is None else {RUN: self.token}
        messages = []
        for client, parcel, mask in parcels:
            facts = {**common, **({CLIENT: client} if self.roster.names else {}), **parcel.facts}
            later, brings = dict(attachments or {}), set[str]()
            if mask is not None:
                facts["digest"] = mask.digest
                if self._mask_travels and mask.count < mask.alive.size:  # everybody knows the dense one
                    later["mask"] = functools.partial(bitmap, mask)
                    brings = set() if self._holds.get(client) == mask.digest else {"mask"}
            self._letters[client] = Letter(kind, Parcel(parcel.arrays, facts), mask, later)
            messages.append(self._message(client, brings))
        return messages

    def mark_mask_held(self, client: int, mask: Mask) -> None:
        """Note that a client holds this mask: it answered under it, or made it itself."""
        before = self._holds.get(client)
        if before == mask.digest:
            return
        self._holds[client] = mask.digest
        if self._mask_travels and self.folder is not None and before not in (None, *self._holds.values()):
            # Nobody holds the old one any more. Should anybody need it after all, it is asked for and sent.
            (self.folder / MASKS / str(before)).unlink(missing_ok=True)

    def _message(self, client: int, brings: set[str]) -> Message:
        letter = self._letters[client]
        arrays = dict(letter.parcel.arrays)
        for name in sorted(brings):
            arrays |= letter.attachments[name]()
        record = self._packer.record(Parcel(arrays, letter.parcel.facts))
        group = str(letter.parcel.facts["round"])
        # Time to live = round timeout: Flower's default of 12 hours would let replies come rounds later.
        ttl = self._run.round_timeout
        return Message(record, self.roster.nodes[client], letter.kind, ttl=ttl, group_id=group)

    def exchange(self, grid: Grid, messages: Iterable[Message], reply_bytes: int) -> Iterator[Message]:
        """Send messages that `write` made; return the replies, of about this size, as they come."""
        courier = Courier(grid, self._run.round_timeout, reply_bytes)
        self.report = courier.outcome
        client_at = {node: client for client, node in self.roster.nodes.items()}
        self._push(courier, {client_at[message.metadata.dst_node_id]: message for message in messages})
        return self._replies(courier)

    def _replies(self, courier: Courier) -> Iterator[Message]:
        given: dict[int, set[str]] = {}
        for client, reply in courier.replies():
            self.report.up += sum(_sizes(reply).values())
            need, had = _need(reply), given.setdefault(client, set())
            if need is not None and need in self._letters[client].attachments and need not in had:
                had.add(need)
                self._push(courier, {client: self._message(client, had)})
                continue
            self._client_of[reply.metadata.reply_to_message_id] = client
            yield reply
            del reply

    def _push(self, courier: Courier, messages: dict[int, Message]) -> None:
        for client, message in messages.items():
            sizes = _sizes(message)
            if "mask" in self._letters[client].attachments:  # not one that belongs to the codec
                self.report.mask_down += sizes.pop("mask", 0)
            self.report.down += sum(sizes.values())
        courier.send(messages)

    # ---- in ----------------------------------------------------------------------------------

    def accepted_replies(
        self, replies: Iterable[Message], allowed: Allowed, check: Check, share: float | None, what: str
    ) -> Iterator[Reply]:
        """Yield the good replies; refuse the others by name, those with other arrays than `allowed` unopened.

        Raises
        ------
        RunFailed
            After the last reply, if fewer than `share` of the clients answered well; None asks for none.
        """
        for message in replies:
            client = self._client_of.pop(message.metadata.reply_to_message_id)
            try:
                reply = self._read(client, message, allowed, check)
            except PayloadError as error:
                self.report.refused[client] = str(error)
                continue
            self.report.ok.append(client)
            if reply.facts.get("note"):
                self.report.notes[client] = in_a_line(str(reply.facts["note"]))
            self.report.train_examples += int(reply.facts.get("passes", 0))
            self.report.eval_examples += int(reply.facts.get("looks", 0))
            mask = self._letters[client].mask
            if mask is not None:
                self.mark_mask_held(client, mask)
            yield reply
            del message, reply
        self._packer, self._letters = Packer(self._bitmaps), {}  # models that nobody will ask for any more
        if share is not None:
            self.report.require(share, what)

    def refuse(self, reply: Reply, reason: str) -> None:
        """Take back that a reply is a good one: beside the others of its round it is none."""
        self.report.ok.remove(reply.client)
        self.report.notes.pop(reply.client, None)
        self.report.refused[reply.client] = reason
        self.report.train_examples -= int(reply.facts.get("passes", 0))
        self.report.eval_examples -= int(reply.facts.get("looks", 0))

    def _read(self, client: int, message: Message, allowed: Allowed, check: Check) -> Reply:
        parcel = read_record(message.content, allowed)
        letter, facts = self._letters[client].parcel, parcel.facts
        if facts.get("need"):
            raise PayloadError(f"asks for {quoted(facts['need'])} again")
        for name in ("round", "digest"):
            if name in letter.facts and facts.get(name) != letter.facts[name]:
                raise PayloadError(f"{name} is {quoted(facts.get(name))}; it must be {letter.facts[name]!r}")
        held = self.dealt(client) if self.dealt is not None else self.roster.holding(client)
        if held is None:
            check_counts(facts, None, MOST_WORK)
        else:
            tested = self._letters[client].kind == "evaluate"
            check_counts(facts, held.test_images if tested else sum(held.counts), self.work(sum(held.counts)))
        check(client, parcel)
        return Reply(client, parcel.arrays, facts, int(facts["samples"]))


def _sizes(message: Message) -> dict[str, int]:
    # Counted on the encoded payload itself. By key: `.array_records` would build a reference cycle.
    arrays = message.content.get("arrays")
    return {name: len(array.data) for name, array in arrays.items()} if isinstance(arrays, ArrayRecord) else {}


def _need(message: Message) -> str | None:
    facts = message.content.get("facts")
    need = facts.get("need") if isinstance(facts, ConfigRecord) else None
    return need if isinstance(need, str) else None
