"""Memory and time of the folds that see all replies at once: python benchmarks/robust_memory.py

Each fold in a fresh process, over replies that wait in a file: how much the peak of resident memory rises while they
are folded, beside the result. The bound of `Rows` is 24 MiB however many replies there are; a fold over replies in
memory takes their number times 4 bytes a coordinate.
"""

import json
import multiprocessing
import platform
import resource
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from ssfl_app.core.robust import FOLDS, Rows, folded

SIZE = 1_000_000
CLIENTS = (10, 40)
BOUND = 24 * 2**20


def peak() -> int:
    """Return the peak of resident memory of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def case(fold: str, clients: int, out: Any) -> None:
    """Fold once, and tell what it took."""
    rows, rng = Rows(SIZE), np.random.default_rng(1)
    for client in range(clients):
        rows.add(client, rng.standard_normal(SIZE, dtype=np.float32))
    before, began = peak(), time.monotonic()
    result = folded(rows, fold, 0.2)
    seconds = time.monotonic() - began
    out.put({"bytes": max(0, peak() - before - result.nbytes), "seconds": round(seconds, 2)})


def main() -> int:
    """Measure all, print a table and write the record."""
    spawn, table = multiprocessing.get_context("spawn"), []
    for fold in FOLDS[1:]:
        for clients in CLIENTS:
            out = spawn.Queue()
            process = spawn.Process(target=case, args=(fold, clients, out))
            process.start()
            found = {"fold": fold, "clients": clients, "coordinates": SIZE, **out.get()}
            process.join()
            table.append(found)
            print(f"{fold:13} {clients:4} replies: {found['bytes'] / 2**20:6.1f} MiB, {found['seconds']:7.2f} s")
    good = all(row["bytes"] <= BOUND for row in table)
    record = {
        "date": date.today().isoformat(),
        "machine": platform.platform(),
        "bound_bytes": BOUND,
        "within_bound": good,
        "folds": table,
    }
    path = Path(__file__).parent / "results" / "robust_memory.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"within {BOUND / 2**20:.0f} MiB: {'yes' if good else 'NO'}; {path}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
