"""The in-process engine: the same ServerApp and ClientApp without Ray, SuperLink or FAB.

For tests, debugging and one machine: several clients are trained at once in threads that share a GPU, or in forks of
this process (`worker_pool`) that share its data: `engine.concurrent`. It gives the same digits as Ray: clients draw
from generators that name seed, round and client, and the server's sums do not depend on the order of replies.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from threading import Event, Lock
from uuid import uuid4

import torch
from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

from ssfl_app.comm.node_config import SIMULATED
from ssfl_app.config import Config, Flat
from ssfl_app.core.blocks import MOST_THREADS, block_threads
from ssfl_app.cores import usable_cores
from ssfl_app.locks import naming_memory
from ssfl_app.runtime import check_at_once, get_runtime, gpu_notes, most_at_once
from ssfl_app.simulation.worker_pool import SERVER, call_client_app, pool, set_task_identity
from ssfl_app.text import tell

Answer = Callable[[Message, Context], Message]
"""What a node does with a message: a ClientApp, or a pool of processes that are one."""


class InlineGrid(Grid):
    """A Flower grid whose nodes live in this process.

    With `concurrent` 1 a message is worked on when its reply is pulled; with more, by one of so many threads, from
    when it is pushed: call `close` in the end.

    Parameters
    ----------
    app : callable
        What every node runs, a ClientApp.
    config : dict
        The run config, flat.
    nodes : mapping of int to int
        Node id -> partition id.
    node_configs : mapping of int to dict, optional
        Node id -> node config, for nodes that were started with other keys than a partition id.
    """

    in_process = True

    def __init__(
        self,
        app: Answer,
        config: Flat,
        nodes: dict[int, int],
        node_configs: Mapping[int, UserConfig] | None = None,
        concurrent: int = 1,
    ) -> None:
        self._app, self.concurrent = app, concurrent
        self._pool = futures.ThreadPoolExecutor(concurrent, "client") if concurrent > 1 else None
        self._working: dict[str, futures.Future[Message]] = {}
        self._ready = Event()  # a reply is, that nobody has been told of
        usual: UserConfig = {"num-partitions": len(nodes), SIMULATED: True}
        configs = {node: {"partition-id": part, **usual} for node, part in nodes.items()} | dict(node_configs or {})
        own = dict(config)  # one for all: nobody changes it, and it would be a quarter of what a node takes
        self._contexts = {node: Context(1, node, dict(configs[node]), RecordDict(), own) for node in nodes}
        # A node whose last answer nobody waited for may still be at it.
        self._nodes = {node: Lock() for node in nodes}
        self._waiting: dict[str, Message] = {}
        self._run = Run.create_empty(run_id=1)
        set_task_identity()

    def set_run(self, run: Run) -> None:
        """Use this run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
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
            ids.append(message.metadata.message_id)
            if self._pool is None:
                self._waiting[ids[-1]] = message
            else:
                self._working[ids[-1]] = self._pool.submit(self._answer_alone, message)
                self._working[ids[-1]].add_done_callback(lambda _: self._ready.set())
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to the messages with these ids: those that are ready, or are made now."""
        if self._pool is not None:
            ready = [i for i in message_ids if i in self._working and self._working[i].done()]
            return [self._working.pop(i).result() for i in ready]
        return [self._answer(self._waiting.pop(i)) for i in message_ids if i in self._waiting]

    def wait(self, seconds: float) -> None:
        """Sleep so long, or until a reply is ready."""
        if self._pool is None:
            time.sleep(seconds)
        else:
            self._ready.wait(seconds)
            self._ready.clear()

    def close(self) -> None:
        """End the threads, as soon as each is ready with its message."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push the messages and return all replies."""
        ids = list(self.push_messages(messages))
        futures.wait([self._working[i] for i in ids if i in self._working])
        return self.pull_messages(ids)

    def _answer_alone(self, message: Message) -> Message:
        with self._nodes[message.metadata.dst_node_id]:
            return self._answer(message)

    def _answer(self, message: Message) -> Message:
        return call_client_app(self._app, message, self._contexts[message.metadata.dst_node_id])


def run_inline(server: ServerApp, client: ClientApp, config: Config) -> None:
    """Run both apps in this process.

    It raises what the ServerApp raises; ConfigError: engine.concurrent is more than this GPU is given; RunFailed:
    memory ran out.
    """
    nodes = {1000 + i: i for i in range(config.settings.run.clients)}
    context = Context(run_id=1, node_id=SERVER, node_config={}, state=RecordDict(), run_config=dict(config.flat))
    check_at_once(config)
    with naming_memory("try a smaller model or data set"):
        runtime = get_runtime(config.flat)  # before anything is forked: all processes share it
    torch.set_num_threads(config.engine.threads)  # which a runtime that was kept does not
    on_gpu = runtime.trainer.device.type == "cuda"
    at_once = clients_at_once(config, runtime.fitting_clients() if on_gpu else None)
    where = "threads on a GPU" if on_gpu else "processes" if at_once > 1 else "this process"
    tell(f"engine inline: {at_once} client(s) at once, in {where}")
    for note in gpu_notes(config):
        tell(note)
    with contextlib.ExitStack() as stack:
        app: Answer = client if on_gpu or at_once == 1 else stack.enter_context(pool(client, at_once))
        if on_gpu:  # else clients train on the cores
            stack.enter_context(block_threads(min(usable_cores(), MOST_THREADS)))
        grid = InlineGrid(app, config.flat, nodes, concurrent=at_once)
        stack.callback(grid.close)
        server(grid, context)


def clients_at_once(config: Config, fitting: int | None = None) -> int:
    """Return how many clients the inline engine trains at once.

    On a GPU by default as many as train in a round and fit there (`fitting`). On a CPU (None) a core each;
    where processes cannot safely be forked (not on Linux), that is one.
    """
    wanted = config.engine.concurrent
    if fitting is not None:
        return wanted or min(most_at_once(config), fitting)
    cores = usable_cores() if sys.platform == "linux" else 1
    return min(wanted or cores, config.settings.run.clients)
