"""What the server does: FedAvg."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from digits.task import Net
from ssfl_app import SSFL

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and print how accurate the model was after each round."""
    torch.manual_seed(0)
    strategy = SSFL(density=0.1, fraction_train=1.0, fraction_evaluate=1.0)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
        train_config=ConfigRecord({"lr": context.run_config["lr"]}),
    )
    for round_, metrics in result.evaluate_metrics_clientapp.items():
        print(f"round {round_}: accuracy {metrics['accuracy']:.4f}", flush=True)
