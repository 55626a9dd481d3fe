"""A Ray cluster that others started: two nodes in network namespaces, each with files of its own."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from ssfl_app.comm.client_files import Folder
from ssfl_app.comm.ray_cluster import NODES, Keeper, RayFolder, why_an_actor_died
from ssfl_app.experiments.sweep import run_sweep
from ssfl_app.options import ConfigError
from ssfl_app.simulation.cluster import Answer, Node, Room, complaints, libraries, room_for
from ssfl_app.simulation.command import Engine, RayCluster, RunArgs
from ssfl_app.simulation.prepared_run import PreparedRun
from ssfl_app.simulation.processes import environment, free_port, kill_families
from ssfl_app.testing.grid import SMALL

ROOT = Path(__file__).parents[2]
SSFL = [sys.executable, "-m", "ssfl_app", "run"]
SECONDS = 240
KEYS: dict[str, Any] = {**SMALL, "model.width": 0.25, "run.checkpoint-every": 1, "run.rounds": 2}

NETS = """
from torch import nn

def net(input_shape, outputs, norm):
    size = input_shape[0] * input_shape[1] * input_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 16), nn.ReLU(), nn.Linear(16, outputs))
"""


def run(keys: Mapping[str, Any] = KEYS, wanted: int = 0, device: str = "auto", asked: int = 4) -> PreparedRun:
    flat = {**keys, "run.device": device, "engine.actors": wanted}
    return PreparedRun(Path(), flat, 6, asked, 1, 1, 0.0, 4, [], (), "")


def nodes(*cpus_and_gpus: tuple[int, int]) -> list[Node]:
    return [Node(f"n{i}", str(i), *has) for i, has in enumerate(cpus_and_gpus)]


class TestRoom:
    """What Flower then makes of it: on each node as many actors as its cores and its GPUs allow."""

    @pytest.fixture(autouse=True)
    def many_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ssfl_app.simulation.cluster.usable_cores", lambda: 64)

    @pytest.mark.parametrize(
        ("has", "wanted", "room"),
        [
            ([(1, 0), (1, 0)], 0, Room(2, 1, 0.0)),  # a core each
            ([(16, 0), (16, 0)], 0, Room(4, 8, 0.0)),  # no more than the cohort
            ([(16, 0), (16, 0)], 5, Room(6, 5, 0.0)),  # even, and no fewer
            ([(16, 0), (16, 0)], 1, Room(2, 16, 0.0)),
            ([(0, 0), (8, 0), (4, 0)], 3, Room(3, 4, 0.0)),  # a head that trains nobody
            ([(8, 2), (8, 2)], 8, Room(8, 2, 0.5)),  # two share a GPU
            ([(8, 0), (8, 2)], 4, Room(4, 2, 0.5)),  # where there are GPUs, only there
            ([(8, 4), (8, 1)], 8, Room(8, 2, 0.25)),
            ([(9, 3)], 8, Room(9, 1, 0.3333)),
            ([(8, 8)], 2, Room(2, 4, 1.0)),  # never parts of two GPUs
        ],
    )
    def test_actors_are_even_and_enough(self, has: list[tuple[int, int]], wanted: int, room: Room) -> None:
        assert room_for(nodes(*has), run(wanted=wanted)) == room
        flowers = [
            min(cpus // room.cpus, int(gpus / room.gpu) if room.gpu else cpus) if gpus or not room.gpu else 0
            for cpus, gpus in has
        ]
        assert sum(flowers) == room.actors

    def test_gpus_are_left_alone_where_the_device_is_the_cpu(self) -> None:
        assert room_for(nodes((4, 4)), run(device="cpu")).gpu == 0.0

    @pytest.mark.parametrize(
        ("has", "words", "why"),
        [
            ([(2, 0)], {"wanted": 3}, "engine.actors is 3; the cluster has 2 cores for them"),
            (
                [(64, 0)],
                {"wanted": 40},
                "engine.actors is 40; the cluster has 64 cores .*Flower drives 32",
            ),
            ([(4, 0)], {"device": "cuda"}, "run.device is 'cuda'; no node of the Ray cluster has a GPU"),
            ([(0, 0)], {}, "no cores for actors"),
        ],
    )
    def test_what_there_is_no_room_for_is_refused(
        self, has: list[tuple[int, int]], words: dict[str, Any], why: str
    ) -> None:
        with pytest.raises(ConfigError, match=why):
            room_for(nodes(*has), run(**words))


def test_a_node_that_differs_is_named_with_what_it_has() -> None:
    ours, (here, there) = Answer(libraries(), "c0de", "da7a", ""), nodes((1, 0), (1, 0))
    cases: list[tuple[Answer | str, list[str]]] = [
        (ours, []),
        (replace(ours, versions=libraries() | {"torch": "1.0"}), ["node n1: torch is 1.0, not "]),
        (replace(ours, code="0ther"), ["node n1: its code is 0ther, not c0de"]),
        (replace(ours, data="0ther"), ["node n1: its data or initial weights are others than this machine's"]),
        (replace(ours, data="", fault="data.path is missing"), ["node n1: data.path is missing"]),
        ("ModuleNotFoundError: No module named 'torch'", ["node n1: ModuleNotFoundError: No module named 'torch'"]),
    ]
    for told, found in cases:
        said = complaints({here: ours, there: told}, "0")
        assert len(said) == len(found)
        assert all(one.startswith(start) for one, start in zip(said, found, strict=True))


@pytest.mark.parametrize("address", ["ray://head:10001", "head", ":6379", "head:port", ""])
def test_an_address_is_that_of_a_head(address: str) -> None:
    with pytest.raises(ConfigError, match="it is HOST:PORT of a cluster's head, or auto"):
        RayCluster(address)


def test_the_command_that_goes_on_names_the_cluster() -> None:
    words = RunArgs(None, [], None, Engine.of("inline", "[::1]:6379", True), None, None)
    assert words.going_on == ["run", "--ray-address", "[::1]:6379", "--ray-without-token"]


def test_a_run_of_many_has_the_whole_cluster(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[compare]\nstrategies = ["fedavg"]\nseeds = [1]\nbaseline = "fedavg"\n')
    with pytest.raises(ConfigError, match="--jobs is 2; it is 1 with --ray-address"):
        run_sweep(
            [tmp_path / "a.toml"], [], tmp_path / "out", Engine.of("inline", "auto"), 2, "none", False, lambda _: None
        )


def test_files_through_a_keeper_are_those_of_its_folder(tmp_path: Path) -> None:
    there, here = RayFolder(str(tmp_path), Keeper().call), Folder(tmp_path)
    there.write("client-00003/000001.safetensors", b"one")
    here.write("client-00003/000002.safetensors", b"two")
    for store in (here, there):
        assert sorted(store.names("client-00003")) == ["000001.safetensors", "000002.safetensors"]
        assert store.read("client-00003/000002.safetensors") == b"two"
        with pytest.raises(FileNotFoundError):
            store.read("client-00003/000003.safetensors")
    there.delete("client-00003/000001.safetensors")
    assert here.names("client-00003") == ["000002.safetensors"]


def test_a_keeper_that_is_gone_is_a_fault_of_the_files() -> None:
    def gone(*_: object) -> None:
        raise ray.exceptions.ActorDiedError

    with pytest.raises(OSError, match="the files of the clients, at the server, are out of reach"):
        RayFolder("/clients", gone).read("masks/a")


def test_a_machine_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NODES, json.dumps({"b (10.0.0.2)": ["127.0.0.1", free_port()]}))
    assert why_an_actor_died("").startswith("Ray answers no more on b (10.0.0.2)")
    monkeypatch.delenv(NODES)
    assert why_an_actor_died(": try") == "Most often it ran out of memory: try"


def started(words: Sequence[object], cwd: Path = Path("/"), **variables: str) -> "subprocess.Popen[str]":
    """Start a command; much of what it does is to wait, so that two at once take little longer than one."""
    return subprocess.Popen(
        list(map(str, words)),
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: "subprocess.Popen[str]", code: int = 0) -> tuple[str, str]:
    """Return what a command said, and said of errors, when it ends with this exit code."""
    said = process.communicate(timeout=SECONDS)
    assert process.returncode == code, said
    return said


def keys(**more: Any) -> str:
    return " ".join(f"{key}={value!r}" for key, value in {**KEYS, **more}.items())


def result(folder: Path) -> dict[str, Any]:
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    files = {path.relative_to(folder): path.read_bytes() for path in folder.glob("clients/client-*/*.safetensors")}
    summary = json.loads((folder / "summary.json").read_text())
    for record in rounds:
        del record["seconds"]
    return {"model": summary["model_sha256"], "rounds": rounds, "files": files}


class Cluster:
    """Two nodes of Ray: "a" is the head, where runs are started; "b" sees nothing of them, nor of this package."""

    def __init__(self, home: Path) -> None:
        self.home, self.address = home, "10.77.0.1:6379"
        self.spaces = {name: f"ssfl-{os.getpid()}-{name}" for name in "ab"}
        self.variables = environment(home / "flwr", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="5" * 64)
        self.variables |= {"RAY_TMPDIR": str(home), "RAY_prestart_worker_first_driver": "0"}
        self.variables["RAY_health_check_period_ms"] = "300"  # five in vain: a node is dead
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *words: str, hidden: tuple[Path, ...] = ()) -> None:
        number = "ab".index(name) + 1
        given = ["--num-cpus=1", f"--node-ip-address=10.77.0.{number}", "--object-store-memory=80000000", *words]
        start = " ".join([str(Path(sys.executable).parent / "ray"), "start", "--block", *given])
        hide = [f"mount -t tmpfs none {path}" for path in hidden]
        shell = " && ".join([f"hostname node-{name}", *hide, f"exec {start}"])
        command = ["ip", "netns", "exec", self.spaces[name], "unshare", "--mount", "--uts", "sh", "-c", shell]
        log = self.home / f"{name}.log"
        for _ in range(3):  # Ray gives a node 30 s to start, whatever else this machine does
            with log.open("wb") as file:
                self.nodes[name] = subprocess.Popen(
                    command, env=self.variables, cwd="/", stdin=subprocess.DEVNULL, stdout=file, stderr=file
                )
            while self.nodes[name].poll() is None:
                if b"Ray runtime started" in log.read_bytes():
                    return
                time.sleep(0.1)
        raise AssertionError(log.read_text(errors="replace"))

    def kill(self, name: str) -> None:
        kill_families([self.nodes[name].pid])
        self.nodes[name].wait()

    def end(self) -> None:
        for name in self.nodes:
            self.kill(name)

    def ssfl(
        self, *words: object, address: str = "", cwd: Path = Path("/"), of: str = "run", **more: str
    ) -> "subprocess.Popen[str]":
        command = [*SSFL[:-1], of, "--ray-address", address or self.address]
        return started(["ip", "netns", "exec", self.spaces["a"], *command, *words], cwd, **{**self.variables, **more})


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def network(spaces: Mapping[str, str]) -> Iterator[None]:
    with ExitStack() as stack:
        for space in spaces.values():
            ip("netns", "add", space)
            stack.callback(ip, "netns", "delete", space)
        ip("link", "add", "eth", "netns", spaces["a"], "type", "veth", "peer", "name", "eth", "netns", spaces["b"])
        for number, space in enumerate(spaces.values(), 1):
            ip("-n", space, "address", "add", f"10.77.0.{number}/24", "dev", "eth")
            for link in ("lo", "eth"):
                ip("-n", space, "link", "set", link, "up")
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "mount"))):
        pytest.skip("two nodes need root, ip, unshare and mount, for namespaces")
    with ExitStack() as stack:
        short = tempfile.TemporaryDirectory(prefix="ssfl-", dir="/tmp", ignore_cleanup_errors=True)
        made = Cluster(Path(stack.enter_context(short)))
        try:
            stack.enter_context(network(made.spaces))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"namespaces cannot be made here: {error.stderr.strip()}")
        stack.callback(made.end)
        made.start("a", "--head", "--port=6379", "--include-dashboard=false")
        made.start("b", f"--address={made.address}", hidden=(made.home, ROOT / "ssfl_app"))
        yield made


@pytest.mark.slow
def test_two_nodes_that_share_no_file_give_the_bits_of_one_process(cluster: Cluster) -> None:
    """The code travels, with a module of the user's; so do the masks that clients hold."""
    place = cluster.home / "mine"
    place.mkdir()
    (place / "nets.py").write_text(NETS)
    words = "-c", keys(**{"model.name": "nets:net", "model.width": 1.0}), "--out"
    inline = started([*SSFL, *words, place / "inline"], place)
    said, _ = ended(cluster.ssfl(*words, place / "ray", cwd=place))
    assert "engine ray: 2 actors on 2 node(s) of 10.77.0.1:6379: node-a (10.77.0.1), node-b (10.77.0.2)" in said
    ended(inline)
    assert result(place / "ray") == result(place / "inline")
    assert json.loads((place / "ray" / "summary.json").read_text())["engine"] == "ray"


@pytest.mark.slow
def test_a_comparison_is_played_on_a_cluster(cluster: Cluster) -> None:
    place = cluster.home / "sweep"
    place.mkdir()
    (place / "one.toml").write_text('[compare]\nstrategies = ["fedavg"]\nseeds = [1]\nbaseline = "fedavg"\n')
    words = "one.toml", "-c", keys(**{"run.rounds": 1}), "--out", place / "out"
    ended(cluster.ssfl(*words, cwd=place, of="compare"))
    (summary,) = (place / "out" / "runs").glob("*/summary.json")
    assert json.loads(summary.read_text())["engine"] == "ray"


@pytest.mark.slow
def test_a_node_without_the_data_and_a_wrong_token_are_refused(cluster: Cluster) -> None:
    import numpy as np

    rng, file = np.random.default_rng(0), cluster.home / "data.npz"
    x, y = rng.integers(0, 255, (120, 1, 8, 8)).astype(np.uint8), np.arange(120) % 4
    np.savez(file, x_train=x, y_train=y, x_test=x, y_test=y)
    data = {"data.name": "arrays", "data.path": str(file)}
    missing = cluster.ssfl("-c", keys(**data), "--out", cluster.home / "missing")
    wrong = cluster.ssfl("-c", keys(), "--out", cluster.home / "wrong", RAY_AUTH_TOKEN="6" * 64)
    _, why = ended(missing, 2)
    assert f"node node-b (10.77.0.2): data.path is '{file}'; there is no such file" in why
    assert "node-a" not in why
    assert "it takes its own token only" in ended(wrong, 2)[1]


@pytest.mark.slow
def test_a_node_that_dies_in_a_round_ends_the_run_by_name_and_it_goes_on_to_the_same_bits(cluster: Cluster) -> None:
    """What the clients of the dead node kept is at the server, and the other node goes on with it."""
    words, folder = ("-c", keys(**{"strategy": "ditto", "run.rounds": 5})), cluster.home / "ditto"
    process = cluster.ssfl(*words, "--out", folder)
    rounds, end = folder / "rounds.jsonl", time.monotonic() + SECONDS
    while not rounds.exists() or rounds.read_text().count("\n") < 2:  # round 0 and one more
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    cluster.kill("b")
    _, errors = ended(process, 1)
    assert "a Ray actor died while it worked for client" in errors
    assert "Ray answers no more on node-b (10.77.0.2)" in errors
    assert f"to go on: ssfl run --ray-address {cluster.address} --resume {folder}" in errors
    assert json.loads((folder / "status.json").read_text())["status"] == "failed"
    assert rounds.read_text().count("\n") < 6
    going_on = cluster.ssfl("--resume", folder, address="auto")
    ended(started([*SSFL, *words, "--out", cluster.home / "inline"]))
    assert "1 actors on 1 node(s) of 10.77.0.1:6379: node-a (10.77.0.1)" in ended(going_on)[0]
    assert len(result(folder)["files"]) >= 6
    assert result(folder) == result(cluster.home / "inline")


OPEN = """
import ray
found = ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80_000_000)
print(found.address_info["gcs_address"], flush=True)
input()
"""


@pytest.mark.slow
def test_a_cluster_without_a_token_is_refused_unless_it_is_taken_as_it_is(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        variables = environment(tmp_path / "flwr", RAY_ADDRESS="local", RAY_TMPDIR=short, RAY_AUTH_MODE="disabled")
        loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # without it Ray looks for the address on the network
        variables |= loopback
        head = subprocess.Popen(
            [sys.executable, "-c", OPEN], env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert head.stdout is not None
            address = head.stdout.readline().strip()
            words = [*SSFL, "--ray-address", address, "-c", keys(**{"engine.actors": 2}), "--out"]
            refused = started([*words, tmp_path / "refused"], tmp_path, **loopback)
            taken = started([*words, tmp_path / "taken", "--ray-without-token"], tmp_path, **loopback)
            assert "whoever reaches this cluster runs code on it, as it has no token" in ended(refused, 2)[1]
            # It is joined, and asked what it has.
            assert "engine.actors is 2; the cluster has 1 cores for them" in ended(taken, 2)[1]
        finally:
            kill_families([head.pid])
            head.wait()
