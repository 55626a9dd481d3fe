"""`ssfl run` as a user starts it, with its rounds seen from outside."""

import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.wan.measure import Watch, round_ends

SSFL = str(Path(sys.executable).parent / "ssfl")

ENGINES = ("ray", "inline")
"""Both play clients on all cores."""


def play(keys: str, engine: str, work: Path) -> dict[str, Any]:
    """Run a configuration on one of `ENGINES` in a new folder below `work`; return when rounds ended, and the record.

    "seconds" is what the app notes for a round in rounds.jsonl. "ends" is when that line was there, in seconds after
    the command was started: from one to the next is the whole of a round, with what the app does between rounds
    (recording, checkpoints), and "typical" is the median of that. "noted" is the median of "seconds".
    """
    folder = Path(tempfile.mkdtemp(dir=work)) / "run"
    lines = folder / "rounds.jsonl"
    said = folder.with_suffix(".log")
    command = [SSFL, "run", "--engine", engine, "-c", keys, "--out", str(folder)]
    with said.open("w") as output, Watch({lines: None}) as watch:
        began = time.monotonic()
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
        wall = time.monotonic() - began
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{said.read_text()[-3000:]}")
    ends = [end - began for end in round_ends(watch.lines)]
    found = read(folder)
    return found | {
        "keys": keys,
        "engine": engine,
        "plan": next((line for line in said.read_text().splitlines() if line.startswith("engine ")), ""),
        "command_seconds": wall,
        "ends": ends,
        "typical": typical(ends),
        "noted": recorded(found),
    }


def read(folder: Path) -> dict[str, Any]:
    """Return what a run recorded, by round, setup (0) first."""
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    if any(r["lost"] or r["refused"] for r in rounds):
        raise RuntimeError(f"not all clients answered in {folder}")
    return {
        "seconds": [r["seconds"] for r in rounds],
        "bytes_down": [r.get("bytes_train_down", 0) for r in rounds],
        "bytes_up": [r.get("bytes_train_up", 0) for r in rounds],
        "losses": [r.get("train_loss") for r in rounds],
        "summary": json.loads((folder / "summary.json").read_text()),
        "environment": json.loads((folder / "environment.json").read_text()),
    }


def typical(ends: list[float]) -> float:
    """Return the median seconds of a round, from end to end: all but the first (warm-up) and the last (evaluated).

    `ends` is when rounds 0, 1, ... ended; 0 is the moment before round 1.
    """
    return median(b - a for a, b in pairwise(ends[1:-1]))


def recorded(played: dict[str, Any]) -> float:
    """Return the median of what the app noted as seconds of the same rounds."""
    return median(played["seconds"][2:-1])
