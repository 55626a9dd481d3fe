"""A federation to break: three SuperNodes on this machine, a run on them, and eyes on its processes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ssfl_app.deployment import federation as house
from ssfl_app.deployment.control import wait_until_online
from ssfl_app.deployment.status import services, stop

NODES = 3
PATIENCE = 1200.0  # seconds any single wait may take; the machine may have other work

KEYS: dict[str, Any] = {
    "run.clients": NODES,
    "run.cohort": NODES,
    "run.rounds": 5,
    "run.round-timeout": 90.0,
    "run.evaluate-every": 5,
    "run.checkpoint-every": 1,
    "mask.density": 0.5,
    "local.epochs": 3,
}


def ssfl(*words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "ssfl_app", *words]


def text(keys: dict[str, Any]) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in keys.items())


def _keys(changed: dict[str, Any]) -> dict[str, Any]:
    # run__round_timeout, as Python writes an argument, is the key run.round-timeout.
    return KEYS | {key.replace("__", ".").replace("_", "-"): value for key, value in changed.items()}


def until(what: str, found: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Wait until `found` returns something true, and return it."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        time.sleep(0.05)
    raise TimeoutError(f"{what}: not within {patience:g} s")


@dataclass
class Run:
    """A run that was started on the federation."""

    folder: Path
    process: "subprocess.Popen[str]"
    began: float = field(default_factory=time.monotonic)

    def said(self, words: str) -> bool:
        console = self.folder / "console.log"
        return console.exists() and words in console.read_text()

    def wait_for(self, words: str) -> None:
        """Wait until the run has said this."""

        def found() -> bool:
            if self.process.poll() is not None and not self.said(words):
                raise RuntimeError(f"the run ended before it said {words!r}: {self.end()[1]}")
            return self.said(words)

        until(f"the run says {words!r}", found)

    def end(self) -> tuple[int, str]:
        """Wait for the end; return exit code and what was said on stderr."""
        _, errors = self.process.communicate(timeout=2 * PATIENCE)
        return self.process.returncode, errors.strip()

    @property
    def records(self) -> list[dict[str, Any]]:
        lines = self.folder / "rounds.jsonl"
        return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []

    @property
    def summary(self) -> dict[str, Any]:
        path = self.folder / "summary.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}


class Field:
    """A federation that is up, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.federation = house.read(folder)
        self._runs: list[Run] = []

    def start(self, out: Path, **keys: Any) -> Run:
        """Start a run in the background."""
        words = ["federation", "run", "--dir", str(self.folder), "--out", str(out)]
        return self._started(out, [*words, "-c", text(_keys(keys))])

    def resume(self, out: Path) -> Run:
        """Resume a run in the background."""
        return self._started(out, ["federation", "run", "--dir", str(self.folder), "--resume", str(out)])

    def _started(self, out: Path, words: list[str]) -> Run:
        process = subprocess.Popen(ssfl(*words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self._runs.append(Run(out, process))
        return self._runs[-1]

    def service(self, name: str) -> psutil.Process:
        """Return the process of a service."""
        return psutil.Process(until(f"{name} runs", lambda: services(self.federation).get(name, {}).get("pid")))

    def client_app(self, name: str) -> psutil.Process:
        """Wait until a node is in the middle of a message, and return the process that works on it.

        In the middle: it sends heartbeats, which begin as it pulls the message. One that is killed earlier Flower
        starts again, and one that is about to end, of the message before, has nothing to lose.
        """
        asked = time.time()

        def busy(process: psutil.Process) -> bool:
            return process.name() == "flwr-clientapp" and process.num_threads() > 1

        def found() -> psutil.Process | None:
            try:
                family = [p for p in self.service(name).children(recursive=True) if p.create_time() > asked]
                return next((p for p in family if busy(p)), None)
            except psutil.Error:
                return None

        return until(f"{name} works on a message", found)

    def kill(self, name: str) -> None:
        """End a service and all its descendants at once (-9)."""
        family = []
        with suppress(psutil.NoSuchProcess):  # it ended, and nobody noted that yet
            service = self.service(name)
            family = [service, *service.children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def nodes_online(self) -> None:
        wait_until_online(self.federation, 150.0, lambda line: None)

    def log(self, name: str) -> str:
        """Return the log of a service."""
        home = self.folder / "superlink" if name == "superlink" else self.folder / "nodes" / name
        return (home / ("superlink.log" if name == "superlink" else "node.log")).read_text(errors="replace")

    def close(self) -> list[str]:
        """End everything; return the command lines of processes that are left."""
        for run in self._runs:
            if run.process.poll() is None:
                run.process.terminate()
                run.process.wait()
        stop(self.federation)
        end = time.monotonic() + 10  # children of a node that ended by itself need a moment
        while (left := self._left()) and time.monotonic() < end:
            time.sleep(0.2)
        return left

    def _left(self) -> list[str]:
        home = str(self.folder)
        left = []
        for process in psutil.process_iter():
            try:
                words = " ".join(process.cmdline())
                ours = home in words or process.environ().get("FLWR_HOME", "").startswith(home)
            except psutil.Error:
                continue
            if ours and process.pid != os.getpid():
                left.append(words)
        return left


@contextmanager
def federation(work: Path, count: int | None = None, **variables: str) -> Iterator[Field]:
    """Bring a federation of so many nodes up, its processes under environment variables, and down in the end.

    Raises
    ------
    RuntimeError
        A process is left when it is down.
    """
    folder = work / "federation"
    subprocess.run(
        ssfl("federation", "up", "--nodes", str(count or NODES), "--dir", str(folder)),
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | variables,
        timeout=PATIENCE,
    )
    made = Field(folder)
    try:
        yield made
    finally:
        left = made.close()
        if left:
            raise RuntimeError(f"left behind: {left}")


def inline(out: Path, **keys: Any) -> dict[str, Any]:
    """Return the summary of the same run in one process."""
    subprocess.run(
        ssfl("run", "--engine", "inline", "-c", text(_keys(keys)), "--out", str(out)),
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=PATIENCE,
    )
    return dict(json.loads((out / "summary.json").read_text()))
