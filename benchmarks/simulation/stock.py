"""The stock Flower app, started by a bare `flwr run` that starts its own SuperLink, and followed to its end."""

import json
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.simulation.app import typical
from benchmarks.simulation.tasks import Task
from ssfl_app.simulation.processes import end_families, environment, free_port, running

APP = Path(__file__).parent / "stock-flower"
PATIENCE = 1800.0


def play(task: Task, cpus: int, loader: str, work: Path) -> dict[str, Any]:
    """Run the app; return when the rounds ended, in seconds after `flwr run` was started.

    Parameters
    ----------
    cpus : int
        client-resources-num-cpus: 2 is Flower's default; 1 gives as many actors as there are cores.
    loader : str
        quickstart or batched, as its pyproject.toml says.
    """
    with tempfile.TemporaryDirectory(dir=work, ignore_cleanup_errors=True) as name:
        home = Path(name)
        app, marks, log = home / "stock-flower", home / "marks.jsonl", home / "flwr.log"
        shutil.copytree(APP, app, ignore=shutil.ignore_patterns("__pycache__"))
        port, flwr_home = str(free_port()), home / "flwr"
        flwr_home.mkdir()
        ports = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port, "FLWR_LOCAL_CONTROL_API_PORT": str(free_port())}
        variables = environment(flwr_home, **ports)
        variables.pop("OMP_NUM_THREADS", None)  # Ray sets it by the CPUs of an actor
        overrides = f"workload='{task.workload}' marks='{marks}' loader='{loader}' num-server-rounds={task.rounds} "
        overrides += f"clients={task.clients} cohort={task.cohort}"
        federation = f"num-supernodes={task.clients} client-resources-num-cpus={cpus}"
        command = ["flwr", "run", str(app), "--stream", "-c", overrides, "--federation-config", federation]
        began = time.monotonic()
        try:
            with running(command, home, variables, log) as process:
                process.wait(PATIENCE)
                wall = time.monotonic() - began
        finally:
            end_families(superlinks(port))
        check(log, marks, task)
        ends = [json.loads(line)["time"] - began for line in marks.read_text().splitlines()]
    return {"cpus": cpus, "loader": loader, "command_seconds": wall, "ends": ends, "typical": typical(ends)}


def superlinks(port: str) -> list[int]:
    """Return the ids of the SuperLinks on a port: `flwr run` detaches the one that it starts, and leaves it up."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any("flower-superlink" in word for word in words) and port in words:
            found.append(process.pid)
    return found


def check(log: Path, marks: Path, task: Task) -> None:
    """Raise RuntimeError unless every round had all its clients: `flwr run` ends with 0 whatever happened."""
    said = log.read_text(errors="replace")
    whole = re.findall(rf"aggregate_train: Received {task.cohort} results and 0 failures", said)
    noted = len(marks.read_text().splitlines()) if marks.exists() else 0
    if len(whole) != task.rounds or noted != task.rounds + 1:
        raise RuntimeError(f"{len(whole)} of {task.rounds} rounds were whole; the log ends with:\n{said[-1500:]}")
