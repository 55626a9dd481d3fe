"""Builds the messages of a round, exchanges them, and refuses bad replies by name.

Mask protocol: the mask goes down once per client, as a bitmap with the first message that needs it. Every message
carries the digest of (names, shapes, mask). A client that does not hold that mask (restarted, joined late)
answers "need mask" and gets the message again with the mask: no exception, no lost round. Of a mask that moved a
little (`mask_before`) those who hold the one before get the places that differ, where these are fewer bytes. Initial
weights work the same way: a question names their digest, and a client that makes others from the seed asks for them.

Refusal: an answer that is for another round or digest, or whose arrays and metadata are not what they must be, is
refused by name and counted. It never reaches an algorithm.
"""

import contextlib
import functools
import itertools
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from ssfl_app.comm.exchange import Closes, ExchangeReport, MessageExchange
from ssfl_app.comm.membership import ClientRegistry
from ssfl_app.comm.payload import (
    BEFORE,
    CLIENT,
    FOLDER,
    MASKS,
    RUN,
    WITH_MASK,
    Metadata,
    Payload,
    PayloadEncoder,
    decode_payload,
    encoded_sizes,
)
from ssfl_app.data.summary import DataSummary
from ssfl_app.files import check_regular, write_bytes
from ssfl_app.sparsity.codec import write_moved
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Allowed, Arrays, PayloadError
from ssfl_app.text import quoted

MOST_WORK = 2**40
"""Images of one message, of a client that nothing is known of: more is no count, and would spoil the sum."""

Check = Callable[[int, Payload], None]
"""check(client, payload) raises PayloadError on an answer that an algorithm must not see."""

Outgoing = tuple[int, Payload, Mask | None]
"""Client, what it is sent, and the mask that is encoded under; None for a question."""


@dataclass(frozen=True, kw_only=True)
class Reply(Payload):
    """A checked answer of one client; `samples` weighs it in a mean."""

    client: int
    samples: int


@dataclass(frozen=True)
class Further:
    """A question to clients whose answers in an exchange are in.

    Attributes
    ----------
    question : str
    round_ : int
    payloads : dict of int to Payload
        What each client is asked.
    allowed : dict
        Arrays that an answer may have.
    check : callable
        check(client, payload) raises PayloadError on an answer that `take` must not see.
    take : callable
        Gets each good answer.
    """

    question: str
    round_: int
    payloads: Mapping[int, Payload]
    allowed: Allowed
    check: Check
    take: Callable[[Reply], None]


@dataclass(frozen=True)
class PendingMessage:
    """What was written to a client, and what may be sent after: attachments by the name a client asks for them.

    `mask` is the one that the reply is encoded under; `config` the user's own, where there is one.
    """

    kind: str
    payload: Payload
    mask: Mask | None
    attachments: Mapping[str, Callable[[], Arrays]]
    config: Mapping[str, Any] | None = None


R = TypeVar("R")  # a checked reply


class Messenger:
    """Carries messages, sends after what clients ask for, and opens the replies one at a time.

    An exchange may take `timeout` seconds, and so long do messages live. `report` is of the exchange that goes on, or
    of the last one; `bitmaps` and `join` are as `PayloadEncoder` has them. `session` tells this run from others
    where masks are bound to it.
    """

    def __init__(self, timeout: float, bitmaps: str = "plain", *, join: bool = False) -> None:
        self.report = ExchangeReport()
        self._timeout, self._bitmaps, self._join = timeout, bitmaps, join
        self._holds: dict[int, str] = {}  # client -> digest of the mask it answered under
        self._had: dict[int, str] = {}  # the same, in a run that was resumed of before as well
        self.mask_before: Mask | None = None
        """What the mask of the next messages was made of by a little: who holds it is told the places that differ."""
        self._client_of: dict[str, int] = {}  # message id -> client
        self._grid: Grid | None = None  # of the last exchange
        self._closed: list[MessageExchange] = []  # those that may have closed before the last answer
        self._kept: MessageExchange | None = None  # of trainings whose late answers count
        self._pending: dict[int, PendingMessage] = {}  # of the exchange that is going on, and of who is still at work
        self.session, self._last_exchange = secrets.token_hex(8), 0
        self._exchange_file: Path | None = None
        self._forget()

    def node_of(self, client: int) -> int:
        """Return the node that a client lives on. Default: clients are named by their nodes."""
        return client

    def next_exchange(self) -> int:
        """Return the number of a new exchange of sums: larger than all before, in a run that was resumed, too."""
        self._last_exchange = max(self._last_exchange + 1, time.time_ns() // 1_000_000)
        if self._exchange_file is not None:
            write_bytes(self._exchange_file, f"{self._last_exchange}\n".encode())
        return self._last_exchange

    def keep_exchange(self, path: Path) -> None:
        """Keep the number of the last exchange in a file, and go on above the one there: clocks may go back."""
        self._exchange_file = path
        with contextlib.suppress(OSError, ValueError):
            check_regular(path)
            self._last_exchange = max(self._last_exchange, int(path.read_text("utf-8")))

    def still_at_work(self) -> list[int]:
        """Return the clients that an exchange closed without, and that have not answered since."""
        if self._kept is not None:
            return self._kept.waiting()
        found = [(exchange, exchange.still_at_work()) for exchange in self._closed]
        self._closed = [exchange for exchange, clients in found if clients]
        return sorted({client for _, clients in found for client in clients})

    def sent(self, client: int) -> Payload:
        """Return what a client was sent, until it has answered."""
        return self._pending[client].payload

    # ---- out ---------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Let go of messages that nobody will ask about any more."""
        self._encoder = PayloadEncoder(self._bitmaps, join=self._join)
        at_work = () if self._kept is None else self._kept.waiting()
        self._pending = {client: self._pending[client] for client in at_work}

    def _message(self, client: int, brings: Iterable[str]) -> Message:
        pending = self._pending[client]
        arrays = dict(pending.payload.arrays)
        for name in sorted(brings):
            arrays |= pending.attachments[name]()
        record = self._encoder.record(Payload(arrays, pending.payload.metadata))
        if pending.config is not None:
            record["config"] = ConfigRecord(dict(pending.config))  # its own: in one process a client may change it
        group = str(pending.payload.metadata["round"])
        # Time to live = round timeout: Flower's default of 12 hours would let replies come rounds later.
        return Message(record, self.node_of(client), pending.kind, ttl=self._timeout, group_id=group)

    def exchange(
        self, grid: Grid, messages: Sequence[Message], reply_bytes: int, closes: Closes | None = None
    ) -> Iterator[Message]:
        """Send messages that `build_messages` made; return the replies, of about this size, as they come.

        `closes` says when the exchange ends before the last one.
        """
        self._grid = grid
        if closes is not None and self._kept is not None:
            exchange = self._kept
            exchange.reopen(closes)
        else:
            exchange = MessageExchange(grid, self._timeout, reply_bytes, closes)
        if closes is not None and closes.keeps:
            self._kept = exchange
        elif closes is not None:
            self._closed.append(exchange)
        self.report, self.report.asked = exchange.report, len(messages)
        client_at = {self.node_of(client): client for client in self._pending}
        self._push(exchange, {client_at[message.metadata.dst_node_id]: message for message in messages})
        arrived = functools.partial(self._arrived, exchange, defaultdict(set))
        # Without a frame that would hold a reply while the next one is awaited.
        return filter(None, itertools.starmap(arrived, exchange.replies()))

    def _arrived(
        self, exchange: MessageExchange, given: defaultdict[int, set[str]], client: int, reply: Message
    ) -> Message | None:
        """Return the reply, or None if it asks for something, which is sent."""
        size, traffic = sum(encoded_sizes(reply.content).values()), self.report.traffic[client]
        self.report.up += size
        traffic.bytes_up, traffic.messages_up = traffic.bytes_up + size, traffic.messages_up + 1
        need, had = _need(reply), given[client]
        if need is not None and need in self._pending[client].attachments and need not in had:
            had.add(need)
            self._push(exchange, {client: self._message(client, had)})
            return None
        self._client_of[reply.metadata.reply_to_message_id] = client
        return reply

    @contextmanager
    def aside(self) -> Iterator[ExchangeReport]:
        """Let an exchange inside belong to the one before it: its bytes count there, as does who is gone in it."""
        before = self.report
        try:
            yield before
        finally:
            before.down, before.up = before.down + self.report.down, before.up + self.report.up
            before.further.append(self.report)
            for client, why in {**self.report.lost, **self.report.refused}.items():
                before.notes[client] = f"its answer counts, and it did not help to unmask the sum: {why}"
            self.report = before

    def ask_more(self, further: Further) -> None:
        """Ask clients whose answers in this exchange are in: a second exchange, which belongs to it (`aside`)."""
        assert self._grid is not None
        with self.aside():
            self._ask(self._grid, further)

    def _ask(self, grid: Grid, further: Further) -> None:
        """Ask, and hand on each good answer."""
        raise NotImplementedError

    def _push(self, exchange: MessageExchange, messages: dict[int, Message]) -> None:
        for client, message in messages.items():
            sizes = encoded_sizes(message.content)
            traffic, pending = self.report.traffic[client], self._pending[client]
            if "mask" in pending.attachments:  # not one that belongs to the codec
                bitmap = sum(sizes.pop(name, 0) for name in WITH_MASK)
                self.report.mask_down += bitmap
                traffic.bytes_down += self._on_clock(client, bitmap)
            self.report.down += sum(sizes.values())
            traffic.bytes_down += sum(sizes.values())
            traffic.messages_down += 1
        exchange.send(messages)

    def _on_clock(self, client: int, told: int) -> int:
        """Return the bytes of `told`, which tell a client a mask, that it takes had the run not been resumed."""
        pending = self._pending[client]
        if self._had.get(client) == pending.payload.metadata["digest"]:
            return 0
        if told and "moved" in pending.attachments and BEFORE not in pending.payload.metadata:
            return sum(map(self._encoder.nbytes, pending.attachments["moved"]().values()))
        return told

    # ---- in ----------------------------------------------------------------------------------

    def _receive(self, read: Callable[[int, Message], R], take: Callable[[R], None], message: Message) -> None:
        """Hand a good reply to `take`; refuse another one by name. `read` raises PayloadError or accepts it."""
        client = self._client_of.pop(message.metadata.reply_to_message_id)
        try:
            reply = read(client, message)
        except PayloadError as error:
            self.report.refuse(client, str(error))
            return
        take(reply)

    def _opened(self, client: int, message: Message, allowed: Allowed) -> Payload:
        """Return what a reply holds; refuse one to another message, and unopened one with arrays beside `allowed`."""
        payload = decode_payload(message.content, allowed)
        sent, metadata = self._pending[client].payload.metadata, payload.metadata
        if metadata.get("need"):
            raise PayloadError(f"asks for {quoted(metadata['need'])} again")
        for name in ("round", "digest"):
            if name in sent and metadata.get(name) != sent[name]:
                raise PayloadError(f"{name} is {quoted(metadata.get(name))}; it must be {sent[name]!r}")
        return payload


class ClientMessenger(Messenger):
    """Writes to numbered clients, each under its mask.

    Parameters
    ----------
    mask_travels : bool
        Whether clients must be given the mask to read a message: the codec down is `MaskedValues`.
    folder : Path or None
        Where simulated clients keep their files.
    token : str or None
        What real clients call this run in the names of their files.
    dealt : callable or None
        What the server knows that it deals to a client; None: a client holds what it said in the handshake.
    work : callable
        Most images that go through the model of a client which holds so many, each as often as it is used, for one
        message.
    """

    def __init__(
        self,
        registry: ClientRegistry,
        timeout: float,
        *,
        mask_travels: bool,
        bitmaps: str = "plain",
        folder: Path | None = None,
        token: str | None = None,
        dealt: Callable[[int], DataSummary] | None = None,
        work: Callable[[int], int] = lambda images: MOST_WORK,
    ) -> None:
        super().__init__(timeout, bitmaps, join=folder is None)
        self.registry, self.folder, self.token, self.dealt, self.work = registry, folder, token, dealt, work
        self._mask_travels = mask_travels
        self.session = token or self.session

    def held(self, client: int) -> int | None:
        """Return how many training samples a client holds; None: nobody said."""
        held = self._holding(client)
        return None if held is None else sum(held.counts)

    def _holding(self, client: int) -> DataSummary | None:
        return self.registry.holding(client) if self.dealt is None else self.dealt(client)

    def node_of(self, client: int) -> int:
        """Return the node that holds a client's place."""
        return self.registry.nodes[client]

    def readmit(self, grid: Grid) -> dict[str, Any]:
        """Let nodes that were set up anew take their old places; return what a round's record says of it."""
        back, unassigned_nodes = self.registry.readmit(grid)
        for client in back:
            self._holds.pop(client, None)
        told = {"rejoined": back, "strangers": {str(node): why for node, why in sorted(unassigned_nodes.items())}}
        return {name: value for name, value in told.items() if value}

    def build_messages(
        self,
        kind: str,
        round_: int,
        payloads: Iterable[Outgoing],
        config: Mapping[str, Any],
        attachments: Mapping[str, Callable[[], Arrays]] | None = None,
    ) -> list[Message]:
        """Return one message of Flower's type `kind` per client.

        `config` holds further metadata. `attachments` are made and sent to clients that ask for them.
        """
        self._forget()
        # Packed when the first client needs it, and the same array for all, so that it is serialised once.
        bitmap = functools.cache(lambda mask: {"mask": mask.packed()})
        moved = functools.cache(lambda mask: self._moved(mask, bitmap(mask)))
        common = {**config, "round": round_} | ({} if self.folder is None else {FOLDER: str(self.folder)})
        common |= {} if self.token is None else {RUN: self.token}
        messages = []
        for client, payload, mask in payloads:
            metadata = {**common, **({CLIENT: client} if self.registry.names else {}), **payload.metadata}
            later, brings = dict(attachments or {}), set[str]()
            if mask is not None:
                metadata["digest"] = mask.digest
                if self._mask_travels and mask.count < mask.alive.size:  # everybody knows the dense one
                    later["mask"] = functools.partial(bitmap, mask)
                    held, before = self._holds.get(client), self.mask_before
                    brings = set() if held == mask.digest else {"mask"}
                    known = before is not None and before.digest in (held, self._had.get(client))
                    if brings and known and moved(mask):
                        later["moved"] = functools.partial(moved, mask)
                        if held:  # of a resumed run clients are new
                            brings, metadata[BEFORE] = {"moved"}, held
            self._pending[client] = PendingMessage(kind, Payload(payload.arrays, metadata), mask, later)
            messages.append(self._message(client, brings))
        return messages

    def masks_held(self, clients: int) -> npt.NDArray[np.uint8]:
        """Return the digests of the masks that so many clients were given, uint8, shape (clients * 32,), or zeros."""
        held = np.zeros((clients, 32), dtype=np.uint8)
        for client, digest in self._had.items():
            held[client] = np.frombuffer(bytes.fromhex(digest), dtype=np.uint8)
        return held.reshape(-1)

    def restore_masks_held(self, held: npt.NDArray[np.uint8]) -> None:
        """Go on with what `masks_held` returned.

        Simulated clients are new when a run is resumed, and are sent their masks again. That is no traffic of theirs.
        """
        self._had = {client: row.tobytes().hex() for client, row in enumerate(held.reshape(-1, 32)) if row.any()}

    def _moved(self, mask: Mask, bitmap: Arrays) -> Arrays:
        """Return where a mask differs from the one before; {} where that is not fewer bytes than its bitmap."""
        assert self.mask_before is not None
        places = write_moved(self.mask_before, mask)
        ours, theirs = (self._encoder.nbytes(array) for arrays in (places, bitmap) for array in arrays.values())
        return places if ours < theirs else {}

    def mark_mask_held(self, client: int, mask: Mask) -> None:
        """Note that a client holds this mask: it answered under it, or made it itself."""
        before = self._holds.get(client)
        if before == mask.digest:
            return
        self._holds[client] = self._had[client] = mask.digest
        if self._mask_travels and self.folder is not None and before not in (None, *self._holds.values()):
            # Nobody holds the old one any more. Should anybody need it after all, it is asked for and sent.
            (self.folder / MASKS / str(before)).unlink(missing_ok=True)

    def receive(
        self,
        replies: Iterable[Message],
        allowed: Allowed,
        check: Check,
        take: Callable[[Reply], None],
        share: float | None,
        what: str,
    ) -> None:
        """Hand each good reply to `take`, and let go of it before the next one is awaited.

        The others are refused by name, those with other arrays than `allowed` unopened.

        Raises
        ------
        RunFailed
            After the last reply, if fewer than `share` of the clients answered well; None asks for none.
        """
        read = functools.partial(self._read, allowed, check)
        for _ in map(functools.partial(self._receive, read, take), replies):
            pass
        self._forget()
        if share is not None:
            self.report.require(share, what)

    def _ask(self, grid: Grid, further: Further) -> None:
        outgoing = ((client, payload, None) for client, payload in further.payloads.items())
        messages = self.build_messages(f"query.{further.question}", further.round_, outgoing, {})
        replies, what = self.exchange(grid, messages, 0), f"the question {further.question!r}"
        self.receive(replies, further.allowed, further.check, further.take, None, what)

    def _read(self, allowed: Allowed, check: Check, client: int, message: Message) -> Reply:
        payload, pending = self._opened(client, message, allowed), self._pending[client]
        metadata, held = payload.metadata, self._holding(client)
        if held is None:
            check_counts(metadata, None, MOST_WORK)
        else:
            images = sum(held.counts)
            check_counts(metadata, held.test_images if pending.kind == "evaluate" else images, self.work(images))
        check(client, payload)
        if pending.mask is not None:
            self.mark_mask_held(client, pending.mask)
        self.report.accept(client, metadata)
        return Reply(payload.arrays, metadata, client=client, samples=int(metadata["samples"]))


def check_counts(metadata: Metadata, images: int | None, work: int) -> None:
    """Raise PayloadError unless the counts of an answer are those of a client that holds so many images.

    Every answer passes here, of whatever strategy and question. At most, not equal: fedfomo trains on a part of them.
    `images` are those it trains on, or with an evaluation tests on; None: nothing is known. `work` counts the images,
    each as often as it is used, that one message can make go through the model.
    """
    samples = metadata.get("samples")
    if type(samples) is not int or samples < 0:
        raise PayloadError(f"samples is {quoted(samples)}; it must be a whole number of at least 0")
    if images is not None and samples > images:
        raise PayloadError(f"samples is {samples}; this client holds {images}")
    for name in ("passes", "looks"):
        count = metadata.get(name, 0)
        if type(count) is not int or not 0 <= count <= work:
            raise PayloadError(f"{name} is {quoted(count)}; it must be a whole number from 0 to {work}")


def _need(message: Message) -> str | None:
    metadata = message.content.get("facts")
    need = metadata.get("need") if isinstance(metadata, ConfigRecord) else None
    return need if isinstance(need, str) else None
