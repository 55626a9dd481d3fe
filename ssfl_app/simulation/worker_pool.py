"""Processes that are the ClientApp, for the inline engine on several cores.

Training on a CPU holds Python's lock for a good part of each step of a small model, so threads would wait for each
other; on a GPU they do not, and share its memory. A process here is a fork of this one, made when data, partition
and model are in memory and before any thread runs: it starts at once and shares all of it. A message crosses a pipe,
with the state of its node, and comes back the same way.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from queue import SimpleQueue

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from ssfl_app.locks import RunFailed

SERVER = 1
"""The node id that messages of the inline engine come from."""


def set_task_identity() -> None:
    """Be a task of Flower's: it keeps the identity in a process-wide place, which the message constructor reads."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SERVER


def call_client_app(app: Callable[[Message, Context], Message], message: Message, context: Context) -> Message:
    """Return the answer to a message, or as Flower does, an error reply for whatever the app raises."""
    try:
        return app(message, context)
    except RunFailed:  # it is not the client that failed
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


class WorkerPool:
    """Answers messages as a ClientApp does, in one of several processes; made by `pool`."""

    def __init__(self, connections: list[Connection]) -> None:
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        for connection in connections:
            self._idle.put(connection)

    def __call__(self, message: Message, context: Context) -> Message:
        """Return the answer to a message; what its node keeps is `context.state` afterwards.

        Raises
        ------
        RunFailed
            The process is gone.
        """
        connection = self._idle.get()
        try:
            connection.send((message, context))
            reply, context.state = connection.recv()
        except (EOFError, OSError) as gone:
            raise RunFailed(
                "a process that trains clients died. Most often it ran out of memory: try a lower engine.concurrent "
                "or a smaller model"
            ) from gone
        finally:
            # A dead one too: who gets it is told, where waiting for a living one might never end.
            self._idle.put(connection)
        return reply  # type: ignore[no-any-return]


@contextmanager
def pool(app: ClientApp, size: int) -> Iterator[WorkerPool]:
    """Fork `size` processes that are this app, and end them."""
    context, connections = multiprocessing.get_context("fork"), list[Connection]()
    processes = []
    for _ in range(size):
        ours, theirs = context.Pipe()
        connections.append(ours)
        # The others' ends go too: a process ends with the last holder of the other end of its pipe.
        process = context.Process(target=_work, args=(app, theirs, list(connections)), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
    try:
        yield WorkerPool(connections)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join(5)
            process.kill()
            process.join()


def _work(app: ClientApp, connection: Connection, ours: list[Connection]) -> None:
    for other in ours:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then ends this
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    set_task_identity()
    while True:
        try:
            message, context = connection.recv()
        except EOFError:
            return
        connection.send((call_client_app(app, message, context), context.state))
