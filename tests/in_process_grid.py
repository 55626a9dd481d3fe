"""The grid of `ssfl_app.testing` with more bad luck, and runs that are played once for all tests of a process."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, Message, RecordDict

from ssfl_app import client_app
from ssfl_app.comm.messenger import Reply
from ssfl_app.comm.node_config import SIMULATED
from ssfl_app.comm.payload import FOLDER, Payload, PayloadEncoder, decode_metadata, decode_payload
from ssfl_app.config import Flat, merge
from ssfl_app.core.strategy import SparseStrategy
from ssfl_app.testing import grid as shipped
from ssfl_app.testing.grid import ANY as ANY
from ssfl_app.testing.grid import SMALL, Fault, Played, Where
from ssfl_app.testing.grid import answer_error as answer_error
from ssfl_app.testing.grid import tamper as tamper

# Added to these in modules that are marked `few` (conftest); a run that must see all digits adds WHOLE itself.
FEW: Flat = {"data.name": "few-digits", "data.augment": "none"}
WHOLE: Flat = {"data.name": "digits"}


def keep_silent(grid: "ScriptedGrid", message: Message) -> Message | None:
    """Never answer."""
    return None


def forget(grid: "ScriptedGrid", message: Message) -> Message | None:
    """Lose the client's memory, as a restarted SuperNode does, then work."""
    grid.context(message).state = RecordDict()
    return grid.work(message)


def pose(as_client: int, **new: Any) -> Fault:
    """Answer a hello as a client would, but for facts that are `new`; None leaves one out."""

    def fault(grid: "ScriptedGrid", message: Message) -> Message | None:
        good = decode_payload(client_app.handle(message, grid.context_of(as_client)).content).metadata
        metadata = {key: value for key, value in {**good, **new}.items() if value is not None}
        return Message(PayloadEncoder().record(Payload(metadata=metadata)), reply_to=message)

    return fault


class ScriptedGrid(shipped.ScriptedGrid):
    """One whose nodes can be found, and joined by others."""

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
            return super().work(message)
        asked = hashlib.blake2b(repr((message.metadata.message_type, sorted(context.node_config.items()))).encode())
        asked.update(repr(sorted(context.run_config.items())).encode())
        for records in (message.content, context.state):
            _digest(asked, records)
        key = asked.digest()
        if key not in MEMO.answers:
            reply = super().work(message)
            if reply.has_error():
                return reply
            while len(MEMO.answers) >= MEMO.most_answers:
                del MEMO.answers[next(iter(MEMO.answers))]
            MEMO.answers[key] = copy.deepcopy((reply.content, context.state))
        content, context.state = copy.deepcopy(MEMO.answers[key])
        return Message(content, reply_to=message)


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
    """Play a run as `ssfl_app.testing.grid.play` does. Nodes may be started with `node_configs`.

    A plain run (none of these, no faults) is played once, and each test that asks for it gets a copy.
    """
    keys = MEMO.images | keys
    if not MEMO.enabled or faults or folder or until is not None or node_configs or grid or prepare:
        grid = grid or ScriptedGrid(merge(SMALL, keys), luck, faults, node_configs)
        return shipped.play(keys, folder=folder, until=until, grid=grid, prepare=prepare)
    asked = repr((sorted(keys.items()), luck))
    if asked not in MEMO.runs:
        while len(MEMO.runs) >= MEMO.most:
            del MEMO.runs[next(iter(MEMO.runs))]
        MEMO.runs[asked] = shipped.play(keys, luck)
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
