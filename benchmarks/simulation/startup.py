"""Start-up: what the command takes beside its rounds, `ssfl run` against a bare `flwr run` of the stock app.

A bare run's ServerApp begins round 1 while Ray and its actors are still starting; `ssfl run` begins it when all
clients have answered a greeting, Ray is up and its actors have imported torch. Both readings are recorded and judged:
the moment at which round 1 begins, and the end of round 1 less a typical round: by how much does everything that is
not a round delay the rounds?
"""

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.simulation import app, stock, tasks

REPEATS = 3


def measure(work: Path, images: int, tiny: bool) -> dict[str, Any]:
    """Start everybody in turn, several times, on digits with short rounds."""
    more = "run.rounds=5 run.evaluate-every=5 local.epochs=1 local.lr-decay=1.0"
    task = tasks.make("digits", work, images, tiny, more)
    found: dict[str, list[dict[str, Any]]] = {"flwr run": [], "ssfl run, fedavg": [], "ssfl run, ssfl": []}
    for _ in range(1 if tiny else REPEATS):
        found["flwr run"].append(stock.play(task, 1, "quickstart", work))
        for strategy in ("fedavg", "ssfl"):
            keys = f"{task.keys} strategy='{strategy}'"
            found[f"ssfl run, {strategy}"].append(app.play(keys, "ray", work))
    for runs in found.values():
        for run in runs:
            run["startup"] = run["ends"][1] - run["typical"]
    medians = {
        name: {
            "startup": median(run["startup"] for run in runs),
            "round_1_begins": median(run["ends"][0] for run in runs),
            "round_1_ends": median(run["ends"][1] for run in runs),
            "whole_command": median(run["command_seconds"] for run in runs),
        }
        for name, runs in found.items()
    }
    ours, theirs = medians["ssfl run, fedavg"], medians["flwr run"]
    above, begin = (ours[key] - theirs[key] for key in ("startup", "round_1_begins"))
    print(f"ssfl run against flwr run: start-up {above:+.1f} s, begin of round 1 {begin:+.1f} s", flush=True)
    return {"keys": task.keys, "medians": medians, "above": above, "above_begin": begin, "runs": found}
