"""The inline engine with several clients at once: the same bits, each thread at a bench of its own."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import psutil
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ssfl_app import client_app, server_app
from ssfl_app.cli.main import run
from ssfl_app.comm.exchange import MessageExchange
from ssfl_app.config import merge, parse, write_toml
from ssfl_app.experiments.jobs import check_all
from ssfl_app.experiments.sweep_spec import read_plan
from ssfl_app.locks import RunFailed, naming_memory
from ssfl_app.options import ConfigError
from ssfl_app.runtime import check_at_once, get_runtime
from ssfl_app.simulation.command import Engine, RunArgs
from ssfl_app.simulation.in_process import InlineGrid, clients_at_once, run_inline
from ssfl_app.simulation.resolve import resolve
from ssfl_app.simulation.worker_pool import pool
from tests.in_process_grid import FEW, SMALL, play


def echo(work):
    """Return an app that answers every message with what `work` says of it."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"facts": ConfigRecord({"said": work(context.node_id)})}), reply_to=message)

    return app


def letter(grid, node):
    return grid.create_message(RecordDict(), "train", node, "")


def said(message):
    return message.content["facts"]["said"]


@pytest.fixture
def grid(request):
    """Return a function that makes a grid of 6 nodes; its threads end with the test."""
    made = []

    def make(work, concurrent):
        made.append(InlineGrid(echo(work), {}, {i: i for i in range(1, 7)}, concurrent=concurrent))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("strategy", ["ssfl", "fedavg", "ditto"])
def test_clients_at_once_give_the_bits_of_one_after_the_other(tmp_path, strategy):
    runs = []
    for concurrent in (1, 4):
        keys = {"strategy": strategy, "run.rounds": 2, "local.batch-size": 64, **FEW}
        nodes = {1000 + i: i for i in range(SMALL["run.clients"])}
        grid = InlineGrid(client_app.app, merge(SMALL, keys), nodes, concurrent=concurrent)
        runs.append(play(keys, grid=grid, folder=tmp_path / str(concurrent)))
        grid.close()
    assert runs[0].bits() == runs[1].bits()
    assert runs[0].metrics() == runs[1].metrics()
    assert runs[0].metrics()[-1]["lost"] == {}


def test_so_many_work_at_once_and_no_more(grid):
    lock, now, most = threading.Lock(), [0], [0]
    everyone = threading.Barrier(3, timeout=10)

    def work(node):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        everyone.wait()  # passes only if three are here together
        with lock:
            now[0] -= 1
        return node

    here = grid(work, 3)
    replies = here.send_and_receive([letter(here, node) for node in range(1, 7)])
    assert sorted(map(said, replies)) == [1, 2, 3, 4, 5, 6]
    assert most == [3]


def test_one_at_a_time_works_when_a_reply_is_pulled(grid):
    seen = []
    here = grid(lambda node: seen.append(node) or node, 1)
    ids = list(here.push_messages([letter(here, 1), letter(here, 2)]))
    assert seen == []
    assert [said(m) for m in here.pull_messages(ids[1:])] == [2]
    assert seen == [2]


def test_a_pull_returns_what_is_ready_and_waits_for_nothing(grid):
    go = threading.Event()
    here = grid(lambda node: go.wait(10) and node if node == 1 else node, 2)
    slow, quick = here.push_messages([letter(here, 1), letter(here, 2)])
    here.wait(10)
    assert [said(m) for m in here.pull_messages([slow, quick])] == [2]
    assert list(here.pull_messages([slow, quick])) == []
    go.set()
    here.wait(10)
    assert [said(m) for m in here.pull_messages([slow, quick])] == [1]


def test_a_wait_ends_with_a_reply_or_with_its_time(grid):
    here = grid(lambda node: node, 2)
    began = time.monotonic()
    here.wait(0.05)
    assert time.monotonic() - began >= 0.05
    here.push_messages([letter(here, 1)])
    here.wait(60)
    assert time.monotonic() - began < 30


def test_a_node_answers_one_message_at_a_time(grid):
    busy, twice = threading.Lock(), []

    def work(node):
        twice.append(not busy.acquire(blocking=False))
        time.sleep(0.01)
        busy.release()
        return node

    here = grid(work, 3)
    here.send_and_receive([letter(here, 1) for _ in range(4)])
    assert twice == [False] * 4


def test_an_exception_becomes_an_answer(grid):
    def work(node):
        if node == 2:
            raise ValueError("no")
        return node

    here = grid(work, 2)
    exchange = MessageExchange(here, 10.0)
    exchange.send({node: letter(here, node) for node in range(1, 5)})
    assert sorted(said(reply) for _, reply in exchange.replies()) == [1, 3, 4]
    assert exchange.report.refused == {2: "raised: ValueError: no"}


def test_enough_messages_are_in_flight_for_all_threads(grid, monkeypatch):
    monkeypatch.setattr("ssfl_app.comm.exchange.training_cores", lambda: 1)
    here = grid(lambda node: node, 2)
    exchange = MessageExchange(here, 10.0, reply_bytes=10**12)
    exchange.send({node: letter(here, node) for node in range(1, 7)})
    assert exchange.report.sent == 4
    assert len(list(exchange.replies())) == 6
    alone = MessageExchange(grid(lambda node: node, 1), 10.0, reply_bytes=10**12)
    alone.send({node: letter(here, node) for node in range(1, 7)})
    assert alone.report.sent == 2


def test_each_thread_has_a_bench_and_shares_the_data():
    shop = get_runtime(merge(SMALL, {"run.seed": 5}))
    found = {}

    def look(name):
        found[name] = (shop.worker_state, shop.worker_state, torch.get_num_threads())

    threads = [threading.Thread(target=look, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shop.worker_state.model is shop.model
    assert shop.worker_state.trainer is shop.trainer
    (a, again, ones), (b, _, _) = found["a"], found["b"]
    assert a is again
    assert ones == shop.config.engine.threads
    assert len({id(state.model) for state in (a, b, shop.worker_state)}) == 3
    assert len({id(state.trainer) for state in (a, b, shop.worker_state)}) == 3
    assert len({id(state.masks) for state in (a, b, shop.worker_state)}) == 3
    weights = [list(state.model.state_dict().values()) for state in (a, b)]
    assert all(torch.equal(x, y) for x, y in zip(*weights, strict=True))


def test_a_runtime_is_made_once_however_many_ask():
    flat, found = merge(SMALL, {"run.seed": 6}), []
    threads = [threading.Thread(target=lambda: found.append(get_runtime(flat))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({id(shop) for shop in found}) == 1


@pytest.mark.parametrize(("room", "keys", "count"), [
    (None, {}, 4), (None, {"engine.concurrent": 3}, 3), (None, {"engine.concurrent": 30}, 6),
    (99, {}, 4), (99, {"strategy": "dispfl"}, 6), (99, {"run.clients": 40, "run.cohort": 30}, 16), (2, {}, 2),
    (2, {"engine.concurrent": 3}, 3), (99, {"engine.concurrent": 1}, 1),
])  # fmt: skip
def test_how_many_at_once(monkeypatch, room, keys, count):
    """A core each on a CPU; on a GPU those that train in a round, at most 16, if there is room for them."""
    monkeypatch.setattr("ssfl_app.simulation.in_process.usable_cores", lambda: 4)
    assert clients_at_once(parse(merge(SMALL, keys)), room) == count


@pytest.mark.parametrize(("gpu", "keys", "most"), [
    (True, {"engine.concurrent": 5}, 4), (True, {"engine.concurrent": 7, "strategy": "dispfl"}, 6),
    (True, {"engine.concurrent": 17, "run.clients": 40, "run.cohort": 30}, 16),
    (True, {"engine.concurrent": 4}, 0), (True, {"engine.concurrent": 5, "run.device": "cpu"}, 0),
    (False, {"engine.concurrent": 5}, 0),
])  # fmt: skip
def test_more_at_once_than_is_safe_on_a_gpu_is_refused_by_name(monkeypatch, tmp_path, gpu, keys, most):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    flat = merge(SMALL, keys)
    if not most:
        check_at_once(parse(flat))
        return
    (tmp_path / "run.toml").write_text(write_toml(flat))
    plan = read_plan([tmp_path / "run.toml"], [])
    for door in (
        lambda: check_at_once(parse(flat)),
        lambda: resolve(RunArgs(tmp_path / "run.toml", [], None, Engine(), tmp_path / "out", None)),
        lambda: check_all(plan.runs),
        lambda: run_inline(None, None, parse(flat)),
    ):
        with pytest.raises(ConfigError, match=rf"engine\.concurrent is \d+; on a GPU it is at most {most}:"):
            door()
    assert not (tmp_path / "out").exists()


# ---- memory ---------------------------------------------------------------------------------------

NO_ROOM = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. Of the allocated memory 1 is"),
    MemoryError("Unable to allocate 3.00 GiB for an array"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
)


def without_room(error):
    def work(node):
        if node == 3:
            raise error
        return node

    return work


@pytest.mark.parametrize("error", NO_ROOM)
@pytest.mark.parametrize("processes", [False, True])
def test_a_client_without_memory_ends_the_run_and_names_the_cure(grid, processes, error):
    """Never a mean over the clients that happened to fit."""
    with pool(echo(without_room(error)), 3) if processes else nullcontext() as app:
        here = grid(without_room(error), 3)
        here._app = app or here._app
        exchange = MessageExchange(here, 10.0)
        exchange.send({node: letter(here, node) for node in range(1, 7)})
        said = r"client 3: memory ran out \(.*3 clients work at once.*engine\.concurrent"
        with pytest.raises(RunFailed, match=said) as run:
            list(exchange.replies())
    assert str(error).partition(" Of the")[0] in str(run.value)
    assert "Of the allocated" not in str(run.value)


def test_on_real_nodes_a_client_without_memory_is_that_clients_affair(grid, monkeypatch):
    here = grid(without_room(NO_ROOM[0]), 2)
    monkeypatch.setattr(type(here), "in_process", False)
    exchange = MessageExchange(here, 10.0)
    exchange.send({node: letter(here, node) for node in range(1, 7)})
    assert len(list(exchange.replies())) == 5
    assert "CUDA out of memory" in exchange.report.refused[3]


def test_a_server_without_memory_ends_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    """In testing the model; the status says it too, and other errors stay what they are."""
    words = ["run.rounds=1 engine.concurrent=1", " ".join(f"{k}={v}" for k, v in SMALL.items() if k != "run.rounds")]

    def evaluate(*_):
        raise NO_ROOM[0]

    monkeypatch.setattr(server_app, "central_evaluation", lambda shop: evaluate)
    with pytest.raises(SystemExit) as end:
        run(override=words, out=tmp_path / "run")
    assert end.value.code == 1
    said = "memory ran out (OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.)"
    assert said in capsys.readouterr().err
    assert said in json.loads((tmp_path / "run" / "status.json").read_text())["message"]
    with pytest.raises(ValueError, match="no"), naming_memory("cure"):
        raise ValueError("no")


@pytest.mark.parametrize(
    ("engine", "steps"), [({}, "plain"), ({"engine.graphs": False}, "plain"), ({"engine.precision": "bf16"}, "plain")]
)
def test_the_cpu_takes_plain_steps_whatever_the_engine_asks(engine, steps):
    shop = get_runtime(merge(SMALL, engine))
    assert shop.trainer.steps == steps
    assert shop.trainer.precision == parse(merge(engine)).engine.precision


def test_a_run_may_be_resumed_with_other_threads_but_not_with_another_precision(tmp_path):
    (tmp_path / "config.toml").write_text(write_toml(merge(SMALL, {"run.out": str(tmp_path)})))

    def resumed(keys):
        return resolve(RunArgs(None, [keys], None, Engine(), None, tmp_path))[0]

    engine = resumed("engine.concurrent=2 engine.graphs=false").engine
    assert (engine.concurrent, engine.graphs) == (2, False)
    with pytest.raises(ConfigError, match=r"engine.precision is 'tf32'; that run was started with 'fp32'"):
        resumed("engine.precision='tf32'")


def test_the_engine_ends_its_threads_with_the_run():
    grids = []

    def server(grid, context):
        grids.append(grid)
        grid.send_and_receive([letter(grid, node) for node in grid.get_node_ids()])
        raise RunFailed("it is over")

    before = threading.active_count()
    with pytest.raises(RunFailed, match="it is over"):
        run_inline(server, echo(lambda node: node), parse(merge(SMALL, {"engine.concurrent": 3})))
    assert grids[0].concurrent == 3
    assert threading.active_count() == before


# ---- processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ssfl", "ditto"])
def test_processes_give_the_bits_of_one_client_after_the_other(tmp_path, strategy):
    keys = {"strategy": strategy, "run.rounds": 2, "local.batch-size": 64, **FEW}
    alone = play(keys)
    nodes, config = {1000 + i: i for i in range(SMALL["run.clients"])}, merge(SMALL, keys)
    get_runtime(config)
    with pool(client_app.app, 3) as app:
        grid = InlineGrid(app, config, nodes, concurrent=3)
        try:
            # Without a folder a client keeps its mask or its model in its node's state, which crosses the pipe.
            at_once = play(keys, grid=grid)
        finally:
            grid.close()
    assert at_once.bits() == alone.bits()
    assert at_once.metrics() == alone.metrics()


def test_a_process_that_raises_is_a_clients_failure_and_one_that_dies_is_the_runs():
    def work(node):
        if node == 1:
            raise ValueError("no data here")
        if node == 2:
            os._exit(1)
        return os.getpid()

    before = {child.pid for child in psutil.Process().children()}
    with pool(echo(work), 2) as app:
        grid = InlineGrid(app, {}, {i: i for i in range(1, 7)}, concurrent=2)
        try:
            (bad,) = grid.send_and_receive([letter(grid, 1)])
            assert bad.error.reason == "ValueError: no data here"
            pids = {said(reply) for reply in grid.send_and_receive([letter(grid, node) for node in (3, 4, 5, 6)])}
            assert os.getpid() not in pids
            with pytest.raises(RunFailed, match="a process that trains clients died"):
                grid.send_and_receive([letter(grid, 2)])
            (good,) = grid.send_and_receive([letter(grid, 3)])  # the other one is alive
            assert said(good) in pids
        finally:
            grid.close()
    assert {child.pid for child in psutil.Process().children()} == before


def test_nobody_waits_for_processes_that_are_all_dead():
    with pool(echo(lambda node: os._exit(1)), 2) as app:
        grid = InlineGrid(app, {}, {i: i for i in range(1, 7)}, concurrent=2)
        try:
            with pytest.raises(RunFailed, match="a process that trains clients died"):
                grid.send_and_receive([letter(grid, node) for node in range(1, 7)])
        finally:
            grid.close()


def test_processes_end_with_the_one_that_made_them(tmp_path):
    script = f"""
import os, time
from pathlib import Path
from flwr.clientapp import ClientApp
from ssfl_app.simulation.worker_pool import pool
import psutil
with pool(ClientApp(), 3):
    Path({str(tmp_path / "pids")!r}).write_text(" ".join(str(c.pid) for c in psutil.Process().children()))
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_the_inline_engine_forks_on_a_cpu():
    grids = []

    def server(grid, context):
        grids.append(grid)
        replies = grid.send_and_receive([letter(grid, node) for node in (1000, 1001, 1002)])
        assert os.getpid() not in {said(reply) for reply in replies}

    run_inline(server, echo(lambda node: os.getpid()), parse(merge(SMALL, {"engine.concurrent": 3})))
    assert grids[0].concurrent == 3
