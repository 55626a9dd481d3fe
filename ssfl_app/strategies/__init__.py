"""The algorithms: one file each, server and client half together."""

from ssfl_app.strategies.base import SparseStrategy
from ssfl_app.strategies.ditto import Ditto
from ssfl_app.strategies.fedavg import FedAvg
from ssfl_app.strategies.fedavg_ft import FedAvgFt
from ssfl_app.strategies.fixed_mask import Random, Shuffled, Ssfl
from ssfl_app.strategies.local_mask import LocalSaliency, RandomLocal

_ALL: tuple[type[SparseStrategy], ...] = (
    Ssfl,
    FedAvg,
    Random,
    Shuffled,
    LocalSaliency,
    RandomLocal,
    FedAvgFt,
    Ditto,
)

REGISTRY: dict[str, type[SparseStrategy]] = {strategy.name: strategy for strategy in _ALL}
"""Name -> strategy. The contract test plays every entry; README has a row for each."""
