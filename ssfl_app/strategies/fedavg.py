"""FedAvg: dense federated averaging, the reference of every byte and accuracy here.

McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017:
a sampled cohort trains the global model, ``w = sum_k n_k w_k / sum_k n_k``.
"""

from ssfl_app.core.algorithm import SparseStrategy


class FedAvg(SparseStrategy):
    """All hooks and verbs are the defaults."""

    name = "fedavg"
    uses_density = False
    one_mask = True
    error_feedback_ok = True
