"""FedProx: FedAvg whose clients are held near the model that came down.

Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, "Federated optimization in heterogeneous networks", MLSys 2020,
algorithm 2. Client k minimises ``F_k(w) + mu / 2 |w - w_t|^2`` from w_t, inexactly: by its local epochs of SGD. The
server takes the mean. Bytes are FedAvg's.

Departures: cohorts are drawn uniformly and means weighted by samples (run.weighting); the paper draws by samples and
takes the plain mean. All clients do all local epochs: there are no stragglers here.
"""

from dataclasses import dataclass

from ssfl_app.core.algorithm import ClientAlgorithm, Payload, SparseStrategy
from ssfl_app.core.options import FromSettings, Section, at_least
from ssfl_app.strategies.shared.proximal import proximal


@dataclass(frozen=True)
class FedProxOptions(Section):
    """Keys of the section ``fedprox``."""

    section = "fedprox"

    mu: float = at_least(0, 0.01, "how strongly a client is held near the model that came down; 0: FedAvg")


class FedProxClient(ClientAlgorithm):
    """Trains with a proximal term."""

    record_level = True
    options = FromSettings(FedProxOptions)

    def train(self, payload: Payload) -> Payload:
        """Train the model that came down, near it, and return it."""
        mask = self.load(payload)
        loss = self.fit(payload.round, mask, penalty=proximal(self.context.model, self.options.mu))
        return self.reply(payload, mask, loss)


class FedProx(SparseStrategy):
    """The server does what FedAvg's does."""

    name = "fedprox"
    client = FedProxClient
    uses_density = False
    one_mask = True
    error_feedback_ok = True
