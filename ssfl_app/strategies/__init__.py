"""The algorithms: one file each, server and client side together."""

from ssfl_app.core.strategy import SparseStrategy
from ssfl_app.registry import Registry
from ssfl_app.strategies.dispfl import DisPfl
from ssfl_app.strategies.ditto import Ditto
from ssfl_app.strategies.dpsgd import Dpsgd, DpsgdFt
from ssfl_app.strategies.fedavg import FedAvg
from ssfl_app.strategies.fedavg_ft import FedAvgFt
from ssfl_app.strategies.fedbn import FedBn
from ssfl_app.strategies.feddst import FedDst
from ssfl_app.strategies.fedfomo import FedFomo
from ssfl_app.strategies.fedpai import FedPai
from ssfl_app.strategies.fedpm import FedPm
from ssfl_app.strategies.fedprox import FedProx
from ssfl_app.strategies.flash import Flash, FlashJoint
from ssfl_app.strategies.local_mask import LocalSaliency, RandomLocal
from ssfl_app.strategies.lotteryfl import LotteryFl
from ssfl_app.strategies.moon import Moon
from ssfl_app.strategies.prunefl import PruneFl
from ssfl_app.strategies.scaffold import Scaffold
from ssfl_app.strategies.spafl import SpaFl
from ssfl_app.strategies.sparsyfed import SparsyFed
from ssfl_app.strategies.ssfl.strategy import Random, Shuffled, Ssfl
from ssfl_app.strategies.subfedavg import SubFedAvg
from ssfl_app.strategies.topk import Topk
from ssfl_app.strategies.zerofl import ZeroFl

_ALL: tuple[type[SparseStrategy], ...] = (
    Ssfl,
    FedAvg,
    Random,
    Shuffled,
    LocalSaliency,
    RandomLocal,
    FedAvgFt,
    Ditto,
    Dpsgd,
    DpsgdFt,
    FedFomo,
    DisPfl,
    SubFedAvg,
    LotteryFl,
    FedPm,
    Flash,
    FlashJoint,
    Topk,
    SparsyFed,
    ZeroFl,
    FedDst,
    PruneFl,
    FedProx,
    Scaffold,
    FedBn,
    Moon,
    FedPai,
    SpaFl,
)

REGISTRY: Registry[type[SparseStrategy]] = Registry(
    "ssfl.strategies",
    {strategy.name: strategy for strategy in _ALL},
    "a subclass of SparseStrategy",
    lambda found: isinstance(found, type) and issubclass(found, SparseStrategy),
)
"""Name -> strategy. The contract test plays every entry; README has a row for each."""
