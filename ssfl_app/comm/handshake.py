"""Asks each node who it is, ``query.hello``, until it answers or the time is over, and checks the answers.

A lost question costs seconds, not the run. Nor does a malformed answer end it: that node is set aside by name.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ssfl_app.comm.exchange import BESIDES, MOST_IN_FLIGHT, is_simulation
from ssfl_app.comm.node_config import NAME
from ssfl_app.comm.payload import Metadata, Payload, PayloadEncoder, decode_metadata
from ssfl_app.comm.pulling import BrokenOff, Puller
from ssfl_app.comm.ray_cluster import why_an_actor_died
from ssfl_app.data.summary import read_data_summary
from ssfl_app.locks import RunFailed
from ssfl_app.privacy.keys import check_public
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.text import cause, quoted

RETRY = 5.0
"""Seconds between two handshakes with a node whose answer was an error of Flower's."""

TRY = 90.0
"""Seconds after which a silent node is asked again; an answer to the earlier one still counts.

Longer than the minute in which Flower notices that a node is gone: a busy node would answer each of them in turn."""

MOST_BYTES = 2**20
"""Bytes of all metadata of a handshake."""


KEY = "key"
"""Fact of an answer to ``query.hello``: the 32 bytes of a client's public key, under secure aggregation."""


@dataclass(frozen=True)
class Handshake:
    """A checked answer to ``query.hello``: a client's number, or the name of a site, and what it says of itself."""

    node: int
    number: int | None
    name: str
    metadata: Metadata

    @property
    def place(self) -> int | str:
        """What no two nodes may claim."""
        return self.name if self.number is None else self.number


def read_handshake(node: int, reply: Message) -> Handshake:
    """Return what a node says of itself; PayloadError if it is not what a client of this project says."""
    if not reply.has_content():
        raise PayloadError("it has neither content nor an error")
    metadata = decode_metadata(reply.content)
    if sum(len(name) + len(str(value)) for name, value in metadata.items()) > MOST_BYTES:
        raise PayloadError(f"the handshake is larger than {MOST_BYTES} characters")
    number, name = metadata.get("client"), metadata.get("name", "")
    for word in ("code", "device"):
        text = metadata.get(word)
        if not isinstance(text, str) or len(text) > 64 or not text.isprintable():
            raise PayloadError(f"{word} is {quoted(text)}; it is one line of at most 64 characters")
    if KEY in metadata:
        check_public(metadata[KEY])
    if "name" in metadata:
        if number is not None or not isinstance(name, str) or not NAME.fullmatch(name):
            raise PayloadError(
                f"name is {quoted(name)} and client is {quoted(number)}; a site has a name and no number"
            )
        read_data_summary(metadata)  # nobody but the site knows what it holds
        return Handshake(node, None, name, metadata)
    if type(number) is not int or not 0 <= number < 2**31:
        raise PayloadError(f"client is {quoted(number)}; it is a whole number of at least 0")
    if "classes" in metadata:
        read_data_summary(metadata)
    return Handshake(node, number, "", metadata)


class HandshakePoller:
    """Asks nodes who they are until each has answered.

    Attributes
    ----------
    answered : set of int
        Nodes that need not be asked again, whatever they answered.
    lost, raised, odd : dict of int to str
        Nodes without a good answer, and why: none came or Flower made an error of it; the client raised an exception;
        the answer is not one of ours.
    """

    def __init__(self, grid: Grid, end: float) -> None:
        self.answered: set[int] = set()
        self.lost: dict[int, str] = {}
        self.raised: dict[int, str] = {}
        self.odd: dict[int, str] = {}
        self._grid, self._end = grid, end
        self._puller = Puller(grid, end, BESIDES)
        self._record = PayloadEncoder().record(Payload())
        self._asked: dict[int, float] = {}
        self._waiting: dict[str, int] = {}

    def silent(self, nodes: Iterable[int]) -> bool:
        """Return whether an answer of one of the nodes may still be on its way."""
        return bool(set(nodes) - self.answered - set(self.lost))

    def reasons(self) -> dict[int, str]:
        """Return why nodes have not given a good answer, as far as they say or show."""
        stuck = dict.fromkeys(self.uploading(), "no whole answer: its upload did not end")
        return {**self.lost, **stuck, **self.odd, **self.raised}

    def uploading(self) -> set[int]:
        """Return the nodes that have announced an answer which is not whole yet."""
        return {node for message_id, node in self._waiting.items() if self._puller.begun(message_id)} - self.answered

    def ask(self, nodes: Iterable[int]) -> None:
        """Ask the connected nodes that are due: new, back again, or without an answer for too long.

        Simulated ones are asked `MOST_IN_FLIGHT` at a time.
        """
        now, there = time.monotonic(), set(nodes)
        for node in set(self._asked) - there:  # it may come back, and what it was working on is gone
            del self._asked[node]
            if node in self.odd or node in self.raised:  # then with what was wrong put right
                self.answered.discard(node)
                self.odd.pop(node, None)
                self.raised.pop(node, None)
        room = MOST_IN_FLIGHT - len(self._waiting) if is_simulation(self._grid) else len(there)
        due: list[int] = []
        for node in sorted(there - self.answered):
            if len(due) >= room:
                break
            waited = now - self._asked.get(node, -TRY)
            if node not in self._asked or waited >= (RETRY if node in self.lost else TRY):
                if node in self._asked:
                    self.lost.setdefault(node, f"no answer within {TRY:g} s")
                self._asked[node] = now
                due.append(node)
        ttl = max(1.0, self._end - now)
        messages = [Message(self._record, node, "query.hello", ttl=ttl) for node in due]
        accepted = {i for i in self._grid.push_messages(messages) if i} if messages else set()
        for message in messages:
            if message.metadata.message_id in accepted:
                self._waiting[message.metadata.message_id] = message.metadata.dst_node_id
            else:
                self.lost[message.metadata.dst_node_id] = "Flower did not accept the message"

    def hear(self) -> list[Handshake]:
        """Return the good answers that came; RunFailed if a Ray actor died."""
        good = []
        self._puller.look(self._waiting)
        for message_id, node in list(self._waiting.items()):
            reply = self._pull(message_id, node)
            if reply is None or node in self.answered:
                continue
            if reply.has_error():
                self._sort(node, reply.error.code, cause(reply.error.reason or ""))
                continue
            try:
                good.append(read_handshake(node, reply))
                self._settle(node)
            except PayloadError as error:
                self._settle(node, f"its handshake is malformed: {cause(str(error))}")
        return good

    def _pull(self, message_id: str, node: int) -> Message | None:
        try:
            for reply in self._puller.pull(message_id):
                self._waiting.pop(message_id, None)
                return reply
        except BrokenOff as error:
            del self._waiting[message_id]
            self.lost[node] = str(error)
        except (ValueError, TypeError, LookupError, AttributeError, DecodeError) as error:
            # Flower builds a message from the objects that a node uploaded, which may be anything.
            del self._waiting[message_id]
            ours = isinstance(error, PayloadError)
            why = cause(str(error)) if ours else f"Flower cannot read it ({type(error).__name__})"
            self._settle(node, f"its handshake is no message: {why}")
        return None

    def _settle(self, node: int, odd: str = "") -> None:
        self.answered.add(node)
        self.lost.pop(node, None)
        if odd:
            self.odd[node] = odd

    def _sort(self, node: int, code: int, reason: str) -> None:
        if code == ErrorCode.UNKNOWN and is_simulation(self._grid):
            raise RunFailed(f"a Ray actor died at the handshake ({reason}). {why_an_actor_died('')}")
        if code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
            self._settle(node)
            self.raised[node] = f"raised: {reason}"
        else:
            self.lost[node] = f"Flower error {code}: {reason}"
