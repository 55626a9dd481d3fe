"""Flower's own HttpGrid on a SuperLink of this process, to which nodes upload their replies object by object."""

import math
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid

from ssfl_app.simulation.in_process import InlineGrid

NEVER = math.inf
GONE = -math.inf

Upload = Callable[[int, int], float]
"""upload(object, objects) returns the seconds after which an object is there: NEVER, or GONE for a broken session."""


def at_once(i: int, count: int) -> float:
    return 0.0


def never(i: int, count: int) -> float:
    """The reply is announced, and nothing of it comes."""
    return NEVER


def all_but_the_last(i: int, count: int) -> float:
    return 0.0 if i < count - 1 else NEVER


def every(seconds: float) -> Upload:
    """An object comes each so many seconds."""
    return lambda i, count: (i + 1) * seconds


def breaks_off(i: int, count: int) -> float:
    return 0.0 if i < count - 1 else GONE


class Uploading(HttpGrid):
    """An HttpGrid whose nodes are those of another grid; `uploads` says by message how a reply is uploaded.

    Whoever still asks for an object after `patience` seconds has waited for an upload, as Flower does.
    """

    def __init__(self, inner: InlineGrid, uploads: Callable[[Message], Upload], patience: float = 20.0) -> None:
        super().__init__(token="of this test")
        self.set_run(Run.create_empty(run_id=1))
        self.inner, self._uploads, self._asked = inner, uploads, dict[str, Message]()
        self._objects: dict[str, tuple[bytes, float]] = {}
        self._end = time.monotonic() + patience
        self.looks, self.confirmed = 0, list[str]()
        self._client = self  # type: ignore[assignment]

    def get_node_ids(self) -> Iterable[int]:
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(self.inner.push_messages(messages))
        self._asked |= {message.metadata.message_id: message for message in messages}
        return ids

    # ---- what a RuntimeHttpClient has --------------------------------------------------------

    def PullMessages(self, request: Any) -> Any:  # noqa: N802
        protos, trees = [], []
        for reply in self.inner.pull_messages(list(request.message_ids)):
            reply.metadata.__dict__["_message_id"] = reply.object_id
            upload = self._uploads(self._asked[reply.metadata.reply_to_message_id])
            objects = get_all_nested_objects(reply)
            for i, (name, item) in enumerate(objects.items()):
                wait = upload(i, len(objects))
                there = wait if wait == GONE else time.monotonic() + wait
                # Equal objects of two replies are one to a SuperLink.
                there = min(there, self._objects[name][1]) if name in self._objects else there
                self._objects[name] = item.deflate(), there
            trees.append(get_object_tree(reply))
            protos.append(message_to_proto(remove_content_from_message(reply)))
        return SimpleNamespace(messages_list=protos, message_object_trees=trees)

    def PullObject(self, request: Any) -> Any:  # noqa: N802
        assert time.monotonic() < self._end, "somebody waits for an upload"
        self.looks += 1
        content, there = self._objects[request.object_id]
        found, available = there != GONE, there <= time.monotonic()
        return SimpleNamespace(
            object_found=found, object_available=available, object_content=content if found and available else b""
        )

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        self.confirmed.append(request.message_object_id)
