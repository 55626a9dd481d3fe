"""What freed memory costs a training step: .venv/bin/python benchmarks/heap.py

Trains ResNet-20 on random images of CIFAR-10's size in fresh processes, one after the other: by glibc's defaults, and
with `ssfl_app.training.malloc.keep_heap`. The defaults depend on what a process did before: here, nothing.
Results: benchmarks/results/heap.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

TURNS, FITS = 5, 6


def train(keep: bool) -> None:
    """Print seconds, page faults and the digest of the weights of some fits: the work of one process."""
    import numpy as np
    import torch

    from ssfl_app.data.dataset import Samples, Transform
    from ssfl_app.sparsity.layout import Layout, state_digest, state_of
    from ssfl_app.training.malloc import keep_heap
    from ssfl_app.training.models import ModelOptions, create
    from ssfl_app.training.trainer import LocalOptions, LocalTrainer

    torch.set_num_threads(1)
    if keep and not keep_heap():
        raise SystemExit("this C library is not glibc")
    rng = np.random.default_rng(1)
    images = Samples(torch.from_numpy(rng.integers(0, 256, (160, 3, 32, 32), np.uint8)), torch.arange(160) % 10)
    model = create(ModelOptions("resnet20", "group"), (3, 8, 8), 10, seed=1)
    options = LocalOptions(epochs=1, batch_size=32, lr=0.1, lr_decay=1.0, momentum=0.0, weight_decay=5e-4, clip=10.0)
    trainer = LocalTrainer(options, Transform((0.5,) * 3, (0.25,) * 3, "crop-flip"), torch.device("cpu"))
    rows = []
    for _ in range(FITS):
        faults, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        trainer.fit(model, images, rng, lr=0.01)
        seconds = time.perf_counter() - began
        rows.append((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))
    digest = state_digest(Layout.of(model), state_of(model))
    print(json.dumps({"rows": rows[1:], "digest": digest}))  # the first one makes kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--one", choices=("defaults", "kept"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "heap.json")
    words = parser.parse_args()
    if words.one:
        train(words.one == "kept")
        return
    from ssfl_app.results.recorder import environment

    record = {"date": str(date.today()), "load": os.getloadavg()[0], "environment": environment()}
    found: dict[str, list[dict]] = {"defaults": [], "kept": []}
    for _ in range(TURNS):
        for how, runs in found.items():
            said = subprocess.run(
                [sys.executable, __file__, "--one", how], check=True, capture_output=True, text=True
            )
            runs.append(json.loads(said.stdout))
    for how, runs in found.items():
        rows = [row for run in runs for row in run["rows"]]
        record[how] = {
            "ms_a_fit": [1e3 * statistics.median(s for s, _ in run["rows"]) for run in runs],
            "median_ms": 1e3 * statistics.median(s for s, _ in rows),
            "median_faults": statistics.median(f for _, f in rows),
        }
        print(f"{how}: {record[how]['median_ms']:.0f} ms, {record[how]['median_faults']:.0f} page faults")
    record["same_bits"] = len({run["digest"] for runs in found.values() for run in runs}) == 1
    print("same bits" if record["same_bits"] else "OTHER BITS")
    words.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
