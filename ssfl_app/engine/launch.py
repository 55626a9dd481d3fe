"""The launcher: `flwr run` on a SuperLink of its own, as a command that tells the truth in its exit code.

What plain ``flwr run`` leaves to its user, and is done here:

- a local SuperLink that Flower starts stays up for ever and keeps environment, venv and working directory of whoever
  started it first; later runs of another checkout then silently get that one's client code. Here every run has its
  own SuperLink, on a free port, in a neutral folder, with its own FLWR_HOME; all of it is gone afterwards.
- without a switch each run installs torch anew; telemetry and update checks go to the internet.
- the folder of a Flower app may hold letters, digits and hyphens only, a clone's need not: the app is copied.
- ``flwr run --stream`` exits with 0 even if the run failed. Here success is what the ServerApp recorded.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import psutil
import torch

from ssfl_app import guard
from ssfl_app.config import Config, app_folder, write_toml
from ssfl_app.exchange import RunFailed
from ssfl_app.results.recorder import read_status

START_TIMEOUT = 60.0
SMALLEST_STORE = 100_000_000  # Ray refuses less than 79 MB
STOP_TIMEOUT = 20.0
_SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def plan(config: Config) -> tuple[int, float]:
    """Return (actors, share of a GPU for each).

    One actor a core by default, never more than the cohort can use; actors share the visible GPUs evenly.
    """
    run = config.settings.run
    actors = config.engine.actors or min(os.cpu_count() or 1, max(run.cohort, 1))
    gpus = torch.cuda.device_count() if run.device != "cpu" and torch.cuda.is_available() else 0
    return actors, gpus / actors


def launch(config: Config, model_bytes: int, say: Callable[[str], None]) -> None:
    """Run the configuration on Ray and wait for its end; `run.out` names the run folder.

    `model_bytes` is the size of a dense model; it sets the size of Ray's object store.

    Raises
    ------
    RunFailed
        With the reason the ServerApp gave, or the end of Flower's log.
    """
    actors, gpu = plan(config)
    threads, cores = config.engine.threads, os.cpu_count()
    say(f"engine ray: {actors} actors, {threads} torch thread(s) and {gpu:g} GPU each, on {cores} cores")
    folder = Path(config.settings.run.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").unlink(missing_ok=True)  # that of an earlier session says nothing about this one
    with tempfile.TemporaryDirectory(prefix="ssfl-", ignore_cleanup_errors=True) as work:
        home, port = Path(work), _free_port()
        app, overrides = _copy_app(home / "ssfl-app"), home / "run.toml"
        overrides.write_text(write_toml(config.flat))
        environment = _environment(home, port, threads) | _object_store(2 * actors * model_bytes)
        federation = (
            f"num-supernodes={config.settings.run.clients} client-resources-num-cpus=1 "
            f"client-resources-num-gpus={gpu} init-args-num-cpus={actors} init-args-log-to-driver=false"
        )
        command = ["flwr", "run", str(app), "local", "--stream", "-c", str(overrides)]
        command += ["--federation-config", federation]
        log = folder / "flower.log"
        begins = log.stat().st_size if log.exists() else 0
        with (
            guard.hold(Path(environment[guard.LAUNCHER])),
            _superlink(home, port, environment),
            _running(command, home, environment, log) as flwr,
        ):
            _follow(flwr, folder / "console.log", say)
    _judge(folder, begins)


def _judge(folder: Path, log_begins: int) -> None:
    status = read_status(folder)
    if status.get("status") == "finished":
        return
    if status.get("status") == "failed":
        raise RunFailed(str(status["message"]))
    with (folder / "flower.log").open("rb") as log:
        log.seek(log_begins)
        lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    tail = "\n  ".join(lines[-12:])
    raise RunFailed(f"Flower ended the run before it was finished; the end of {folder / 'flower.log'}:\n  {tail}")


def _follow(flwr: "subprocess.Popen[bytes]", console: Path, say: Callable[[str], None]) -> None:
    """Say the lines that the ServerApp adds to console.log, until Flower's command ends."""
    read = console.stat().st_size if console.exists() else 0
    running = True
    while running:
        running = flwr.poll() is None  # asked before reading, so that the last lines are read too
        if console.exists():
            with console.open() as file:
                file.seek(read)
                text = file.read()
            whole = text[: text.rfind("\n") + 1]
            read += len(whole.encode())
            for line in whole.splitlines():
                say(line)
        if running:
            time.sleep(0.1)


def _copy_app(target: Path) -> Path:
    """Copy this very package and its pyproject.toml to a folder whose name Flower accepts."""
    package = Path(str(resources.files("ssfl_app")))
    ignore = shutil.ignore_patterns("__pycache__", "_app")
    shutil.copytree(package, target / "ssfl_app", ignore=ignore)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(app_folder() / name, target / name)
    return target


def _environment(home: Path, port: int, threads: int) -> dict[str, str]:
    flwr_home = home / "flwr"
    flwr_home.mkdir()
    (flwr_home / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    binaries = str(Path(sys.executable).parent)
    return (
        os.environ
        | _SWITCHES
        | {
            "FLWR_HOME": str(flwr_home),
            "PATH": binaries + os.pathsep + os.environ.get("PATH", ""),
            "OMP_NUM_THREADS": str(threads),
            guard.LAUNCHER: str(home / "launcher.lock"),
            "SSFL_SOURCE": str(app_folder()),
        }
    )


def _object_store(size: int) -> dict[str, str]:
    # A message and a reply for every actor. By default Ray takes 30 % of the machine and, while there is room, puts
    # each object at another address; all of it then counts as memory of the server's process.
    return {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(max(SMALLEST_STORE, size))}


@contextmanager
def _superlink(home: Path, port: int, environment: dict[str, str]) -> Iterator[None]:
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with _running(command, home, environment, home / "superlink.log") as process:
        _wait_until_healthy(process, port, home / "superlink.log")
        yield


def _wait_until_healthy(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.05)
    tail = "\n  ".join(log.read_text(errors="replace").splitlines()[-12:])
    raise RunFailed(f"Flower's SuperLink did not start on port {port} within {START_TIMEOUT:g} s:\n  {tail}")


@contextmanager
def _running(
    command: list[str], cwd: Path, environment: dict[str, str], log: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command of this very environment; end it and all its descendants in the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / command[0]), *command[1:]],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the launcher, which then stops the others in order
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all its descendants: first asked, then killed."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    if process.poll() is None:
        process.terminate()
    _, alive = psutil.wait_procs(family, STOP_TIMEOUT if process.poll() is None else 1)
    for member in alive:
        # Flower's and Ray's children have sessions of their own and survive their parent for a while.
        member.kill()
    psutil.wait_procs(alive, STOP_TIMEOUT)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
