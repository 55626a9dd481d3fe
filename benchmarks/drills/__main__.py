"""Play the drills and record what was lost: benchmarks/results/drills.json and docs/drills.md.

python -m benchmarks.drills [name ...]     about 20 minutes; root for the full disk, a C compiler for the clock
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.drills import faults, secure
from benchmarks.drills.field import KEYS, federation, inline
from benchmarks.drills.refusals import refusals
from benchmarks.drills.undisturbed import undisturbed
from ssfl_app.results.recorder import environment

RESULTS = Path(__file__).parents[1] / "results"
HEAD = "# Drills: what breaks, and what it costs\n\nWritten by `python -m benchmarks.drills`.\n"
PAGE = Path(__file__).parents[2] / "docs" / "drills.md"


def play(names: list[str], record: dict[str, Any]) -> Iterator[str]:
    """Play the drills of these names, all if there are none; note each in the record and yield what came of it."""
    record |= {"keys": KEYS, "environment": environment()}
    day = {"day": record["environment"]["time"][:10]}
    with tempfile.TemporaryDirectory(prefix="drills-") as folder:
        work = Path(folder)
        for play_secure in (secure.killed_in_each_exchange, secure.seconds_a_round):
            name = play_secure.__name__
            if not names or name in names:
                env = {"environment": environment()}
                record.setdefault("secure_aggregation", {})[name] = play_secure(work / name) | day | env
                yield f"{name}: {record['secure_aggregation'][name]}"
        if names and not set(names) - {"killed_in_each_exchange", "seconds_a_round"}:
            return
        reference = inline(work / "reference")
        record["reference"] = {key: reference[key] for key in ("model_sha256", "central_accuracy")}
        if not names or "undisturbed" in names:
            record["undisturbed"] = undisturbed(work / "undisturbed", reference) | day
            yield f"undisturbed: {record['undisturbed']}"
        for drill in faults.RUNS:
            name = drill.__name__
            if not names or name in names:
                result = drill(work / name, reference)
                played = asdict(result) | {"waited_too_long": result.waited_too_long} | day
                record.setdefault("drills", {})[name] = played
                yield f"{name}: {result}"
        if not names or "refusals" in names:
            with federation(work / "refusals") as place:
                record["refusals"] = [asdict(row) for row in refusals(place, work / "refusals")]
            yield f"refusals: {record['refusals']}"


def table(record: dict[str, Any]) -> str:
    env, keys = record["environment"], record["keys"]
    head = (
        f"{keys['run.clients']} SuperNodes on one machine, TLS and node authentication, sqlite; ssfl on digits, "
        f"density {keys['mask.density']}, {keys['run.rounds']} rounds, round timeout {keys['run.round-timeout']:g} s "
        f"unless named. {env['cpu']}, {env['cores']} cores, flwr {env['flwr']}, "
        f"torch {env['torch']}. Undisturbed: accuracy {100 * record['reference']['central_accuracy']:.1f} %. "
        "`benchmarks/drills`."
    )
    lines = [head, ""]
    if "undisturbed" in record:
        lines += [describe(record["undisturbed"]), ""]
    lines += [
        "| drill | end | lost or refused | longest round s | accuracy % | bits of the undisturbed run | day |",
        "|---|---|---|---|---|---|---|",
    ]
    played = record.get("drills", {})
    for row in [played[drill.__name__] for drill in faults.RUNS if drill.__name__ in played]:
        failed = "; ".join([*row["lost"], *(f"refused: {line}" for line in row["refused"])]) or "nothing"
        longest = f"{row['longest']:.0f}" + (", too long" if row["waited_too_long"] else "")
        accuracy = "-" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}"
        bits = "yes" if row["same_bits"] else "no"
        lines.append(f"| {row['what']} | {row['end']} | {failed} | {longest} | {accuracy} | {bits} | {row['day']} |")
    lines += ["", "| a node with | its exit code | it says | the SuperLink says |", "|---|---|---|---|"]
    for row in record.get("refusals", []):
        code = "still trying" if row["exit_code"] is None else row["exit_code"]
        says = " | ".join(row[by].replace("[", "\\[") for by in ("node_says", "superlink_says"))  # no links
        lines.append(f"| {row['who']} | {code} | {says} |")
    return "\n".join([*lines, *masked(record.get("secure_aggregation", {}))]) + "\n"


def masked(played: dict[str, Any]) -> list[str]:
    """Return what the page says of secure aggregation."""
    lines: list[str] = []
    if row := played.get("killed_in_each_exchange"):
        failed = "; ".join([*row["lost"], *(f"refused: {line}" for line in row["refused"])]) or "nothing"
        gone, bits = "; ".join(row["not_unmasking"]) or "nobody", "yes" if row["same_bits"] else "no"
        about = (
            f"## Secure aggregation\n\n{secure.SUPERNODES} SuperNodes, `privacy.secure-aggregation`, "
            f"{secure.RUN['run.rounds']} rounds, round timeout {row['timeout']:g} s. The bits are compared with "
            "those of a run in one process, in the clear (`wire.up-values` and `ssfl.score-values` are `fixed32`), "
            "that loses the same replies of training."
        )
        names = "drill | end | rounds | lost or refused | did not unmask | longest round s | accuracy % | bits"
        lines += ["", about, "", f"| {names} | day |", "|---|---|---|---|---|---|---|---|---|"]
        cells = row["what"], row["end"], row["rounds"], failed, gone, f"{row['longest']:.0f}"
        accuracy = "-" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}"
        lines.append("| " + " | ".join(map(str, (*cells, accuracy, bits, row["day"]))) + " |")
        lines += ["", row["note"]] if "note" in row else []
    if row := played.get("seconds_a_round"):
        clear, under = (row["median"][kind] for kind in ("clear", "masked"))
        loads = f"{min(row['load']):.1f} to {max(row['load']):.1f}"
        told = (
            f"A round takes {clear:.1f} s in the clear and {under:.1f} s under secure aggregation: medians of "
            f"{len(row['rounds']['clear'])} rounds each, {row['day']}, in turns; load of the machine {loads}."
        )
        lines += ["", told]
    return lines


def describe(calm: dict[str, Any]) -> str:
    """Return the sizes of the undisturbed run as a sentence."""
    memory = ", ".join(f"{role} {megabytes:.0f}" for role, megabytes in calm["peak_rss_mb"].items())
    return (
        f"Undisturbed, {calm['day']}: {calm['seconds_per_round']:.1f} s a round, {calm['payload']:,} payload bytes; "
        f"Flower's own counter (network-traffic) sees {100 * calm['traffic_over_payload']:.2f} % more; the model has "
        f"{'the same bits as' if calm['same_bits'] else 'OTHER bits than'} the in-process engine's. Peak resident "
        f"memory of one process, MB: {memory}."
    )


def main() -> None:
    names, path = sys.argv[1:], RESULTS / "drills.json"
    record = json.loads(path.read_text()) if names and path.exists() else {}
    for told in play(names, record):
        print(told, flush=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
    PAGE.write_text(f"{HEAD}\n{table(record)}")


if __name__ == "__main__":
    main()
