"""FedBN: FedAvg of all but the norm layers, which stay at each client.

Li, Jiang, Zhang, Kamp and Dou, "FedBN: Federated learning on non-IID features via local batch normalization", ICLR
2021, algorithm 1. A client trains the whole model: the mean weights that came down with the norm layers that it had
before. Weights, biases and running statistics of norm layers are neither sent nor averaged. With B coordinates in
them a client and round costs ``4 (P + R - B)`` bytes down and up, fp32.

Departures: every norm layer stays, of whatever kind (model.norm is "group" by default), not BatchNorm alone. The
server keeps the norm layers of the initial weights, and central accuracy is with these; personal accuracy is each
client's, with its own. A client that never trained has the initial ones too.
"""

from ssfl_app.core.algorithm import ClientAlgorithm, Metadata, Payload, ServerContext, SparseStrategy
from ssfl_app.core.options import ConfigError
from ssfl_app.sparsity.codec import Dense
from ssfl_app.sparsity.layout import Layout


class WithoutNorms(Dense):
    """All coordinates but those of norm layers."""

    name = "without-norms"

    def stays(self, layout: Layout) -> tuple[str, ...]:
        """Return the tensors of norm layers."""
        return layout.norms


class FedBnClient(ClientAlgorithm):
    """Keeps its norm layers."""

    down = WithoutNorms
    up = WithoutNorms
    stateful = True

    def evaluate(self, payload: Payload) -> Metadata:
        """Test the model that came down with this client's norm layers."""
        self.load(payload)
        return self.tested(payload, "personal_accuracy")


class FedBn(SparseStrategy):
    """The server does what FedAvg's does, on what travels."""

    name = "fedbn"
    client = FedBnClient
    uses_density = False

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        if not self.layout.norms:
            raise ConfigError("strategy is 'fedbn'; the model has no norm layers to keep, so this would be fedavg")
