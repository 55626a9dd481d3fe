"""What every client does with a message."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod

from digits.task import Net, load_data, test, train
from ssfl_app import sparse_mod

app = ClientApp(mods=[arrays_size_mod, sparse_mod])  # Flower's own mod: logs how many bytes of arrays come and go


def prepare(message: Message, context: Context) -> tuple[Net, tuple]:
    """Return the model that came, and this client's data."""
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=True)
    return net, load_data(context.node_config["partition-id"], context.node_config["num-partitions"])


@app.train()
def on_train(message: Message, context: Context) -> Message:
    """Train the model that came, and send it back."""
    net, (images, labels, _, _) = prepare(message, context)
    loss = train(net, images, labels, context.run_config["local-epochs"], message.content["config"]["lr"])
    metrics = MetricRecord({"loss": loss, "num-examples": len(images)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def on_evaluate(message: Message, context: Context) -> Message:
    """Test the model that came."""
    net, (_, _, images, labels) = prepare(message, context)
    loss, accuracy = test(net, images, labels)
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(images)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
