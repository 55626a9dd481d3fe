"""One exchange of messages: push to many clients, pull their replies one at a time, lose nothing silently.

Stands in for Flower's `Grid.send_and_receive`, which holds every reply until the last one is there and sleeps
up to 3 s between polls. Here at most one reply is in memory, so server memory does not grow with the number
of clients, and every client ends up in exactly one of three lists: ok, lost, refused.
"""

import math
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ssfl_app.comm.client_files import ClientStateError
from ssfl_app.comm.payload import Metadata
from ssfl_app.comm.pulling import BrokenOff, Puller
from ssfl_app.comm.ray_cluster import why_an_actor_died
from ssfl_app.cores import training_cores
from ssfl_app.locks import RunFailed, memory_ran_out
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.text import cause, in_a_line

SIMULATION_POLL = 0.01
DEPLOYMENT_POLL = 0.25
"""Seconds between polls: a pull costs 0.1 ms in simulation and 25 ms of SuperLink CPU over HTTP."""

FEWER_ACTORS = "try fewer actors (engine.actors) or a smaller model"

IN_FLIGHT = 100_000_000
"""Bytes of replies that may be on their way at once in simulation, if that is more than one a core."""

MOST_IN_FLIGHT = 500
"""Messages that may be so: each costs a look for its reply, and Flower takes a tenth of a second to hand them out."""

MOST_NAMED = 8
"""Clients that a reason names."""

LARGER, BESIDES = 4, 2**24
"""Bytes of a reply at most: so many times the expected ones (positions, squared gradients), and so many besides."""


def is_simulation(grid: Grid) -> bool:
    """Return whether the nodes are simulated: by Flower on Ray, or by our in-process engine."""
    return type(grid).__name__ == "InMemoryGrid" or getattr(grid, "in_process", False)


def fewer_at_once(grid: Grid) -> str:
    """Return what to try where the simulated clients of this grid have too little memory."""
    count = getattr(grid, "concurrent", 0)
    if count > 1:
        return f"{count} clients work at once, try a lower engine.concurrent or a smaller model"
    return "try a smaller model or batch" if count else FEWER_ACTORS


LAST, LEAST = 5, 3
"""Answers of a client that say how long it usually takes, and how many of them must be known."""


class Deadlines:
    """How long each client is waited for: `factor` times the median time of its last good answers, late ones too.

    Attributes
    ----------
    factor : float
        ``run.deadline``.
    seconds : array of float64, shape (clients, LAST)
        What the last answers of a client took, the newest first; NaN: it has not answered so often.
    """

    def __init__(self, factor: float, clients: int) -> None:
        self.factor, self.seconds = factor, np.full((clients, LAST), np.nan)

    def note(self, client: int, seconds: float) -> None:
        """Learn from a good answer."""
        self.seconds[client] = [seconds, *self.seconds[client, :-1]]

    def usual(self, client: int) -> float:
        """Return what a client usually takes, in seconds; infinite before its third answer."""
        known = self.seconds[client][~np.isnan(self.seconds[client])]
        return float(np.median(known)) if known.size >= LEAST else math.inf

    def of(self, client: int) -> float:
        """Return for how many seconds a client is waited for."""
        return self.factor * self.usual(client)

    def passed(self, client: int) -> str:
        """Return the reason of a client that was not waited for any longer."""
        usual = self.usual(client)
        return (
            f"not there after {self.factor * usual:.4g} s, run.deadline {self.factor:g} times its usual {usual:.4g} s"
        )


@dataclass(frozen=True)
class Closes:
    """When an exchange ends although clients are still at work; they are late.

    Attributes
    ----------
    enough : int
        With so many good replies.
    deadlines : Deadlines or None
        Or when nobody is left who may be waited for.
    share : float
        For that, this share of those asked must have answered well.
    keeps : bool
        Late replies count in the exchange in which they come, after `MessageExchange.reopen`. Else they are dropped.
    """

    enough: int = sys.maxsize
    deadlines: Deadlines | None = None
    share: float = 0.0
    keeps: bool = False


@dataclass
class Traffic:
    """Messages and payload bytes between the server and one client in an exchange; a mask when it is new to it."""

    bytes_down: int = 0
    messages_down: int = 0
    bytes_up: int = 0
    messages_up: int = 0


@dataclass
class ExchangeReport:
    """What became of the messages of one exchange.

    `ok` lists clients in order of arrival; `lost` (no answer) and `refused` (a bad one) give a reason by client;
    `late` are those without which the round closed, `busy` those that are still at work and were not asked;
    `notes` are what clients found out of order, and `odd_metrics` which metrics do not count and why, of those that
    answered well; `stale` are those whose message is so many rounds old. `asked` counts the clients; `seconds` is
    when the round closed, where a simulated clock said so.
    Bytes are payload bytes of encoded arrays; bitmaps of masks are counted apart from the rest of `down`.
    `examples` are images that went forward and backward, and forward only, for each good reply. `traffic` is by
    client, `further` are the exchanges that came after this one and belong to it.
    """

    ok: list[int] = field(default_factory=list)
    lost: dict[int, str] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    late: dict[int, str] = field(default_factory=dict)
    busy: dict[int, str] = field(default_factory=dict)
    stale: dict[int, int] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    odd_metrics: dict[int, str] = field(default_factory=dict)
    examples: dict[int, tuple[int, int]] = field(default_factory=dict)
    traffic: defaultdict[int, Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    further: list["ExchangeReport"] = field(default_factory=list)
    asked: int = 0
    seconds: float | None = None
    down: int = 0
    mask_down: int = 0
    up: int = 0
    sent: int = 0

    @property
    def train_examples(self) -> int:
        """Images that went forward and backward."""
        return sum(train for train, _ in self.examples.values())

    @property
    def eval_examples(self) -> int:
        """Images that went forward only."""
        return sum(only_forward for _, only_forward in self.examples.values())

    def accept(self, client: int, metadata: Metadata) -> None:
        """Note that a reply is a good one, and what it says of the client's work."""
        self.ok.append(client)
        self.examples[client] = int(metadata.get("passes", 0)), int(metadata.get("looks", 0))
        if metadata.get("note"):
            self.notes[client] = in_a_line(str(metadata["note"]))

    def refuse(self, client: int, reason: str) -> None:
        """Note that a reply is none; one that was accepted may be none beside the others of its exchange."""
        for known in (self.examples, self.notes, self.stale):
            known.pop(client, None)
        if client in self.ok:
            self.ok.remove(client)
        self.refused[client] = reason

    def come_late(self, client: int, reason: str) -> None:
        """Note that a good reply came too late to count; its work was done all the same."""
        self.ok.remove(client)
        self.late[client] = reason

    def enough(self, share: float) -> bool:
        """Return whether at least `share` of the clients that were asked answered well."""
        return len(self.ok) >= share * self.asked

    def require(self, share: float, what: str, who: str = "client") -> None:
        """Raise RunFailed unless `share` of the clients answered well, and one at least, or that share of nodes."""
        least, option = (0, "min_ok_fraction") if who == "node" else (1, "failures.min-ok-fraction")
        if self.enough(share) and len(self.ok) >= least:
            return
        clients: dict[str, list[str]] = {}  # each reason once
        for client, why in sorted({**self.lost, **self.refused, **self.busy, **self.late}.items()):
            clients.setdefault(why, []).append(str(client))
        bad = ", ".join(f"{_called(who, of)}: {why}" for why, of in clients.items())
        raise RunFailed(f"{what}: {len(self.ok)} of {self.asked} {who}s answered well; {option} is {share} ({bad})")


def names(*reports: ExchangeReport) -> dict[str, Any]:
    """Return who answered well in any of the exchanges, and who did not and why, as a round's record has it."""
    told: dict[str, Any] = {"ok": sorted({client for report in reports for client in report.ok})}
    for kind in ("lost", "refused", "late", "busy", "stale", "notes", "odd_metrics"):
        why: dict[int, Any] = {c: reason for report in reports for c, reason in getattr(report, kind).items()}
        if why or kind in ("lost", "refused"):
            told[kind] = {str(client): why[client] for client in sorted(why)}
    return told


def _called(who: str, names: list[str]) -> str:
    if len(names) == 1:
        return f"{who} {names[0]}"
    return f"{len(names)} {who}s ({', '.join(names[:MOST_NAMED])}{', ...' if len(names) > MOST_NAMED else ''})"


class MessageExchange:
    """Carries the messages of one exchange.

    Parameters
    ----------
    timeout : float
        Seconds from now until clients that have not answered, or not uploaded all of their answer, count as lost.
        Give the messages the same time to live, so that no reply of this exchange arrives in a later one.
    reply_bytes : int
        Expected size of a reply. In simulation replies wait in this process until they are pulled, so only
        as many messages are in flight as keep every core busy, or fit into `IN_FLIGHT` together and are no more than
        `MOST_IN_FLIGHT`. Real nodes get all messages at once.
    closes : Closes
        When it ends before the last reply. Default: all are awaited.

    Notes
    -----
    A grid that works on messages in threads of this process has `concurrent`, how many at once, and `wait`, which
    sleeps until a reply is there.
    """

    def __init__(self, grid: Grid, timeout: float, reply_bytes: int = 0, closes: Closes | None = None) -> None:
        self.report, self._closes = ExchangeReport(), closes or Closes()
        self._late: dict[str, int] = {}  # who was still at work when it closed
        self._ends: dict[str, float] = {}  # until when a message lives
        self._pushed: dict[int, float] = {}  # when a client got its first message, and until when it is waited for
        self._until: dict[int, float] = {}
        self._grid, self._timeout = grid, timeout
        self._end = time.monotonic() + timeout
        self._puller = Puller(grid, self._end, LARGER * reply_bytes + BESIDES)
        self._waiting: dict[str, int] = {}
        self._queue: deque[tuple[int, Message]] = deque()
        self._poll, self._limit = DEPLOYMENT_POLL, sys.maxsize
        self._sleep: Callable[[float], object] = getattr(grid, "wait", time.sleep)
        if is_simulation(grid):
            self._poll = SIMULATION_POLL
            # Twice what is worked on at once: whoever is ready finds the next message there.
            busy = max(training_cores(), 2 * getattr(grid, "concurrent", 1))
            self._limit = max(busy, min(MOST_IN_FLIGHT, IN_FLIGHT // max(1, reply_bytes)))

    def reopen(self, closes: Closes) -> None:
        """Begin another round, in which those still count who are at work on older messages."""
        self.report, self._closes = ExchangeReport(), closes
        self._ends = {message_id: self._ends[message_id] for message_id in self._waiting}
        self._end = self._puller.end = time.monotonic() + self._timeout

    def waiting(self) -> list[int]:
        """Return who was sent a message and has not answered it, and may do so."""
        return sorted(self._waiting.values())

    def send(self, messages: Mapping[int, Message]) -> None:
        """Take one message per client; a client must have no other message on its way.

        Two messages in flight to one node would lose one of its updates to `Context.state`.
        """
        busy = set(messages) & {*self._waiting.values(), *(client for client, _ in self._queue)}
        if busy:
            raise RuntimeError(f"clients {sorted(busy)} still have a message in flight")
        self._queue.extend(messages.items())
        self._push()

    def _push(self) -> None:
        room = self._limit - len(self._waiting)
        batch = [self._queue.popleft() for _ in range(min(room, len(self._queue)))]
        accepted = {i for i in self._grid.push_messages([message for _, message in batch]) if i} if batch else set()
        for client, message in batch:
            # Grids differ in how they report a refused message (left out, or None): never zip the two lists.
            if message.metadata.message_id in accepted:
                self._waiting[message.metadata.message_id] = client
                self._ends[message.metadata.message_id] = self._end
                self.report.sent += 1
                if self._closes.deadlines is not None and client not in self._pushed:
                    self._pushed[client] = time.monotonic()
                    self._until[client] = self._pushed[client] + self._closes.deadlines.of(client)
            else:
                self.report.lost[client] = "Flower did not accept the message: the node is gone"

    def replies(self) -> Iterator[tuple[int, Message]]:
        """Yield (client, reply) as replies arrive; further messages may be sent meanwhile.

        Replies that are errors are sorted into `report`; at the deadline so are clients that kept silent.

        Raises
        ------
        RunFailed
            A Ray actor died, and Flower would go on feeding most later messages to the dead one. Or this machine ran
            out of memory or disk in simulation: a mean over those clients that happened to fit means nothing.
        """
        while (self._waiting or self._queue) and not self._closed and time.monotonic() < self._end:
            looked, got = time.monotonic(), False
            self._puller.look(self._waiting)
            for message_id in list(self._waiting):
                if self._closed:
                    break
                yield from self._answers(message_id)
                if message_id in self._waiting and time.monotonic() >= self._ends[message_id]:
                    self._lose(message_id)
                got = got or message_id not in self._waiting
                self._push()
            if self._waiting and not self._closed:
                # A round ends with its last reply: look often, but where many are awaited not all of the time.
                in_vain = 0.0 if got else time.monotonic() - looked
                self._sleep(max(self._poll, min(4 * in_vain, 0.1)))
        if self._closed:
            out = {*self._waiting.values(), *(client for client, _ in self._queue)} - self.report.busy.keys()
            self.report.late |= {client: self._why_late(client) for client in sorted(out)}
            if not self._closes.keeps:
                self._late, self._waiting = self._waiting, {}
        else:
            for client, _ in self._queue:
                self.report.lost[client] = f"no answer within {self._timeout:g} s"
            for message_id in list(self._waiting):
                self._lose(message_id)
        self._queue.clear()

    def _lose(self, message_id: str) -> None:
        begun = self._puller.begun(message_id)
        what, why = ("whole answer", ": its upload did not end") if begun else ("answer", "")
        self.report.lost[self._waiting.pop(message_id)] = f"no {what} within {self._timeout:g} s{why}"

    @property
    def _closed(self) -> bool:
        if len(self.report.ok) >= self._closes.enough:
            return True
        if self._closes.deadlines is None or self._queue or not self.report.enough(self._closes.share):
            return False
        now = time.monotonic()
        return all(now >= self._until[client] for client in self._waiting.values())

    def _why_late(self, client: int) -> str:
        if self._closes.deadlines is None or len(self.report.ok) >= self._closes.enough:
            return f"{len(self.report.ok)} good replies closed the round"
        return self._closes.deadlines.passed(client)

    def _learn(self, client: int, answered: float) -> None:
        if self._closes.deadlines is not None:
            self._closes.deadlines.note(client, answered - self._pushed[client])

    def still_at_work(self) -> list[int]:
        """Return who was late and has not answered since; an answer that is there now is dropped.

        Nobody is after the time limit: messages live no longer.
        """
        self._puller.look(self._late)
        for message_id, client in list(self._late.items()):
            try:
                answers = [not reply.has_error() for reply in self._puller.pull(message_id)]
                over = bool(answers) or time.monotonic() >= self._end
                if any(answers):
                    self._learn(client, time.monotonic())
            except (BrokenOff, ValueError, TypeError, LookupError, AttributeError, DecodeError):
                over = True
            if over:
                del self._late[message_id]
        return sorted(self._late.values())

    def _answers(self, message_id: str) -> Iterator[tuple[int, Message]]:
        # Not a part of `replies`: what it holds is gone before the next reply is pulled.
        for reply in self._pull(message_id):
            # By what was asked for: what a reply says of itself is its sender's word.
            client = self._waiting.pop(message_id, None)
            if client is None:  # a second answer to one message: the first one counts
                continue
            if reply.has_error():
                self._sort(client, reply.error.code, reply.error.reason or "")
            elif not reply.has_content():
                self.report.refuse(client, "answered with neither content nor an error")
            else:
                answered = time.monotonic()
                yield client, reply
                if client in self.report.examples:
                    self._learn(client, answered)

    def _pull(self, message_id: str) -> Iterable[Message]:
        try:
            return self._puller.pull(message_id)
        except BrokenOff as error:
            self.report.lost[self._waiting.pop(message_id)] = str(error)
        except PayloadError as error:
            self.report.refuse(self._waiting.pop(message_id), str(error))
        except (ValueError, TypeError, LookupError, AttributeError, DecodeError) as error:
            if is_simulation(self._grid):
                raise
            # Flower builds a message from the objects that a node uploaded, which may be anything.
            client = self._waiting.pop(message_id)
            self.report.refuse(client, in_a_line(f"no message: {type(error).__name__}: {error}"))
        return []

    def _sort(self, client: int, code: int, reason: str) -> None:
        line = cause(reason)
        # In simulation an exception of Ray, or this machine's memory. Elsewhere a SuperNode whose app or machine
        # failed: a matter of that client.
        if code == ErrorCode.UNKNOWN and is_simulation(self._grid):
            raise RunFailed(
                f"a Ray actor died while it worked for client {client} ({line}). "
                f"{why_an_actor_died(f': {FEWER_ACTORS}')}"
            )
        if is_simulation(self._grid) and (what := memory_ran_out(reason)):
            raise RunFailed(f"client {client}: {what}: {fewer_at_once(self._grid)}")
        if ClientStateError.__name__ in reason and is_simulation(self._grid):
            raise RunFailed(f"client {client}: {line}")
        if code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
            self.report.refuse(client, f"raised: {line}")
        else:
            self.report.lost[client] = f"Flower error {code}: {line}"
