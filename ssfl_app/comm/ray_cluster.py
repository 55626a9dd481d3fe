"""What is different where a Ray cluster spreads simulated clients over machines: their files, and machines that go.

A client may be asked on another machine in the next round, so one machine writes what all of them keep. A folder of a
network file system would not do: its listings may be seconds old, and a client would go on from an older version of
its model.
"""

import contextlib
import functools
import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ssfl_app.comm.client_files import Folder, Store

NAME = "SSFL_FILES"
"""Environment variable of Ray's processes: the actor that has the files; without it they lie on this machine."""

NAMESPACE = "ssfl"
"""Ray's namespace of that actor."""

NODES = "SSFL_NODES"
"""Environment variable of the server: JSON, by the name of each node that trains where its raylet listens."""

ANSWER = 2.0
"""Seconds that a raylet has to take a connection."""


class Keeper:
    """An actor on the server's machine, which reads and writes there."""

    def call(self, folder: str, method: str, *given: Any) -> Any:
        """Return what a method of the `Folder` with this path returns, or raise its OSError."""
        return getattr(Folder(Path(folder)), method)(*given)


class RayFolder:
    """A `Store` that is a folder of the server's machine, through its `Keeper`."""

    def __init__(self, folder: str, ask: Callable[..., Any]) -> None:
        self._folder, self._ask = folder, ask

    def names(self, own: str) -> list[str]:
        """Return the names of the regular files in the folder `own`."""
        return list(self._call("names", own))

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        return bytes(self._call("read", name))

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically."""
        self._call("write", name, content)

    def delete(self, name: str) -> None:
        """Delete a file."""
        self._call("delete", name)

    def alone(self, name: str) -> AbstractContextManager[None]:
        """Do nothing: a simulated client has one message at a time, and no other process has its files."""
        return contextlib.nullcontext()

    def _call(self, method: str, *given: object) -> Any:
        import ray  # real nodes import this module and need not have it

        try:
            return self._ask(self._folder, method, *given)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # what the file system said, without Ray's traceback for a text
        except ray.exceptions.RayError as error:
            raise OSError(f"the files of the clients, at the server, are out of reach ({error})") from error


def store_of(folder: str) -> Path | Store:
    """Return where simulated clients keep what lies in a folder of the server's machine."""
    name = os.environ.get(NAME)
    return RayFolder(folder, _keeper(name)) if name else Path(folder)


@functools.cache
def _keeper(name: str) -> Callable[..., Any]:
    import ray

    keeper: Any = ray.get_actor(name, namespace=NAMESPACE)
    return lambda *given: ray.get(keeper.call.remote(*given))


def silent(places: Mapping[str, tuple[str, int]]) -> list[str]:
    """Return the names of nodes whose raylet, at host and port, takes no connection."""
    found = []
    for name, (host, port) in places.items():
        try:
            socket.create_connection((host, port), ANSWER).close()
        except OSError:
            found.append(name)
    return found


def why_an_actor_died(cure: str) -> str:
    """Return what to say of an actor that died: which machine is gone, or the usual reason with a `cure`."""
    if gone := silent(json.loads(os.environ.get(NODES, "{}"))):
        return f"Ray answers no more on {', '.join(gone)}; --resume plays on with the nodes that are left"
    return f"Most often it ran out of memory{cure}"
