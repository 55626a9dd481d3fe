"""What a density costs in few rounds: the app of examples/message-api under SSFL, on the in-process engine.

    python benchmarks/short_runs.py

Accuracy on the clients' held-out images after some rounds; seeds change the initial weights and the minibatches, the
data stay. Writes benchmarks/results/short-runs.json, and prints the table of docs/plugin.md.
"""

import json
import logging
import statistics
import sys
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord

from ssfl_app import SSFL
from ssfl_app.results.recorder import environment
from ssfl_app.simulation.in_process import InlineGrid

ROOT = Path(__file__).resolve().parent.parent
ROUNDS, DENSITIES, SEEDS, CLIENTS = (1, 3, 5, 10, 20), (1.0, 0.5, 0.25, 0.1, 0.05), (1, 2, 3), 10


def main() -> None:
    """Play all of it: some minutes."""
    sys.path.insert(0, str(ROOT / "examples" / "message-api" / "after"))
    from digits.client_app import app
    from digits.task import Net

    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    measured = {}
    for density in DENSITIES:
        for seed in SEEDS:
            torch.manual_seed(seed)
            strategy = SSFL(density=density)
            grid = InlineGrid(app, {"local-epochs": 2}, {1000 + client: client for client in range(CLIENTS)})
            initial, config = ArrayRecord(Net().state_dict()), ConfigRecord({"lr": 0.05})
            result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=max(ROUNDS), train_config=config)
            told = [result.evaluate_metrics_clientapp[round_]["accuracy"] for round_ in ROUNDS]
            measured.setdefault(str(density), []).append(told)
        row = [f"{100 * statistics.mean(column):.1f}" for column in zip(*measured[str(density)], strict=True)]
        print(f"| {density:g} | {' | '.join(row)} |", flush=True)
    record = {
        "rounds": ROUNDS,
        "clients": CLIENTS,
        "seeds": SEEDS,
        "accuracy": measured,
        "environment": environment(),
    }
    (ROOT / "benchmarks" / "results" / "short-runs.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
