"""What every client does with a message."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from stock.task import load_data, make_model, train

app = ClientApp()


@app.train()
def on_train(message: Message, context: Context) -> Message:
    """Train the model that came on this client's images, and send it back."""
    model = make_model(context.run_config["workload"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    config, client = context.run_config, context.node_config["partition-id"]
    loader = load_data(config["workload"], client, config["loader"])
    loss = train(model, loader, config["workload"], message.content["config"]["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": loader.examples})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)
