"""Write the table of docs/scale.md: what a round would cost with many real nodes: python benchmarks/scale.py

Constants are those of the records: `idle_cpu_seconds_a_second`, `cpu_seconds_a_round` and `rounds` of
results/deployment.json (python -m benchmarks.deployment), and part "many" of results/simulation.json. Nothing is
measured here, and what is written are products of these constants and the number of nodes.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.simulation.table import table  # noqa: E402

RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "scale.md"
BEGIN, END = "<!-- table -->\n", "<!-- end table -->"
NODES = (3, 1_000, 10_000, 100_000, 1_000_000)
COHORT, PARAMETERS, DENSITY = 100, 11_000_000, 0.1
FAN_IN = 100
SUM_BYTES = 12  # of a coordinate in ssfl_app.core.means: 96 bits; the weights of all are one number
SHARED = "SuperLink", "front"
"""Programs of which there is one for all nodes."""


def constants() -> dict[str, float]:
    """Return what one node, one message and one client cost, by the records."""
    row = json.loads((RESULTS / "deployment.json").read_text())
    warm, nodes = row["warm"], row["nodes"]
    idle = sum(warm["idle_cpu_seconds_a_second"][name] for name in SHARED) / nodes
    rounds = row["keys"]["run__rounds"]
    messages = nodes * (rounds + rounds // row["keys"]["run__evaluate_every"]) / rounds
    many = json.loads((RESULTS / "simulation.json").read_text())["many"]["cases"]
    own = [case for case in many if (case["engine"], case["strategy"]) == ("inline", "ssfl")]
    few, most = (choose(own, key=lambda case: case["clients"]) for choose in (min, max))
    more = most["clients"] - few["clients"]
    return {
        "idle": idle,
        "message": sum(warm["cpu_seconds_a_round"][name] for name in SHARED) / messages,
        "server": warm["cpu_seconds_a_round"]["ServerApp"] / messages,
        "memory_kb": (most["peak_bytes"] - few["peak_bytes"]) / more / 1e3,
        "record_kb": (most["record_bytes"] - few["record_bytes"]) / more / 1e3,
    }


def rows(found: dict[str, float]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each number of nodes."""
    alive = DENSITY * PARAMETERS
    for nodes in NODES:
        cohort = min(COHORT, nodes)
        levels = max(1, math.ceil(math.log(nodes, FAN_IN)))
        yield (
            f"{nodes:,}",
            f"{nodes * found['idle']:,.2f}",
            f"{duration(nodes * (found['message'] + found['server']))}",
            f"{duration(cohort * (found['message'] + found['server']))}",
            f"{size(4 * PARAMETERS * nodes)}",
            f"{size(2 * PARAMETERS * nodes)}",
            f"{size(4 * alive * cohort)}",
            f"{size(1e3 * found['memory_kb'] * nodes)}",
            f"{levels}",
            f"{size(SUM_BYTES * alive * min(FAN_IN, nodes))}",
        )


def size(count: float) -> str:
    """Return bytes in a unit that leaves few digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Return seconds in a unit that leaves few digits."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


HEAD = (
    "nodes",
    "cores for their polls",
    "CPU to ask all once",
    "CPU of a round",
    "fp32 scores of all",
    "bf16 scores of all",
    "values of a round, up",
    "server memory more",
    "levels of a tree",
    "sums at its root",
)


def main() -> None:
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    found = constants()
    said = (
        f"{1e3 * found['idle']:.1f} ms of CPU a second for an idle node (SuperLink, front), "
        f"{1e3 * found['message']:.0f} ms there and {1e3 * found['server']:.0f} ms in the ServerApp for a message, "
        f"with its answer; {found['memory_kb']:.1f} kB of memory and {found['record_kb']:.2f} kB on disk a client."
    )
    lines = [f"Constants: {said}", "", *table(HEAD, rows(found)), ""]
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after)


if __name__ == "__main__":
    main()
