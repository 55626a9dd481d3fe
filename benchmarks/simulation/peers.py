"""Side by side: this app, a stock Flower FedAvg app, and Apple's pfl; same model, data, cohort and steps."""

import os
from pathlib import Path
from typing import Any

from benchmarks.simulation import app, pfl_venv, stock, tasks

# (CPUs of a client, loader): as `flwr run` comes; an actor a core; and that with our transforms, a batch at a time.
OURS = (("fedavg", "ray"), ("ssfl", "ray"), ("fedavg", "inline on all cores"), ("ssfl", "inline on all cores"))
STOCK = ((2, "quickstart"), (1, "quickstart"), (1, "batched"))


def measure(work: Path, images: int, tiny: bool) -> dict[str, Any]:
    """Measure both tasks."""
    # One rate for all rounds: neither the quickstart nor pfl has our schedule.
    made = [tasks.make(name, work, images, tiny, "local.lr-decay=1.0") for name in ("cifar10", "digits")]
    return {task.name: measure_task(task, work) for task in made}


def measure_task(task: tasks.Task, work: Path) -> dict[str, Any]:
    """Run everybody on one task; each gets "typical", seconds from the end of one round to the end of the next."""
    cores, runs = os.cpu_count() or 1, {}
    for number, (strategy, engine) in enumerate(OURS):
        keys = f"{task.keys} strategy='{strategy}'"
        runs[f"ssfl run, {strategy}, {engine}"] = app.play(keys, engine, work / f"peers-{task.name}-{number}")
    for cpus, loader in STOCK:
        runs[f"stock Flower, {cpus} CPU a client, {loader} loader"] = stock.play(task, cpus, loader, work)
    for processes, threads in ((1, cores), (cores, 1)):
        runs[f"pfl, {processes} x {threads} threads"] = pfl_venv.play(task, processes, threads, work)
    for name, run in runs.items():
        run["typical"] = app.typical(run["ends"])
        print(f"{task.name} {name}: {run['typical']:.2f} s a round", flush=True)

    def fastest(who: str, without: str = "-") -> float:
        return min(r["typical"] for name, r in runs.items() if name.startswith(who) and without not in name)

    times = {}
    for engine in [engine for strategy, engine in OURS if strategy == "fedavg"]:
        ours = runs[f"ssfl run, fedavg, {engine}"]["typical"]
        # The goal is about an app as the quickstart has it; the one with our loader says what of it is Flower.
        times[engine] = {
            "stock": fastest("stock", "batched") / ours,
            "stock_batched": fastest("stock") / ours,
            "pfl": fastest("pfl") / ours,
        }
    return {"keys": task.keys, "runs": runs, "times": times}
