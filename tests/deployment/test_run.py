"""Real SuperNodes: TLS, node authentication, one killed, one hostile; and the same bits as in simulation."""

import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL, HEARTBEAT_PATIENCE

from benchmarks.drills import field
from benchmarks.drills.field import Field, inline, ssfl, until
from ssfl_app.deployment import credentials
from ssfl_app.deployment.control import control, nodes
from ssfl_app.deployment.services import node_service
from ssfl_app.simulation.processes import end, environment, free_port
from tests.deployment.test_front import TRICKY

pytestmark = pytest.mark.slow

SECONDS = 240
SITES = {"run__clients": 2, "run__cohort": 2}

QUICK = """
import sys

if "ssfl_app.deployment.supernode" in sys.orig_argv:
    from flwr.common.constant import HEARTBEAT_MIN_INTERVAL
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection

    heartbeat.HEARTBEAT_DEFAULT_INTERVAL = fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL = HEARTBEAT_MIN_INTERVAL
"""
"""Nodes whose heartbeats come as often as Flower allows: the wait for one that was killed is a third of a minute."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """Bring two authenticated SuperNodes up; when they are down again no process is left."""
    work = tmp_path_factory.mktemp("place")
    (work / "sitecustomize.py").write_text(QUICK)
    paths = os.pathsep.join([str(work), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(field, "NODES", SITES["run__clients"])  # a message to a node is a process that loads torch
        with field.federation(work, PYTHONPATH=paths) as made:
            yield made


def test_a_registered_node_that_claims_anothers_place_is_set_aside_and_the_run_goes_on(
    place: Field, tmp_path: Path
) -> None:
    """It goes on to the bits of the simulation and costs the bytes that Flower counts, as if no thief were there.

    The thief comes through the front, as every node here; its key is registered beside those of the federation.
    """
    home = credentials.make_node(tmp_path, "thief")
    shutil.copy(place.folder / "superlink" / "ca.crt", home)
    thief = control(place.federation, "supernode", "register", str(home / "key.pub"))["node-id"]
    service = node_service(home, place.federation.address, "partition-id=0 num-partitions=2", free_port())
    service.start()
    assert service.process is not None
    keys = SITES | {"run__rounds": 2, "run__evaluate_every": 2}
    try:
        while [node["status"] for node in nodes(place.federation)].count("online") <= len(place.federation.nodes):
            assert service.process.poll() is None
            time.sleep(2)
        run = place.start(tmp_path / "run", **keys)
        same = inline(tmp_path / "inline", **keys)
        code, errors = run.end()
    finally:
        end(service.process)
        control(place.federation, "supernode", "unregister", str(thief))
    assert code == 0, errors
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
    assert summary["lost_replies"] == summary["refused_replies"] == 0
    said = (run.folder / "console.log").read_text()
    registered = json.loads(place.federation.registered.read_text())["numbers"]["0"]
    words = f"node {thief} is set aside: says that it is client 0, whose key is that of node {registered}"
    assert words in said or str(thief) not in said  # the run does not wait for one that answers last
    assert (run.folder / "rounds.jsonl").stat().st_mode & 0o077 == 0


def test_a_node_that_is_killed_comes_back_and_costs_numbers_in_the_table(place: Field, tmp_path: Path) -> None:
    keys = SITES | {"run__rounds": 5, "run__evaluate_every": 5, "partition__name": "iid", "local__epochs": 5}
    run = place.start(tmp_path / "run", **keys)
    until("the mask is found", lambda: run.records)
    place.client_app("node-1")
    place.service("node-1").kill()
    killed = time.monotonic()
    # Flower takes a node back when heartbeats are missing: the other one holds a round up until it is there.
    until("the round without it is over", lambda: "1" in run.records[-1].get("lost", {}))
    other = place.client_app("node-0")
    other.suspend()
    time.sleep(max(0.0, killed + HEARTBEAT_PATIENCE * HEARTBEAT_MIN_INTERVAL - time.monotonic()))
    place.nodes_online()
    other.resume()
    code, errors = run.end()
    assert code == 0, errors
    records, summary = run.records, run.summary
    lost = [record["round"] for record in records if "1" in record.get("lost", {})]
    assert lost == list(range(lost[0], lost[0] + len(lost)))  # from when it was killed until it was back
    assert 5 not in lost
    assert summary["lost_replies"] == len(lost) + sum(len(record.get("evaluate_lost", {})) for record in records)
    assert summary["refused_replies"] == 0
    assert all(set(record["lost"]) <= {"1"} for record in records)
    values = 4 * (summary["alive"] + summary["parameters"] - summary["prunable"])
    assert summary["bytes_train_up"] == values * sum(len(record["ok"]) for record in records if record["round"])
    assert max(record["seconds"] for record in records) < 90 + 60
    assert summary["central_accuracy"] > 0.9
    restarts = json.loads(place.federation.state.read_text())["services"]["node-1"]["restarts"]
    assert restarts >= 1


def test_a_federation_that_is_up_is_not_started_twice_and_says_who_is_online(place: Field) -> None:
    twice = subprocess.run(
        ssfl("federation", "up", "--nodes", "2", "--dir", str(place.folder)),
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
    assert status.stdout.count("online") == len(place.federation.nodes) == SITES["run__clients"]


def test_a_node_with_all_its_credentials_controls_nothing(place: Field, tmp_path: Path) -> None:
    home, runs = place.folder / "nodes" / "node-1", len(control(place.federation, "ls")["runs"])
    connection = f'[superlink]\ndefault = "f"\n[superlink.f]\naddress = "{place.federation.address}"\n'
    (tmp_path / "config.toml").write_text(f'{connection}root-certificates = "{home / "ca.crt"}"\n')
    flwr = str(Path(sys.executable).parent / "flwr")
    app = tmp_path / "evil"
    shutil.copytree("examples/message-api/before", app)
    calls = ["ls"], ["supernode", "list"], ["supernode", "register", str(home / "key.pub")], ["run", str(app)]
    for words in calls:
        done = subprocess.run(
            [flwr, *words, "f"],
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode != 0
        assert "404" in done.stdout + done.stderr
    host, _, port = place.federation.address.rpartition(":")
    trusted = ssl.create_default_context(cafile=str(home / "ca.crt"))
    for target in TRICKY:
        front = http.client.HTTPSConnection(host, int(port), timeout=20, context=trusted)
        front._validate_path = lambda url: None  # type: ignore[attr-defined]
        front.request("POST", target, body=b"", headers={"content-type": "application/x-protobuf"})
        assert front.getresponse().status in (400, 404), target
        front.close()
    assert len(control(place.federation, "ls")["runs"]) == runs
    for name in ("superlink", "node-0", "node-1"):
        for process in [place.service(name), *place.service(name).children(recursive=True)]:
            listening = [c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
            assert set(listening) <= {"127.0.0.1"}, process.cmdline()
