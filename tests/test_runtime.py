"""What a process sets up is set up once: the configuration is parsed, the data are loaded and dealt."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from torch import nn

from ssfl_app import client_app, runtime, server_app
from ssfl_app import config as configuration
from ssfl_app.cli.main import run
from ssfl_app.comm.node_config import SIMULATED
from ssfl_app.comm.payload import Payload, PayloadEncoder
from ssfl_app.config import merge
from ssfl_app.registry import name_of
from ssfl_app.simulation.command import Engine, RunArgs
from ssfl_app.simulation.in_process import InlineGrid
from ssfl_app.simulation.prepared_run import _prepare
from ssfl_app.simulation.worker_pool import SERVER
from tests.in_process_grid import SMALL

KEYS = SMALL | {"run.rounds": 1, "engine.concurrent": 1}
ONCE = Counter(["parse", "load", "split"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return how often each of `ONCE` was called in what is from now on a fresh process."""
    counted: Counter[str] = Counter()
    for owner, name in ((configuration, "parse"), (runtime.data, "load"), (runtime, "split")):

        def call(*args: object, name: str = name, real: object = getattr(owner, name)) -> object:
            counted[name] += 1
            return real(*args)  # type: ignore[operator]

        monkeypatch.setattr(owner, name, call)
    runtime._open.cache_clear()
    return counted


WORDS = [f"{key}={value}" for key, value in KEYS.items()]


def test_a_run_in_this_process_parses_loads_and_deals_once(calls: Counter[str], tmp_path: Path) -> None:
    run(override=WORDS, out=tmp_path / "run")
    assert calls == ONCE
    assert not runtime._CHECKED


def test_the_process_that_prepares_a_run_on_ray_parses_loads_and_deals_once(
    calls: Counter[str], tmp_path: Path
) -> None:
    _prepare(RunArgs(None, WORDS, None, Engine("ray"), tmp_path / "run", None))
    assert calls == ONCE
    assert not runtime._CHECKED  # nobody will ask for them


def test_the_process_of_a_server_app_parses_loads_and_deals_once(calls: Counter[str], tmp_path: Path) -> None:
    flat = merge(KEYS, {"run.out": str(tmp_path / "run")})
    grid = InlineGrid(client_app.app, flat, {1000 + i: i for i in range(SMALL["run.clients"])})  # type: ignore[arg-type]
    server_app.app(grid, Context(run_id=1, node_id=SERVER, node_config={}, state=RecordDict(), run_config=flat))
    assert calls == ONCE


def test_a_process_that_answers_for_many_clients_parses_loads_and_deals_once(calls: Counter[str]) -> None:
    InlineGrid(client_app.app, {}, {})  # Flower's task identity
    for client in (0, 1, 0, 2):
        node: dict[str, bool | int] = {"partition-id": client, "num-partitions": 6, SIMULATED: True}
        hello = Message(PayloadEncoder().record(Payload()), client + 1, "query.hello")
        context = Context(run_id=1, node_id=client + 1, node_config=node, state=RecordDict(), run_config=merge(KEYS))  # type: ignore[arg-type]
        assert not client_app.handle(hello, context).has_error()
    assert calls == ONCE


def _linear(shape: tuple[int, ...], outputs: int, norm: str) -> nn.Module:
    return nn.Linear(*shape, outputs)


def test_a_run_that_begins_anew_reads_the_data_anew(tmp_path: Path) -> None:
    file = tmp_path / "some.npz"
    named = {"data.name": "arrays", "data.path": str(file), "model.name": name_of(_linear), "mask.density": 1.0}
    config, shapes = configuration.parse(SMALL | named), []
    for width in (3, 4):
        x, y = np.ones((40, width)), np.arange(40) % 2
        np.savez(file, x_train=x, y_train=y, x_test=x, y_test=y)
        runtime.check(config, keep=True)
        shapes.append(runtime.get_runtime(config.flat).data.shape)
    assert shapes == [(3,), (4,)]
