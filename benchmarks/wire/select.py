"""Seconds and memory of the server's selection of the largest of many scores.

Run in a process of its own, so that its peak memory is that of the selection alone.
"""

import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np

from ssfl_app.sparsity.mask import largest

SIZES = (10**6, 10**7, 10**8)
REPEATS = 3


def child(size: int, density: float) -> dict[str, float]:
    """Return the seconds of the fastest of a few selections, and the peak memory over that of the scores."""
    rng, scores = np.random.default_rng(1), np.empty(size, dtype=np.float32)
    for start in range(0, size, 10**6):  # float64 of all of them at once would be the peak
        scores[start : start + 10**6] = rng.lognormal(-12, 3, min(10**6, size - start))
    largest(scores[:1000], 10)  # whatever NumPy loads on first use
    before, seconds = _peak(), []
    for _ in range(REPEATS):
        began = time.perf_counter()
        alive = largest(scores, int(density * size))
        seconds.append(time.perf_counter() - began)
        assert np.count_nonzero(alive) == int(density * size)
        del alive
    return {"seconds": min(seconds), "memory": 1 + (_peak() - before) / scores.nbytes}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure() -> dict[str, Any]:
    """Return seconds and memory (in multiples of the scores, themselves included) by size and density."""
    found: dict[str, Any] = {}
    for size in SIZES:
        for density in (0.5, 0.05):
            words = [sys.executable, "-m", "benchmarks.wire.select", str(size), str(density)]
            found[f"{size} {density}"] = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
            print(size, density, found[f"{size} {density}"], flush=True)
    return found


def table(found: dict[str, Any]) -> list[str]:
    """Return Markdown."""
    lines = ["| scores | density | seconds | memory, scores = 1 |", "| --- | --- | --- | --- |"]
    for name, row in found.items():
        size, density = name.split()
        lines.append(f"| {int(size):,} | {density} | {row['seconds']:.3f} | {row['memory']:.2f} |")
    return lines


if __name__ == "__main__":
    print(json.dumps(child(int(sys.argv[1]), float(sys.argv[2]))))
