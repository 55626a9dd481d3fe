"""An old-style client: NumPy arrays in, NumPy arrays out."""

import torch
from flwr.app import Context
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod

from digits.task import Net, load_data, test, train
from ssfl_app import sparse_numpy_mod


class DigitsClient(NumPyClient):
    """Trains and tests on one part of the digits."""

    def __init__(self, partition: int, partitions: int, epochs: int) -> None:
        self.net, self.data, self.epochs = Net(), load_data(partition, partitions), epochs

    def load(self, parameters: list) -> None:
        """Copy the arrays into the model, in the order of its state dict."""
        state = zip(self.net.state_dict(), parameters, strict=True)
        self.net.load_state_dict({name: torch.tensor(array) for name, array in state}, strict=True)

    def fit(self, parameters: list, config: dict) -> tuple:
        """Train the model that came, and send it back."""
        self.load(parameters)
        images, labels, _, _ = self.data
        loss = train(self.net, images, labels, self.epochs, config["lr"])
        return [tensor.numpy() for tensor in self.net.state_dict().values()], len(images), {"loss": loss}

    def evaluate(self, parameters: list, config: dict) -> tuple:
        """Test the model that came."""
        self.load(parameters)
        _, _, images, labels = self.data
        loss, accuracy = test(self.net, images, labels)
        return loss, len(images), {"accuracy": accuracy}


def client_fn(context: Context) -> object:
    """Return the client of a node."""
    node = context.node_config
    return DigitsClient(node["partition-id"], node["num-partitions"], context.run_config["local-epochs"]).to_client()


app = ClientApp(client_fn=client_fn, mods=[arrays_size_mod, sparse_numpy_mod])
