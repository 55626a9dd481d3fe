"""Accuracy against epsilon on digits: python -m benchmarks.private --minutes M [--jobs 2]

Differential privacy of clients (privacy.level "client"), 200 of them, an expected 40 a round: dense FedAvg, and SSFL
with private layer densities at 0.1 and 0.05, for epsilon 2, 8, and none (no noise and no clipping; SSFL by the same
densities, without noise), three seeds. Clip and rate are chosen for each method at each epsilon from the same grid,
on a seed of its own; without noise the rate is that of epsilon 8. What the end of the minutes cuts goes on with the
next call; each run that ends is written to benchmarks/results/private.json, and the table beside it is made of that
file alone.
"""

import argparse
import functools
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

from ssfl_app.files import write_bytes, write_json
from ssfl_app.results.compare import estimate

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "private.json"
METHODS = {
    "dense FedAvg": "strategy='fedavg'",
    "ssfl, density 0.1": "strategy='ssfl' mask.density=0.1 ssfl.discovery='private-densities'",
    "ssfl, density 0.05": "strategy='ssfl' mask.density=0.05 ssfl.discovery='private-densities'",
}
TERMS = (
    "run.clients=200 run.cohort=40 run.rounds=60 run.evaluate-every=10 run.weighting='uniform' partition.name='iid' "
    "local.epochs=5 local.batch-size=8 local.weight-decay=0.0"
)
PRIVATE = "privacy.level='client' privacy.delta=0.001"
EPSILONS = (2.0, 8.0, None)
TUNED = (2.0, 8.0)
CLIPS, RATES = (0.2, 0.6), (0.05, 0.15)
SEEDS, TUNING = (1, 2, 3), 101


def keys_of(method: str, epsilon: float | None, clip: float, rate: float, seed: int) -> str:
    own = f"{TERMS} {METHODS[method]} local.lr={rate} run.seed={seed}"
    if epsilon is None:
        return f"{own} wire.up-values='fixed32'" + (" ssfl.score-values='fixed32'" if "ssfl" in method else "")
    return f"{own} {PRIVATE} privacy.epsilon={epsilon} privacy.clip={clip}"


def tuning_name(method: str, epsilon: float, clip: float, rate: float) -> str:
    return f"tune, {method}, epsilon {epsilon}, clip {clip}, rate {rate}"


def tuning() -> Iterator[tuple[str, str]]:
    for epsilon, method, clip, rate in itertools.product(TUNED, METHODS, CLIPS, RATES):
        yield tuning_name(method, epsilon, clip, rate), keys_of(method, epsilon, clip, rate, TUNING)


def chosen(method: str, epsilon: float | None, known: dict[str, Any]) -> tuple[float, float]:
    """Return the clip and the rate that were best on the seed of the tuning; of equal ones the first of the grid."""
    at = epsilon or max(TUNED)
    return max(itertools.product(CLIPS, RATES), key=lambda pair: known[tuning_name(method, at, *pair)]["accuracy"])


def main_runs(known: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for seed, method, epsilon in itertools.product(SEEDS, METHODS, EPSILONS):
        clip, rate = chosen(method, epsilon, known)
        yield f"{method}, epsilon {epsilon}, seed {seed}", keys_of(method, epsilon, clip, rate, seed)


def play(keys: str, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    line = [sys.executable, "-m", "ssfl_app", "run", "-c", f"{keys} engine.concurrent=1", "--out", str(out)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip()[-400:]}
    summary = json.loads((out / "summary.json").read_text())
    kept = ("epsilon", "delta", "noise_multiplier", "bytes_train_up", "bytes_discovery_up", "alive", "parameters")
    return {
        "accuracy": summary["central_accuracy"],
        **{name: summary.get(name) for name in kept},
        "environment": json.loads((out / "environment.json").read_text()),
        "date": str(date.today()),
    }


def table(known: dict[str, Any]) -> str:
    lines = [
        "| method | epsilon | accuracy %, mean of the seeds | noise multiplier | clip, rate | MB up |",
        "|---" * 6 + "|",
    ]
    for method, epsilon in itertools.product(METHODS, EPSILONS):
        rows = [known.get(f"{method}, epsilon {epsilon}, seed {seed}", {}) for seed in SEEDS]
        good = [row for row in rows if "accuracy" in row]
        if not good:
            continue
        found = estimate([100 * row["accuracy"] for row in good])
        assert found is not None
        said = f"{found.mean:.1f}" + ("" if found.half is None else f" ± {found.half:.1f}")
        said += "" if len(good) == len(SEEDS) else f" ({len(good)} of {len(SEEDS)} seeds)"
        noise = f"{good[0]['noise_multiplier']:.3f}" if good[0].get("noise_multiplier") else "0"
        clip, rate = chosen(method, epsilon, known)
        sent = statistics.mean(row["bytes_train_up"] + row["bytes_discovery_up"] for row in good) / 1e6
        shown = "none" if epsilon is None else f"{epsilon:g}"
        used = f"-, {rate}" if epsilon is None else f"{clip}, {rate}"
        lines.append(f"| {method} | {shown} | {said} | {noise} | {used} | {sent:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "scratch" / "private")
    words = parser.parse_args()
    end = time.monotonic() + 60 * words.minutes
    known: dict[str, Any] = json.loads(RECORD.read_text())["runs"] if RECORD.exists() else {}

    def one(name: str, keys: str) -> None:
        if time.monotonic() > end:
            return
        made = play(keys, words.out / name.replace(" ", "-").replace(",", ""))
        known[name] = {"keys": keys, **made}
        write_json(RECORD, {"runs": dict(sorted(known.items()))})
        print(f"{name}: {made.get('accuracy', made.get('failed'))}", flush=True)

    for runs in (tuning, functools.partial(main_runs, known)):
        waiting = [(name, keys) for name, keys in runs() if known.get(name, {}).get("keys") != keys]
        with ThreadPoolExecutor(words.jobs) as pool:
            list(pool.map(lambda pair: one(*pair), waiting))
        if time.monotonic() > end:
            print("the minutes are over; the same command goes on", flush=True)
            return
    write_bytes(RECORD.with_suffix(".md"), table(known).encode())
    print(table(known))


if __name__ == "__main__":
    main()
