"""FedAvg-FT: FedAvg, then every client fine-tunes the final model for one local round.

Cheng, Chadha and Duchi, "Federated asymptotics: a model to compare federated learning algorithms", AISTATS 2023
(fine-tuning as a personalisation baseline); as in the public code of DisPFL, whose table SSFL compares with: one
ordinary local round on every client after the last round, then the mean accuracy of the fine-tuned models.

Departures: that code trains with round -1, so at lr * decay**-1; here it is the initial rate, local.lr (or, with
finetune.lr "scheduled", that of the next round). The fine-tuned models stay on the clients and are not kept.
"""

from ssfl_app.core.algorithm import SparseStrategy
from ssfl_app.strategies.shared.fine_tuning import FineTuningClient


class FedAvgFt(SparseStrategy):
    """The server does what FedAvg's does."""

    name = "fedavg-ft"
    client = FineTuningClient
    uses_density = False
    error_feedback_ok = True
