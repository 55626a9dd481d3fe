"""A run of recorded answers: the real server, and clients that answer at once what they answered before.

Training is most of what a run costs. Without it an exchange takes milliseconds, so that the answers of every strategy
can be damaged in many ways.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

from ssfl_app.client_app import app
from ssfl_app.comm.exchange import ExchangeReport
from ssfl_app.comm.payload import decode_metadata
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.strategy import ServerContext, SparseStrategy
from ssfl_app.locks import RunFailed
from ssfl_app.runtime import Runtime, get_runtime
from ssfl_app.simulation.in_process import InlineGrid
from ssfl_app.sparsity.layout import State
from ssfl_app.strategies import REGISTRY
from tests.in_process_grid import MEMO, SMALL, Where

Answers = Callable[[Message, RecordDict], list[Message]]
"""answers(message, good) returns what the grid hands over in place of the good answer; it may not exist yet."""

ORDER = ("query", "train", "evaluate")


class _Over(Exception):
    """The exchange that is looked at is over; the next one begins."""


def where_of(message: Message, client: int) -> Where:
    """Return which message of a run this is; every step of a criterion asks a question of its own."""
    metadata = decode_metadata(message.content)
    step = f"/{metadata['step']}" if "step" in metadata else ""
    return message.metadata.message_type + step, int(metadata.get("round", 0)), client


class Recording(InlineGrid):
    """Real clients, whose messages and good answers are kept."""

    def __init__(self, flat: Flat) -> None:
        super().__init__(app, flat, {100 + k: k for k in range(int(flat["run.clients"]))})
        self.asked: dict[Where, Message] = {}
        self.answered: dict[Where, RecordDict] = {}

    def _answer(self, message: Message) -> Message:
        where = where_of(message, message.metadata.dst_node_id - 100)
        reply = super()._answer(message)
        assert not reply.has_error(), reply.error
        self.asked[where], self.answered[where] = message, reply.content
        return reply


class Replaying(InlineGrid):
    """Clients that answer what they answered before; the answer to one message is another one."""

    def __init__(self, recorded: "Recorded", target: Where, answers: Answers) -> None:
        super().__init__(app, recorded.flat, {100 + k: k for k in range(int(recorded.flat["run.clients"]))})
        self._recorded, self._target, self._answers = recorded, target, answers
        self.strategy: SparseStrategy | None = None
        self.report: ExchangeReport | None = None

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages, until those of a later exchange come; the questions of one hook belong together."""
        messages = list(messages)
        if self.report is not None and messages and self._stage(where_of(messages[0], 0)) > self._stage(self._target):
            raise _Over
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages."""
        replies: list[Message] = []
        for message in [self._waiting.pop(i) for i in message_ids if i in self._waiting]:
            where = where_of(message, message.metadata.dst_node_id - 100)
            good = self._recorded.answered[where]
            if where == self._target:
                assert self.strategy is not None
                self.report = self.strategy.messenger.report
                replies += self._answers(message, good)
            else:
                replies.append(Message(good, reply_to=message))
        return replies

    @staticmethod
    def _stage(where: Where) -> tuple[int, int]:
        return where[1], ORDER.index(where[0].partition(".")[0])


@dataclass
class Recorded:
    """What the clients of a run were sent and answered."""

    flat: Flat
    runtime: Runtime
    asked: dict[Where, Message]
    answered: dict[Where, RecordDict]

    def targets(self, kind: str) -> list[Where]:
        """Return the messages of one kind to the last client that got some, in order."""
        found = [where for where in self.answered if where[0].startswith(kind) and where[0] != "query.hello"]
        return [where for where in found if where[2] == max(w[2] for w in found if w[:2] == where[:2])]

    def replay(self, target: Where, answers: Answers) -> "Replayed":
        """Play the run up to the end of the exchange of `target`, whose answer is another one."""
        config = parse(self.flat)
        strategy = made(self.runtime)
        grid = Replaying(self, target, answers)
        grid.strategy = strategy
        failure = None
        try:
            strategy.start(grid, ArrayRecord(_initial(self)), config.settings.run.rounds)
        except _Over:
            pass
        except RunFailed as error:
            failure = str(error)
        assert grid.report is not None, "the run never came to this message"
        return Replayed(strategy, grid.report, failure)


@dataclass
class Replayed:
    """How a replay stands after the exchange; `failure` is what ended it if that was not the test."""

    strategy: SparseStrategy
    report: ExchangeReport
    failure: str | None

    def bits(self) -> dict[str, Any]:
        """Return all that a reply may change: what a checkpoint holds, the model, the mask, and the accuracies."""
        strategy = self.strategy
        return {
            **{
                f"snapshot {name}": sha256(array.tobytes()).hexdigest()
                for name, array in strategy.state_dict().items()
            },
            "model": sha256(strategy.layout.flatten(strategy.model()).tobytes()).hexdigest(),
            "mask": sha256(strategy.mask.packed().tobytes()).hexdigest(),
            "densities": strategy.densities(),
            "accuracies": (strategy.accuracy, strategy.personal_accuracy),
            "losses": strategy.losses,
        }


def made(runtime: Runtime, **more: Any) -> SparseStrategy:
    """Return the strategy of a run, made with what the server would give it."""
    config = runtime.config
    context = ServerContext(runtime.layout, config.settings, runtime.model, runtime.data.shape, **more)
    return REGISTRY[config.strategy](context)


@functools.lru_cache(maxsize=4)
def _initial_of(items: tuple[tuple[str, Any], ...]) -> State:
    return get_runtime(dict(items)).initial_state()


def _initial(recorded: Recorded) -> State:
    return _initial_of(tuple(sorted(recorded.flat.items())))


@functools.cache
def record(name: str, *keys: tuple[str, Any]) -> Recorded:
    """Play a run of three clients with real ones, once: all modules that ask for it are marked alike."""
    few: Flat = {"run.clients": 3, "run.cohort": 3, "run.rounds": 1, "local.batch-size": 64, "strategy": name}
    flat = merge(SMALL, {**few, **MEMO.images, **dict(keys)})
    config, runtime = parse(flat), get_runtime(flat)
    grid = Recording(flat)
    strategy = made(runtime)
    strategy.start(grid, ArrayRecord(runtime.initial_state()), config.settings.run.rounds)
    return Recorded(flat, runtime, grid.asked, grid.answered)
