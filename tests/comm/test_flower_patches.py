"""What is changed in Flower: which waits, for how long, under which versions, and that nothing else is."""

import hashlib
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce.vce_api import _register_nodes
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.protobuf import client as protobuf_client
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.run import Run
from flwr.supercore.version import package_version
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid.inmemory_grid import InMemoryGrid
from flwr.supernode import start_client_internal as node_loop
from flwr.supernode.runtime import run_clientapp as client_process

from ssfl_app.comm import flower_patches
from ssfl_app.comm.flower_patches import AT_ONCE, SHARE, SHORTEST, UPLOADED, Pace
from ssfl_app.comm.payload import Payload, PayloadEncoder
from ssfl_app.deployment import front, supernode
from ssfl_app.simulation.worker_pool import set_task_identity

PATCHED = [
    (node_loop, "time"),
    (node_loop, "_pull_and_store_message"),
    (node_loop, "pull_objects"),
    (inflatable_utils, "get_num_workers"),
    (protobuf_client, "httpx"),
    (client_process, "install_from_fab"),
]


@pytest.fixture(autouse=True)
def flowers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what a test patched."""
    for module, name in PATCHED:
        monkeypatch.setattr(module, name, getattr(module, name))


class Clock:
    """Stands in for `time`: who sleeps moves it."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(flower_patches, "time", made)
    return made


def test_the_version_that_is_installed_is_known_and_another_one_is_not() -> None:
    assert flower_patches.known(package_version)
    for version in ("1.40.9", "1.410.0", "1.99.0", "2.0.0", "unknown", ""):
        assert not flower_patches.known(version)


@pytest.mark.parametrize("plain", [False, True])
def test_an_unknown_version_is_left_as_it_is_and_the_log_says_so(
    plain: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = [getattr(module, name) for module, name in PATCHED]
    started, said = list[list[str]](), list[str]()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(supernode.PLAIN, "1") if plain else monkeypatch.setattr(flower_patches, "KNOWN", ("0.1.",))
    monkeypatch.setattr(supernode, "flower_supernode", lambda: started.append(sys.argv[1:]))
    monkeypatch.setattr(supernode, "log", lambda level, text, *words: said.append(text % words))
    monkeypatch.setattr(sys, "argv", ["supernode.py", "--superlink", "a:1"])
    supernode.main()
    assert started == [["--superlink", "a:1"]]
    assert [getattr(module, name) for module, name in PATCHED] == before
    why = "SSFL_PLAIN_NODE is 1" if plain else f"flwr {package_version} is none that is known here"
    assert said == [f"{why}: waits and process starts are Flower's"]
    assert list(tmp_path.iterdir()) == []


def test_a_node_waits_a_share_of_what_it_has_waited_already(clock: Clock) -> None:
    pace = Pace()
    while clock.now < 1000:
        pace.sleep(3)
    assert clock.slept[0] == SHORTEST
    assert max(clock.slept) == 3  # Flower's own, in the end
    waited = 0.0
    for slept in clock.slept:
        assert slept == pytest.approx(min(3, max(SHORTEST, SHARE * waited)))
        waited += slept
    pace.busy()
    assert pace.wait(3) == SHORTEST


def test_a_node_may_rest_longer_when_it_had_nothing_to_do_for_long(clock: Clock) -> None:
    pace = Pace(rest=60.0)
    assert pace.wait(3) == SHORTEST
    clock.now += 100
    assert pace.wait(3) == pytest.approx(100 * SHARE)
    clock.now += 10_000
    assert pace.wait(3) == 60
    pace.busy()
    assert pace.wait(3) == SHORTEST


def test_a_reply_in_the_nodes_own_memory_is_found_at_once_and_is_work(clock: Clock) -> None:
    pace = Pace()
    clock.now += 500
    assert pace.wait(3) == 3
    assert pace.wait(0.5) == AT_ONCE  # it has a message
    assert pace.wait(3) == SHORTEST


class Idle(Exception):
    """The loop of a SuperNode has gone round."""


class Tasks:
    """The state of a SuperNode whose ClientApp hands its state over after a while."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._end = clock, clock.now + seconds

    def get_tasks(self, statuses: Any) -> list[str]:
        assert statuses == ["running"]
        return ["a task"] if self._clock.now < self._end else []


def test_the_loop_of_a_supernode_tells_of_each_message_and_waits_less(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, told, pushed = iter([7, None, 8]), list[tuple[object, int]](), list[object]()

    def pull(**named: Any) -> int | None:
        if (run := next(answers, -1)) == -1:
            raise Idle
        return run

    class Factory:
        objectstore_factory = SimpleNamespace(store=lambda: None)

        @staticmethod
        def state() -> Any:
            return state

    state: Any = Tasks(clock, 0.1)
    state.set_node_id = pushed.append
    monkeypatch.setattr(node_loop, "_pull_and_store_message", pull)
    monkeypatch.setattr(node_loop, "_push_messages", lambda **named: pushed.append("pushed"))
    monkeypatch.setattr(node_loop, "register_signal_handlers", lambda **named: None)

    class Connection:
        def __enter__(self) -> tuple[Any, ...]:
            return (5, *[None] * 7)

        def __exit__(self, *words: object) -> None: ...

    monkeypatch.setattr(node_loop, "_init_connection", lambda **named: Connection())
    flower_patches.pace(lambda state, run_id: told.append((state, run_id)))
    with pytest.raises(Idle):
        node_loop.start_client_internal(
            state_factory=Factory(),  # type: ignore[arg-type]
            server_address="a:1",
            node_config={},
            isolation="process",
        )
    assert told == [(state, 7), (state, 8)]
    assert pushed == [5, "pushed", "pushed"]
    *handed_over, idle = clock.slept
    assert set(handed_over) == {AT_ONCE}
    assert sum(handed_over) == pytest.approx(0.1, abs=1.1 * AT_ONCE)
    assert idle == SHORTEST


def test_a_clientapp_that_never_hands_its_state_over_does_not_stop_its_node(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_loop, "_pull_and_store_message", lambda **named: 7)
    flower_patches.pace(lambda state, run_id: None)
    pull: Any = node_loop._pull_and_store_message
    assert pull(state=Tasks(clock, 1000.0), object_store=None) == 7
    assert clock.now - 100 == pytest.approx(flower_patches.HANDED_OVER, abs=AT_ONCE)


def test_an_object_that_is_not_uploaded_yet_is_asked_for_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, answers = list[float](), iter([None, None, b"there"])

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    def pull(object_id: str) -> bytes:
        if (content := next(answers)) is None:
            raise ObjectUnavailableError(object_id)
        return content

    monkeypatch.setattr(inflatable_utils, "threading", SimpleNamespace(Event=Event, Lock=threading.Lock))
    flower_patches.objects()
    assert node_loop.pull_objects(["a"], pull) == {"a": b"there"}
    assert waits == pytest.approx([UPLOADED, 2 * UPLOADED], rel=0.2)  # Flower's jitter


@pytest.mark.parametrize("cores", [1, 64])
def test_the_objects_of_a_small_message_travel_together(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflatable_utils.os, "cpu_count", lambda: cores)
    flower_patches.objects()
    set_task_identity()
    record = PayloadEncoder(join=True).record(Payload({"values": np.ones(8, np.float32)}, {"samples": 1}))
    message = Message(record, 7, "train")
    together = threading.Barrier(len(get_all_nested_objects(message)))

    def push(object_id: str, content: bytes) -> None:
        together.wait(60)  # breaks unless all are on their way at once

    inflatable_utils.push_object_contents_from_iterable(((str(i), b"") for i in range(together.parties)), push)
    assert node_loop.push_object_contents_from_iterable is inflatable_utils.push_object_contents_from_iterable


def expiry(client: ProtobufClient) -> float:
    """Return the seconds after which a client of Flower closes an idle connection."""
    transport: Any = client._client._transport
    return float(transport._pool._keepalive_expiry)


def test_connections_are_kept_longer_than_httpx_does_and_not_as_long_as_the_front() -> None:
    with ProtobufClient("https://localhost") as before:
        assert expiry(before) == 5  # as soon as this fails, `keep_alive` may be of no use any more
    flower_patches.keep_alive()
    with ProtobufClient("https://localhost") as after:
        assert expiry(after) == flower_patches.KEEP_ALIVE
        assert (after._client.timeout, after._client.follow_redirects) == (httpx.Timeout(30.0), True)
    assert httpx.Client()._transport._pool._keepalive_expiry == 5  # type: ignore[attr-defined]
    assert 30 < flower_patches.KEEP_ALIVE < front.KEEP_ALIVE  # a heartbeat in between


def test_only_the_app_that_is_installed_is_not_installed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[bytes]()
    monkeypatch.setattr(flower_patches, "install_from_fab", lambda fab, **named: done.append(fab))
    flower_patches.installed(hashlib.sha256(b"ours").hexdigest())
    for fab in (b"ours", b"another", b"ours"):
        client_process.install_from_fab(fab, skip_prompt=True)
    assert done == [b"another"]


def test_a_simulation_looks_for_messages_of_nodes_that_were_sent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    set_task_identity()
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state, run = factory.state(), Run.create_empty(1)
    assert isinstance(state, InMemoryLinkState)
    nodes, grid = list(_register_nodes(50, factory)), InMemoryGrid(factory)
    run.primary_task_id, run.federation_id = 7, NOOP_FEDERATION_ID
    state.run_ids[run.run_id], state.task_store[7] = RunRecord(run=run), Task(task_id=7, run_id=run.run_id)
    grid.set_run(run)
    looked, check = [], state._check_stored_messages
    monkeypatch.setattr(state, "_check_stored_messages", lambda ids, *more: (looked.append(ids), check(ids, *more)))

    def send(*places: int) -> list[str]:
        return list(grid.push_messages([Message(RecordDict(), nodes[place], "train") for place in places]))

    def hand_out() -> list[str]:
        """Do what Flower's simulation does, until no node has a message."""
        found: list[str] = []
        for _ in range(3):
            for node in nodes:
                found += [message.metadata.message_id for message in state.get_message_ins(node, limit=1)]
        return found

    sent = send(0, 1)
    assert hand_out() == sent
    assert len(looked) > 2 * len(nodes)
    flower_patches.mailboxes(state)
    for places in ((2, 3), (49, 3)):  # again, when all were found
        sent = send(*places)
        looked.clear()
        assert sorted(hand_out()) == sorted(sent)
        assert len(looked) == len(sent)
        looked.clear()
        assert hand_out() == []
        assert looked == []
    two = send(5, 5)
    assert hand_out() == two
    assert list(grid.push_messages([Message(RecordDict(), 12345, "train")])) == []  # no node of this simulation
    assert state.get_message_ins(12345, limit=1) == []
