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
from ssfl_app.sparsity.codec import BitmapAndValues, MaskedValues, nbytes
from ssfl_app.strategies import REGISTRY
from tests.in_process_grid import WHOLE, Played, answer_error, play, tamper

pytestmark = pytest.mark.few

# Keys under which a strategy learns the small task; the others do so in 4 rounds of 3 epochs.
LEARNS: dict[str, dict[str, Any]] = {
    name: {"run.rounds": 6, "run.evaluate-every": 6} for name in ("fedpm", "lotteryfl", "sparsyfed", "random-local")
}
for _slow in ("lotteryfl", "random-local"):  # every second digit is too little for them
    LEARNS[_slow] |= WHOLE

# Keys under which a strategy costs less and does the same: PruneFL's one client prunes alone for 20 local rounds by
# default, and 6 reach the density.
CHEAP: dict[str, dict[str, Any]] = {"prunefl": {"prunefl.checks": 6}}

# Strategies whose density is an outcome: it starts at 1 or elsewhere and falls, or follows from what was learnt.
EMERGENT: set[str] = {
    "subfedavg",  # of clients' masks, which start dense and shrink as their models get good
    "lotteryfl",  # likewise
    "topk",  # mask.density is that of the uplink; the model is the union of what came up
    "sparsyfed",  # of clients' models; the server's is their union
    "zerofl",  # of every layer that computes, but the first one is dense
    "fedpm",  # of the mask that is tested: as many weights as the learnt probabilities say
}

# Strategies whose published rule rounds layer by layer: off by less than one weight a layer.
ROUNDED: set[str] = {
    "dispfl",  # Erdos-Renyi-Kernel densities
}

# Strategies that train on this share of a client's images only, by default: they judge models on the others.
TRAINS_ON: dict[str, float] = {"fedfomo": 0.9}


@pytest.fixture(scope="module", params=sorted(REGISTRY))
def played(request: pytest.FixtureRequest) -> Played:
    return play(base(request.param))


def base(name: str) -> dict[str, Any]:
    return {"strategy": name} | CHEAP.get(name, {})


def name_of(played: Played) -> str:
    return played.strategy.name


def test_is_registered_under_its_own_name(played: Played) -> None:
    assert REGISTRY[name_of(played)] is type(played.strategy)


def test_learns(played: Played) -> None:
    """The models that the method ends up with are good where they are used, and better than at its start."""
    keys = {"run.rounds": 4, "local.epochs": 3, "local.batch-size": 16, "run.evaluate-every": 4} | LEARNS.get(
        name_of(played), {}
    )
    long = play(base(name_of(played)) | keys)
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
        assert 0 < density <= 1
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


def test_pays_its_codecs_bytes(played: Played) -> None:
    """For strategies of one global model: by formula."""
    rule, layout, mask = type(played.strategy).client, played.layout, played.strategy.mask
    if type(played.strategy).full_participation or rule.stateful or mask is not played.strategy.mask_for(0):
        pytest.skip("its own test has the formula")
    for (kind, round_, _), up in played.grid.got:
        if kind == "train":
            played.strategy.codec_up(round_).check(up.arrays, layout, mask)
    down, ups = played.strategy.codec_down(1), {type(played.strategy.codec_up(round_)) for round_ in (1, 2, 3)}
    if ups == {type(down)} and not isinstance(down, BitmapAndValues):
        model = nbytes(down.encode(layout, played.strategy.state, mask))
        bitmap = -(-layout.prunable_size // 8) if isinstance(down, MaskedValues) else 0
        for record in played.records[1:]:
            assert (record["bytes_train_down"], record["bytes_train_up"]) == (4 * model, 4 * model)
            assert record["bytes_evaluate_down"] == 6 * model
        # The mask goes down once per client in the whole run.
        assert [record["bytes_mask_down"] for record in played.records[1:]] == [6 * bitmap, 0, 0]


def test_counts_image_passes(played: Played) -> None:
    for record in played.records[1:]:
        share = TRAINS_ON.get(name_of(played), 1)
        images = sum(math.floor(share * len(played.runtime.partition.train[client])) for client in record["ok"])
        assert record["image_passes"] >= images  # one local epoch each, and what the method adds
    if name_of(played) in ("fedavg", "ssfl", "random"):
        assert played.records[1]["image_passes"] == sum(
            len(played.runtime.partition.train[client]) for client in played.records[1]["ok"]
        )


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
