"""Run the tables of README with `ssfl run` and record them: python benchmarks/tables.py digits|cifar10

Every run is `ssfl run` in a process of its own: cifar10 on the Ray engine, digits (24 short runs) on the in-process
one, which gives the same digits and whose seconds are those of one core. The record in benchmarks/results/ holds
each run's summary.json and environment.json; the Markdown table beside it is what README shows.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
CIFAR10 = HERE.parent.parent / "shared" / "data" / "cifar10"

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
        f"data.name='parquet' data.path='{CIFAR10}' model.name='resnet20' run.rounds=16 run.evaluate-every=4 "
        + LOCAL,
        "ray",
        (1,),
        (("fedavg", 1.0), ("ssfl", 0.5), ("ssfl", 0.1), ("random", 0.1)),
    ),
}


def play(settings: str, engine: str, strategy: str, density: float, seed: int, folder: Path) -> dict:
    keys = f"{settings} strategy='{strategy}' mask.density={density} run.seed={seed}"
    command = [str(Path(sys.executable).parent / "ssfl"), "run", "--engine", engine, "-c", keys, "--out", str(folder)]
    subprocess.run(command, check=True)
    return {
        "keys": keys,
        "summary": json.loads((folder / "summary.json").read_text()),
        "environment": json.loads((folder / "environment.json").read_text()),
    }


def row(runs: list[dict]) -> str:
    one = runs[0]["summary"]
    accuracy = [100 * r["summary"]["central_accuracy"] for r in runs]
    local = statistics.mean(100 * r["summary"]["local_accuracy_mean"] for r in runs)
    messages = one["cohort"] * one["rounds"]
    spread = f" ± {statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else ""
    return " | ".join(
        [
            f"| `{one['strategy']}`",
            f"{one['density']:.3g}",
            f"{statistics.mean(accuracy):.2f}{spread}",
            f"{local:.2f}",
            f"{one['bytes_train_down'] / messages / 1e6:.3f}",
            f"{one['bytes_train_up'] / messages / 1e6:.3f}",
            f"{(one['bytes_discovery_down'] + one['bytes_discovery_up']) / 1e6:.1f}",
            f"{one['bytes_dense_train'] / (one['bytes_train_down'] + one['bytes_train_up']):.2f}",
            f"{statistics.mean(r['summary']['seconds_total'] for r in runs):.0f} |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    name = parser.parse_args().table
    settings, engine, seeds, rows = TABLES[name]
    record = HERE / "results" / f"{name}.json"
    done: dict[str, list[dict]] = {}
    lines = []
    for strategy, density in rows:
        runs = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                runs.append(play(settings, engine, strategy, density, seed, Path(folder) / "run"))
        done[f"{strategy} {density}"] = runs
        lines.append(row(runs))
        print(lines[-1], flush=True)
    where = runs[0]["environment"]
    hardware = f"{where['cores']} cores of {where['cpu']}, no GPU" if not where["gpu"] else where["gpu"]
    head = (
        "| strategy | density | central accuracy % | mean local % | MB down a client a round | MB up | "
        "discovery and masks, MB in all | fewer training bytes | seconds |\n|---|---|---|---|---|---|---|---|---|"
    )
    title = f"{name}: {len(seeds)} seed(s), {hardware}, {date.today()}, torch {where['torch']}, flwr {where['flwr']}"
    (HERE / "results" / f"{name}.md").write_text("\n".join([title, "", head, *lines, ""]))
    record.write_text(json.dumps({"title": title, "settings": settings, "rows": done}, indent=1) + "\n")


if __name__ == "__main__":
    main()
