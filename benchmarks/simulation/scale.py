"""Cost against scale: 10 to 1,000 clients, 0.1 to 25 million parameters: seconds, server memory, bytes a round.

Training is as little as there can be, one step a client on a few images of 8 x 8 pixels: what is left is messages.
All clients train in every round. Server memory is that of the process with ServerApp and Ray's driver.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.memory import Sampler
from benchmarks.simulation import app

CLIENTS = (10, 30, 100, 300, 1000)
MODELS = ("cnn", "resnet20", "resnet110", "resnet18", "resnet50")  # by size
STRATEGIES = ("ssfl", "fedavg")
KEYS = (
    "run.device='cpu' partition.name='iid' run.rounds={rounds} run.evaluate-every={rounds} local.epochs=1 "
    "local.batch-size=144 ssfl.saliency-batch-size=8 run.join-timeout=600 "
    "model.name='{model}' strategy='{strategy}' run.clients={n} run.cohort={n}"
)


def cases(tiny: bool) -> Iterator[tuple[str, str, int]]:
    """Yield (model, strategy, clients)."""
    models, clients = (MODELS[:2], (4, 8)) if tiny else (MODELS, CLIENTS)
    for strategy in STRATEGIES:
        yield from ((models[0], strategy, n) for n in clients)
        yield from ((model, strategy, clients[0]) for model in models[1:])


def measure(work: Path, images: int, tiny: bool) -> dict[str, Any]:
    """Measure all cases; `images` is not used."""
    return {"cases": [measure_case(*case, work) for case in cases(tiny)]}


def measure_case(model: str, strategy: str, clients: int, work: Path) -> dict[str, Any]:
    """Run one case."""
    keys, folder = KEYS.format(rounds=4, model=model, strategy=strategy, n=clients), work / f"{model}-{clients}"
    folder = folder.with_name(f"{folder.name}-{strategy}")
    command = [app.SSFL, "run", "--engine", "ray", "-c", keys, "--out", str(folder)]
    with folder.with_suffix(".log").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    sampler = Sampler(folder, process.pid)
    sampler.start()
    code = process.wait()
    sampler.stop = True
    sampler.join()
    if code:
        raise RuntimeError(f"{keys} failed:\n{folder.with_suffix('.log').read_text()[-3000:]}")
    found = app.read(folder)
    row = {
        "model": model,
        "strategy": strategy,
        "clients": clients,
        "parameters": found["summary"]["parameters"],
        "seconds": app.recorded(found),
        "setup_seconds": found["seconds"][0],
        "evaluated_round_seconds": found["seconds"][-1],
        "down": median(found["bytes_down"][2:-1]),
        "up": median(found["bytes_up"][2:-1]),
        "idle_bytes": sampler.idle,
        "peak_bytes": sampler.peak,
        "at_peak": sampler.at_peak,
        "environment": found["environment"],
    }
    print(
        f"{model} {strategy} {clients} clients: {row['seconds']:.2f} s, {row['peak_bytes'] / 1e6:.0f} MB", flush=True
    )
    return row
