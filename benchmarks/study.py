"""Play every system on digits and record it: python benchmarks/study.py [--jobs N] [--record-only] [--out DIR]

`ssfl compare configs/digits-study.toml` in scratch/digits-study, which goes on where it stopped; then the tables, the
picture and the numbers are copied to benchmarks/results/digits-study.*, README's short table is written beside them
(digits-study-short.md: density 0.05 and the dense methods), and the paper's order at density 0.05 is looked at: what
does not hold is printed.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DENSITY = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--record-only", action="store_true", help="play nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "scratch" / "digits-study")
    words = parser.parse_args()
    command = [str(Path(sys.executable).parent / "ssfl"), "compare", str(ROOT / "configs" / "digits-study.toml")]
    command += ["--out", str(words.out), "--jobs", str(words.jobs)]
    subprocess.run([*command, *(["--report-only"] if words.record_only else [])], check=True)
    for kind in ("md", "png", "json"):
        shutil.copy(words.out / f"comparison.{kind}", RESULTS / f"digits-study.{kind}")
    full = (RESULTS / "digits-study.md").read_text()
    (RESULTS / "digits-study.md").write_text(full.replace("(comparison.png)", "(digits-study.png)"))
    tables = json.loads((RESULTS / "digits-study.json").read_text())["tables"]
    short = "\n\n".join(f"{partition(table)}:\n\n{short_table(table)}" for table in tables)
    (RESULTS / "digits-study-short.md").write_text(short + "\n")
    for table in tables:
        print(partition(table), "\n".join(check_order(table)) or "the paper's order holds", sep="\n")


def partition(table: dict) -> str:
    return str(table["axes"]["partition.name"]).capitalize()


def short_table(table: dict) -> str:
    rows = [row for row in table["rows"] if row["mask_density"] in (None, DENSITY)]
    rows.sort(key=lambda row: (row["mask_density"] is None, -row["means"]["own"]["mean"]))
    head = "| strategy | density | central % | own tests % | with | p against SSFL | MB | image passes |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *map(short_row, rows)])


def short_row(row: dict) -> str:
    mean = row["means"]
    gap = row["difference"] or {}
    p = ""
    if gap.get("p") is not None:
        p = "<0.01" if gap["p"] < 0.01 else f"{gap['p']:.2f}"
    return " | ".join(
        [
            f"| `{row['strategy']}`",
            f"{mean['density']['mean']:.3g}",
            accuracy(mean["central"]),
            accuracy(mean["own"]),
            "global" if mean["personal"] is None else "personal",
            p,
            f"{(mean['down']['mean'] + mean['up']['mean']) / 1e6:.1f}",
            f"{mean['image_passes']['mean']:,.0f} |",
        ]
    )


def accuracy(found: dict | None) -> str:
    if found is None:  # a method without a global model
        return "-"
    return f"{100 * found['mean']:.1f} ± {100 * found['half_width_95']:.1f}"


def check_order(table: dict) -> list[str]:
    """Return where the numbers at density 0.05 contradict the paper."""
    known = {row["strategy"]: row["means"] for row in table["rows"] if row["mask_density"] in (None, DENSITY)}
    claims = [("ssfl", "random"), ("shuffled", "random"), ("random", "random-local")]
    claims += [("ssfl", other) for other in ("shuffled", "dispfl", "subfedavg", "fedpm", "topk")]
    found = []
    for metric in ("central", "own"):
        for better, worse in claims:
            if known[worse][metric] is None:
                continue
            gap = 100 * (known[worse][metric]["mean"] - known[better][metric]["mean"])
            if gap > 0:
                found.append(f"{metric}: {worse} is {gap:.1f} points above {better}")
    return found


if __name__ == "__main__":
    main()
