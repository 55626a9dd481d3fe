"""Real SuperNodes: TLS, node authentication, one of them killed; and the same bits as in simulation."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.drills.field import KEYS, Field, federation, inline, ssfl
from ssfl_app.engine.federation_control import control

pytestmark = pytest.mark.slow

SECONDS = 240


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """Bring three authenticated SuperNodes up; when they are down again no process is left."""
    with federation(tmp_path_factory.mktemp("place")) as made:
        yield made


def test_the_bits_of_the_simulation_and_the_bytes_that_flower_counts(place: Field, tmp_path: Path) -> None:
    run = place.start(tmp_path / "run", run__rounds=2, run__evaluate_every=2)
    code, errors = run.end()
    assert code == 0, errors
    same = inline(tmp_path / "inline", run__rounds=2, run__evaluate_every=2)
    summary = run.summary
    assert summary["engine"] == "deployment"
    assert summary["model_sha256"] == same["model_sha256"]
    assert summary["mask_sha256"] == same["mask_sha256"]
    kinds = [key for key in summary if key.startswith("bytes_") and key != "bytes_mask_down"]
    assert {key: summary[key] for key in kinds} == {key: same[key] for key in kinds}
    up = summary["bytes_discovery_up"] + summary["bytes_train_up"]
    down = summary["bytes_discovery_down"] + summary["bytes_train_down"] + summary["bytes_evaluate_down"]
    counted = control(place.federation, "ls")["runs"][0]["network-traffic"]
    assert up < counted["inbound-bytes"] < 1.02 * up
    assert down < counted["outbound-bytes"] < 1.02 * down


def test_a_node_that_is_killed_comes_back_and_costs_numbers_in_the_table(place: Field, tmp_path: Path) -> None:
    run = place.start(tmp_path / "run", run__rounds=6, run__evaluate_every=6, run__round_timeout=60.0)
    run.wait_for("round 1/")
    place.client_app("node-1")
    place.service("node-1").kill()
    code, errors = run.end()
    assert code == 0, errors
    records, summary = run.records, run.summary
    lost = [record["round"] for record in records if "1" in record.get("lost", {})]
    assert lost == list(range(2, 2 + len(lost)))  # from the round in which it was killed until it was back
    assert lost
    assert 6 not in lost  # Flower takes a node back a minute after it was killed
    assert summary["lost_replies"] == len(lost) + sum(len(record.get("evaluate_lost", {})) for record in records)
    assert summary["refused_replies"] == 0
    assert all(set(record["lost"]) <= {"1"} for record in records)
    values = 4 * (summary["alive"] + summary["parameters"] - summary["prunable"])
    assert summary["bytes_train_up"] == values * sum(len(record["ok"]) for record in records if record["round"])
    assert max(record["seconds"] for record in records) < 60 + 90
    assert summary["central_accuracy"] > 0.9
    restarts = json.loads(place.federation.state.read_text())["services"]["node-1"]["restarts"]
    assert restarts >= 1


def test_a_federation_that_is_up_is_not_started_twice_and_says_who_is_online(place: Field) -> None:
    twice = subprocess.run(
        ssfl("federation", "up", "--nodes", "3", "--dir", str(place.folder)),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert twice.returncode == 2
    assert "is up already" in twice.stderr
    place.nodes_online()
    status = subprocess.run(
        ssfl("federation", "status", "--dir", str(place.folder)),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert status.returncode == 0, status.stdout
    assert status.stdout.count("online") == len(place.federation.nodes) == KEYS["run.clients"]
