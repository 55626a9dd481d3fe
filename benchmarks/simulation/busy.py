"""Where a round goes that is not training: what each kind of process has of the cores.

Shares are of CPU seconds within rounds 2 to R - 1, seen from outside; what is missing to 100 % are cores that wait.
"""

import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.simulation import app, tasks

KINDS = (
    ("trains", "ClientAppActor"),
    ("server", "flwr-simulation"),
    ("SuperLink", "flower-superlink"),
    ("Ray", "/ray/"),  # not the launcher, which has --engine ray
)


def measure(work: Path, images: int, tiny: bool) -> dict[str, Any]:
    """Measure both tasks on both engines."""
    found: dict[str, Any] = {}
    for name in ("cifar10", "digits"):
        task = tasks.make(name, work, images, tiny, "local.lr-decay=1.0")
        found[name] = {engine: shares(f"{task.keys} strategy='fedavg'", engine, work) for engine in app.ENGINES}
        for engine, row in found[name].items():
            print(name, engine, {kind: f"{100 * share:.1f} %" for kind, share in row.items()}, flush=True)
    return found


def shares(keys: str, engine: str, work: Path) -> dict[str, float]:
    """Return CPU seconds by kind of process / (cores x wall seconds) of the rounds between the first and the last."""
    before = {process.pid for process in psutil.process_iter()}
    marks: list[tuple[float, dict[str, float]]] = []
    done = threading.Event()

    def follow() -> None:
        while not done.wait(0.1):
            marks.append((time.monotonic(), spent(before, engine)))

    watcher = threading.Thread(target=follow, daemon=True)
    began = time.monotonic()
    watcher.start()
    played = app.play(keys, engine, work)
    done.set()
    watcher.join()
    start, end = (began + played["ends"][i] for i in (1, -2))
    inside = [mark for mark in marks if start <= mark[0] <= end]
    (first, a), (last, b) = inside[0], inside[-1]
    cores = psutil.cpu_count() or 1
    return {kind: (b[kind] - a.get(kind, 0)) / (last - first) / cores for kind in b}


def spent(before: set[int], engine: str) -> dict[str, float]:
    """Return the CPU seconds so far of processes that were not there `before`, by kind."""
    total: dict[str, float] = defaultdict(float)
    for process in psutil.process_iter(["cmdline", "cpu_times", "ppid"]):
        info = process.info
        if process.pid in before or not info["cmdline"] or not info["cpu_times"]:
            continue
        words = " ".join(info["cmdline"])
        if engine == "inline":  # the command, and its forks, which have its name
            kind = "trains" if info["ppid"] not in (0, 1) and _is_fork(process) else "server"
        else:
            kind = next((kind for kind, part in KINDS if part in words), "launcher")
        total[kind] += info["cpu_times"].user + info["cpu_times"].system
    return dict(total)


def _is_fork(process: psutil.Process) -> bool:
    try:
        parent = process.parent()
        return parent is not None and parent.cmdline() == process.cmdline()
    except psutil.Error:
        return False
