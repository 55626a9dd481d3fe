"""Play the drills and record what was lost: benchmarks/results/drills.json and docs/drills.md.

python -m benchmarks.drills [name ...]     about 20 minutes; root for the full disk, a C compiler for the clock
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.drills import faults
from benchmarks.drills.field import KEYS, federation, inline
from benchmarks.drills.refusals import refusals
from benchmarks.drills.undisturbed import undisturbed
from ssfl_app.results.recorder import environment

RESULTS = Path(__file__).parents[1] / "results"
HEAD = "# Drills: what breaks, and what it costs\n\nWritten by `python -m benchmarks.drills`.\n"
PAGE = Path(__file__).parents[2] / "docs" / "drills.md"


def play(names: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {"environment": environment(), "keys": KEYS, "drills": {}, "refusals": []}
    with tempfile.TemporaryDirectory(prefix="drills-") as folder:
        work = Path(folder)
        reference = inline(work / "reference")
        record["reference"] = {key: reference[key] for key in ("model_sha256", "central_accuracy")}
        if not names or "undisturbed" in names:
            record["undisturbed"] = undisturbed(work / "undisturbed", reference)
            print(json.dumps(record["undisturbed"], indent=1), flush=True)
        for drill in faults.RUNS:
            if names and drill.__name__ not in names:
                continue
            began = time.monotonic()
            result = drill(work / drill.__name__, reference)
            record["drills"][drill.__name__] = asdict(result) | {"waited_too_long": result.waited_too_long}
            print(f"{drill.__name__}: {time.monotonic() - began:.0f} s: {result}", flush=True)
        if not names or "refusals" in names:
            with federation(work / "refusals") as place:
                record["refusals"] = [asdict(row) for row in refusals(place, work / "refusals")]
            print(json.dumps(record["refusals"], indent=1))
    return record


def table(record: dict[str, Any]) -> str:
    env, keys = record["environment"], record["keys"]
    head = (
        f"{keys['run.clients']} SuperNodes on one machine, TLS and node authentication, sqlite; ssfl on digits, "
        f"density {keys['mask.density']}, {keys['run.rounds']} rounds, round timeout {keys['run.round-timeout']:g} s "
        f"unless named. {env['cpu']}, {env['cores']} cores, {env['time'][:10]}, flwr {env['flwr']}, "
        f"torch {env['torch']}. Undisturbed: accuracy {100 * record['reference']['central_accuracy']:.1f} %. "
        "`benchmarks/drills`."
    )
    lines = [head, ""]
    if "undisturbed" in record:
        lines += [describe(record["undisturbed"]), ""]
    lines += [
        "| drill | end | lost or refused | longest round s | accuracy % | bits of the undisturbed run |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["drills"].values():
        failed = "; ".join([*row["lost"], *(f"refused: {line}" for line in row["refused"])]) or "nothing"
        late = ", too long" if row["waited_too_long"] else ""
        lines.append(
            f"| {row['what']} | {row['end']} | {failed} | {row['longest']:.0f}{late} | {100 * row['accuracy']:.1f} | "
            f"{'yes' if row['same_bits'] else 'no'} |"
        )
    lines += ["", "| a node with | its exit code | it says | the SuperLink says |", "|---|---|---|---|"]
    for row in record["refusals"]:
        code = "still trying" if row["exit_code"] is None else row["exit_code"]
        lines.append(f"| {row['who']} | {code} | {row['node_says']} | {row['superlink_says']} |")
    return "\n".join(lines) + "\n"


def describe(calm: dict[str, Any]) -> str:
    """Return the sizes of the undisturbed run as a sentence."""
    memory = ", ".join(f"{role} {megabytes:.0f}" for role, megabytes in calm["peak_rss_mb"].items())
    return (
        f"Undisturbed: {calm['seconds_per_round']:.1f} s a round, {calm['payload']:,} payload bytes; "
        f"Flower's own counter (network-traffic) sees {100 * calm['traffic_over_payload']:.2f} % more; the model has "
        f"{'the same bits as' if calm['same_bits'] else 'OTHER bits than'} the in-process engine's. Peak resident "
        f"memory of one process, MB: {memory}."
    )


def main() -> None:
    names = sys.argv[1:]
    record = play(names)
    if names:
        print(table(record))
        return
    (RESULTS / "drills.json").write_text(json.dumps(record, indent=2) + "\n")
    PAGE.write_text(
        f"# Drills: what breaks, and what it costs\n\nWritten by `python -m benchmarks.drills`.\n\n{table(record)}"
    )


if __name__ == "__main__":
    main()
