"""The ClientApp that Flower loads; it imports torch when the first message comes that needs it.

In a simulation Flower loads the ClientApp in the server's process and starts Ray after that, one after the other:
this one loads at once, so Ray starts while the ServerApp imports torch.
"""

import contextlib
import json
import os
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from ssfl_app import locks


class LazyClientApp(ClientApp):
    """`ssfl_app.client_app`, imported on first use."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        from ssfl_app.client_node import UNMASK, unmask

        if message.metadata.message_type == UNMASK:  # needs no torch
            return unmask(message, context)
        from ssfl_app.client_app import app as inner

        return inner(message, context)

    def prepare(self, context: Context) -> None:
        """Open what all messages of a run need, on a real node, in a process whose forks will answer them.

        `context` has the configuration of run and node; its state is empty. Errors are those of a message.
        """
        from ssfl_app.client_app import prepare

        prepare(context)


app = LazyClientApp()
if locks.LATER in os.environ:  # before Ray is imported, which reads its variables then
    with contextlib.suppress(FileNotFoundError):
        os.environ.update(json.loads(Path(os.environ[locks.LATER]).read_bytes()))
