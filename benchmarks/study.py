"""Play a sweep on digits and record it: python -m benchmarks.study [study|ablations] [--minutes M] [--commit]

`ssfl compare` with configs/digits-study.toml, every system, or configs/digits-ablations.toml, what SSFL's mask
depends on, in scratch/digits-study as far as the time goes; the same command goes on where that stopped, on another
machine too: every quarter of an hour what is read of finished runs is packed into
benchmarks/results/digits-study-runs.tar.xz, and unpacked where a run folder is missing. When no run of the short
table waits (or with --record-only) the tables, the picture and the numbers are copied to
benchmarks/results/digits-study.*, and the short table of docs/results.md (density 0.05 and the dense methods, common
settings) and README's are written beside them, digits-study-short.md and -brief.md; half of it would replace a whole
one, and the other tables say what waits. With --commit these files are committed. At the end of the study the
paper's order at density 0.05 is looked at: what does not hold is printed.
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from ssfl_app.files import write_bytes
from ssfl_app.results.status import read_status

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SWEEPS = "study", "ablations"
DENSITY = 0.05
OWN = "own settings"
BRIEF = ("fedavg", "narrow-0.05", "ssfl", "shuffled", "flash", "prunefl", "dispfl", "topk", "sparsyfed", "random")
BRIEF += ("random-local",)
SLICE = 15 * 60  # seconds from one record to the next
NONE = "\N{EN DASH}"
READ = ("config.toml", "rounds.jsonl", "summary.json", "status.json", "environment.json", "clients.json")
READ += ("mask.safetensors",)
"""The files of a run folder that tables are made of."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", nargs="?", choices=SWEEPS, default=SWEEPS[0])
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="time for all; default: until all is played"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--record-only", action="store_true", help="play nothing")
    parser.add_argument("--commit", action="store_true", help="commit each record")
    parser.add_argument("--out", type=Path, help="default: scratch/digits-study")
    words = parser.parse_args()
    end, stem = time.monotonic() + 60 * words.minutes, f"digits-{words.sweep}"
    out, archive = words.out or ROOT / "scratch" / stem, RESULTS / f"{stem}-runs.tar.xz"
    unpack(archive, out / "runs")
    while True:
        left = min(SLICE, end - time.monotonic())
        part = ["--report-only"] if words.record_only else ["--budget", f"{max(1.0, left):.0f}s"]
        command = [sys.executable, "-m", "ssfl_app", "compare", str(ROOT / "configs" / f"{stem}.toml")]
        done = subprocess.run([*command, "--out", str(out), "--jobs", str(words.jobs), *part], cwd=ROOT)
        if done.returncode not in (0, 1):  # 1: a run failed, which the table says
            sys.exit(done.returncode)
        pack(out / "runs", archive)
        tables: list[dict[str, Any]] = json.loads((out / "comparison.json").read_text("utf-8"))["tables"]
        if words.record_only or short_is_whole(tables):
            record(out, stem)
        if words.commit:
            commit(stem)
        if words.record_only or not waits(tables) or end - time.monotonic() < 1:
            break
    for table in tables if words.sweep == "study" else ():
        print(title(table), "\n".join(check_order(table)) or "the paper's order holds", sep="\n")


def pack(runs: Path, archive: Path) -> None:
    """Write what tables are made of, of all finished runs; the same runs make the same bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as file:
        for home in sorted(runs.iterdir()):
            if read_status(home).get("status") != "finished":
                continue
            for path in (home / name for name in READ if (home / name).is_file()):
                member = tarfile.TarInfo(f"{home.name}/{path.name}")
                member.size = path.stat().st_size
                file.addfile(member, io.BytesIO(path.read_bytes()))
    write_bytes(archive, packed.getvalue())


def unpack(archive: Path, runs: Path) -> None:
    """Make folders of the runs that the archive has and `runs` lacks."""
    if archive.is_file():
        there = {home.name for home in runs.glob("*")}
        with tarfile.open(archive) as file:
            members = [member for member in file if Path(member.name).parts[0] not in there]
            file.extractall(runs, members, filter="data")


def record(out: Path, stem: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """Copy what a comparison in `out` wrote, write the short tables of the study, and return all tables."""
    for kind in ("md", "png", "json"):
        shutil.copy(out / f"comparison.{kind}", results / f"{stem}.{kind}")
    full = (results / f"{stem}.md").read_text("utf-8")
    (results / f"{stem}.md").write_text(full.replace("(comparison.png)", f"({stem}.png)"), "utf-8")
    tables: list[dict[str, Any]] = json.loads((results / f"{stem}.json").read_text("utf-8"))["tables"]
    if stem == "digits-study":
        pairs = [(table, own_table(table, tables)) for table in tables if table["terms"] != OWN]
        short = "\n\n".join(f"{partition(table)}:\n\n{short_table(table, own)}" for table, own in pairs)
        (results / "digits-study-short.md").write_text(short + "\n", "utf-8")
        (results / "digits-study-brief.md").write_text(brief_table(pairs[0][0]) + "\n", "utf-8")
    return tables


def commit(stem: str) -> None:
    """Commit the files of the record, if they are others than those that are committed."""
    files = [str(path) for path in sorted(RESULTS.glob(f"{stem}*"))]
    subprocess.run(["git", "add", "--", *files], cwd=ROOT, check=True)
    if subprocess.run(["git", "diff", "--cached", "--quiet", "--", *files], cwd=ROOT).returncode:
        message = f"{stem}, as far as it is played"
        subprocess.run(["git", "commit", "--quiet", "-m", message, "--", *files], cwd=ROOT, check=True)


def short_is_whole(tables: list[dict[str, Any]]) -> bool:
    """Return whether nothing waits of what the short table has at the common settings."""
    common = [table for table in tables if table["terms"] != OWN]
    return not waits([{"rows": [row for row in table["rows"] if in_short(row)]} for table in common])


def waits(tables: list[dict[str, Any]]) -> bool:
    """Return whether there are runs that are neither finished nor failed."""
    reasons = [why for table in tables for row in table["rows"] for why in row["missing"].values()]
    return any(not why.startswith("failed") for why in reasons)


def own_table(table: dict[str, Any], tables: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the rows of the table with own settings that belongs to one with common settings, by name."""
    found = [other for other in tables if other["terms"] == OWN and other["axes"] == table["axes"]]
    return {row["row"]: row for other in found for row in shown_rows(other)}


def shown_rows(table: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows at density 0.05 and at none that have a run."""
    return [row for row in table["rows"] if in_short(row) and row["seeds"]]


def in_short(row: dict[str, Any]) -> bool:
    """Return whether a row is one at density 0.05, or of a dense method."""
    return row["mask_density"] in (None, DENSITY)


def partition(table: dict[str, Any]) -> str:
    return str(table["axes"]["partition.name"]).capitalize()


def title(table: dict[str, Any]) -> str:
    return ", ".join(filter(None, [partition(table), table["terms"]]))


def short_table(table: dict[str, Any], own: dict[str, dict[str, Any]]) -> str:
    rows = sorted(shown_rows(table), key=lambda row: (row["mask_density"] is None, -(value(row, "own") or 0)))
    head = (
        *("row", "density", "central %", "own tests %", "with", "p (Holm) against SSFL"),
        *("own settings: own tests %", "p (Holm)", "settings", "MB", "image passes"),
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(short_row(row, own.get(row['row'])))} |" for row in rows)])


def brief_table(table: dict[str, Any]) -> str:
    """Return the table of README.md: `BRIEF`, in its order, at the common settings."""
    rows = {row["row"]: row for row in shown_rows(table)}
    lines = ["| strategy | density | central accuracy % | on own tests % | p (Holm) against SSFL | MB in all |"]
    lines.append("|---" * 6 + "|")
    for row in (rows[name] for name in BRIEF if name in rows):
        name, density, central, own, _, p, *_, megabytes, _ = short_row(row, None)
        lines.append(f"| {' | '.join((name, density, central, own, p, megabytes))} |")
    return "\n".join(lines)


def short_row(row: dict[str, Any], own: dict[str, Any] | None) -> list[str]:
    count = "" if not row["missing"] else f" ({len(row['seeds'])} of {len(row['seeds']) + len(row['missing'])} seeds)"
    best = [NONE, NONE, NONE]
    if own is not None:
        best = [accuracy(own, "own"), probability(own), ", ".join(f"{k} {v}" for k, v in own["settings"].items())]
    return [
        f"`{row['row']}`{count}",
        f"{value(row, 'density') or 0:.3g}",
        accuracy(row, "central"),
        accuracy(row, "own"),
        "global" if value(row, "personal") is None else "personal",
        probability(row),
        *best,
        f"{((value(row, 'down') or 0) + (value(row, 'up') or 0)) / 1e6:.1f}",
        f"{value(row, 'image_passes') or 0:,.0f}",
    ]


def value(row: dict[str, Any], key: str) -> float | None:
    return None if row["means"].get(key) is None else float(row["means"][key]["mean"])


def accuracy(row: dict[str, Any], key: str) -> str:
    found = row["means"].get(key)
    if found is None:
        return NONE
    half = found["half_width_95"]
    return f"{100 * found['mean']:.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def probability(row: dict[str, Any]) -> str:
    p = (row["difference"] or {}).get("p_holm")
    return NONE if p is None else "<0.01" if p < 0.01 else f"{p:.2f}"


def check_order(table: dict[str, Any]) -> list[str]:
    """Return where the numbers at density 0.05 contradict the paper."""
    known = {row["row"]: row for row in shown_rows(table)}
    claims = [("ssfl", "random"), ("shuffled", "random"), ("random", "random-local")]
    claims += [("ssfl", other) for other in ("shuffled", "dispfl", "subfedavg", "fedpm", "topk")]
    found = []
    for metric in ("central", "own"):
        for better, worse in claims:
            high, low = (value(known[name], metric) if name in known else None for name in (better, worse))
            if high is not None and low is not None and low > high:
                found.append(f"{metric}: {worse} is {100 * (low - high):.1f} points above {better}")
    return found


if __name__ == "__main__":
    main()
