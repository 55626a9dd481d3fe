"""Time what `make demo` runs, seeds 1 to 3, in process: python benchmarks/demo.py

Goals: each run under 60 s of wall time on 2 cores, mean central accuracy at least 95 %.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent


def run(seed: int) -> dict:
    with tempfile.TemporaryDirectory() as work:
        folder, began = Path(work) / "run", time.monotonic()
        words = ["run", "-c", f"run.seed={seed}", "--out", str(folder)]
        subprocess.run([str(Path(sys.executable).parent / "ssfl"), *words], check=True, stdout=subprocess.DEVNULL)
        wall = time.monotonic() - began
        summary, environment = (json.loads((folder / f"{n}.json").read_text()) for n in ("summary", "environment"))
    return {"wall_seconds": wall, "summary": summary, "environment": environment}


def main() -> None:
    runs = [run(seed) for seed in (1, 2, 3)]
    record = {"date": str(date.today()), "runs": runs}
    (HERE / "results" / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    walls = [r["wall_seconds"] for r in runs]
    mean = statistics.mean(r["summary"]["central_accuracy"] for r in runs)
    print("wall seconds:", *(f"{wall:.1f}" for wall in walls), f"mean accuracy: {100 * mean:.2f} %")
    assert max(walls) < 60, walls
    assert mean >= 0.95, mean


if __name__ == "__main__":
    main()
