"""Pulls replies and waits for nobody's upload.

`HttpGrid.pull_messages` (Flower 1.41) takes an announced reply out of the SuperLink, once, and then waits in line
until the node has uploaded each of its objects: through 180 s of silence, 7200 s in all, and nobody else's reply is
pulled meanwhile. A thread for each message would not end that: Flower waits in a pool of its own, whose threads
Python joins when the process ends. So the same requests are made here one by one: one asks for the announcements of
all replies that are awaited, they are kept, and at each look the object that was missing last is asked for first.
While it is missing a look costs one short request; when it is there, so may be the rest, and the reply is taken as a
whole. What was pulled of an unfinished one is dropped, so no more than one reply is ever held.
"""

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any, cast

from flwr.app import Array, Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_children_ids_from_object_content,
    get_object_type_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from ssfl_app.sparsity.values import PayloadError

MOST_OBJECTS = 1000
"""Objects of a reply. Flower makes one of each record, array and 5 MB of an array."""


def inflated_size(contents: Mapping[str, bytes]) -> int:
    """Return how many bytes the arrays among some objects are made of.

    Flower joins an array of chunks by a list of places that its sender writes, and the same chunk may stand there a
    thousand times.
    """
    total = 0
    for content in contents.values():
        if get_object_type_from_object_content(content) == Array.__name__:
            chunks = get_object_children_ids_from_object_content(content)
            places = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            total += sum(len(contents[chunks[place]]) for place in places)
    return total


class BrokenOff(Exception):
    """The rest of a reply will never come."""


class Puller:
    """Pulls the replies of one exchange.

    From a grid that is no `HttpGrid` messages are pulled as ever: its nodes are in this machine. From an `HttpGrid`
    nothing is pulled after `end`, on `time.monotonic`, and no reply of more than `most` bytes, Flower's envelope too.
    """

    def __init__(self, grid: Grid, end: float, most: int) -> None:
        self._grid, self.end, self._most = grid, end, most
        # By its name: what a simulation or a client need not import it does not.
        self._http = any(kind.__name__ == "HttpGrid" for kind in type(grid).__mro__)
        # Message -> its reply whose upload was begun: id, and objects in the order in which they are asked for.
        self._announced: dict[str, tuple[str, list[str]]] = {}

    def begun(self, message_id: str) -> bool:
        """Return whether the reply to a message was announced, and has not come as a whole."""
        return message_id in self._announced

    def look(self, message_ids: Iterable[str]) -> None:
        """Find out which of these messages have a reply that was announced: in one request, however many they are."""
        new = [message_id for message_id in message_ids if not self.begun(message_id)]
        if self._http and new and time.monotonic() < self.end:
            self._ask(new)

    def pull(self, message_id: str) -> Iterable[Message]:
        """Return the reply to a message if it is there as a whole; `look` has found out whether it is announced.

        Raises
        ------
        BrokenOff
            It was announced and is gone.
        PayloadError
            It has too many objects or bytes, or its objects are no message.
        ValueError, TypeError, LookupError, AttributeError, DecodeError
            A grid that is no `HttpGrid` cannot make a message of it.
        """
        if not self._http:
            return self._grid.pull_messages([message_id])
        reply = self._take(message_id) if self.begun(message_id) else None
        return [] if reply is None else [reply]

    @property
    def _client(self) -> Any:
        return cast(Any, self._grid)._runtime_client

    @property
    def _where(self) -> dict[str, Any]:
        return {"node": cast(Any, self._grid).node, "run_id": self._grid.run.run_id}

    def _ask(self, message_ids: list[str]) -> None:
        told = self._client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
        for message, tree in zip(told.messages_list, told.message_object_trees, strict=True):
            if message.metadata.reply_to_message_id in message_ids:
                objects = list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))
                self._announced[message.metadata.reply_to_message_id] = message.metadata.message_id, objects

    def _take(self, message_id: str) -> Message | None:
        (reply_id, objects), contents, size = self._announced[message_id], dict[str, bytes](), 0
        if len(objects) > MOST_OBJECTS:
            self._refuse(message_id, f"{len(objects)} objects; it has at most {MOST_OBJECTS}")
        for place, object_id in enumerate(objects):
            if time.monotonic() >= self.end:
                return None
            told = self._client.PullObject(PullObjectRequest(**self._where, object_id=object_id))
            if not told.object_found:
                del self._announced[message_id]
                raise BrokenOff("its upload broke off")
            if not told.object_available:
                # Those behind it next time too: what was there already is pulled again only when all the rest is.
                self._announced[message_id] = reply_id, objects[place:] + objects[:place]
                return None
            contents[object_id] = told.object_content
            size += len(told.object_content)
            if size > self._most:
                self._refuse(message_id, f"more than {self._most} bytes")
        self._confirm(message_id)
        try:
            whole = inflated_size(contents)
            if whole > self._most:
                raise PayloadError(f"the reply unfolds to {whole} bytes; it has at most {self._most}")
            reply = cast(Message, inflate_object_from_contents(reply_id, contents))
        except PayloadError:
            raise
        except Exception as error:  # of any kind: these bytes are the node's, JSON of any depth among them
            raise PayloadError(f"the reply is no message: Flower cannot read it ({type(error).__name__})") from error
        reply.metadata.__dict__["_message_id"] = reply_id
        return reply

    def _refuse(self, message_id: str, what: str) -> None:
        self._confirm(message_id)
        raise PayloadError(f"the reply has {what}")

    def _confirm(self, message_id: str) -> None:
        """Tell the SuperLink that it need not keep the reply any longer."""
        reply_id, _ = self._announced.pop(message_id)
        self._client.ConfirmMessageReceived(ConfirmMessageReceivedRequest(**self._where, message_object_id=reply_id))
