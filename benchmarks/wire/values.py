"""Accuracy and bytes of the value types: the same runs, with what travels written down in other ways."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.simulation.tasks import write_cifar

LAST = 5  # evaluated rounds whose mean is a run's accuracy: a single one moves by more than a value type does

# name -> wire keys; each run sends fp32 where nothing else is said
VARIANTS = {
    "fp32": "",
    "fp16 up": "wire.up-values='fp16'",
    "fp16 down": "wire.down-values='fp16'",
    "fp16": "wire.up-values='fp16' wire.down-values='fp16'",
    "bf16": "wire.up-values='bf16' wire.down-values='bf16'",
    "bf16, stochastic": "wire.up-values='bf16' wire.down-values='bf16' wire.rounding='stochastic'",
    "int8 up": "wire.up-values='int8'",
    "int8 down": "wire.down-values='int8'",
    "int8": "wire.up-values='int8' wire.down-values='int8'",
    "int8, stochastic": "wire.up-values='int8' wire.down-values='int8' wire.rounding='stochastic'",
    "int8, error feedback": "wire.up-values='int8' wire.down-values='int8' wire.error-feedback=true",
}
# Of CIFAR-10: a run takes about three minutes on two cores.
TRAIN, TESTS = 10_000, 5_000
CIFAR10 = (
    "data.name='parquet' data.path='{data}' data.augment='crop-flip' partition.alpha=1.0 "
    "local.epochs=1 local.batch-size=32 run.rounds=12 "
    "ssfl.saliency-batch-size=128 mask.density=0.5"
)
TASKS: dict[str, tuple[str, tuple[int, ...], tuple[str, ...]]] = {
    "digits": ("mask.density=0.1", (1, 2, 3), tuple(VARIANTS)),
    "cifar10": (
        CIFAR10,
        (1, 2, 3),
        ("fp32", "fp16", "int8", "int8, error feedback"),
    ),
}


def play(keys: str, cache: Path) -> dict[str, Any]:
    """Play a run, decoded images in `cache`; return its accuracy in percent and its bytes of a model each way."""
    with tempfile.TemporaryDirectory() as folder:
        out, ssfl = Path(folder) / "run", str(Path(sys.executable).parent / "ssfl")
        words = [ssfl, "run", "--engine", "inline", "-c", keys, "--out", str(out)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"SSFL_CACHE": str(cache)})
        rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()][1:]
        summary = json.loads((out / "summary.json").read_text())
    messages = summary["cohort"] * summary["rounds"]
    return {
        "accuracy": statistics.mean(100 * r["central_accuracy"] for r in rounds[-LAST:]),
        "down": summary["bytes_train_down"] / messages,
        "up": summary["bytes_train_up"] / messages,
    }


def measure(task: str, data: str, record: dict[str, Any], save: Any) -> None:
    """Play what the record does not have yet."""
    common, seeds, names = TASKS[task]
    with tempfile.TemporaryDirectory() as folder:
        if data:
            write_cifar(Path(data), Path(folder) / "data", TRAIN, TESTS)
        keys = common.format(data=Path(folder) / "data")
        for seed, name in product(seeds, names):
            runs = record.setdefault(name, {})
            if str(seed) not in runs:
                runs[str(seed)] = play(f"{keys} run.seed={seed} {VARIANTS[name]}", Path(folder) / "cache")
                print(task, name, seed, runs[str(seed)], flush=True)
                save()


def table(task: str, record: dict[str, Any]) -> list[str]:
    """Return Markdown: bytes, accuracy, and the paired difference to fp32 with its 95 % interval."""
    head = ("values", "bytes a model down", "up", "accuracy %", "minus fp32, points")
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for name in TASKS[task][2]:
        runs = record.get(name, {})
        if not runs:
            continue
        off = [runs[seed]["accuracy"] - record["fp32"][seed]["accuracy"] for seed in runs]
        cells = (f"{statistics.mean(run[key] for run in runs.values()):,.0f}" for key in ("down", "up"))
        mean = statistics.mean(run["accuracy"] for run in runs.values())
        lines.append(f"| {name} | {' | '.join(cells)} | {mean:.2f} | {_interval(off) if name != 'fp32' else ''} |")
    seeds = sorted({seed for runs in record.values() for seed in runs})
    cut = f" Its first {TRAIN:,} training and {TESTS:,} test images." if task == "cifar10" else ""
    return [*lines, "", f"Seeds {', '.join(seeds)}; a run's accuracy is the mean of its last {LAST} rounds.{cut}"]


def _interval(differences: list[float]) -> str:
    from scipy import stats

    mean, count = statistics.mean(differences), len(differences)
    if count == 1:
        return f"{mean:+.2f}"
    half = stats.t.ppf(0.975, count - 1) * statistics.stdev(differences) / count**0.5
    return f"{mean:+.2f} ± {half:.2f}"
