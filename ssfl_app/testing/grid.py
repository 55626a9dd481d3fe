"""The in-process engine with bad luck: random node ids, replies in random order, scripted faults."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Error, Message

from ssfl_app import client_app
from ssfl_app.callbacks.base import RunCallback
from ssfl_app.comm.payload import Payload, PayloadEncoder, decode_payload
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.closing import Taken
from ssfl_app.core.strategy import ServerContext, SparseStrategy
from ssfl_app.privacy.ledger import Ledger
from ssfl_app.runtime import Runtime, get_runtime
from ssfl_app.server_app import central_evaluation
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

ANY = 2**28

Where = tuple[str, int, int]  # message type, round, client
Fault = Callable[["ScriptedGrid", Message], Message | None]


def answer_error(code: int, reason: str = "scripted") -> Fault:
    """Answer with one of Flower's errors instead of working."""
    return lambda grid, message: Message(Error(code, reason), reply_to=message)


def tamper(change: Callable[[Payload], Payload]) -> Fault:
    """Work, then change the reply."""

    def fault(grid: "ScriptedGrid", message: Message) -> Message | None:
        good = grid.work(message)
        return Message(PayloadEncoder().record(change(decode_payload(good.content, unfolded=ANY))), reply_to=message)

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

    def context(self, message: Message) -> Context:
        """Return the context of the node that a message goes to."""
        return self._contexts[message.metadata.dst_node_id]

    def context_of(self, client: int) -> Context:
        """Return the context of a client."""
        return next(c for c in self._contexts.values() if self.number(c) == client)

    def number(self, context: Context) -> int:
        """Return the client whose context this is."""
        name = context.node_config.get("name")
        return int(context.node_config["partition-id"]) if name is None else self._names.index(str(name))

    def work(self, message: Message) -> Message:
        """Answer as the client does."""
        return super()._answer(message)

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


@dataclass
class Played(RunCallback):
    """A finished run."""

    strategy: SparseStrategy
    runtime: Runtime
    grid: ScriptedGrid
    records: list[dict[str, Any]] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def own_copy(self) -> "Played":
        """Return this run for one test, free to change it; data, files and models to work with are shared."""
        kept = (self.runtime, self.runtime.model, self.layout, self.strategy._closing)
        return copy.deepcopy(self, {id(shared): shared for shared in kept})

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
        """The layout of the model: of the narrower one, where channels were removed."""
        return self.strategy.layout

    def bits(self) -> tuple[str, ...]:
        """Return each tensor of the global model by its name and the digest of its bits.

        Where pytest shows that two differ, it lists these lines; on CI, which cuts nothing, bytes would take hours.
        """
        flat = self.layout.flatten(self.strategy.model())
        return tuple(f"{n} {sha256(flat[span].tobytes()).hexdigest()}" for n, span in self.layout.spans.items())

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records without what a clock says."""
        return [{k: v for k, v in record.items() if k != "seconds"} for record in self.records]


def play(
    keys: Flat,
    luck: int = 0,
    faults: Mapping[Where, Fault] | None = None,
    folder: Path | None = None,
    until: int | None = None,
    grid: ScriptedGrid | None = None,
    prepare: Callable[[SparseStrategy], None] | None = None,
    ledger: Ledger | None = None,
    replay: Mapping[int, Taken] | None = None,
) -> Played:
    """Play a run without a run folder: strategy, exchange, wire and clients are the real ones.

    Clients keep what they remember in `folder`, or in Flower's state without one. The run breaks off after round
    `until`. Nodes are those of a `grid`, or of one with this `luck` and these `faults`; `prepare` sees the strategy
    before it starts. A `ledger` is needed with privacy.level "client"; `replay` is as in `ServerContext`.
    """
    flat = merge(SMALL, keys)
    config = parse(flat)
    runtime = get_runtime(flat)
    grid = grid or ScriptedGrid(flat, luck, faults)
    context = ServerContext(
        runtime.layout,
        config.settings,
        runtime.model,
        runtime.data.shape,
        folder=folder,
        metric=runtime.trainer.task.metric,
        ledger=ledger,
        replay=replay,
    )
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
