"""Write the table of goals in docs/performance.md from the records: python benchmarks/performance.py

Every row is a goal, what the record of it says, the machine and the script; a goal whose record is not there is a row
too. The text around the table is written by hand.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.simulation import table as simulation  # noqa: E402
from benchmarks.wan import table as wan  # noqa: E402

RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- goals -->\n", "<!-- end goals -->"
POINTS, DISCOVERY_GB, OVERLAP, SECONDS, MEMORY = 0.3, 2.4, 99.9, 1.0, 3.0
GATHER = 4.0
Row = tuple[str, str, str, str, str]


def read(name: str) -> dict[str, Any]:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else {}


def machine(env: dict[str, Any]) -> str:
    return f"{env['cores']} cores of {env['cpu']}, {env.get('gpu') or 'no GPU'}, {env['time'][:10]}"


def met(yes: bool) -> str:
    return "met" if yes else "**not met**"


def simulated(record: dict[str, Any]) -> Iterator[Row]:
    script = "`python -m benchmarks.simulation.run`"
    if not record:
        yield "simulation on CPU", "not measured", "", "", script
        return
    for part, goal, measured, verdict in simulation.goals(record):
        yield goal, measured, verdict, machine(part["environment"]), script
    if "scale" not in record:
        yield "cost against scale: 10 to 1,000 clients, 0.1 to 25 million parameters", "not measured", "", "", script


def wired(record: dict[str, Any]) -> Iterator[Row]:
    script, where = "`python -m benchmarks.wire.run`", record.get("environment", {})
    if "cifar10" not in record.get("values", {}):
        yield f"fp16 and int8 within {POINTS} points of fp32, cifar10", "not measured", "", "", script
    for task, found in record.get("values", {}).items():
        for kind in ("fp16", "int8"):
            pairs = [
                (runs["accuracy"], found["fp32"][seed]["accuracy"]) for seed, runs in found.get(kind, {}).items()
            ]
            if pairs:
                off = statistics.mean(one - other for one, other in pairs)
                goal = f"{kind} both ways within {POINTS} points of fp32, {task}, {len(pairs)} seeds"
                yield goal, f"{off:+.2f} points", met(abs(off) <= POINTS), machine(where["values"]), script
    found = record.get("discovery", {})
    for kind in ("bf16", "log8") if found else ():
        row = found["types"][kind]
        total = (row["down"] + row["up"] + found["clients"] * row["bitmaps"]["0.5"]["zlib"]) / 1e9
        overlap = 100 * row["overlap"]["0.5"]
        goal = f"discovery with {kind} scores, {found['model']}, {found['clients']} clients, density 0.5: at most "
        goal += f"{DISCOVERY_GB} GB, at least {OVERLAP} % of fp32's mask"
        yes = total <= DISCOVERY_GB and overlap >= OVERLAP
        yield goal, f"{total:.2f} GB, {overlap:.3f} %", met(yes), machine(where["discovery"]), script
    for name, row in record.get("select", {}).items():
        size, density = name.split()
        if int(size) == 10**8:
            goal = f"top-k of 1e8 scores, density {density}: at most {SECONDS:g} s and {MEMORY:g} x their memory"
            yes = row["seconds"] <= SECONDS and row["memory"] <= MEMORY
            yield goal, f"{row['seconds']:.2f} s, {row['memory']:.2f} x", met(yes), machine(where["select"]), script


def deployed(record: dict[str, Any]) -> Iterator[Row]:
    script, goal = "`python -m benchmarks.deployment`", "a round on three SuperNodes, digits, TLS and keys"
    if "warm" not in record:
        yield goal, "not measured", "", "", script
        return
    row, most = record["warm"], record["goal"]
    plain = record.get("plain", {}).get("seconds", {})
    for kind, seconds in row["seconds"].items():
        told = f"{seconds:.1f} s" + (f" ({plain[kind]:.1f} s with plain SuperNodes)" if plain else "")
        what = f"{goal}, {kind}: at most {most:g} s, the bits of one process"
        yield what, told, met(seconds <= most and row["same_bits"]), machine(row["environment"]), script


def wide(record: dict[str, Any]) -> Iterator[Row]:
    script, goal = (
        "`sudo python -m benchmarks.wan.run`",
        f"gather of {wan.SPEED_MODEL}, density 0.1, five regions: at least {GATHER:g} x faster than dense",
    )
    found = [pair for pair in (wan.pairs(record) if record else []) if pair[0]["model"] == wan.SPEED_MODEL]
    if not found:
        yield goal, "not measured", "", "", script
    for dense, sparse in found:
        times = wan.gather(dense), wan.gather(sparse)
        told = f"{times[0] / times[1]:.2f} x ({times[0]:.2f} s and {times[1]:.2f} s)"
        yield (
            goal.replace(wan.SPEED_MODEL, wan.title(dense)),
            told,
            met(times[0] >= GATHER * times[1]),
            machine(sparse["environment"]),
            script,
        )


def on_gpu() -> Iterator[Row]:
    goal = "the paper's CIFAR-10 recipe, 999 rounds, on one H200: at most 15 minutes, by a round's measured time"
    script, records = "`benchmarks/gpu_window.py`", sorted((HERE / "results").glob("gpu-*.jsonl"))
    if not records:
        yield goal, "not measured", "no GPU was at hand", "", script
    for path in records:
        rows = {row["part"]: row for row in map(json.loads, path.read_text().splitlines()) if "ended" not in row}
        if "rounds" in rows:
            minutes = 999 * rows["rounds"]["images_per_round"] / rows["rounds"]["images_per_second"] / 60
            yield goal, f"{minutes:.1f} minutes", met(minutes <= 15), machine(rows["machine"]), script


def main() -> None:
    rows = [*simulated(read("simulation.json")), *wired(read("wire.json"))]
    rows += [*deployed(read("deployment.json")), *wide(read("wan.json")), *on_gpu()]
    lines = ["| goal | measured | | where and when | script |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
