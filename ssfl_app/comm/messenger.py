"""Builds the messages of a round, exchanges them, and refuses bad replies by name.

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

from ssfl_app.comm.exchange import ExchangeReport, MessageExchange
from ssfl_app.comm.membership import ClientRegistry
from ssfl_app.comm.payload import MASKS, Metadata, Payload, PayloadEncoder, decode_payload
from ssfl_app.data.summary import DataSummary
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Allowed, Arrays, PayloadError
from ssfl_app.text import in_a_line, quoted

FOLDER = "folder"
"""Fact of a message in simulation: where simulated clients keep their files."""

RUN = "run"
"""Fact of a message in deployment: 16 hex digits that tell this run's files on a node from another run's."""

CLIENT = "client"
"""Fact of a message to a site with data of its own: the number that its name has in this run."""

MOST_WORK = 2**40
"""Images of one message, of a client that nothing is known of: more is no count, and would spoil the sum."""

Check = Callable[[int, Payload], None]
"""check(client, parcel) raises PayloadError on an answer that an algorithm must not see."""

Outgoing = tuple[int, Payload, Mask | None]
"""Client, what it is sent, and the mask that is encoded under; None for a question."""


@dataclass(frozen=True)
class Reply:
    """A checked answer of one client; `samples` weighs it in a mean."""

    client: int
    arrays: Arrays
    metadata: Metadata
    samples: int


@dataclass(frozen=True)
class PendingMessage:
    """What was written to a client, and what may be sent after: attachments by the name a client asks for them."""

    kind: str
    payload: Payload
    mask: Mask | None
    attachments: Mapping[str, Callable[[], Arrays]]


class Messenger:
    """Writes messages to clients by number, carries them, and opens the replies one at a time.

    Parameters
    ----------
    registry : ClientRegistry
        Who is who.
    round_timeout : float
        Seconds after which a message that is not answered is lost.
    mask_travels : bool
        Whether clients must be given the mask to read a message: the codec down is `MaskedValues`.
    bitmaps : str
        As `PayloadEncoder` has it.

    Attributes
    ----------
    outcome : ExchangeReport
        Of the exchange that is going on, or the last one.
    folder : Path or None
        Where simulated clients keep their files.
    token : str or None
        What real clients call this run in the names of their files.
    roster : ClientRegistry
        Who is who.
    dealt : callable or None
        What the server knows that it deals to a client; None: a client holds what it said at the greeting.
    work : callable
        Most images that go through the model of a client which holds so many, each as often as it is used, for one
        message.
    """

    def __init__(
        self, registry: ClientRegistry, round_timeout: float, *, mask_travels: bool, bitmaps: str = "plain"
    ) -> None:
        self.report = ExchangeReport()
        self.folder: Path | None = None
        self.token: str | None = None
        self.registry = registry
        self.dealt: Callable[[int], DataSummary] | None = None
        self.work: Callable[[int], int] = lambda images: MOST_WORK
        self._timeout, self._mask_travels, self._bitmaps = round_timeout, mask_travels, bitmaps
        self._encoder = PayloadEncoder(bitmaps)
        self._letters: dict[int, PendingMessage] = {}  # of the exchange that is going on
        self._holds: dict[int, str] = {}  # client -> digest of the mask it answered under
        self._client_of: dict[str, int] = {}  # message id -> client

    # ---- who is who --------------------------------------------------------------------------

    def wait_for_clients(self, grid: Grid) -> dict[int, Metadata]:
        """Wait until every client is connected, and return what each says of itself.

        Raises
        ------
        RunFailed
            As `ClientRegistry.meet` does.
        """
        return self.registry.wait_for_clients(grid)

    def readmit(self, grid: Grid) -> dict[str, Any]:
        """Let nodes that were set up anew take their old places; return what a round's record says of it."""
        back, unassigned_nodes = self.registry.readmit(grid)
        for client in back:
            self._holds.pop(client, None)
        told = {
            "rejoined": back,
            "strangers": {str(node): unassigned_nodes[node] for node in sorted(unassigned_nodes)},
        }
        return {name: value for name, value in told.items() if value}

    # ---- out ---------------------------------------------------------------------------------

    def build_messages(
        self,
        kind: str,
        round_: int,
        payloads: Iterable[Outgoing],
        config: Mapping[str, Any],
        attachments: Mapping[str, Callable[[], Arrays]] | None = None,
    ) -> list[Message]:
        """Return one message of Flower's type `kind` per client.

        `config` holds further facts. `attachments` are made and sent to clients that ask for them.
        """
        self._encoder, self._letters = PayloadEncoder(self._bitmaps), {}
        # Packed when the first client needs it, and the same array for all, so that it is serialised once.
        bitmap = functools.cache(lambda mask: {"mask": mask.packed()})
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
                    brings = set() if self._holds.get(client) == mask.digest else {"mask"}
            self._letters[client] = PendingMessage(kind, Payload(payload.arrays, metadata), mask, later)
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
        arrays = dict(letter.payload.arrays)
        for name in sorted(brings):
            arrays |= letter.attachments[name]()
        record = self._encoder.record(Payload(arrays, letter.payload.metadata))
        group = str(letter.payload.metadata["round"])
        # Time to live = round timeout: Flower's default of 12 hours would let replies come rounds later.
        ttl = self._timeout
        return Message(record, self.registry.nodes[client], letter.kind, ttl=ttl, group_id=group)

    def exchange(self, grid: Grid, messages: Iterable[Message], reply_bytes: int) -> Iterator[Message]:
        """Send messages that `write` made; return the replies, of about this size, as they come."""
        exchange = MessageExchange(grid, self._timeout, reply_bytes)
        self.report = exchange.report
        client_at = {node: client for client, node in self.registry.nodes.items()}
        self._push(exchange, {client_at[message.metadata.dst_node_id]: message for message in messages})
        return self._replies(exchange)

    def _replies(self, exchange: MessageExchange) -> Iterator[Message]:
        given: dict[int, set[str]] = {}
        for client, reply in exchange.replies():
            self.report.up += sum(_sizes(reply).values())
            need, had = _need(reply), given.setdefault(client, set())
            if need is not None and need in self._letters[client].attachments and need not in had:
                had.add(need)
                self._push(exchange, {client: self._message(client, had)})
                continue
            self._client_of[reply.metadata.reply_to_message_id] = client
            yield reply
            del reply

    def _push(self, exchange: MessageExchange, messages: dict[int, Message]) -> None:
        for client, message in messages.items():
            sizes = _sizes(message)
            if "mask" in self._letters[client].attachments:  # not one that belongs to the codec
                self.report.mask_down += sizes.pop("mask", 0)
            self.report.down += sum(sizes.values())
        exchange.send(messages)

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
            if reply.metadata.get("note"):
                self.report.notes[client] = in_a_line(str(reply.metadata["note"]))
            self.report.train_examples += int(reply.metadata.get("passes", 0))
            self.report.eval_examples += int(reply.metadata.get("looks", 0))
            mask = self._letters[client].mask
            if mask is not None:
                self.mark_mask_held(client, mask)
            yield reply
            del message, reply
        self._encoder, self._letters = PayloadEncoder(self._bitmaps), {}  # models that nobody will ask for any more
        if share is not None:
            self.report.require(share, what)

    def refuse(self, reply: Reply, reason: str) -> None:
        """Take back that a reply is a good one: beside the others of its round it is none."""
        self.report.ok.remove(reply.client)
        self.report.notes.pop(reply.client, None)
        self.report.refused[reply.client] = reason
        self.report.train_examples -= int(reply.metadata.get("passes", 0))
        self.report.eval_examples -= int(reply.metadata.get("looks", 0))

    def _read(self, client: int, message: Message, allowed: Allowed, check: Check) -> Reply:
        payload = decode_payload(message.content, allowed)
        letter, metadata = self._letters[client].payload, payload.metadata
        if metadata.get("need"):
            raise PayloadError(f"asks for {quoted(metadata['need'])} again")
        for name in ("round", "digest"):
            if name in letter.metadata and metadata.get(name) != letter.metadata[name]:
                raise PayloadError(f"{name} is {quoted(metadata.get(name))}; it must be {letter.metadata[name]!r}")
        held = self.dealt(client) if self.dealt is not None else self.registry.holding(client)
        if held is None:
            check_counts(metadata, None, MOST_WORK)
        else:
            tested = self._letters[client].kind == "evaluate"
            check_counts(metadata, held.test_images if tested else sum(held.counts), self.work(sum(held.counts)))
        check(client, payload)
        return Reply(client, payload.arrays, metadata, int(metadata["samples"]))


def check_counts(metadata: Metadata, images: int | None, work: int) -> None:
    """Raise PayloadError unless the counts of an answer are those of a client that holds so many images.

    Every answer passes here, of whatever strategy and question. At most, not equal: fedfomo trains on a part of them.

    Parameters
    ----------
    images : int or None
        That the client holds for what it was asked: those it trains on, or with an evaluation those it tests on;
        None: nothing is known.
    work : int
        Images, each as often as it is used, that one message can make go through the model.
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


def _sizes(message: Message) -> dict[str, int]:
    # Counted on the encoded payload itself. By key: `.array_records` would build a reference cycle.
    arrays = message.content.get("arrays")
    return {name: len(array.data) for name, array in arrays.items()} if isinstance(arrays, ArrayRecord) else {}


def _need(message: Message) -> str | None:
    metadata = message.content.get("facts")
    need = metadata.get("need") if isinstance(metadata, ConfigRecord) else None
    return need if isinstance(need, str) else None
