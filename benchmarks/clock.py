"""Which density, on which network? Digits to a target accuracy, in the time of each profile's clients.

    python -m benchmarks.clock             # what the record lacks: some minutes of one core
    python -m benchmarks.clock --table     # the table of docs/clock.md anew from the record

A clock changes no bits, so each density is played once and its exchanges are timed for all profiles. Writes
benchmarks/results/clock.json and the table of docs/clock.md.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.wan.table import fill, table
from ssfl_app.comm.exchange import ExchangeReport
from ssfl_app.config import Flat, merge
from ssfl_app.core.clock import PROFILES, Clock
from ssfl_app.core.strategy import SparseStrategy
from ssfl_app.results.recorder import environment
from ssfl_app.results.run_folder import ALL_BYTES
from ssfl_app.testing.grid import play

ROOT = Path(__file__).resolve().parent.parent
RECORD, PAGE = ROOT / "benchmarks" / "results" / "clock.json", ROOT / "docs" / "clock.md"
TARGET = 0.9
KEYS: Flat = {"run.clients": 20, "run.cohort": 10, "run.rounds": 20, "local.epochs": 2, "local.batch-size": 16}
KEYS |= {"partition.alpha": 0.3, "clock.profile": "lan"}
CASES: dict[str, Flat] = {
    "`fedavg`": {"strategy": "fedavg", "mask.density": 1.0},
    **{f"`ssfl`, {density:g}": {"strategy": "ssfl", "mask.density": density} for density in (0.5, 0.1, 0.05)},
}


class AllProfiles(Clock):
    """Times each exchange for the clients of all profiles, in the order of the exchanges."""

    def __init__(self, strategy: SparseStrategy) -> None:
        seed = strategy.settings.run.seed
        self._clocks = {name: Clock(profile, seed, strategy.forward_flops) for name, profile in PROFILES.items()}
        self.told: list[dict[str, float]] = []
        super().__init__(PROFILES["lan"], seed, strategy.forward_flops)

    def seconds(self, report: ExchangeReport) -> float:
        """Return what the profile of the run says."""
        self.told.append({name: clock.seconds(report) for name, clock in self._clocks.items()})
        return super().seconds(report)


def measure(case: Flat) -> dict[str, Any]:
    """Return accuracy by round, and bytes and each profile's seconds until its end."""
    clocks: list[AllProfiles] = []

    def prepare(strategy: SparseStrategy) -> None:
        clocks.append(AllProfiles(strategy))
        strategy.clock = clocks[0]

    records = play(merge(KEYS, case), prepare=prepare).records
    told, sent, rounds = clocks[0].told, 0, []
    before = len(told) - len(records[1:])  # questions before round 1; then an exchange a round
    for number, record in enumerate(records):
        sent += sum(record.get(key, 0) for key in ALL_BYTES if key != "bytes_evaluate_down")
        until = {name: sum(each[name] for each in told[: before + number]) for name in PROFILES}
        rounds.append({"round": number, "accuracy": record.get("central_accuracy"), "bytes": sent, "seconds": until})
    return {"rounds": rounds, "forward_flops": clocks[0]._forward_flops()}


def page_table(known: dict[str, Any]) -> str:
    """Return what a density costs until the target, by profile; the least of a column is bold."""
    found = {}
    for name, case in known["cases"].items():
        reached = [each for each in case["rounds"] if (each["accuracy"] or 0) >= known["target"]]
        found[name] = reached[0] if reached else None
    head = ["strategy, density", "accuracy at the end %", f"rounds to {100 * known['target']:g} %", "MB"]
    head += [f"`{name}`: s" for name in PROFILES]
    least = {name: min(each["seconds"][name] for each in found.values() if each) for name in PROFILES}
    rows = []
    for name, each in found.items():
        row = [name, f"{100 * known['cases'][name]['rounds'][-1]['accuracy']:.1f}"]
        if each is None:
            rows.append([*row, *["-"] * (2 + len(PROFILES))])
            continue
        row += [str(each["round"]), f"{each['bytes'] / 1e6:.1f}"]
        for profile, best in least.items():
            text = f"{each['seconds'][profile]:.3g}"
            row.append(f"**{text}**" if each["seconds"][profile] == best else text)
        rows.append(row)
    where = known["environment"]
    last = f"One seed, {known['keys']['run.rounds']} rounds, torch {where['torch']}, {where['time'][:10]}."
    return table(head, rows) + f"\n\n{last}"


def main() -> None:
    """Play all densities, or only write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        record = {"target": TARGET, "keys": KEYS, "cases": {}, "environment": environment()}
        if RECORD.exists() and (known := json.loads(RECORD.read_text()))["keys"] == KEYS:
            record["cases"] = known["cases"]
        for name in [name for name in CASES if name not in record["cases"]]:
            record["cases"][name] = measure(CASES[name])
            print(name, record["cases"][name]["rounds"][-1], flush=True)
            RECORD.write_text(json.dumps(record, indent=1) + "\n")
    shown = page_table(json.loads(RECORD.read_text()))
    PAGE.write_text(fill(PAGE.read_text(), {"densities": shown}))
    print(shown)


if __name__ == "__main__":
    main()
