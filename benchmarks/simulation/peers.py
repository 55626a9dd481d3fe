"""Side by side, in turns: this app, a stock Flower FedAvg app, and Apple's pfl; same model, data, cohort, steps."""

import os
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.simulation import app, pfl_venv, stock, tasks, turns

# (CPUs of a client, loader): as `flwr run` comes; an actor a core; and that with our transforms, a batch at a time.
STOCK = ((2, "quickstart"), (1, "quickstart"), (1, "batched"))


def measure(work: Path, images: int, tiny: bool) -> dict[str, Any]:
    """Measure both tasks."""
    # One rate for all rounds: neither the quickstart nor pfl has our schedule.
    made = [tasks.make(name, work, images, tiny, "local.lr-decay=1.0") for name in ("cifar10", "digits")]
    return {task.name: measure_task(task, work, 1 if tiny else turns.TURNS) for task in made}


def measure_task(task: tasks.Task, work: Path, times: int) -> dict[str, Any]:
    """Run everybody on one task; each gets "typical", seconds from the end of one round to the end of the next."""
    cores = os.cpu_count() or 1
    players: dict[str, Any] = {}
    for engine, strategy in product(app.ENGINES, ("fedavg", "ssfl")):
        keys = f"{task.keys} strategy='{strategy}'"
        players[f"ssfl run, {strategy}, {engine}"] = partial(app.play, keys, engine, work)
    for cpus, loader in STOCK:
        players[f"stock Flower, {cpus} CPU a client, {loader} loader"] = partial(stock.play, task, cpus, loader, work)
    for processes, threads in ((1, cores), (cores, 1)):
        players[f"pfl, {processes} x {threads} threads"] = partial(pfl_venv.play, task, processes, threads, work)
    found, faster = turns.take(players, times), {}
    for engine in app.ENGINES:
        ours = found[f"ssfl run, fedavg, {engine}"]
        # The goal is about an app as the quickstart has it; the one with our loader says what of it is Flower.
        faster[engine] = {
            "stock": turns.quotient(turns.fastest(found, "stock", "batched"), ours),
            "stock_batched": turns.quotient(turns.fastest(found, "stock"), ours),
            "pfl": turns.quotient(turns.fastest(found, "pfl"), ours),
        }
    return {"keys": task.keys, "runs": found, "faster": faster}
