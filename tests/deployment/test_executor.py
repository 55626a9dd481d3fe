"""The warm executor on a SuperNode's real Runtime API: who answers, what two messages share, what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import Status
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeState, NodeStateFactory
from flwr.supernode.start_client_internal import _insert_message

from ssfl_app.deployment import executor, supernode
from ssfl_app.deployment.supernode import Warm
from ssfl_app.simulation.processes import environment, free_port
from ssfl_app.simulation.worker_pool import set_task_identity
from tests.deployment.test_front import serving

SECONDS = 120.0

PROJECT = """
[project]
name = "noting"
version = "{version}"
description = "notes what its process has seen"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41"]
[tool.flwr.app]
publisher = "lab"
[tool.flwr.app.components]
serverapp = "noting:server"
clientapp = "noting:app"
[tool.flwr.app.config]
key = "value"
"""

APP = """
import os
import threading
import time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

SEEN = []


class App(ClientApp):
    pass


def prepare(self, context):
    SEEN.append(f"{{context.run_config['key']}} {{context.node_config['site']}} {{len(context.state)}}")
    {prepare}


{name} = prepare
app, server = App(), ServerApp()


@app.train()
def train(message, context):
    SEEN.append(message.content["facts"]["word"])
    count = int(context.state["own"]["count"]) + 1 if "own" in context.state else 1
    context.state["own"] = ConfigRecord({{"count": count}})
    time.sleep(message.content["facts"]["seconds"])
    told = {{"pid": os.getpid(), "parent": os.getppid(), "seen": SEEN, "count": count}}
    return Message(RecordDict({{"facts": ConfigRecord(told)}}), reply_to=message)
"""


class Node:
    """A SuperNode without a SuperLink: its state, its Runtime API, and an executor beside it."""

    def __init__(self, folder: Path, state: NodeState, address: str) -> None:
        self.folder, self.state, self.address = folder, state, address
        self.secret = folder / "secret"
        self.warm = Warm(address, self.secret)
        self.executor: subprocess.Popen[bytes]
        self.runs = 0

    def start(self, command: list[str]) -> "subprocess.Popen[bytes]":
        # As the supervisor starts a node: Flower's processes find each other by PATH.
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, cwd=self.folder, env=environment(self.folder / "flwr")
        )

    def end(self, executor: "subprocess.Popen[bytes]") -> None:
        """Do what a SuperNode's end does."""
        assert executor.stdin is not None
        executor.stdin.close()
        assert executor.wait(SECONDS) == 0

    def brings(self, prepare: str = "pass", name: str = "App.prepare") -> int:
        """Return a new run, of an app that does this when it gets ready."""
        self.runs += 1
        run_id = self.runs
        home = self.folder / f"app-{run_id}"
        home.mkdir()
        (home / "LICENSE").write_text("none")
        (home / "pyproject.toml").write_text(PROJECT.format(version=f"1.0.{run_id}"))
        (home / "noting.py").write_text(APP.format(prepare=prepare, name=name))
        fab_hash = self.state.store_fab(Fab("", build_fab_from_disk(home), {}))
        run = Run.create_empty(run_id)
        run.fab_id, run.fab_version, run.fab_hash, run.series_id = "lab/noting", f"1.0.{run_id}", fab_hash, run_id
        self.state.store_run(run)
        context = Context(run_id, 7, {"site": "a"}, RecordDict(), {"key": "value"}, series_id=run_id)
        self.state.set_run_series_context(run_id, context)
        return run_id

    def send(self, run_id: int, word: str, seconds: float = 0.0) -> None:
        """Give the node a message that nobody tells the executor of."""
        facts = ConfigRecord({"word": word, "seconds": seconds})
        message = Message(RecordDict({"facts": facts}), 7, "train", ttl=1000.0)
        message.metadata.__dict__["_run_id"] = run_id
        _insert_message(message, self.state, self.state.object_store)
        self.state.create_task(TaskType.CLIENT_APP, run_id, self.state.get_run(run_id).fab_hash)  # type: ignore[union-attr]

    def tell(self, run_id: int, executor: "subprocess.Popen[bytes]") -> None:
        assert executor.stdin is not None
        executor.stdin.write(json.dumps(self.warm.recipe(self.state, run_id)).encode() + b"\n")
        executor.stdin.flush()

    def answer(self, ended: bool = True) -> dict[str, Any]:
        """Return what the next good reply says, once its ClientApp has ended, or at once."""
        (reply,) = until(lambda: [r for r in self.state.get_messages_legacy(is_reply=True) if not r.has_error()])
        until(lambda: not ended or not self.state.get_tasks(statuses=[Status.RUNNING]))
        store, (facts,) = (
            self.state.object_store,
            [t for t in tree(self.state, reply) if t.startswith(b"ConfigRecord")],
        )
        assert store is not None
        return dict(ConfigRecord.inflate(facts))

    def answers(self, run_id: int, word: str) -> dict[str, Any]:
        self.send(run_id, word)
        self.tell(run_id, self.executor)
        return self.answer()


def tree(state: NodeState, reply: Message) -> list[bytes]:
    """Return the objects of a reply."""

    def below(node: Any) -> Iterator[str]:
        yield node.object_id
        for child in node.children:
            yield from below(child)

    names = list(below(state.object_store.get_object_tree(reply.metadata.message_id)))
    return [bytes(until(lambda: state.object_store.get(name))) for name in names]  # noqa: B023


def until(found: Callable[[], Any]) -> Any:
    end = time.monotonic() + SECONDS
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return value


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Return a node whose executor runs; the runs of all tests are its."""
    set_task_identity()
    folder = tmp_path_factory.mktemp("node")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(folder / "flwr"))
        patch.setenv("OMP_NUM_THREADS", "1")
        factory, port, secret = NodeStateFactory(ObjectStoreFactory()), free_port(), os.urandom(32)
        made = Node(folder, factory.state(), f"127.0.0.1:{port}")
        made.state.set_node_id(7)
        made.secret.write_bytes(secret)
        with serving(uvicorn.Server(uvicorn.Config(create_app(factory, secret), port=port, log_level="critical"))):
            made.executor = made.start(made.warm.command(0))
            yield made
            family = [p.pid for p in psutil.Process(made.executor.pid).children(recursive=True)]
            made.end(made.executor)
            until(lambda: not alive(family))


def alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except psutil.NoSuchProcess:
            continue
    return found


def test_two_messages_share_what_was_opened_and_nothing_that_a_message_did(node: Node) -> None:
    run = node.brings()
    first, second = node.answers(run, "one"), node.answers(run, "two")
    assert first["seen"] == ["value a 0", "one"]  # prepared with the configuration alone
    assert second["seen"] == ["value a 0", "two"]
    assert (first["count"], second["count"]) == (1, 2)  # and Flower's state is handed on by Flower
    assert first["pid"] != second["pid"]
    assert first["parent"] == second["parent"]  # one process got ready, once
    assert psutil.Process(first["parent"]).ppid() == node.executor.pid


def test_another_run_has_a_process_of_its_own_and_the_one_before_goes(node: Node) -> None:
    before, after = node.answers(node.brings(), "one"), node.answers(node.brings(), "two")
    assert before["parent"] != after["parent"]
    until(lambda: not alive([before["parent"]]))
    assert after["seen"] == ["value a 0", "two"]


@pytest.mark.parametrize(
    ("prepare", "name"),
    [
        ("pass", "App.other"),  # somebody else's app
        ("raise OSError('no data')", "App.prepare"),
        ("threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()", "App.prepare"),
        ("os._exit(3)", "App.prepare"),
    ],
)
def test_an_app_that_cannot_be_opened_beforehand_answers_all_the_same(prepare: str, name: str, node: Node) -> None:
    run = node.brings(prepare, name)
    first, second = node.answers(run, "one"), node.answers(run, "two")
    assert (first["seen"], second["seen"]) == (["one"], ["two"])
    assert first["parent"] == second["parent"] == node.executor.pid


def test_a_process_that_is_killed_while_it_waits_costs_no_message(node: Node) -> None:
    run = node.brings()
    first = node.answers(run, "one")
    os.kill(first["parent"], signal.SIGKILL)
    until(lambda: not alive([first["parent"]]))
    second, third = node.answers(run, "two"), node.answers(run, "three")
    assert second["parent"] == node.executor.pid
    assert third["parent"] not in (first["parent"], node.executor.pid)  # and there is a new one
    assert third["seen"] == ["value a 0", "three"]


def test_a_message_that_nobody_told_of_is_found(node: Node) -> None:
    """As after an executor that was killed between two messages."""
    run = node.brings()
    node.warm.recipe(node.state, run)
    node.send(run, "one")
    assert node.answer()["seen"] == ["one"]


def test_who_does_not_know_the_secret_gets_no_message(node: Node) -> None:
    wrong = SuperExecAuthHttpInterceptor(master_secret=os.urandom(32), protected_methods=executor.PROTECTED)
    for proof in ([], [wrong]):
        with (
            RuntimeHttpClient.from_server_address(node.address, True, None, proof) as stranger,
            pytest.raises(httpx.HTTPStatusError, match="401"),
        ):
            stranger.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))


def test_what_takes_the_place_of_an_executor_that_cannot_live_is_flowers_own(node: Node) -> None:
    early, late = node.warm.command(supernode.TRIES - 1), node.warm.command(supernode.TRIES)
    assert early[:-1] == [sys.executable, "-P", "-m", "ssfl_app.deployment.executor", node.address, str(node.secret)]
    assert Path(late[0]).name == "flower-superexec"
    # It takes these options: it claims a message that ours does not know of, and Flower's process answers.
    run = node.brings()
    os.kill(node.executor.pid, signal.SIGSTOP)
    process = node.start(late)
    try:
        node.warm.recipe(node.state, run)
        node.send(run, "one")
        assert node.answer()["seen"] == ["one"]
    finally:
        os.kill(node.executor.pid, signal.SIGCONT)
        process.terminate()
        process.wait(SECONDS)


PARENT = """
import sys
import time
from pathlib import Path
from ssfl_app.deployment.supernode import Warm
warm = Warm(sys.argv[1], Path(sys.argv[2]))
warm.start()
while warm._process is None:
    time.sleep(0.01)
for line in sys.stdin.buffer:
    warm._process.stdin.write(line)
    warm._process.stdin.flush()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they end when they look for their parent")
def test_a_supernode_that_is_killed_leaves_no_process_behind(node: Node) -> None:
    run = node.brings()
    os.kill(node.executor.pid, signal.SIGSTOP)
    parent = node.start([sys.executable, "-P", "-c", PARENT, node.address, str(node.secret)])
    try:
        node.send(run, "one", seconds=1000.0)
        node.tell(run, parent)
        until(lambda: node.state.get_tasks(statuses=[Status.RUNNING]))
        family = [p.pid for p in psutil.Process(parent.pid).children(recursive=True)]
        assert len(family) == 3  # executor, the one that is ready, and the one at work
        parent.kill()
        parent.wait(SECONDS)
        until(lambda: not alive(family))
    finally:
        parent.kill()
        os.kill(node.executor.pid, signal.SIGCONT)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they end when they look for their parent")
def test_an_executor_that_is_killed_with_a_message_in_hand_has_a_successor(node: Node) -> None:
    run, other = node.brings(), node.brings()
    os.kill(node.executor.pid, signal.SIGSTOP)
    parent = node.start([sys.executable, "-P", "-c", PARENT, node.address, str(node.secret)])
    try:
        node.send(run, "one", seconds=1000.0)
        node.tell(run, parent)
        until(lambda: len(psutil.Process(parent.pid).children(recursive=True)) == 3)
        (first,) = psutil.Process(parent.pid).children()
        family = [process.pid for process in [first, *first.children(recursive=True)]]
        first.kill()
        until(lambda: not alive(family))  # who answered goes too, as with Flower's own executor
        node.warm.recipe(node.state, other)
        node.send(other, "two")
        answer = node.answer(ended=False)  # Flower waits for a heartbeat of the one that was killed
        assert answer["seen"] == ["two"]
        assert answer["parent"] == psutil.Process(parent.pid).children()[0].pid != first.pid
    finally:
        parent.kill()
        parent.wait(SECONDS)
        os.kill(node.executor.pid, signal.SIGCONT)
