"""What the server does: Flower's FedAvg."""

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from stock.task import facts_of, make_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train without evaluation, and note when each round ended."""
    config = context.run_config
    clients, cohort = config["clients"], config["cohort"]
    # The two minima: a ServerApp may start before the nodes are there, and would sample from those that are.
    strategy = FedAvg(
        fraction_train=cohort / clients,
        fraction_evaluate=0.0,
        min_train_nodes=cohort,
        min_available_nodes=clients,
    )

    def mark(round_: int, arrays: ArrayRecord) -> None:
        # Flower calls it before round 1 and after every round: a stopwatch instead of the quickstart's evaluation.
        with Path(config["marks"]).open("a") as file:
            file.write(json.dumps({"round": round_, "time": time.monotonic()}) + "\n")

    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(make_model(config["workload"]).state_dict()),
        num_rounds=config["num-server-rounds"],
        train_config=ConfigRecord({"lr": facts_of(config["workload"])["lr"]}),
        evaluate_fn=mark,
    )
