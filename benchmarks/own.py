"""What the files of examples/own reach, dense and with SSFL, and the bits of three engines: python benchmarks/own.py

Goals: SSFL at density 0.2 is within `DISTANCE` of dense, both means over the seeds, and what misses it is said; Ray
and three SuperNodes have the bits of one process. ``--engines`` plays the second part, which takes minutes, too.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.drills.field import federation, ssfl

HERE = Path(__file__).parent
OWN = HERE.parent / "examples" / "own"
DENSE = "strategy='fedavg'"
DISTANCE = {"tumours": 0.03, "progression": 0.05, "speakers": 0.05, "lesions": 0.1, "momentum": 0.02, "topics": 0.05}
"""How much worse the headline metric may be, in its own unit."""

LONGER = {"topics, 40 rounds": ("topics", "run.rounds=40")}
"""What else is played: by its name in the record, the file and its keys."""

LOWER = {"progression"}
"""Where less is better: a mean absolute error."""

SEEDS = (1, 2, 3)
# Of three nodes each holds enough samples for its least-batch.
SHORT = "run.clients=3 run.cohort=3 run.rounds=1 local.epochs=1"
ENGINES = dict.fromkeys(DISTANCE, SHORT) | {"topics": f"{SHORT} data.options.length=4 model.options.depth=1"}


def play(folder: Path, name: str, keys: str, *command: str) -> dict[str, Any]:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    line = [*ssfl(*(command or ("run",))), f"{name}.toml", "-c", keys, "--out", str(out)]
    subprocess.run(line, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    files = ("summary", "environment")
    return {file: json.loads((out / f"{file}.json").read_text()) for file in files}


def reached(folder: Path, case: str) -> dict[str, Any]:
    name, longer = LONGER.get(case, (case, ""))
    both = (f"{DENSE} {longer}", longer)
    dense, sparse = ([play(folder, name, f"run.seed={seed} {keys}") for seed in SEEDS] for keys in both)
    means = [statistics.mean(run["summary"]["central_accuracy"] for run in runs) for runs in (dense, sparse)]
    worse = (means[1] - means[0]) * (1 if name in LOWER else -1)
    print(
        f"{case}: dense {means[0]:.4f}, SSFL {means[1]:.4f}, worse by {worse:.4f} (goal {DISTANCE[name]})", flush=True
    )
    made = {kind: [run["summary"] for run in runs] for kind, runs in (("dense", dense), ("ssfl", sparse))}
    return {"means": means, "worse": worse, **made, "environment": sparse[0]["environment"]}


def engines(folder: Path, name: str, nodes: tuple[str, ...]) -> dict[str, Any]:
    ways = {"in process": ("run",), "ray": ("run", "--engine", "ray"), "SuperNodes": nodes}
    made = {way: play(folder, name, ENGINES[name], *words)["summary"]["model_sha256"] for way, words in ways.items()}
    print(name, "same bits" if len(set(made.values())) == 1 else made, flush=True)
    return made


def main() -> None:
    """Play what the record lacks; each example is written when it is done."""
    path = HERE / "results" / "own.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    part = record.setdefault("engines" if "--engines" in sys.argv else "reached", {})
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = Path(shutil.copytree(OWN, work / "own"))
        if "--engines" in sys.argv:
            place = stack.enter_context(federation(work / "place"))
            nodes = ("federation", "run", "--dir", str(place.folder), "--app", str(folder))
        cases = list(DISTANCE) if "--engines" in sys.argv else [*DISTANCE, *LONGER]
        for name in [name for name in cases if name not in part]:
            made = engines(folder, name, nodes) if "--engines" in sys.argv else reached(folder, name)
            part[name] = {"date": str(date.today()), **made}
            path.write_text(json.dumps(record, indent=1) + "\n")
    for name, row in record.get("reached", {}).items():
        goal = DISTANCE[LONGER.get(name, (name, ""))[0]]
        if row["worse"] > goal:
            print(f"{name}: missed, {row['worse']:.4f} worse than dense; goal {goal}")
    for name, row in record.get("engines", {}).items():
        assert row["in process"] == row["ray"] == row["SuperNodes"], name


if __name__ == "__main__":
    main()
