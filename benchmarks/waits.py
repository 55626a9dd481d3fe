"""What `ssfl run` makes its user wait for beside the rounds, on both engines: python benchmarks/waits.py

Plays the default run; measures wall time, when its first and last lines came, how long the prompt took after the last
one, and the most memory that the command itself held (on Ray it only waits; in process it also trains). Goals, on 2
quiet cores: on Ray 18 s in all, the prompt within 2 s of the last line, and 150 MB for the launcher.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
ENGINES = ("ray", "inline")
GOALS = {"wall_seconds": 18.0, "seconds_after_last_line": 2.0, "command_mb": 150.0}


class Memory(threading.Thread):
    """Follows the resident memory of one process, without its children."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.most = psutil.Process(pid), 0

    def run(self) -> None:
        try:
            while True:
                self.most = max(self.most, self.process.memory_info().rss)
                time.sleep(0.02)
        except psutil.Error:  # it has ended
            return


def play(engine: str, keys: str) -> dict:
    """Play a run; return its waits and what it recorded."""
    with tempfile.TemporaryDirectory() as work:
        folder, began = Path(work) / "run", time.monotonic()
        command = [str(Path(sys.executable).parent / "ssfl"), "run", "--engine", engine, "-c", keys, "--out", folder]
        lines: list[float] = []
        greeted = began
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            memory = Memory(process.pid)
            memory.start()
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(time.monotonic())
                if " clients on " in line:  # all have joined
                    greeted = lines[-1]
        ended = time.monotonic()
        assert process.returncode == 0
        summary, environment = (json.loads((folder / f"{n}.json").read_text()) for n in ("summary", "environment"))
    return {
        "engine": engine,
        "wall_seconds": ended - began,
        "seconds_to_first_line": lines[0] - began,
        "seconds_to_greeting": greeted - began,
        "seconds_after_last_line": ended - lines[-1],
        "seconds_rounds": summary["seconds_rounds"],
        "command_mb": memory.most / 1e6,
        "model_sha256": summary["model_sha256"],
        "environment": environment,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=3, help="runs of each engine")
    parser.add_argument("-c", "--config", default="", help='keys of the run, "run.rounds=2", say')
    parser.add_argument("--out", type=Path, default=HERE / "results" / "waits.json")
    words = parser.parse_args()
    load = os.getloadavg()[0]
    runs = [play(engine, words.config) for _ in range(words.turns) for engine in ENGINES]
    kinds = [kind for kind in runs[0] if kind.endswith("_mb") or "seconds" in kind]
    medians = {
        engine: {kind: statistics.median(run[kind] for run in runs if run["engine"] == engine) for kind in kinds}
        for engine in ENGINES
    }
    for engine, row in medians.items():
        print(f"{engine}:", ", ".join(f"{kind} {value:.1f}" for kind, value in row.items()))
    missed = {kind: goal for kind, goal in GOALS.items() if medians["ray"][kind] > goal}
    print(f"goals missed on Ray: {missed}" if missed else "all goals met on Ray")
    record = {"date": str(date.today()), "load": load, "keys": words.config, "goals": GOALS, "medians": medians}
    record["same_bits"] = len({run["model_sha256"] for run in runs}) == 1
    words.out.write_text(json.dumps(record | {"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
