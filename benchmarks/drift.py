"""Masks under drift that never stops: python -m benchmarks.drift --minutes M [--jobs 2]

Digits under both streams of ``shift.stream`` (docs/streams.md). Compared at one density: a mask that is never found
again, one that is once, by schedule or by the newcomers' loss, or with all weights back at w0, one that moves all the
time, FedDST, and dense FedAvg; beside them a mask that is never found again and has ten times the weights, which is
what about an eighth of dense's bytes buy without any move. Each run that ends is written to
benchmarks/results/drift.json at once, by its slug, and the table beside it is made of that file alone; what the end
of the minutes cuts goes on with the next call, from its checkpoint in --out, and a run that the record has is not
played again, on whatever machine.

Accuracy is that of the global model on the test images that are in play in a round: the mean over all rounds, and
over the last turn of the stream. Goal: continuous within 2 points of dense at a fifth of its bytes where never loses
5 or more.
"""

import argparse
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import images
from benchmarks.images import Entry, percent, place, say
from ssfl_app import config as configuration
from ssfl_app.experiments.run_spec import planned
from ssfl_app.results.compare import estimate, numbers
from ssfl_app.results.run_folder import CENTRAL, read_run
from ssfl_app.results.table import NONE, Table, megabytes

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "drift.json"
SEEDS, ROUNDS, DENSITY = (1, 2, 3), 60, 0.01
EVERY, CLASSES = 3, 10
DATA = f"partition.alpha=1.0 shift.classes=3 shift.every={EVERY}"
TERMS = f"run.rounds={ROUNDS} local.epochs=2 mask.density={DENSITY} {DATA}"
LAST = EVERY * CLASSES
"""Rounds in which the stream goes around once."""
STREAMS = ("classes", "labels")
ONCE = f"ssfl.refresh='scheduled' ssfl.refresh-round={ROUNDS // 2}"
MOVES = "ssfl.refresh='continuous' ssfl.refresh-every=3 ssfl.refresh-sample=0.5 ssfl.refresh-weights='zero'"
MOVES += " ssfl.score-values='log8'"
DENSE = "dense"
ROWS = {
    DENSE: "strategy='fedavg'",
    "never": "",
    "never, ten times the weights": f"mask.density={10 * DENSITY}",
    "continuous": MOVES,
    "feddst": "strategy='feddst' feddst.every=3 feddst.until=1.0",
    "scheduled": ONCE,
    "drift": "ssfl.refresh='drift'",
    "restart": f"{ONCE} ssfl.refresh-weights='restart'",
}


def plan(given: dict[str, Any]) -> list[Entry]:
    """Return the runs, those of one seed before those of the next; `given` keys have the last word in all of them."""
    found = []
    for seed in SEEDS:
        for stream in STREAMS:
            for row, keys in ROWS.items():
                own = {"run.seed": seed, "shift.stream": stream}
                flat = configuration.merge(configuration.read_overrides([TERMS, keys]), own, given)
                run = planned(flat, dense=row == DENSE)
                words = f"{stream}, {row}, seed {seed}"
                slug = re.sub(r"[^\w.]+", "-", words)
                found.append(Entry(stream, row, float(flat["mask.density"]), replace(run, slug=slug, name=words)))
    return found


class Study(images.Study):
    """The record of the finished and the failed runs, by slug, and the table of it."""

    def measured(self, entry: Entry, home: Path) -> dict[str, Any]:
        """Return the record of a run that is finished."""
        run = read_run(home)
        accuracy = {e["round"]: e[CENTRAL] for e in run.rounds if e.get(CENTRAL) is not None}
        return {
            **place(entry),
            **numbers(run),
            "central": statistics.fmean(accuracy.values()),
            "end": statistics.fmean(list(accuracy.values())[-LAST:]),
            "central_by_round": accuracy,
            "swapped": {e["round"]: e["swapped"]["weights"] for e in run.rounds if "swapped" in e},
            "mask_distance": {e["round"]: e["mask_distance"] for e in run.rounds if "mask_distance" in e},
            "model_sha256": (run.summary or {}).get("model_sha256"),
            "environment": run.environment,
        }

    def page(self) -> str:
        """Return a table for each stream."""
        return tables(list(self.known.values()))


HEADERS = ["row", "seeds", "accuracy % over time", "to dense", "last turn", "to dense", "MB", "of dense's bytes"]
NOTE = (
    "± is half the 95 % interval of the mean over seeds; to dense: the mean difference of seeds that both have. MB: "
    "training, masks, scores and discovery, both directions."
)


def tables(known: Sequence[dict[str, Any]]) -> str:
    """Return a table for each stream, the rows in their order, and why runs failed."""
    lines = ["# Masks under drift that never stops", "", f"Digits, {TERMS}", ""]
    for stream in dict.fromkeys(each["part"] for each in known):
        here = [each for each in known if each["part"] == stream]
        runs = {row: {e["seed"]: e for e in here if e["row"] == row and "failed" not in e} for row in ROWS}
        made = [cells(row, runs[row], runs[DENSE]) for row in ROWS if runs[row]]
        lines += [f"## shift.stream {stream!r}", "", *Table(HEADERS, made, 1).markdown(), ""]
        lines += [f"- {e['row']}, seed {e['seed']}: {e['failed']}." for e in here if "failed" in e]
    environments = [each["environment"] for each in known if "failed" not in each]
    for cores, cpu, torch in sorted({(each["cores"], each["cpu"], each["torch"]) for each in environments}):
        lines.append(f"{cores} cores of {cpu}, no GPU, torch {torch}. {NOTE}")
    return "\n".join([*lines, ""])


def cells(row: str, runs: dict[int, dict[str, Any]], dense: dict[int, dict[str, Any]]) -> list[str]:
    """Return a row of a table: means over its seeds."""

    def share(values: Sequence[float], sign: str = "") -> str:
        found = estimate(values)
        if found is None:
            return NONE
        return f"{100 * found.mean:{sign}.1f}" + ("" if found.half is None else f" ± {percent(found.half)}")

    def sent(each: dict[str, Any]) -> float:
        return float(each["down"] + each["up"])

    both = sorted(runs.keys() & dense.keys())

    def to_dense(key: str) -> str:
        return NONE if row == DENSE else share([runs[seed][key] - dense[seed][key] for seed in both], "+")

    parts = [sent(runs[seed]) / sent(dense[seed]) for seed in both]
    return [
        row,
        ", ".join(map(str, sorted(runs))),
        share([each["central"] for each in runs.values()]),
        to_dense("central"),
        share([each["end"] for each in runs.values()]),
        to_dense("end"),
        megabytes(statistics.fmean(map(sent, runs.values()))),
        f"{statistics.fmean(parts):.3f}" if parts else NONE,
    ]


def play(runs: Sequence[Entry], record: Path, out: Path, minutes: float, at_once: int) -> str:
    """Play what fits and return what is to be said at the end."""
    return Study(runs, record, out / "runs").play(out, time.monotonic() + 60 * minutes, at_once)


def main(words: Sequence[str] | None = None) -> None:
    """Play what fits into the minutes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True, help="0: make the table of the record")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--out", type=Path, default=ROOT / "scratch" / "drift", help="of the run folders")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--only", default="", help="play runs with this in their slug only: classes-continuous")
    parser.add_argument("-c", action="append", default=[], help="keys that all runs get; take another --record")
    given = parser.parse_args(words)
    runs = [entry for entry in plan(configuration.read_overrides(given.c)) if given.only in entry.run.slug]
    say(play(runs, given.record, given.out.resolve(), given.minutes, given.jobs))


if __name__ == "__main__":
    main()
