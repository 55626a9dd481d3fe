"""FedAvg-FT: FedAvg, then every client fine-tunes the final model for one local round.

Cheng, Chadha and Duchi, "Federated asymptotics: a model to compare federated learning algorithms", AISTATS 2023
(fine-tuning as a personalisation baseline); as in the public code of DisPFL, whose table SSFL compares with: one
ordinary local round on every client after the last round, then the mean accuracy of the fine-tuned models.

Departures: that code trains with round -1, so at lr * decay**-1; here it is the initial rate, local.lr (or, with
finetune.lr "scheduled", that of the next round). The fine-tuned models stay on the clients and are not kept.
"""

from ssfl_app.comm.payload import Metadata, Payload
from ssfl_app.core.client import ClientAlgorithm
from ssfl_app.core.options import Settings
from ssfl_app.core.strategy import SparseStrategy
from ssfl_app.strategies.shared.fine_tuning import FinetuneOptions, finetuned, finetuning_of


class FinetuneClient(ClientAlgorithm):
    """FedAvg's client, which fine-tunes before its last test."""

    @classmethod
    def uses(cls, settings: Settings) -> int:
        """Return the epochs of fine-tuning too."""
        return super().uses(settings) + finetuning_of(settings).epochs

    def evaluate(self, payload: Payload) -> Metadata:
        """Test the global model; after the last round also a fine-tuned copy, as personal accuracy."""
        metadata = super().evaluate(payload)
        if payload.metadata["round"] != self.settings.run.rounds:
            return metadata
        return metadata | finetuned(self, payload)


class FedAvgFt(SparseStrategy):
    """The server does what FedAvg's does."""

    name = "fedavg-ft"
    client = FinetuneClient
    sections = {"finetune": FinetuneOptions}  # noqa: RUF012  (ClassVar of the base)
    uses_density = False
    error_feedback_ok = True
