"""What waiting costs: digits on clients of clock.profile "mobile", in rounds that wait for all, some or a buffer.

    python -m benchmarks.slow_sites            # what the record lacks: some minutes of one core
    python -m benchmarks.slow_sites --table    # the table of docs/slow-sites.md anew from the record

Each case has the simulated time that `ROUNDS` rounds take which wait for everybody, with the same seed and so the
same clients. Writes benchmarks/results/slow-sites.json and the table of docs/slow-sites.md.
"""

import argparse
import json
import os
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.wan.table import fill, table
from ssfl_app.config import Flat, merge
from ssfl_app.core.clock import HEADERS, TRIPS_DOWN, TRIPS_UP
from ssfl_app.core.strategy import SparseStrategy
from ssfl_app.results.recorder import environment
from ssfl_app.testing.grid import play

ROOT = Path(__file__).resolve().parent.parent
RECORD, PAGE = ROOT / "benchmarks" / "results" / "slow-sites.json", ROOT / "docs" / "slow-sites.md"
SEEDS, ROUNDS, MOST, TARGETS = (1, 2, 3), 12, 400, (0.8, 0.9)
KEYS: Flat = {"run.clients": 20, "run.cohort": 10, "local.epochs": 2, "local.batch-size": 16, "partition.alpha": 0.3}
KEYS |= {"strategy": "ssfl", "mask.density": 0.1, "clock.profile": "mobile", "failures.min-ok-fraction": 0.1}
CLOCK = [HEADERS, TRIPS_DOWN, TRIPS_UP]  # with another one times are others
CASES: dict[str, Flat] = {
    "all 10 of 10": {"run.rounds": ROUNDS},
    "the first 10 of 13": {"run.over-select": 1.3, "run.close-after": 10.0},
    "the first 5 of 10": {"run.close-after": 5.0},
    "`run.buffer`, 5 of 10": {"run.buffer": 5.0},
}


def measure(case: Flat, seed: int, until: float) -> list[dict[str, Any]]:
    """Return accuracy, simulated seconds and trainings by round, of rounds that end in so many seconds."""
    now = [0.0]

    def prepare(strategy: SparseStrategy) -> None:
        keep = strategy.callback.round  # type: ignore[union-attr]

        def end(record: dict[str, Any], strategy: SparseStrategy) -> str:
            keep(record, strategy)
            now[0] += record["simulated_seconds"]
            return "time is over" if now[0] >= until else ""

        strategy.callback.round = end  # type: ignore[method-assign, union-attr]
        strategy.configure_evaluate = lambda *_: []  # type: ignore[method-assign]  # the server tests, and nobody else

    seconds, rounds = 0.0, []
    for record in play(merge(KEYS, {"run.rounds": MOST, "run.seed": seed}, case), prepare=prepare).records:
        seconds += record["simulated_seconds"]
        row = {"seconds": seconds, "accuracy": record.get("central_accuracy"), "ok": len(record["ok"])}
        row |= {"trained": len(record.get("client_seconds", ())), "ages": list(record.get("stale", {}).values())}
        rounds += [row] if seconds <= until else []
    return rounds


def page_table(known: dict[str, Any]) -> str:
    """Return how far each case gets in the time of the first, means over seeds."""
    runs, base = known["runs"], next(iter(known["cases"]))
    ends = [runs[base][seed][-1]["seconds"] for seed in runs[base]]
    head = ["a round waits for", *(f"{100 * target:g} % after: s" for target in known["targets"])]
    head += [f"accuracy after {mean(ends):.0f} s, %", "rounds", "trainings", "of them counted", "mean age"]
    rows = []
    for name in known["cases"]:
        played, row = list(runs[name].values()), [name]
        for target in known["targets"]:
            reached = [next((r["seconds"] for r in run if (r["accuracy"] or 0) >= target), None) for run in played]
            times = [time for time in reached if time is not None]
            row.append(f"{mean(times):.1f}" if len(times) == len(played) else f"{len(times)} of {len(played)} seeds")
        last = [100 * run[-1]["accuracy"] for run in played]
        row.append(f"{mean(last):.1f} ({min(last):.1f} to {max(last):.1f})")
        row.append(f"{mean(len(run) - 1 for run in played):.0f}")
        counted = [sum(r["ok"] for r in run[1:]) for run in played]
        row += [f"{mean(sum(r['trained'] for r in run) for run in played):.0f}", f"{mean(counted):.0f}"]
        ages = sum(sum(r["ages"]) for run in played for r in run)
        rows.append([*row, f"{ages / sum(counted):.2f}"])
    where = known["environment"]
    last_line = f"Means over {len(known['seeds'])} seeds, torch {where['torch']}, {where['time'][:10]}."
    return table(head, rows) + f"\n\n{last_line}"


def main() -> None:
    """Play all cases, or only write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        record: dict[str, Any] = {
            "clock": CLOCK,
            "keys": KEYS,
            "cases": CASES,
            "targets": TARGETS,
            "seeds": SEEDS,
            "runs": {},
        }
        record["environment"] = environment()
        if RECORD.exists():
            known = json.loads(RECORD.read_text())
            same = all(known.get(key) == record[key] for key in ("clock", "keys", "cases"))
            record["runs"] = known["runs"] if same else {}
        until = {seed: float("inf") for seed in SEEDS}
        for name, case in CASES.items():
            runs = record["runs"].setdefault(name, {})
            for seed in SEEDS:
                if str(seed) not in runs:
                    runs[str(seed)] = measure(case, seed, until[seed])
                    print(name, seed, runs[str(seed)][-1], flush=True)
                    RECORD.write_text(json.dumps(record, indent=1) + "\n")
                if case == next(iter(CASES.values())):
                    until[seed] = runs[str(seed)][-1]["seconds"]
    shown = page_table(json.loads(RECORD.read_text()))
    PAGE.write_text(fill(PAGE.read_text(), {"waiting": shown}))
    print(shown)


if __name__ == "__main__":
    main()
