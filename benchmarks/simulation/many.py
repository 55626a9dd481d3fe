"""Many clients, few at a time: 100 to 10,000 clients, 100 a round, all of them asked for scores and for a last test.

Clients hold four images of 8 x 8 pixels and train one step: what is left is what a client costs beside its training.
Overhead is the seconds of a phase by its clients, less what the same computation takes in plain PyTorch by the cores.
Memory is that of the process with the ServerApp.
"""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F

from benchmarks.memory import Sampler
from benchmarks.simulation import app
from ssfl_app import config as configuration
from ssfl_app.runtime import get_runtime

CLIENTS = (100, 1000, 10_000)
COHORT = 100
EACH = 4  # images of a client
STRATEGIES = ("ssfl", "fedavg")
ROUNDS = 6
GOAL_MS, GOAL_SPREAD = 3.0, 0.15
KEYS = (
    "run.device='cpu' data.name='arrays' data.path='{path}' partition.name='iid' run.rounds={rounds} "
    "run.evaluate-every={rounds} run.join-timeout=1200 run.round-timeout=1200 local.epochs=1 local.batch-size=144 "
    "ssfl.saliency-batch-size=4 strategy='{strategy}' run.clients={n} run.cohort={cohort}"
)


def cases(tiny: bool) -> Iterator[tuple[str, str, int]]:
    """Yield (engine, strategy, clients)."""
    for engine in app.ENGINES:
        for strategy in STRATEGIES:
            yield from ((engine, strategy, n) for n in ((20, 200) if tiny else CLIENTS))


def measure(work: Path, images: int, tiny: bool) -> dict[str, Any]:
    """Measure all cases; `images` is not used."""
    found = [case(*each, work) for each in cases(tiny)]
    return {"bare": bare(next(work.glob("data-*")), 20 if tiny else 200), "cases": found}


def make_images(folder: Path, count: int) -> None:
    """Write a training set of `count` images of noise and a small test set."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", count), ("test", 100)):
        images = rng.normal(0, 1, (n, 1, 8, 8)).astype(np.float32)
        np.savez(folder / f"{part}.npz", x=images, y=rng.integers(0, 10, n))


def bare(data: Path, times: int) -> dict[str, float]:
    """Return the seconds of one core that scoring, a step and a test of a client's images take in plain PyTorch."""
    torch.set_num_threads(1)
    keys = KEYS.format(path=data, rounds=1, strategy="fedavg", n=1, cohort=1)
    runtime = get_runtime(configuration.read_given(None, [keys]))
    model = runtime.model
    own = runtime.data.train.take(np.arange(EACH))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    inputs, targets = own.inputs, own.targets

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(inputs), targets)

    def scores() -> None:
        model.zero_grad()
        loss().backward()
        for weight in model.parameters():
            torch.abs(weight * weight.grad)

    def train() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    def test() -> None:
        with torch.no_grad():
            loss()

    return {name: typical(work, times) for name, work in (("scores", scores), ("train", train), ("test", test))}


def typical(work: Callable[[], None], times: int) -> float:
    """Return the median seconds of a call."""
    taken = []
    for _ in range(times + 5):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken[5:])


def case(engine: str, strategy: str, clients: int, work: Path) -> dict[str, Any]:
    """Run one case."""
    data = work / f"data-{clients}"
    make_images(data, EACH * clients)
    keys = KEYS.format(path=data, rounds=ROUNDS, strategy=strategy, n=clients, cohort=min(COHORT, clients))
    folder = work / f"{engine}-{strategy}-{clients}"
    with folder.with_suffix(".log").open("w") as output:
        command = [app.SSFL, "run", "--engine", engine, "-c", keys, "--out", str(folder)]
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        sampler = Sampler(folder, process.pid, "flwr-simulation" if engine == "ray" else "")
        sampler.start()
        code = process.wait()
        wall = time.monotonic() - began
        sampler.stop = True
        sampler.join()
    if code:
        raise RuntimeError(f"{keys} failed:\n{folder.with_suffix('.log').read_text()[-3000:]}")
    found = app.read(folder)
    seconds = found["seconds"]
    row = {
        "engine": engine,
        "strategy": strategy,
        "clients": clients,
        "cohort": min(COHORT, clients),
        "cores": psutil.cpu_count(),
        "command_seconds": wall,
        "discovery_seconds": seconds[0] if strategy == "ssfl" else None,
        "round_seconds": app.recorded(found),
        "test_seconds": seconds[-1] - app.recorded(found),  # of all clients, in the last round
        "rest_seconds": wall - sum(seconds),
        "peak_bytes": sampler.peak,
        "record_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "environment": found["environment"],
    }
    print({key: row[key] for key in list(row)[:-1]}, flush=True)
    return row


def overhead(part: dict[str, Any], case: dict[str, Any], phase: str) -> float | None:
    """Return the milliseconds that a client costs in "scores", "train" or "test" beside the computation itself."""
    key, clients = {
        "scores": ("discovery_seconds", case["clients"]),
        "train": ("round_seconds", case["cohort"]),
        "test": ("test_seconds", case["clients"]),
    }[phase]
    return None if case[key] is None else 1e3 * (case[key] / clients - part["bare"][phase] / case["cores"])
