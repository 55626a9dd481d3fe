"""The algorithms: one file each, server and client half together."""

from ssfl_app.strategies.base import SparseStrategy
from ssfl_app.strategies.fedavg import FedAvg
from ssfl_app.strategies.fixed_mask import Random, Shuffled, Ssfl

REGISTRY: dict[str, type[SparseStrategy]] = {
    "ssfl": Ssfl,
    "fedavg": FedAvg,
    "random": Random,
    "shuffled": Shuffled,
}
"""Name -> strategy. The contract test plays every entry; README has a row for each."""
