"""How much of a round is training: seconds in plain PyTorch on all cores / wall seconds of the app's rounds.

Left out are round 1, in which processes warm up, and the last one, which is evaluated.
"""

import os
import re
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.simulation import plain, tasks
from benchmarks.simulation.app import ENGINES, play, recorded, typical

STRATEGIES = ("ssfl", "fedavg")
REFERENCE = 6  # rounds of plain PyTorch at a time: all have the same number of steps


def measure(work: Path, images: int, tiny: bool) -> dict[str, Any]:
    """Measure both tasks."""
    return {name: measure_task(tasks.make(name, work, images, tiny), work) for name in ("cifar10", "digits")}


def measure_task(task: tasks.Task, work: Path) -> dict[str, Any]:
    """Measure plain PyTorch, the app with each engine and strategy, and plain PyTorch again."""
    measured = list(range(2, task.rounds))[:REFERENCE]
    one_core = plain.measure(task.workload, 1, 1, [1, *measured])
    ways, runs = plain.reference(task.workload, measured), {}
    for engine in ENGINES:
        for strategy in STRATEGIES:
            played = play(f"{task.keys} strategy='{strategy}'", engine, work / f"{task.name}-{engine}-{strategy}")
            runs[f"{strategy} {engine}"] = played | {"typical": typical(played["ends"]), "noted": recorded(played)}
            print(f"{task.name} {strategy} {engine}: {recorded(played):.2f} s a round", flush=True)
    best = min(ways, key=lambda way: way["seconds"])
    # Once more: other machines of the same host take more or less of our cores as time goes by.
    again = plain.measure(task.workload, best["processes"], best["threads"], measured)
    best["rounds"] += again["rounds"]
    best["seconds"] = median(r["seconds"] for r in best["rounds"])
    loss = {"plain": one_core["rounds"][0]["loss"], "app": runs["fedavg ray"]["losses"][1]}
    for played in runs.values():
        played["efficiency"] = best["seconds"] / played["noted"]
        played["efficiency_from_end_to_end"] = best["seconds"] / played["typical"]
    for way in ways:
        print(f"{task.name} plain, {way['processes']} x {way['threads']} threads: {way['seconds']:.2f} s", flush=True)
    return {
        "keys": task.keys,
        "plain": ways,
        "plain_seconds": best["seconds"],
        "plain_on_one_core": one_core,
        "loss_of_round_1": loss,
        "same_training": same(loss["plain"], loss["app"]),
        "plan": planned(runs["fedavg ray"]["plan"]),
        "runs": runs,
    }


def same(ours: float, theirs: float) -> bool:
    """Return whether two losses of round 1 are of the same training: one batch in another order shows."""
    return abs(ours - theirs) <= 1e-5 * abs(ours)


def planned(line: str) -> dict[str, Any]:
    """Return what the launcher says that it starts, and whether that is an actor a core with one thread each."""
    found = re.search(r"(\d+) actors, (\d+) torch thread", line)
    actors, threads = (int(found[1]), int(found[2])) if found else (0, 0)
    cores = os.cpu_count()
    return {"printed": line, "actors": actors, "threads": threads, "met": actors == cores and threads == 1}
