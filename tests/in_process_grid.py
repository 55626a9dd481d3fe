"""The in-process engine with bad luck: random node ids, replies in random order, scripted faults."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict

from ssfl_app import client_app
from ssfl_app.comm.messenger import FOLDER, Reply
from ssfl_app.comm.node_config import SIMULATED
from ssfl_app.comm.payload import Payload, PayloadEncoder, decode_metadata, decode_payload
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.strategy import ServerContext, SparseStrategy
from ssfl_app.runtime import Runtime, get_runtime
from ssfl_app.simulation.in_process import InlineGrid
from ssfl_app.sparsity.layout import Layout, State
from ssfl_app.sparsity.mask import Mask
from ssfl_app.strategies import REGISTRY

# Small enough for a run in under a second, large enough to learn something.
SMALL: Flat = {
    "run.clients": 6,
    "run.cohort": 4,
    "run.rounds": 3,
    "run.round-timeout": 120.0,
    "mask.density": 0.2,
    "local.epochs": 1,
    "local.batch-size": 32,
    "partition.alpha": 1.0,
}

# Added to these in modules that are marked `few` (conftest); a run that must see all digits adds WHOLE itself.
FEW: Flat = {"data.name": "few-digits", "data.augment": "none"}
WHOLE: Flat = {"data.name": "digits"}

ANY = 2**28

Where = tuple[str, int, int]  # message type, round, client
Fault = Callable[["ScriptedGrid", Message], Message | None]


def answer_error(code: int, reason: str = "scripted") -> Fault:
    """Answer with one of Flower's errors instead of working."""
    return lambda grid, message: Message(Error(code, reason), reply_to=message)


def keep_silent(grid: "ScriptedGrid", message: Message) -> Message | None:
    """Never answer."""
    return None


def forget(grid: "ScriptedGrid", message: Message) -> Message | None:
    """Lose the client's memory, as a restarted SuperNode does, then work."""
    grid.context(message).state = RecordDict()
    return grid.work(message)


def tamper(change: Callable[[Payload], Payload]) -> Fault:
    """Work, then change the reply."""

    def fault(grid: "ScriptedGrid", message: Message) -> Message | None:
        good = grid.work(message)
        return Message(PayloadEncoder().record(change(decode_payload(good.content, unfolded=ANY))), reply_to=message)

    return fault


def pose(as_client: int, **new: Any) -> Fault:
    """Answer a hello as a client would, but for facts that are `new`; None leaves one out."""

    def fault(grid: "ScriptedGrid", message: Message) -> Message | None:
        good = decode_payload(client_app.handle(message, grid.context_of(as_client)).content).metadata
        metadata = {key: value for key, value in {**good, **new}.items() if value is not None}
        return Message(PayloadEncoder().record(Payload(metadata=metadata)), reply_to=message)

    return fault


class ScriptedGrid(InlineGrid):
    """An InlineGrid whose node ids and order of replies depend on `luck`, and whose clients misbehave on cue."""

    def __init__(
        self,
        config: Flat,
        luck: int = 0,
        faults: Mapping[Where, Fault] | None = None,
        node_configs: Sequence[Flat] | None = None,
    ) -> None:
        self._luck = np.random.default_rng(luck)
        count = int(config["run.clients"]) if node_configs is None else len(node_configs)
        ids = [int(node) for node in self._luck.choice(2**62, count, replace=False)]
        own = None if node_configs is None else dict(zip(ids, node_configs, strict=True))
        super().__init__(client_app.app, config, {node: client for client, node in enumerate(ids)}, own)
        # A site's number is the rank of its name.
        self._names = sorted(str(each["name"]) for each in node_configs or () if "name" in each)
        self._faults = dict(faults or {})
        self.log: list[Where] = []
        self.sent: list[tuple[Where, Payload]] = []
        self.got: list[tuple[Where, Payload]] = []

    def pull_messages(self, message_ids: Any) -> list[Message]:
        """Answer each message with probability one half; the others are not ready yet."""
        ready = [i for i in message_ids if i in self._waiting and self._luck.random() < 0.5]
        replies = [self._answer(self._waiting.pop(i)) for i in ready]
        return [reply for reply in replies if reply is not None]

    def wait(self, seconds: float) -> None:
        """Sleep only where nothing can come but a reply that was lost."""
        if not self._waiting:
            super().wait(seconds)

    def context(self, message: Message) -> Any:
        return self._contexts[message.metadata.dst_node_id]

    def context_of(self, client: int) -> Any:
        return next(c for c in self._contexts.values() if self.number(c) == client)

    def number(self, context: Any) -> int:
        name = context.node_config.get("name")
        return int(context.node_config["partition-id"]) if name is None else self._names.index(str(name))

    def add(self, node: int, node_config: Flat) -> None:
        """Connect one more node."""
        like = next(iter(self._contexts.values()))
        self._contexts[node] = Context(
            run_id=1, node_id=node, node_config=dict(node_config), state=RecordDict(), run_config=like.run_config
        )

    def work(self, message: Message) -> Message:
        """Answer as the client does; what it answered before to the same message in the same state is not made again.

        A client whose state lies in files always works.
        """
        context = self.context(message)
        if (
            not MEMO.enabled
            or context.node_config.keys() - {"partition-id", "num-partitions", SIMULATED}
            or FOLDER in decode_metadata(message.content)
            or message.metadata.message_type == "query.hello"
        ):
            return super()._answer(message)
        asked = hashlib.blake2b(repr((message.metadata.message_type, sorted(context.node_config.items()))).encode())
        asked.update(repr(sorted(context.run_config.items())).encode())
        for records in (message.content, context.state):
            _digest(asked, records)
        key = asked.digest()
        if key not in MEMO.answers:
            reply = super()._answer(message)
            if reply.has_error():
                return reply
            while len(MEMO.answers) >= MEMO.most_answers:
                del MEMO.answers[next(iter(MEMO.answers))]
            MEMO.answers[key] = copy.deepcopy((reply.content, context.state))
        content, context.state = copy.deepcopy(MEMO.answers[key])
        return Message(content, reply_to=message)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ScriptedGrid":
        """Copy what a finished run leaves; locks are nobody's to copy."""
        copied = copy.copy(self)
        for name in ("log", "sent", "got", "_contexts"):
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        return copied

    def _answer(self, message: Message) -> Message | None:  # type: ignore[override]
        payload = decode_payload(message.content, unfolded=ANY)
        client = self.number(self.context(message))
        where = (message.metadata.message_type, int(payload.metadata.get("round", 0)), client)
        self.log.append(where)
        self.sent.append((where, payload))
        fault = self._faults.get(where)
        reply = self.work(message) if fault is None else fault(self, message)
        if reply is not None and not reply.has_error():
            self.got.append((where, decode_payload(reply.content, unfolded=ANY)))
        return reply


def _digest(into: "hashlib.blake2b", records: RecordDict) -> None:
    """Add all that records hold, in their order."""
    for name, record in records.items():
        into.update(repr((name, type(record).__name__, len(record))).encode())
        for key, value in record.items():
            if isinstance(record, ArrayRecord):
                into.update(repr((key, value.dtype, value.shape, value.stype, len(value.data))).encode())
                into.update(value.data)
            else:
                into.update(repr((key, value)).encode())


class DeploymentGrid(ScriptedGrid):
    """Nodes that the server takes for real ones."""

    in_process = False


@dataclass
class Played:
    """A finished run."""

    strategy: SparseStrategy
    runtime: Runtime
    grid: ScriptedGrid
    records: list[dict[str, Any]] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def own_copy(self) -> "Played":
        """Return this run for one test, which may change what it likes; data and models to work with are shared."""
        return copy.deepcopy(self, {id(shared): shared for shared in (self.runtime, self.runtime.model, self.layout)})

    def met(self, sites: Any) -> None:
        """See the clients."""

    def warn(self, line: str) -> None:
        """Keep a warning."""
        self.warnings.append(line)

    def round(self, record: dict[str, Any], strategy: SparseStrategy) -> None:
        """Keep the record, the model and the mask of a round."""
        self.records.append(record)
        self.states.append(strategy.model())
        self.masks.append(strategy.mask)

    @property
    def layout(self) -> Layout:
        return self.runtime.layout

    def bits(self) -> bytes:
        """Return the bits of the global model."""
        return self.layout.flatten(self.strategy.model()).tobytes()

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records without what a clock says."""
        return [{k: v for k, v in record.items() if k != "seconds"} for record in self.records]


def aggregate(strategy: SparseStrategy, round_: int, replies: Iterable[Reply]) -> None:
    """Change the model by replies that were accepted."""
    aggregator = strategy.aggregator(round_)
    for reply in replies:
        aggregator.add(reply)
    aggregator.finish()


def snapshot_of(round_: int, into: dict[str, Any]) -> Callable[[SparseStrategy], None]:
    """Return a `prepare` for `play` that puts what a checkpoint after a round holds into `into`."""

    def prepare(strategy: SparseStrategy) -> None:
        recording = strategy.callback.round

        def keep(record: dict[str, Any], strategy: SparseStrategy) -> None:
            if record["round"] == round_:
                into.update((name, array.copy()) for name, array in strategy.state_dict().items())
            recording(record, strategy)

        strategy.callback.round = keep  # type: ignore[method-assign]

    return prepare


def play(
    keys: Flat,
    luck: int = 0,
    faults: Mapping[Where, Fault] | None = None,
    folder: Path | None = None,
    until: int | None = None,
    node_configs: Sequence[Flat] | None = None,
    grid: ScriptedGrid | None = None,
    prepare: Callable[[SparseStrategy], None] | None = None,
) -> Played:
    """Play a run without a run folder: strategy, exchange, wire and clients are the real ones.

    Clients keep what they remember in `folder`, or in Flower's state without one. The run breaks off after round
    `until`. Nodes are started with `node_configs`, or are those of another `grid`; `prepare` sees the strategy before
    it starts. A plain run (none of these, no faults) is played once, and each test that asks for it gets a copy.
    """
    keys = MEMO.images | keys
    if not MEMO.enabled or faults or folder or until is not None or node_configs or grid or prepare:
        return _play(keys, luck, faults, folder, until, node_configs, grid, prepare)
    asked = repr((sorted(keys.items()), luck))
    if asked not in MEMO.runs:
        while len(MEMO.runs) >= MEMO.most:
            del MEMO.runs[next(iter(MEMO.runs))]
        MEMO.runs[asked] = _play(keys, luck, None, None, None)
    return MEMO.runs[asked].own_copy()


@dataclass
class Memo:
    """Runs and clients' answers that were made already; switched off for tests that change the code under them.

    `images` are keys of the data that runs of the present module are played on. `answers` are an answer's content and
    the client's state behind it, by digest of the message, the client's number, its state and the configuration.
    """

    enabled: bool = True
    most: int = 24
    most_answers: int = 300
    images: Flat = field(default_factory=dict)
    runs: dict[str, Played] = field(default_factory=dict)
    answers: dict[bytes, tuple[RecordDict, RecordDict]] = field(default_factory=dict)


MEMO = Memo()


def _play(
    keys: Flat,
    luck: int,
    faults: Mapping[Where, Fault] | None,
    folder: Path | None,
    until: int | None,
    node_configs: Sequence[Flat] | None = None,
    grid: ScriptedGrid | None = None,
    prepare: Callable[[SparseStrategy], None] | None = None,
) -> Played:
    from ssfl_app.server_app import central_evaluation

    flat = merge(SMALL, keys)
    config = parse(flat)
    runtime = get_runtime(flat)
    grid = grid or ScriptedGrid(flat, luck, faults, node_configs)
    known = {"folder": folder, "metric": runtime.trainer.task.metric}
    context = ServerContext(runtime.layout, config.settings, runtime.model, runtime.data.shape, **known)
    strategy = REGISTRY[config.strategy](context)
    played = Played(strategy, runtime, grid)
    strategy.callback = played
    if prepare is not None:
        prepare(strategy)
    rounds = config.settings.run.rounds
    strategy.start(
        grid,
        ArrayRecord(runtime.initial_state()),
        rounds if until is None else until,
        evaluate_fn=central_evaluation(runtime),
    )
    return played
