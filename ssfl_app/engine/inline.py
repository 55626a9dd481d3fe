"""The in-process engine: the same ServerApp and ClientApp without Ray, SuperLink or FAB.

For tests, debugging and a single GPU. It gives the same digits as Ray: clients draw from generators that name
seed, round and client, and the server's sums do not depend on the order of replies.
"""

from collections.abc import Iterable, Mapping
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from ssfl_app.config import Flat

_SERVER = 1


class InlineGrid(Grid):
    """A Flower grid whose nodes live in this process; a message is worked on when its reply is pulled.

    Parameters
    ----------
    app : ClientApp
        What every node runs.
    config : dict
        The run config, flat.
    nodes : mapping of int to int
        Node id -> partition id.
    node_configs : mapping of int to dict, optional
        Node id -> node config, for nodes that were started with other keys than a partition id.

    Notes
    -----
    Flower keeps the identity of the running task in a process-wide place; it is set here, since the message
    constructor reads it.
    """

    in_process = True

    def __init__(
        self,
        app: ClientApp,
        config: Flat,
        nodes: dict[int, int],
        node_configs: Mapping[int, UserConfig] | None = None,
    ) -> None:
        self._app, own = app, node_configs or {}
        self._contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config=dict(own.get(node, {"partition-id": partition, "num-partitions": len(nodes)})),
                state=RecordDict(),
                run_config=dict(config),
            )
            for node, partition in nodes.items()
        }
        self._waiting: dict[str, Message] = {}
        self._run = Run.create_empty(run_id=1)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, _SERVER

    def set_run(self, run: Run) -> None:
        """Use this run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept the messages and return their ids."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self._waiting[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Work on the messages with these ids and return the replies."""
        return [self._answer(self._waiting.pop(i)) for i in message_ids if i in self._waiting]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push the messages and return all replies."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            # As Flower does: the client's exception becomes an error reply, whatever it is.
            return Message(
                Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}"), reply_to=message
            )


def run_inline(server: ServerApp, client: ClientApp, config: Flat) -> None:
    """Run both apps in this process.

    Raises
    ------
    ConfigError, RunFailed
        What the ServerApp raises.
    """
    nodes = {1000 + i: i for i in range(int(config["run.clients"]))}
    context = Context(run_id=1, node_id=_SERVER, node_config={}, state=RecordDict(), run_config=dict(config))
    server(InlineGrid(client, config, nodes), context)
