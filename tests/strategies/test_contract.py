"""What every registered strategy keeps, whatever it computes. Departures are named at the top."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssfl_app.comm.payload import Payload
from ssfl_app.core.strategy import ServerContext
from ssfl_app.strategies import REGISTRY
from tests.in_process_grid import Played, answer_error, play, tamper

pytestmark = pytest.mark.narrow

# Keys under which a strategy learns the small task; the others do so in 4 rounds of 3 epochs.
LEARNS: dict[str, dict[str, Any]] = {
    "sparsyfed": {"run.rounds": 6},
    "fedpm": {"run.rounds": 6, "local.epochs": 5},
    "lotteryfl": {"run.rounds": 6, "local.epochs": 4, "local.lr": 0.2},
    "random-local": {"run.rounds": 9},
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
DENSE, SPARSE = 4 * (P + REST), 4 * (ALIVE + REST)

# Strategies whose density is an outcome: between which two it lies.
EMERGENT: dict[str, tuple[float, float]] = {
    "subfedavg": (1, 1),  # with one local epoch nothing is pruned
    "lotteryfl": (0.8**3 - 4 / P, 1 - 0.2 * 0.5),  # a fifth of each layer at a time, and once in a round at most
    "topk": (0.2, 4 * 0.2),  # the union of what four clients sent
    "sparsyfed": (0.2, 4 * 0.2),  # likewise
    "zerofl": ((144 + 921 + 6553 + 128) / P,) * 2,  # a fifth of each layer, but the first one is dense
    "fedpm": (0.45, 0.55),  # of a mask that is drawn; its probabilities start at one half
}


@pytest.fixture(scope="module", params=sorted(REGISTRY))
def shared(request: pytest.FixtureRequest) -> Played:
    return play(base(request.param))


@pytest.fixture
def played(shared: Played) -> Played:
    return shared.own_copy()


def base(name: str) -> dict[str, Any]:
    return {"strategy": name} | CHEAP.get(name, {})


def name_of(played: Played) -> str:
    return played.strategy.name


def test_is_registered_under_its_own_name(played: Played) -> None:
    assert REGISTRY[name_of(played)] is type(played.strategy)


def test_learns(played: Played) -> None:
    """The models that the method ends up with are good where they are used, and better than at its start."""
    keys = {"run.rounds": 4, "local.epochs": 3, "local.batch-size": 16, "run.evaluate-every": 9}
    long = play(base(name_of(played)) | keys | LEARNS.get(name_of(played), {}))
    last = long.records[-1]
    best = last["central_accuracy"] if last["personal_accuracy_mean"] is None else last["personal_accuracy_mean"]
    assert best > 0.8
    assert last["train_loss"] < 0.5 * long.records[1]["train_loss"]


def test_repeats_bit_for_bit_with_other_node_ids_and_another_order_of_replies(played: Played, tmp_path: Path) -> None:
    again = play(base(name_of(played)), luck=1, folder=tmp_path)  # and with client memory in files
    assert again.grid.log != played.grid.log
    assert again.bits() == played.bits()
    assert again.metrics() == played.metrics()


def test_another_seed_is_another_run_and_global_random_generators_are_left_alone(played: Played) -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert play(base(name_of(played)) | {"run.seed": 2, "run.rounds": 1}).bits() != played.bits()
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def test_goes_on_from_a_snapshot_to_the_same_bits(played: Played, tmp_path: Path) -> None:
    from flwr.app import ArrayRecord

    keys = base(name_of(played)) | {"run.checkpoint-every": 1}
    half = play(keys, folder=tmp_path, until=1)
    arrays = {name: array.copy() for name, array in half.strategy.state_dict().items()}
    rest = play(keys, folder=tmp_path, until=2)  # got further than its checkpoint: clients remember round 2
    again = REGISTRY[name_of(played)](ServerContext(played.layout, rest.strategy.settings, folder=tmp_path))
    again.load_state_dict(1, arrays)
    finished = Played(again, played.runtime, rest.grid)
    again.callback = finished
    again.start(rest.grid, ArrayRecord(played.runtime.initial_state()), 3)
    assert finished.bits() == played.bits()
    assert again.personal_accuracy == played.strategy.personal_accuracy


def test_has_exactly_the_density_it_promises(played: Played) -> None:
    name, layout = name_of(played), played.layout
    density, density_all = played.strategy.densities()
    wanted = math.floor(0.2 * layout.prunable_size) if type(played.strategy).uses_density else layout.prunable_size
    rest = layout.size - layout.prunable_size
    assert density_all == pytest.approx((density * layout.prunable_size + rest) / layout.size)
    if name in EMERGENT:
        low, high = EMERGENT[name]
        assert low - 1e-9 <= density <= high + 1e-9
    elif name in ROUNDED:
        assert abs(density * layout.prunable_size - wanted) < len(layout.prunable)
    else:
        assert density * layout.prunable_size == pytest.approx(wanted, abs=1e-6)
    assert played.records[-1]["density"] == density


def test_what_a_global_mask_holds_dead_is_zero(played: Played) -> None:
    layout = played.layout
    for state, mask in zip(played.states, played.masks, strict=True):
        prunable = layout.flatten(state)[layout.is_prunable]
        assert not prunable[~mask.alive].any()


def test_counts_the_bytes_of_what_was_sent(played: Played) -> None:
    """Against the arrays that crossed the grid; what they are by formula is in each strategy's own test."""
    down: dict[tuple[str, int], int] = {}
    up: dict[tuple[str, int], int] = {}
    for into, payloads in ((down, played.grid.sent), (up, played.grid.got)):
        for (kind, round_, _), payload in payloads:
            into[kind, round_] = into.get((kind, round_), 0) + payload.nbytes
    for record in played.records[1:]:
        round_ = record["round"]
        masks = record["bytes_mask_down"]
        everything = record["bytes_train_down"] + record["bytes_evaluate_down"] + masks
        assert everything == down["train", round_] + down["evaluate", round_]
        assert record["bytes_train_up"] == up["train", round_]
    for record in played.records:
        sent = sum(n for (kind, r), n in down.items() if kind.startswith("query") and r == record["round"])
        assert record.get("bytes_discovery_down", 0) == sent


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
        case "local-saliency" | "random-local":  # both ends know each mask
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
    "local-saliency": 6 * BITMAP,
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


def test_goes_on_without_a_lost_client_and_a_refused_one_changes_no_more(played: Played) -> None:
    """A refused client worked, and may remember that; the server took nothing, so it never happened."""
    client = played.records[2]["cohort"][0]
    where = ("train", 2, client)

    def poison(payload: Payload) -> Payload:
        name = "values" if "values" in payload.arrays else next(iter(payload.arrays))
        values = payload.arrays[name].copy()
        if values.dtype == np.float32:
            values[7] = np.nan
        else:
            values = values[:-1]
        return Payload({**payload.arrays, name: values}, payload.metadata)

    lost = play(base(name_of(played)), faults={where: answer_error(5, "node gone")})
    assert lost.records[2]["lost"] == {str(client): "Flower error 5: node gone"}
    assert lost.records[2]["ok"] == [c for c in played.records[2]["cohort"] if c != client]
    assert lost.bits() != played.bits()

    refused = play(base(name_of(played)), faults={where: tamper(poison)})
    reason = refused.records[2]["refused"][str(client)]
    assert "1 values are NaN or Inf" in reason or "bytes; this layout needs" in reason
    assert refused.bits() == lost.bits()
    assert refused.records[3]["personal_accuracy_mean"] == lost.records[3]["personal_accuracy_mean"]


def test_sends_every_sampled_strategy_the_same_cohorts(played: Played) -> None:
    if type(played.strategy).full_participation:
        assert all(record["cohort"] == list(range(6)) for record in played.records[1:])
        return
    other = play({"strategy": "fedavg"})
    assert [r.get("cohort") for r in played.records] == [r.get("cohort") for r in other.records]
