"""What every strategy keeps, whatever it computes: played in this process, by its address, in a few seconds.

A module that imports these tests and fixtures may say by fixtures of its own which `strategy` they play, with which
`keys`, under which it is `learning`, and by which `play`.
"""

import copy
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from ssfl_app.comm.payload import Payload
from ssfl_app.config import Flat, read_overrides
from ssfl_app.core.strategy import ServerContext, SparseStrategy
from ssfl_app.sparsity.layout import Vector
from ssfl_app.testing import grid
from ssfl_app.testing.grid import Played, ScriptedGrid, answer_error, tamper

Play = Callable[..., Played]


@pytest.fixture(scope="module")
def strategy(request: pytest.FixtureRequest) -> str:
    """Return the strategy that --strategy names."""
    named: str | None = request.config.getoption("--strategy")
    return named or pytest.exit("--strategy is missing; it names what is played, e.g. --strategy mine:Mine", 4)


@pytest.fixture(scope="module")
def keys(strategy: str) -> Flat:
    """Return the keys of every run."""
    return {"strategy": strategy}


@pytest.fixture(scope="module")
def learning(request: pytest.FixtureRequest) -> Flat:
    """Return the keys under which it learns the small task."""
    return read_overrides([request.config.getoption("--strategy-keys")])


@pytest.fixture(scope="module")
def play() -> Play:
    """Return what plays a run."""
    return grid.play


@pytest.fixture(scope="module")
def shared(play: Play, keys: Flat) -> Played:
    """Return a run of three rounds."""
    return play(keys)


@pytest.fixture
def played(shared: Played) -> Played:
    """Return this run for one test."""
    return shared.own_copy()


@dataclass
class Again:
    """A run whose clients keep their memory in files: a snapshot of round 1, and nodes and files after round 2."""

    folder: Path
    run: Played | None = None
    snapshot: dict[str, Vector] = field(default_factory=dict)
    nodes: ScriptedGrid | None = None

    @property
    def files(self) -> Path:
        """Where the files of round 2 lie."""
        return self.folder / "of round 2"

    def watch(self, strategy: SparseStrategy) -> None:
        """Have a strategy that is to be played leave them."""
        played = cast(Played, strategy.callback)
        told = played.round

        def keep(record: dict[str, Any], strategy: SparseStrategy) -> None:
            if record["round"] == 1:
                self.snapshot = {name: array.copy() for name, array in strategy.state_dict().items()}
            if record["round"] == 2:
                self.nodes = copy.deepcopy(played.grid)
                shutil.copytree(self.folder / "clients", self.files, dirs_exist_ok=True)
            told(record, strategy)

        played.round = keep  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def again(play: Play, keys: Flat, tmp_path_factory: pytest.TempPathFactory) -> Again:
    """Return the run of `shared` with other node ids and another order of replies."""
    made = Again(tmp_path_factory.mktemp("again"))
    (made.folder / "clients").mkdir()
    made.run = play(keys | {"run.checkpoint-every": 1}, luck=1, folder=made.folder / "clients", prepare=made.watch)
    return made


def test_learns(play: Play, keys: Flat, learning: Flat) -> None:
    """The models that the method ends up with are good where they are used, and better than at its start."""
    long: Flat = {"run.rounds": 4, "local.epochs": 3, "local.batch-size": 16, "run.evaluate-every": 9}
    records = play(keys | long | learning).records
    last = records[-1]
    best = last["central_accuracy"] if last["personal_accuracy_mean"] is None else last["personal_accuracy_mean"]
    assert best > 0.8
    assert last["train_loss"] < 0.5 * records[1]["train_loss"]


def test_repeats_bit_for_bit_with_other_node_ids_and_another_order_of_replies(played: Played, again: Again) -> None:
    """Client memory is in files the second time."""
    assert again.run is not None
    assert again.run.grid.log != played.grid.log
    assert again.run.bits() == played.bits()
    assert again.run.metrics() == played.metrics()


def test_another_seed_is_another_run_and_global_random_generators_are_left_alone(
    play: Play, keys: Flat, played: Played
) -> None:
    """Chance comes from `generator(seed, purpose, ...)`."""

    def generators() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index] # noqa: NPY002

    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    before = generators()
    assert play(keys | {"run.seed": 2, "run.rounds": 1}).bits() != played.bits()
    assert before == generators()


def test_goes_on_from_a_snapshot_to_the_same_bits(played: Played, again: Again) -> None:
    """All that the server remembers is in `state_dict`; clients may have got further than the checkpoint."""
    assert again.run is not None
    assert again.nodes is not None
    settings = again.run.strategy.settings
    resumed = type(played.strategy)(ServerContext(played.layout, settings, folder=again.files))
    resumed.load_state_dict(1, again.snapshot)
    finished = Played(resumed, played.runtime, again.nodes)
    resumed.callback = finished
    resumed.start(again.nodes, ArrayRecord(played.runtime.initial_state()), 3)
    lost = "it goes on to other bits from its snapshot: does state_dict() hold all that the server remembers?"
    assert finished.bits() == played.bits(), lost
    assert resumed.personal_accuracy == played.strategy.personal_accuracy


def test_says_which_share_of_its_model_is_alive(played: Played) -> None:
    """Of the prunable weights, and of all."""
    (density, density_all), layout = played.strategy.densities(), played.layout
    assert 0 < density <= 1
    rest = layout.size - layout.prunable_size
    assert density_all == pytest.approx((density * layout.prunable_size + rest) / layout.size)
    assert played.records[-1]["density"] == density


def test_what_a_global_mask_holds_dead_is_zero(played: Played) -> None:
    """In every round."""
    layout = played.layout
    for state, mask in zip(played.states, played.masks, strict=True):
        prunable = layout.flatten(state)[layout.is_prunable]
        assert not prunable[~mask.alive].any()


def test_counts_the_bytes_of_what_was_sent(played: Played) -> None:
    """Against the arrays that crossed the grid; what they are by formula a test of the strategy knows."""
    down: dict[tuple[str, int], int] = {}
    up: dict[tuple[str, int], int] = {}
    for into, payloads in ((down, played.grid.sent), (up, played.grid.got)):
        for (kind, round_, _), payload in payloads:
            into[kind, round_] = into.get((kind, round_), 0) + payload.nbytes
    for record in played.records[1:]:
        round_ = record["round"]
        everything = record["bytes_train_down"] + record["bytes_evaluate_down"] + record["bytes_mask_down"]
        assert everything == down["train", round_] + down["evaluate", round_]
        assert record["bytes_train_up"] == up["train", round_]
    for record in played.records:
        sent = sum(n for (kind, r), n in down.items() if kind.startswith("query") and r == record["round"])
        assert record.get("bytes_discovery_down", 0) == sent


def test_goes_on_without_a_lost_client_and_a_refused_one_changes_no_more(
    play: Play, keys: Flat, played: Played
) -> None:
    """A refused client worked, and may remember that; the server took nothing, so it never happened."""
    client = played.records[2]["cohort"][0]
    where = ("train", 2, client)

    def poison(payload: Payload) -> Payload:
        name = "values" if "values" in payload.arrays else next(iter(payload.arrays))
        values = payload.arrays[name].copy()
        if values.dtype == np.float32:
            values[7] = np.nan
        else:
            values = values[:-1]
        return Payload({**payload.arrays, name: values}, payload.metadata)

    lost = play(keys, faults={where: answer_error(5, "node gone")})
    assert lost.records[2]["lost"] == {str(client): "Flower error 5: node gone"}
    assert lost.records[2]["ok"] == [c for c in played.records[2]["cohort"] if c != client]
    assert lost.bits() != played.bits()

    refused = play(keys, faults={where: tamper(poison)})
    reason = refused.records[2]["refused"][str(client)]
    assert "1 values are NaN or Inf" in reason or "bytes; this layout needs" in reason
    assert refused.bits() == lost.bits()
    assert refused.records[3]["personal_accuracy_mean"] == lost.records[3]["personal_accuracy_mean"]


def test_sends_every_sampled_strategy_the_same_cohorts(play: Play, played: Played) -> None:
    """Those of FedAvg, or everybody."""
    if type(played.strategy).full_participation:
        assert all(record["cohort"] == list(range(6)) for record in played.records[1:])
        return
    other = play({"strategy": "fedavg"})
    assert [r.get("cohort") for r in played.records] == [r.get("cohort") for r in other.records]
