"""What Sub-FedAvg and LotteryFL share: masks that only shrink, the mean over those who carry a weight, the wire."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ssfl_app.comm.payload import Payload
from ssfl_app.config import Flat, parse
from ssfl_app.core.strategy import ServerContext
from ssfl_app.sparsity.codec import BitmapAndValues, read_mask
from ssfl_app.sparsity.layout import Layout, load_state
from ssfl_app.sparsity.mask import Mask
from ssfl_app.strategies import REGISTRY
from ssfl_app.strategies.shared.iterative_pruning import IterativePruningClient
from tests.in_process_grid import Played, answer_error, forget, play, tamper

pytestmark = pytest.mark.narrow

# Both prune in every round, for all clients whose model is any good; large batches are quick.
QUICK: Flat = {"local.epochs": 2, "local.batch-size": 64}
BASES: dict[str, Flat] = {
    "subfedavg": {"strategy": "subfedavg", "subfedavg.step": 0.2, "subfedavg.accuracy": 0.0, **QUICK},
    "lotteryfl": {"strategy": "lotteryfl", "lotteryfl.accuracy": 0.0, **QUICK},
}
NAMES = sorted(BASES)
PRUNABLE, REST = 38160, 170
BITMAP, LEAST = PRUNABLE // 8, PRUNABLE // 5


@pytest.fixture(params=NAMES)
def played(request: pytest.FixtureRequest) -> Played:
    return play(BASES[request.param])


def base(played: Played) -> Flat:
    return BASES[played.strategy.name]


def twice(played: Played) -> int:
    """Return a client that trains in rounds 1 and 2, so that it has a mask of its own in round 2."""
    return min(set(played.records[1]["cohort"]) & set(played.records[2]["cohort"]))


def masks_after(played: Played, until: int) -> list[Mask]:
    """Return the masks that clients had after a round, by what came up."""
    masks = [Mask.dense(played.layout)] * 6
    for (kind, round_, client), payload in played.grid.got:
        if kind == "train" and round_ <= until:
            masks[client] = read_mask(payload.arrays, played.layout)
    return masks


class TestPruning:
    def rule(self, density: float) -> IterativePruningClient:
        model = torch.nn.Sequential(torch.nn.Linear(10, 1), torch.nn.Linear(4, 1))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10]]))
            model[1].weight.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
        settings = parse({"strategy": "lotteryfl", "mask.density": density}).settings
        site: Any = SimpleNamespace(model=model, layout=Layout.of(model), settings=settings)
        return IterativePruningClient(site)

    def test_by_hand(self) -> None:
        """The smallest of each layer, rounded down: floor(0.3 * 10) and floor(0.3 * 4)."""
        rule = self.rule(0.1)
        once = rule.pruned(Mask.dense(rule.context.layout), 0.3)
        assert once.alive.astype(int).tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1]
        # Of the 7 and 3 that are left: floor(2.1) and floor(0.9).
        again = rule.pruned(once, 0.3)
        assert again.alive.astype(int).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1]

    def test_the_share_shrinks_near_the_density_and_nothing_dies_below_it(self) -> None:
        rule = self.rule(0.8)  # 11 of 14 stay: 3 may go, 3 / 14 of each layer, rounded down
        once = rule.pruned(Mask.dense(rule.context.layout), 0.5)
        assert [alive for _, alive, _ in once.layers()] == [8, 4]
        # One more may go, less than one a layer: it stays.
        assert rule.pruned(once, 0.5) == once
        assert self.rule(1.0).pruned(Mask.dense(rule.context.layout), 0.5).count == 14


def test_masks_shrink_and_stay_above_the_density(played: Played) -> None:
    counts = [[mask.count for mask in masks_after(played, round_)] for round_ in range(4)]
    for before, after in pairwise(counts):
        assert all(a <= b for a, b in zip(after, before, strict=True))
    assert min(counts[-1]) < 0.9 * PRUNABLE
    assert [mask.count for mask in played.strategy.masks] == counts[-1]
    density = sum(counts[-1]) / 6 / PRUNABLE
    assert played.records[-1]["density"] == pytest.approx(density)


def test_they_reach_the_density_to_a_weight_a_layer_and_stop(played: Played) -> None:
    name = f"{played.strategy.name}.step"
    deep = play(base(played) | {name: 0.9, "mask.density": 0.4, "run.cohort": 6, "run.rounds": 2})
    least = int(0.4 * PRUNABLE)
    for mask in deep.strategy.masks:
        assert least <= mask.count < least + 4
    assert [mask.count for mask in masks_after(deep, 1)] == [mask.count for mask in masks_after(deep, 2)]


def test_the_mean_is_over_the_masks_that_the_weights_carry(played: Played) -> None:
    """Not over those they came down under: what a client has just pruned does not count as a 0."""
    layout = played.layout
    total, carried, by_old = (np.zeros(layout.size) for _ in range(3))
    before = masks_after(played, 2)
    for (kind, round_, client), payload in played.grid.got:
        if (kind, round_) == ("train", 3):
            state, mask = BitmapAndValues().decode(payload.arrays, layout)
            samples = int(payload.metadata["samples"])
            total += samples * layout.flatten(state)
            carried += samples * mask.transmitted
            by_old += samples * before[client].transmitted
    old, new = (layout.flatten(state) for state in played.states[2:])
    assert np.allclose(new, np.where(carried > 0, total / np.maximum(carried, 1), old), rtol=1e-5, atol=1e-7)
    assert ((carried != by_old) & (carried > 0)).sum() > 1000  # the cases that tell them apart occur
    assert (carried == 0).sum() > 100


def test_a_client_is_tested_with_its_own_part_of_the_global_model(played: Played) -> None:
    shop = played.runtime
    for client, mask in enumerate(played.strategy.masks):
        load_state(shop.model, mask.apply(played.strategy.state))
        _, accuracy = shop.trainer.evaluate(shop.model, shop.data.test.take(shop.partition.test[client]))
        assert played.strategy.personal_accuracy[client] == accuracy
    assert played.records[-1]["local_accuracy_mean"] is None


def test_bytes(played: Played) -> None:
    def model(mask: Mask) -> int:
        return 4 * (mask.count + REST)

    for record in played.records[1:]:
        before, after = (masks_after(played, record["round"] - late) for late in (1, 0))
        assert record["bytes_train_down"] == sum(model(before[client]) for client in record["cohort"])
        assert record["bytes_train_up"] == sum(model(after[client]) + BITMAP for client in record["cohort"])
        assert record["bytes_evaluate_down"] == sum(map(model, after))
        assert record["bytes_mask_down"] == record["bytes_peer"] == 0  # who made a mask has it


def test_a_client_that_forgot_its_mask_gets_it_back(played: Played) -> None:
    client = twice(played)
    forgetful = play(base(played), faults={("train", 2, client): forget})
    assert forgetful.bits() == played.bits()
    assert forgetful.records[2]["bytes_mask_down"] == BITMAP


def test_a_client_whose_answer_was_lost_goes_back_to_its_old_mask(played: Played) -> None:
    """Whether the message or only its answer was lost, the run is the same; the mask is sent again."""

    def lose_answer(grid: Any, message: Any) -> Any:
        grid.work(message)
        return answer_error(5)(grid, message)

    where = ("train", 2, twice(played))
    lost, never = (play(base(played), faults={where: fault}) for fault in (lose_answer, answer_error(5)))
    assert lost.bits() == never.bits()
    assert lost.strategy.personal_accuracy == never.strategy.personal_accuracy
    assert (lost.records[2]["bytes_mask_down"], never.records[2]["bytes_mask_down"]) == (BITMAP, 0)


def test_goes_on_from_a_snapshot_with_masks_that_have_shrunk(played: Played, tmp_path: Path) -> None:
    from flwr.app import ArrayRecord

    keys = base(played) | {"run.checkpoint-every": 1}
    half = play(keys, folder=tmp_path, until=2)
    assert half.strategy.densities()[0] < 1
    again = REGISTRY[played.strategy.name](ServerContext(half.layout, half.strategy.settings, folder=tmp_path))
    again.load_state_dict(2, {name: array.copy() for name, array in half.strategy.state_dict().items()})
    finished = Played(again, half.runtime, half.grid)
    again.callback = finished
    again.start(half.grid, ArrayRecord(half.runtime.initial_state()), 3)
    assert finished.bits() == played.bits()
    assert again.mask_for(0) == played.strategy.mask_for(0)
    assert again.personal_accuracy == played.strategy.personal_accuracy


def with_bits(change: Any) -> Any:
    """Change the mask of a reply, and bring as many values as it then needs."""

    def tampered(payload: Payload) -> Payload:
        bits = np.unpackbits(payload.arrays["mask"])
        change(bits)
        values = np.zeros(int(bits.sum()) + REST, dtype=np.float32)
        return Payload({"values": values, "mask": np.packbits(bits)}, payload.metadata)

    return tamper(tampered)


def kill(bits: Any) -> None:
    bits[np.flatnonzero(bits)[LEAST - 1 :]] = 0


def test_a_bad_reply_is_refused_by_name_and_the_others_go_on(played: Played) -> None:
    cohort, only = played.records[2]["cohort"], f"masks of {played.strategy.name} only shrink"
    two = sorted(set(played.records[1]["cohort"]) & set(cohort))[:2]
    for faults in (
        {
            "a mask has 7631 alive weights; mask.density leaves at least 7632": with_bits(kill),
            f"dead weights back; {only}": with_bits(lambda bits: bits.fill(1)),
        },
        {
            "no array 'mask'": tamper(lambda p: Payload({"values": p.arrays["values"]}, p.metadata)),
            "values has length": tamper(
                lambda p: Payload({**p.arrays, "values": p.arrays["values"][1:]}, p.metadata)
            ),
        },
    ):
        scripted = {("train", 2, client): fault for client, fault in zip(two, faults.values(), strict=True)}
        broken = play(base(played), faults=scripted, until=2)
        for client, reason in zip(two, faults, strict=True):
            assert reason in broken.records[2]["refused"][str(client)]
            assert broken.strategy.mask_for(client) == masks_after(played, 1)[client]
        assert broken.records[2]["ok"] == [client for client in cohort if client not in two]


def test_lossy_values_cost_less(played: Played) -> None:
    learns: Flat = {"local.batch-size": 16, "local.lr": 0.2}
    lossy = play(base(played) | learns | {"wire.up-values": "bf16", "wire.down-values": "fp16"})
    for record in lossy.records[1:]:
        before, after = (masks_after(lossy, record["round"] - late) for late in (1, 0))
        assert record["bytes_train_down"] == sum(2 * (before[client].count + REST) for client in record["cohort"])
        assert record["bytes_train_up"] == sum(
            2 * (after[client].count + REST) + BITMAP for client in record["cohort"]
        )
    assert lossy.records[-1]["personal_accuracy_mean"] > 0.5
