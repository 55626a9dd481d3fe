"""Run the tables of docs/results.md with `ssfl run` and record them: python benchmarks/tables.py digits|cifar10

cifar10 reads the folder that SSFL_CIFAR10 names.

Every run is `ssfl run` in a process of its own: cifar10 on the Ray engine, digits (24 short runs) on the in-process
one, which gives the same digits and whose seconds are those of one core. The record in benchmarks/results/ holds
each run's summary.json and environment.json; the Markdown table beside it is what that page shows. Runs that the
record already has are not played again: delete it to start over.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
# The folder of train and test parquet files (columns img.bytes, label), e.g. the Hub's uoft-cs/cifar10.
CIFAR10 = os.environ.get("SSFL_CIFAR10", "/data/cifar10")

LOCAL = "partition.alpha=1.0 local.epochs=1 local.batch-size=32 ssfl.saliency-batch-size=128"

# table -> (settings of all rows, engine, seeds, rows); a row is (strategy, density)
TABLES = {
    "digits": (
        "run.evaluate-every=20",
        "inline",
        (1, 2, 3),
        (
            ("fedavg", 1.0),
            ("ssfl", 0.5),
            ("ssfl", 0.1),
            ("shuffled", 0.1),
            ("random", 0.1),
            ("ssfl", 0.05),
            ("shuffled", 0.05),
            ("random", 0.05),
        ),
    ),
    "cifar10": (
        f"data.name='parquet' data.path='{CIFAR10}' data.augment='crop-flip' model.name='resnet20' "
        "run.rounds=16 run.evaluate-every=4 " + LOCAL,
        "ray",
        (1,),
        (("fedavg", 1.0), ("ssfl", 0.5), ("ssfl", 0.1), ("random", 0.1)),
    ),
}


def keys(settings: str, strategy: str, density: float, seed: int) -> str:
    return f"{settings} strategy='{strategy}' mask.density={density} run.seed={seed}"


def play(settings: str, engine: str, strategy: str, density: float, seed: int, folder: Path) -> dict:
    words = ["run", "--engine", engine, "-c", keys(settings, strategy, density, seed), "--out", str(folder)]
    subprocess.run([str(Path(sys.executable).parent / "ssfl"), *words], check=True)
    return {
        "summary": json.loads((folder / "summary.json").read_text()),
        "environment": json.loads((folder / "environment.json").read_text()),
    }


def row(runs: list[dict]) -> str:
    one = runs[0]["summary"]
    central = [accuracy(run) for run in runs]
    local = statistics.mean(100 * r["summary"]["local_accuracy_mean"] for r in runs)
    messages = one["cohort"] * one["rounds"]
    spread = f" ± {statistics.stdev(central):.2f}" if len(central) > 1 else ""
    return " | ".join(
        [
            f"| `{one['strategy']}`",
            f"{one['density']:.3g}",
            f"{statistics.mean(central):.2f}{spread}",
            f"{local:.2f}",
            f"{one['bytes_train_down'] / messages / 1e6:.3f}",
            f"{one['bytes_train_up'] / messages / 1e6:.3f}",
            f"{(one['bytes_discovery_down'] + one['bytes_discovery_up']) / 1e6:.1f}",
            f"{one['bytes_dense_train'] / (one['bytes_train_down'] + one['bytes_train_up']):.2f}",
            f"{statistics.mean(r['summary']['seconds_total'] for r in runs):.0f} |",
        ]
    )


def accuracy(run: dict) -> float:
    return 100 * run["summary"]["central_accuracy"]


def check_digits(mean: Callable[[str, float], float]) -> None:
    """The goals of the project for its default run: 95 % at density 0.1, and 3 points above random at 0.05."""
    assert mean("ssfl", 0.1) >= 95, mean("ssfl", 0.1)
    assert mean("ssfl", 0.05) - mean("random", 0.05) >= 3, (mean("ssfl", 0.05), mean("random", 0.05))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    name = parser.parse_args().table
    settings, engine, seeds, rows = TABLES[name]
    record = HERE / "results" / f"{name}.json"
    known = json.loads(record.read_text())["runs"] if record.exists() else {}
    lines = []
    for strategy, density in rows:
        for seed in seeds:
            if keys(settings, strategy, density, seed) not in known:
                with tempfile.TemporaryDirectory() as folder:
                    run = play(settings, engine, strategy, density, seed, Path(folder) / "run")
                known[keys(settings, strategy, density, seed)] = run
                record.write_text(json.dumps({"runs": known}, indent=1) + "\n")
        runs = [known[keys(settings, strategy, density, seed)] for seed in seeds]
        lines.append(row(runs))
        print(lines[-1], flush=True)
    if name == "digits":
        check_digits(lambda s, d: statistics.mean(accuracy(known[keys(settings, s, d, seed)]) for seed in seeds))
    where = runs[0]["environment"]
    hardware = f"{where['cores']} cores of {where['cpu']}, no GPU" if not where["gpu"] else where["gpu"]
    head = (
        "| strategy | density | central accuracy % | mean local % | MB down a client a round | MB up | "
        "discovery and masks, MB in all | fewer training bytes | seconds |\n|---|---|---|---|---|---|---|---|---|"
    )
    title = f"{name}: {len(seeds)} seed(s), {hardware}, {date.today()}, torch {where['torch']}, flwr {where['flwr']}"
    (HERE / "results" / f"{name}.md").write_text("\n".join([title, "", head, *lines, ""]))


if __name__ == "__main__":
    main()
