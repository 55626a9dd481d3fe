"""How much of a round is training: seconds in plain PyTorch on all cores / wall seconds of the app's rounds.

Plain PyTorch and the app take turns, and each is divided by the other within its turn. Left out are round 1, in which
processes warm up, and the last one, which is evaluated.
"""

import os
import re
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.simulation import app, plain, tasks, turns

STRATEGIES = ("ssfl", "fedavg")
REFERENCE = 6  # rounds of plain PyTorch in a turn: all have the same number of steps


def measure(work: Path, images: int, tiny: bool) -> dict[str, Any]:
    """Measure both tasks."""
    made = [tasks.make(name, work, images, tiny) for name in ("cifar10", "digits")]
    return {task.name: measure_task(task, work, 1 if tiny else turns.TURNS) for task in made}


def measure_task(task: tasks.Task, work: Path, times: int) -> dict[str, Any]:
    """Measure plain PyTorch both ways, and the app with each engine and strategy, in turns."""
    cores, rounds = os.cpu_count() or 1, range(1, task.rounds)[:REFERENCE]
    players: dict[str, Any] = {}
    for processes, threads in ((1, cores), (cores, 1)):
        players[plain_name(processes, threads)] = partial(plain.measure, task.workload, processes, threads, rounds)
    for strategy, engine in product(STRATEGIES, app.ENGINES):
        keys = f"{task.keys} strategy='{strategy}'"
        players[f"ssfl run, {strategy}, {engine}"] = partial(app.play, keys, engine, work)
    found = turns.take(players, times)
    reference = turns.fastest(found, "plain")
    efficiency = {
        name: {
            "noted": turns.quotient(reference, runs, "noted"),
            "from_end_to_end": turns.quotient(reference, runs),
        }
        for name, runs in found.items()
        if name.startswith("ssfl run")
    }
    ours, theirs = found["ssfl run, fedavg, ray"][0], found[plain_name(cores, 1)][0]
    loss = {"plain": theirs["rounds"][0]["loss"], "app": ours["losses"][1]}
    return {
        "keys": task.keys,
        "runs": found,
        "efficiency": efficiency,
        "loss_of_round_1": loss,
        "same_training": same(loss["plain"], loss["app"]),
        "plan": planned(ours["plan"]),
    }


def plain_name(processes: int, threads: int) -> str:
    return f"plain PyTorch, {processes} x {threads} threads"


def same(ours: float, theirs: float) -> bool:
    """Return whether two losses of round 1 are of the same training: one batch in another order shows."""
    return abs(ours - theirs) <= 1e-5 * abs(ours)


def planned(line: str) -> dict[str, Any]:
    """Return what the launcher says that it starts, and whether that is an actor a core with one thread each."""
    found = re.search(r"(\d+) actors, (\d+) torch thread", line)
    actors, threads = (int(found[1]), int(found[2])) if found else (0, 0)
    cores = os.cpu_count()
    return {"printed": line, "actors": actors, "threads": threads, "met": actors == cores and threads == 1}
