"""The contract of `ssfl_app.testing` on every registered strategy, and what each of them promises beside it.

Departures are named at the top.
"""

import math
from typing import Any

import numpy as np
import pytest

from ssfl_app.strategies import REGISTRY
from ssfl_app.testing.test_contract import *  # noqa: F403
from ssfl_app.testing.test_contract import Play, Played
from tests import in_process_grid

pytestmark = pytest.mark.narrow

# Keys under which a strategy learns the small task; the others do so in 3 rounds of 2 epochs at the rate 0.2.
LEARNS: dict[str, dict[str, Any]] = {
    "dispfl": {"local.epochs": 3, "local.lr": 0.3},
    "ditto": {"run.rounds": 4, "local.lr": 0.1},
    "fedfomo": {"run.rounds": 4, "local.epochs": 3},
    "fedpai": {"local.epochs": 3, "local.lr": 0.3},
    "fedpm": {"run.rounds": 6, "local.epochs": 5},
    "flash": {"local.lr": 0.4},
    "flash-joint": {"local.lr": 0.4},
    "local-saliency": {"local.epochs": 3, "local.lr": 0.3},
    "lotteryfl": {"run.rounds": 5, "local.epochs": 4, "local.lr": 0.3},
    "random": {"local.lr": 0.4},
    "random-local": {"run.rounds": 5, "local.epochs": 4, "local.lr": 0.3},
    "spafl": {"run.rounds": 5, "local.epochs": 4, "local.lr": 0.1},
    "sparsyfed": {"local.lr": 0.4},
    "topk": {"local.epochs": 3, "local.lr": 0.3},
}

# Keys under which a strategy costs less and does the same: PruneFL's one client prunes alone for 20 local rounds by
# default, and 6 reach the density.
CHEAP: dict[str, dict[str, Any]] = {"prunefl": {"prunefl.checks": 6}}

# Strategies whose published rule rounds layer by layer: off by less than one weight a layer.
ROUNDED: set[str] = {
    "dispfl",  # Erdos-Renyi-Kernel densities
}

P, LAYERS, REST, BITMAP = 38160, (144, 4608, 32768, 640), 170, 4770
"""The narrow CNN: prunable weights, also by layer, and the others; bytes of a bit for each prunable weight."""
ALIVE = 7632  # floor(0.2 * P)
FILTERS = 16 + 32 + 64 + 10
DENSE, SPARSE = 4 * (P + REST), 4 * (ALIVE + REST)

# Strategies whose density is an outcome: between which two it lies.
EMERGENT: dict[str, tuple[float, float]] = {
    "subfedavg": (1, 1),  # with one local epoch nothing is pruned
    "lotteryfl": (0.8**3 - 4 / P, 1 - 0.2 * 0.5),  # a fifth of each layer at a time, and once in a round at most
    "topk": (0.2, 4 * 0.2),  # the union of what four clients sent
    "sparsyfed": (0.2, 4 * 0.2),  # likewise
    "zerofl": ((144 + 921 + 6553 + 128) / P,) * 2,  # a fifth of each layer, but the first one is dense
    "spafl": (0.5, 1),  # of filters that stay above their thresholds
    "fedpm": (0.45, 0.55),  # of a mask that is drawn; its probabilities start at one half
}


@pytest.fixture(scope="module", params=sorted(REGISTRY))
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def keys(strategy: str) -> dict[str, Any]:
    return {"strategy": strategy} | CHEAP.get(strategy, {})


@pytest.fixture(scope="module")
def learning(strategy: str) -> dict[str, Any]:
    return {"run.rounds": 3, "local.epochs": 2, "local.lr": 0.2} | LEARNS.get(strategy, {})


@pytest.fixture(scope="module")
def play() -> Play:
    return in_process_grid.play


def name_of(played: Played) -> str:
    return played.strategy.name


def test_is_registered_under_its_own_name(played: Played) -> None:
    assert REGISTRY[name_of(played)] is type(played.strategy)


def test_a_method_without_a_global_model_has_none_tested(played: Played) -> None:
    last, whole = played.records[-1], type(played.strategy).has_global_model
    assert whole == (name_of(played) not in ("dispfl", "fedfomo", "spafl"))
    assert (last["central_accuracy"] is None) == (last["central_loss"] is None) == (not whole)
    assert whole or (last["local_accuracy_mean"] is None and 0 < last["personal_accuracy_mean"] <= 1)


def test_has_exactly_the_density_it_promises(played: Played) -> None:
    name, layout = name_of(played), played.layout
    density, _ = played.strategy.densities()
    wanted = math.floor(0.2 * layout.prunable_size) if type(played.strategy).uses_density else layout.prunable_size
    if name in EMERGENT:
        low, high = EMERGENT[name]
        assert low - 1e-9 <= density <= high + 1e-9
    elif name in ROUNDED:
        assert abs(density * layout.prunable_size - wanted) < len(layout.prunable)
    else:
        assert density * layout.prunable_size == pytest.approx(wanted, abs=1e-6)


def of_own_masks(played: Played, round_: int) -> tuple[int, int, int]:
    """Down go the weights of the mask that a client sent last, up those of the one it has now, and this mask."""
    alive: dict[int, int] = dict.fromkeys(range(6), P)
    down = up = 0
    for r in range(1, round_ + 1):
        down = sum(4 * (alive[client] + REST) for client in played.records[r]["cohort"])
        came = [(where[2], payload) for where, payload in played.grid.got if where[:2] == ("train", r)]
        alive |= {client: int(np.unpackbits(payload.arrays["mask"]).sum()) for client, payload in came}
        up = sum(4 * (alive[client] + REST) + BITMAP for client in played.records[r]["cohort"])
    return down, up, sum(4 * (count + REST) for count in alive.values())


def bytes_of_a_round(played: Played, round_: int) -> tuple[int, int, int, int]:
    """Return what a strategy is said to send: to train down and up, to evaluate, and masks that go down beside."""
    first, alive = round_ == 1, [round(record["density"] * P) for record in played.records[1:]]
    match name_of(played):
        case "fedavg" | "fedavg-ft" | "ditto" | "fedprox" | "moon":
            return 4 * DENSE, 4 * DENSE, 6 * DENSE, 0
        case "scaffold":  # a control variate beside the model
            return 4 * 2 * DENSE, 4 * 2 * DENSE, 6 * DENSE, 0
        case "fedbn":  # two norms of 16 and 32 channels stay
            return 4 * (DENSE - 384), 4 * (DENSE - 384), 6 * (DENSE - 384), 0
        case "dpsgd" | "dpsgd-ft":
            return 6 * DENSE, 6 * DENSE, 6 * DENSE, 0
        case "ssfl" | "shuffled" | "random" | "flash" | "prunefl":  # the mask goes down once a client
            return 4 * SPARSE, 4 * SPARSE, 6 * SPARSE, 6 * BITMAP * first
        case "local-saliency" | "random-local" | "fedpai":  # both ends know each mask
            return 4 * SPARSE, 4 * SPARSE, 6 * SPARSE, 0
        case "feddst":  # the mask moves in the first of three rounds only
            return 4 * SPARSE, 4 * (SPARSE + BITMAP * first), 6 * SPARSE, (4 + 6) * BITMAP * first
        case "flash-joint":  # it moves in every round, and is known from the evaluation when the next one begins
            return 4 * SPARSE, 4 * (SPARSE + BITMAP), 6 * SPARSE, (4 * first + 6) * BITMAP
        case "topk":
            return 4 * DENSE, 4 * (SPARSE + BITMAP), 6 * DENSE, 0
        case "zerofl":  # density and zerofl.r-mask
            return 4 * DENSE, 4 * (4 * (math.floor(0.3 * P) + REST) + BITMAP), 6 * DENSE, 0
        case "sparsyfed":  # dense at first, then the union of what came up
            before, now = (P if first else alive[round_ - 2]), alive[round_ - 1]
            return 4 * (4 * (before + REST) + BITMAP), 4 * (SPARSE + BITMAP), 6 * (4 * (now + REST) + BITMAP), 0
        case "spafl":  # a threshold for each channel and unit
            return 4 * 4 * FILTERS, 4 * 4 * FILTERS, 6 * 4 * FILTERS, 0
        case "fedpm":  # probabilities down, bits up
            return 4 * 4 * P, 4 * BITMAP, 6 * BITMAP, 0
        case "dispfl":
            model = 4 * (alive[0] + REST) + BITMAP
            return 6 * model, 6 * model, 6 * model, 0
        case "fedfomo":  # five peers' models, of which there are none at first; up go preferences for them
            peers = 0 if first else 5
            return 6 * peers * DENSE, 6 * (DENSE + 4 * peers), 0, 0
        case "lotteryfl" | "subfedavg":
            return *of_own_masks(played, round_), 0
    raise AssertionError("a new strategy says here what it sends")


# Bytes that come up before training; nothing goes down, as the seed says what weights a run starts from.
DISCOVERY: dict[str, int] = {
    **dict.fromkeys(["ssfl", "shuffled"], 6 * 4 * P),  # scores
    **dict.fromkeys(["local-saliency", "fedpai"], 6 * BITMAP),
    **dict.fromkeys(["flash", "flash-joint"], 4 * len(LAYERS)),  # one client's layer densities
    "prunefl": SPARSE + BITMAP,  # one client's model
}


def test_pays_its_codecs_bytes(played: Played) -> None:
    """By formula: float32 values, and a bit for each prunable weight where a mask travels."""
    layout, first = played.layout, played.records[0]
    assert (layout.prunable_size, layout.size - layout.prunable_size) == (sum(LAYERS), REST) == (P, REST)
    for record in played.records[1:]:
        keys = ("bytes_train_down", "bytes_train_up", "bytes_evaluate_down", "bytes_mask_down")
        assert tuple(record[key] for key in keys) == bytes_of_a_round(played, record["round"])
    assert (first["bytes_discovery_down"], first["bytes_discovery_up"]) == (0, DISCOVERY.get(name_of(played), 0))


def passes(played: Played, round_: int) -> int:
    """Return how many images clients train or judge a gradient on: one local epoch each, and what the method adds."""
    name, cohort, held = name_of(played), played.records[round_].get("cohort", []), played.runtime.partition.train
    images, last = sum(len(held[client]) for client in cohort), round_ == 3
    if round_ == 0:
        (asked,) = {client for (kind, _, client), _ in played.grid.got if kind.startswith("query.i")} or {0}
        (found,) = {client for (kind, _, client), _ in played.grid.got if kind == "query.layer_densities"} or {0}
        return {
            **dict.fromkeys(["ssfl", "shuffled", "local-saliency"], sum(min(64, len(own)) for own in held)),
            **dict.fromkeys(["flash", "flash-joint"], 10 * len(held[found])),  # epochs of one client
            "fedpai": 3 * sum(min(64, len(own)) for own in held),  # a gradient, and a product with the Hessian
            "prunefl": 2 * 6 * len(held[asked]),  # an epoch and its gradients' squares, six times
        }.get(name, 0)
    match name:
        case "ditto":  # two epochs of the global model and three of the personal one
            return 5 * images
        case "dpsgd-ft" | "fedavg-ft":  # everybody tunes the model that training ends with
            return images + last * sum(map(len, held))
        case "feddst":  # gradients of one batch say where weights grow
            return images + (round_ == 1) * sum(min(32, len(held[client])) for client in cohort)
        case "fedfomo":  # a tenth is held out, to judge models
            return sum(math.floor(0.9 * len(held[client])) for client in cohort)
    return images


def test_counts_image_passes(played: Played) -> None:
    assert [record["image_passes"] for record in played.records] == [passes(played, round_) for round_ in range(4)]
