"""Pulls replies and waits for nobody's upload.

`HttpGrid.pull_messages` (Flower 1.41) takes an announced reply out of the SuperLink, once, and then waits in line
until the node has uploaded each of its objects: through 180 s of silence, 7200 s in all, and nobody else's reply is
pulled meanwhile. A thread for each message would not end that: Flower waits in a pool of its own, whose threads
Python joins when the process ends. So the same requests are made here one by one: an announcement is kept, and at
each look the object that was missing last is asked for first. While it is missing a look costs one short request, as
it does for a client that is still at work; when it is there, so may be the rest, and the reply is taken as a whole.
What was pulled of an unfinished one is dropped, so no more than one reply is ever held.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import Message
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
)
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from ssfl_app.sparsity.values import PayloadError

MOST_OBJECTS = 1000
"""Objects of a reply. Flower makes one of each record, array and 5 MB of an array."""


class BrokenOff(Exception):
    """The rest of a reply will never come."""


@dataclass
class _Announced:
    """A reply whose upload was begun: its id, and its objects in the order in which they are asked for."""

    message_id: str
    objects: list[str]


class Puller:
    """Pulls the replies of one exchange.

    Parameters
    ----------
    grid : Grid
        Flower's. From one that is no `HttpGrid` messages are pulled as ever: its nodes are in this machine.
    end : float
        When to stop, on `time.monotonic`: from then on nothing is pulled from an `HttpGrid`.
    most : int
        Bytes of a reply of an `HttpGrid`, with Flower's envelope.
    """

    def __init__(self, grid: Grid, end: float, most: int) -> None:
        self._grid, self._end, self._most = grid, end, most
        # By its name: what a simulation or a client need not import it does not.
        self._http = any(kind.__name__ == "HttpGrid" for kind in type(grid).__mro__)
        self._announced: dict[str, _Announced] = {}

    def begun(self, message_id: str) -> bool:
        """Return whether the reply to a message was announced, and has not come as a whole."""
        return message_id in self._announced

    def pull(self, message_id: str) -> Iterable[Message]:
        """Return the reply to a message if it is there as a whole.

        Raises
        ------
        BrokenOff
            It was announced and is gone.
        PayloadError
            It has too many objects or bytes.
        ValueError, TypeError, LookupError, AttributeError, DecodeError
            Its objects are no message.
        """
        if not self._http:
            return self._grid.pull_messages([message_id])
        if not self.begun(message_id) and time.monotonic() < self._end:
            self._ask(message_id)
        reply = self._take(message_id) if self.begun(message_id) else None
        return [] if reply is None else [reply]

    @property
    def _client(self) -> Any:
        return cast(Any, self._grid)._runtime_client

    def _ask(self, message_id: str) -> None:
        told = self._client.PullMessages(PullAppMessagesRequest(message_ids=[message_id]))
        for message, tree in zip(told.messages_list, told.message_object_trees, strict=True):
            if message.metadata.reply_to_message_id == message_id:
                objects = list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))
                self._announced[message_id] = _Announced(message.metadata.message_id, objects)
                if len(objects) > MOST_OBJECTS:
                    self._refuse(message_id, f"{len(objects)} objects; it has at most {MOST_OBJECTS}")

    def _take(self, message_id: str) -> Message | None:
        announced, contents, size = self._announced[message_id], dict[str, bytes](), 0
        where = {"node": cast(Any, self._grid).node, "run_id": self._grid.run.run_id}
        for object_id in announced.objects:
            if time.monotonic() >= self._end:
                return None
            told = self._client.PullObject(PullObjectRequest(**where, object_id=object_id))
            if not told.object_found:
                del self._announced[message_id]
                raise BrokenOff("its upload broke off")
            if not told.object_available:
                announced.objects.remove(object_id)
                announced.objects.insert(0, object_id)
                return None
            contents[object_id] = told.object_content
            size += len(told.object_content)
            if size > self._most:
                self._refuse(message_id, f"more than {self._most} bytes")
        self._confirm(message_id)
        reply = cast(Message, inflate_object_from_contents(announced.message_id, contents))
        reply.metadata.__dict__["_message_id"] = announced.message_id
        return reply

    def _refuse(self, message_id: str, what: str) -> None:
        self._confirm(message_id)
        raise PayloadError(f"the reply has {what}")

    def _confirm(self, message_id: str) -> None:
        """Tell the SuperLink that it need not keep the reply any longer."""
        announced = self._announced.pop(message_id)
        where = {"node": cast(Any, self._grid).node, "run_id": self._grid.run.run_id}
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(**where, message_object_id=announced.message_id)
        )
