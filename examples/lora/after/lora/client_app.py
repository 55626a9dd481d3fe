"""What every client does with a message: only adapters come and go."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from lora.task import Text, get_model, test, train
from ssfl_app import sparse_mod

app = ClientApp(mods=[arrays_size_mod, sparse_mod])  # Flower's own mod: logs how many bytes of arrays come and go


def prepare(message: Message, context: Context) -> tuple[PeftModel, Text]:
    """Return the model with the adapters that came, and this client's text."""
    model = get_model()
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    return model, Text(context.node_config["partition-id"])


@app.train()
def on_train(message: Message, context: Context) -> Message:
    """Train the adapters that came, and send them back."""
    model, text = prepare(message, context)
    loss = train(model, text, context.run_config["lr"], seed=message.content["config"]["server-round"])
    metrics = MetricRecord({"loss": loss, "num-examples": len(text)})
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def on_evaluate(message: Message, context: Context) -> Message:
    """Test the adapters that came."""
    model, text = prepare(message, context)
    metrics = MetricRecord({"loss": test(model, text), "num-examples": len(text)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
