"""Exchange and aggregation are apart: while a client works, the server holds no reply and is in no aggregator."""

import gc
import inspect
from typing import Any

import pytest
from flwr.app import Message

from ssfl_app.comm.messenger import Reply
from ssfl_app.config import Flat, merge
from ssfl_app.strategies import REGISTRY
from tests.in_process_grid import SMALL, ScriptedGrid, play

pytestmark = pytest.mark.narrow

KEYS: Flat = {
    "run.rounds": 1,
    "run.round-timeout": 600.0,
    "flash.stage-clients": 0.4,
    "feddst.every": 1,
    "prunefl.every": 1,
    "prunefl.checks": 1,
}
NAMES = sorted({cls.aggregator: name for name, cls in REGISTRY.items()}.values())  # one of each kind


def replies() -> int:
    """Count the replies in memory, opened ones and messages, that were made after the last `gc.freeze`."""
    there = gc.get_objects()
    return sum(type(o) is Reply or (type(o) is Message and bool(o.metadata.reply_to_message_id)) for o in there)


class WatchingGrid(ScriptedGrid):
    """Looks around whenever a client begins to work."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.held: list[int] = []
        self.frames: set[str] = set()

    def work(self, message: Message) -> Message:
        if message.metadata.message_type != "query.hello":
            self.held.append(replies())
        frame = inspect.currentframe()
        while frame is not None:
            self.frames.add(f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}")
            frame = frame.f_back
        return super().work(message)


@pytest.mark.parametrize("name", NAMES)
def test_a_client_works_neither_inside_an_aggregator_nor_beside_a_reply(name: str) -> None:
    keys = KEYS | {"strategy": name}
    gc.collect()
    gc.freeze()  # what is there already is not looked at: it is the most by far
    grid = WatchingGrid(merge(SMALL, keys))
    before = replies()
    play(keys, grid=grid)
    assert len(grid.held) >= 4
    assert set(grid.held) == {before}
    inside = ("ssfl_app.core.aggregation.", "ssfl_app.core.means.", "ssfl_app.core.robust.")
    assert not [frame for frame in grid.frames if frame.startswith(inside)]
    assert not [f for f in grid.frames if f.startswith("ssfl_app.strategies") and f.endswith((".add", ".finish"))]
    assert "ssfl_app.core.strategy.aggregate_train" in grid.frames  # it would see others
