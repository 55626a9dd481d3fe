"""What the server does: FedAvg, as old-style clients need it."""

import torch
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg

from digits.task import Net


def weighted(metrics: list) -> dict:
    """Return the mean accuracy, and print it."""
    accuracy = sum(count * told["accuracy"] for count, told in metrics) / sum(count for count, _ in metrics)
    print(f"accuracy {accuracy:.4f}", flush=True)
    return {"accuracy": accuracy}


def server_fn(context: Context) -> ServerAppComponents:
    """Return the strategy and the number of rounds."""
    torch.manual_seed(0)
    strategy = FedAvg(
        initial_parameters=ndarrays_to_parameters([tensor.numpy() for tensor in Net().state_dict().values()]),
        on_fit_config_fn=lambda server_round: {"lr": context.run_config["lr"]},
        evaluate_metrics_aggregation_fn=weighted,
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(context.run_config["num-server-rounds"]))


app = ServerApp(server_fn=server_fn)
