"""What the server does: FedAvg of the adapters."""

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict

from lora.task import get_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and print the loss after each round."""
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=1.0)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(get_model())),
        num_rounds=context.run_config["num-server-rounds"],
    )
    for round_, metrics in result.evaluate_metrics_clientapp.items():
        print(f"round {round_}: loss {metrics['loss']:.4f}", flush=True)
