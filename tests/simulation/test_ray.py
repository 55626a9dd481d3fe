"""The real thing: `ssfl run` and `flwr run` on Ray, against the in-process engine, digit for digit."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import ssfl_app
from ssfl_app.config import read_overrides
from tests.in_process_grid import SMALL
from tests.system.test_surroundings import DEAD, NOTEBOOK

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
KEYS = " ".join(f"{key}={value}" for key, value in SMALL.items()) + " run.checkpoint-every=1 engine.actors=1"
SECONDS = 240


def ssfl(folder: Path, keys: str = KEYS, **variables: str) -> dict[str, object]:
    """Run to the end; return the metrics of all rounds and the hashes."""
    command = [str(BIN / "ssfl"), "run", "--engine", "ray", "-c", keys, "--out", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, env=os.environ | variables
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return result(folder)


def result(folder: Path) -> dict[str, object]:
    summary = json.loads((folder / "summary.json").read_text())
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in rounds:
        del record["seconds"]
    return {
        "model": summary["model_sha256"],
        "mask": summary["mask_sha256"],
        "rounds": rounds,
        "engine": summary["engine"],
    }


def in_process(folder: Path, keys: str = KEYS) -> dict[str, object]:
    """Return the result of the in-process engine, here: a process of its own would import everything first."""
    ssfl_app.run(config=read_overrides([keys]), out=folder, quiet=True)
    found = result(folder)
    assert found.pop("engine") == "inline"
    return found


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Return the result of the in-process engine."""
    return in_process(tmp_path_factory.mktemp("inline") / "run")


@pytest.fixture
def short() -> Iterator[Path]:
    """Yield a folder whose name leaves room for a socket's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_personal_models_on_ray_are_those_of_the_in_process_engine_whatever_others_left(
    short: Path, tmp_path: Path
) -> None:
    """Each client's model is a file of the run folder, whoever wrote it: two actors, or this process.

    Others left a cluster that crashed, by its address file and by the variable of somebody's shell.
    """
    (short / "ray").mkdir()
    (short / "ray" / "ray_current_cluster").write_text("127.0.0.1:6379")
    keys = f"{KEYS} engine.actors=2 strategy='ditto'"
    inline = in_process(tmp_path / "inline", keys)
    ray = ssfl(tmp_path / "ray", keys, RAY_TMPDIR=str(short), RAY_ADDRESS="127.0.0.1:6379")
    assert ray.pop("engine") == "ray"
    assert ray == inline
    files = [sorted((tmp_path / name / "clients").glob("client-*/*.safetensors")) for name in ("inline", "ray")]
    assert len(files[0]) >= 6
    assert [file.relative_to(tmp_path / "inline") for file in files[0]] == [
        file.relative_to(tmp_path / "ray") for file in files[1]
    ]
    assert all(one.read_bytes() == two.read_bytes() for one, two in zip(*files, strict=True))
    assert sorted(path.name for path in short.rglob("*")) == ["ray", "ray_current_cluster"]


def start(
    folder: Path, keys: str = KEYS, engine: str = "ray", **variables: str
) -> tuple["subprocess.Popen[str]", set[int]]:
    """Start a run and wait for its first checkpoint; return it and the processes that were there before."""
    before = {process.pid for process in psutil.process_iter()}
    command = [str(BIN / "ssfl"), "run", "--engine", engine, "-c", keys, "--out", str(folder)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | variables
    )
    end = time.monotonic() + SECONDS
    while not (folder / "checkpoint" / "latest.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    return process, before


def alive(before: set[int], name: str) -> list[psutil.Process]:
    """Return the living processes of that name which were not there before."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or [])
        if process.pid not in before and name in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def living(family: list[psutil.Process]) -> list[psutil.Process]:
    gone = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return [member for member in family if member.is_running() and member.status() not in gone]


def test_behind_a_proxy_with_a_long_tmpdir_a_killed_run_stops_and_resumes_to_the_same_model(
    inline: dict[str, object], tmp_path: Path
) -> None:
    """However many actors share the clients, one here; plain `flwr run`, below, gives all digits once more."""
    folder, deep = tmp_path / "größe", tmp_path / ("x" * 100)
    deep.mkdir()
    proxies = {"http_proxy": DEAD, "HTTPS_PROXY": DEAD, "ALL_PROXY": "socks5://127.0.0.1:9"}
    around = {**proxies, **NOTEBOOK, "TMPDIR": str(deep)}
    process, before = start(folder, **around)
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while alive(before, "flwr-simulation") + alive(before, "ray::") + alive(before, "flower-super"):
        assert time.monotonic() < end, "the simulation outlives its launcher"
        time.sleep(0.1)
    assert not (folder / "summary.json").exists()
    command = [str(BIN / "ssfl"), "run", "--engine", "ray", "--resume", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, env=os.environ | around
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming after round" in done.stdout
    resumed = result(folder)
    assert [resumed[name] for name in ("model", "mask", "engine")] == [inline["model"], inline["mask"], "ray"]
    assert (folder / "report.html").is_file()
    assert not list(deep.glob("ray*"))


@pytest.mark.parametrize(
    ("engine", "number"), [("ray", signal.SIGINT), ("inline", signal.SIGINT), ("inline", signal.SIGHUP)]
)
def test_an_interrupted_run_says_so_and_leaves_nothing(engine: str, number: int, short: Path, tmp_path: Path) -> None:
    shared = {*Path("/tmp/ray").glob("session_2*"), *Path("/dev/shm").iterdir()}
    folder = tmp_path / "run"
    process, _ = start(folder, f"{KEYS} run.rounds=500", engine, TMPDIR=str(short))
    family = psutil.Process(process.pid).children(recursive=True)
    assert engine == "inline" or len(family) > 6
    process.send_signal(number)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    cure = "run --engine ray --resume" if engine == "ray" else "run --resume"
    assert errors == f"ssfl: interrupted\nto go on: ssfl {cure} {folder}\n"
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    assert not living(family)
    assert not [path for path in short.iterdir() if not path.name.startswith("torch")]
    left = {*Path("/tmp/ray").glob("session_2*"), *Path("/dev/shm").iterdir()} - shared
    ours = {str(p.pid) for p in family}  # other runs on this machine leave theirs
    assert not [path for path in left if ours & set(re.split(r"\D+", path.name))]


def test_ray_that_does_not_start_is_said_by_its_cause(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [str(BIN / "ssfl"), "run", "--engine", "ray", "-c", f"{KEYS} run.clients=7", "--out", str(folder)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=os.environ | {"RAY_OVERRIDE_RESOURCES": "no JSON"},  # as good a reason as any
    )
    assert done.returncode == 1
    assert done.stderr.startswith("ssfl: the run failed: json.decoder.JSONDecodeError: Expecting value")
    assert done.stderr.count("\n") == 2
    assert json.loads((folder / "status.json").read_text())["status"] == "failed"


def listening(process: psutil.Process) -> dict[tuple[str, int], str]:
    """Return address and port of all that the descendants of a process listen on, with their names."""
    found = {}
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            sockets = [s for s in child.net_connections("inet") if s.status == psutil.CONN_LISTEN]
            found |= {(s.laddr.ip.removeprefix("::ffff:"), s.laddr.port): child.name() for s in sockets}
    return found


INTRUDER = """
import ray
ray.init(address="127.0.0.1:{port}", log_to_driver=False)
print("code runs:", ray.get(ray.remote(lambda: 41 + 1).remote()))
"""


def test_a_run_is_reached_by_nobody_and_a_dead_actor_ends_it_with_a_plain_message(tmp_path: Path) -> None:
    """No descendant listens beyond this machine, and on it nobody without the run's token gets in."""
    process, _ = start(tmp_path / "run", f"{KEYS} run.rounds=200")
    sockets = listening(psutil.Process(process.pid))
    assert {address for address, _ in sockets} <= {"127.0.0.1", "::1"}, sockets
    (port,) = [port for (_, port), name in sockets.items() if name == "gcs_server"]
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    without["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # else Ray looks for the address on the network
    words, pipe = [sys.executable, "-c", INTRUDER.format(port=port)], subprocess.PIPE
    both = [
        subprocess.Popen(words, env=without | own, stdout=pipe, stderr=pipe, text=True)
        for own in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64})
    ]
    for intruder in both:
        out, said = intruder.communicate(timeout=SECONDS)
        assert intruder.returncode != 0
        assert "code runs" not in out
        assert "token" in said.lower()
    assert process.poll() is None
    family = psutil.Process(process.pid).children(recursive=True)
    actors = [member for member in family if "ray::ClientAppActor" in " ".join(member.cmdline())]
    assert actors
    actors[0].kill()
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "a Ray actor died while it worked for client" in errors
    assert not living(family)


def test_a_run_that_fails_on_ray_has_exit_code_1_and_says_why(tmp_path: Path) -> None:
    # Ray's actors need seconds to start and greet.
    keys = f"{KEYS} run.join-timeout=0.01 run.round-timeout=0.01"
    command = [str(BIN / "ssfl"), "run", "--engine", "ray", "-c", keys, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 1
    assert "clients joined within run.join-timeout" in done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


def test_plain_flwr_run_gives_the_same_digits(inline: dict[str, object], tmp_path: Path) -> None:
    """As docs/flower-run.md says: a folder name that Flower accepts, two switches, the number of SuperNodes."""
    app = tmp_path / "ssfl-app"
    shutil.copytree(ROOT / "ssfl_app", app / "ssfl_app", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, app / name)
    port = "39467"
    environment = os.environ | {
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    federation = "num-supernodes=6 client-resources-num-cpus=1"
    command = [str(BIN / "flwr"), "run", str(app), "--stream", "--federation-config", federation]
    command += ["-c", f"{KEYS} run.out='{tmp_path / 'run'}'"]
    try:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert (tmp_path / "run" / "summary.json").exists(), done.stdout[-3000:]
        plain = result(tmp_path / "run")
        assert plain.pop("engine") == "ray"
        assert plain == inline
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if "flower-superlink" in " ".join(process.info["cmdline"] or []) and port in (
                process.info["cmdline"] or []
            ):
                for member in [*process.children(recursive=True), process]:
                    member.kill()
