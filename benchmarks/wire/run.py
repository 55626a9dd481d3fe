"""Value types, discovery, selection and a peer: .venv/bin/python -m benchmarks.wire.run [part...] [--data FOLDER]

Parts: values (accuracy and bytes of the value types), discovery (bytes and overlap of the score types), select
(seconds and memory of the server's top-k), nncodec (a standard codec for networks on the same models). The data are
CIFAR-10 as parquet files, or as SSFL_CIFAR10 names them; without them values plays digits only, and discovery
nothing. Measured parts are kept in benchmarks/results/wire.json, and wire.md is made from that file.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.wire import discovery, nncodec, select, values
from ssfl_app.results.recorder import environment

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("select", "discovery", "values", "nncodec")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", choices=[*PARTS, []], help=", ".join(PARTS))
    parser.add_argument("--data", default=os.environ.get("SSFL_CIFAR10", ""), help="CIFAR-10 as parquet files")
    parser.add_argument("--model", default="resnet18", help="of the discovery")
    parser.add_argument("--clients", type=int, default=100, help="of the discovery")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of wire.json and wire.md")
    args = parser.parse_args()
    where = args.out / "wire.json"
    record: dict[str, Any] = json.loads(where.read_text()) if where.exists() else {}

    def save() -> None:
        where.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        (args.out / "wire.md").write_text(page(record))

    for part in args.parts or PARTS:
        record.setdefault("environment", {})[part] = environment()
        if part == "select":
            record[part] = select.measure()
        elif part == "discovery" and args.data:
            record[part] = discovery.measure(args.data, args.model, args.clients)
        elif part == "values":
            for task in values.TASKS if args.data else ["digits"]:
                values.measure(task, args.data, record.setdefault(part, {}).setdefault(task, {}), save)
        elif part == "nncodec":
            record[part] = nncodec.measure()
        save()


def page(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    lines: list[str] = []
    for part, where in record["environment"].items():
        versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "numpy", "flwr"))
        lines.append(f"{part}: {where['cores']} cores of {where['cpu']}, no GPU, {where['time'][:10]}, {versions}.  ")
    for task, found in record.get("values", {}).items():
        lines += ["", f"## Value types, {task}", "", *values.table(task, found)]
    for part, title, table in (
        ("discovery", "Discovery", discovery.table),
        ("select", "Top-k on the server", select.table),
        ("nncodec", "NNCodec", nncodec.table),
    ):
        if part in record:
            lines += ["", f"## {title}", "", *table(record[part])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
