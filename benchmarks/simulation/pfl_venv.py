"""Apple's pfl: an environment of its own, and its runs."""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.simulation.app import typical
from benchmarks.simulation.tasks import Task
from ssfl_app.simulation.processes import free_port

VENV = Path(os.environ.get("SSFL_PFL_VENV", "/tmp/pfl-venv"))
ROOT = Path(__file__).parents[2]
VERSION = "0.6.0"

# Without its extra "pytorch", which would fetch 5 GB of CUDA libraries once more; NumPy is the app's, by its number.
PACKAGES = (f"pfl=={VERSION}", f"numpy=={metadata.version('numpy')}")


def make_venv() -> Path:
    """Return the Python of pfl's environment; make that if it is not there.

    It sees torch and torchvision of the environment that this process runs in, by a .pth file. That is written when
    pip is through: pip never sees the other environment.
    """
    python = VENV / "bin" / "python"
    if not (VENV / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, *PACKAGES], check=True)
        packages = next((VENV / "lib").glob("python3*")) / "site-packages"
        (packages / "torch-of-the-app.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (VENV / "complete").touch()
    return python


def play(task: Task, processes: int, threads: int, work: Path) -> dict[str, Any]:
    """Train the task's workload; return when the rounds ended, in seconds after the command was started."""
    python = make_venv()
    with tempfile.TemporaryDirectory(dir=work) as name:
        marks, log = Path(name) / "marks.jsonl", Path(name) / "log"
        command = [str(python), "-m", "benchmarks.simulation.pfl_run", str(task.workload), str(marks)]
        variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
        if processes > 1:
            addresses = ",".join(f"localhost:{free_port()}" for _ in range(processes))
            variables |= {"PFL_WORKER_ADDRESSES": addresses, "GLOO_SOCKET_IFNAME": "lo"}
        began = time.monotonic()
        with log.open("wb") as output:
            workers = [
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=variables | ({"PFL_WORKER_RANK": str(rank)} if processes > 1 else {}),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                for rank in range(processes)
            ]
            codes = [worker.wait() for worker in workers]
        wall, said = time.monotonic() - began, log.read_text(errors="replace")
        if any(codes):
            raise RuntimeError(f"pfl failed:\n{said[-3000:]}")
        ends = [json.loads(line)["time"] - began for line in marks.read_text().splitlines()]
    versions = json.loads(said.rpartition("versions ")[2].splitlines()[0])
    return {
        "processes": processes,
        "threads": threads,
        "command_seconds": wall,
        "ends": ends,
        "typical": typical(ends),
        "versions": versions,
    }
