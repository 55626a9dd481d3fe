"""LotteryFL: when a client prunes, and that it then goes back to the start. The rest is in test_shrinking.py."""

from typing import Any

import numpy as np
import pytest
import torch

from ssfl_app.config import Flat
from ssfl_app.options import ConfigError
from ssfl_app.sparsity.codec import BitmapAndValues, MaskedValues, read_mask
from ssfl_app.sparsity.layout import load_state
from ssfl_app.sparsity.mask import Mask
from tests import oracles
from tests.in_process_grid import Played, play

pytestmark = pytest.mark.few

# Few steps a round, so that two float32 runs have little time to drift apart.
BASE: Flat = {"strategy": "lotteryfl", "local.batch-size": 64, "lotteryfl.accuracy": 0.45}


@pytest.fixture
def played() -> Played:
    return play(BASE)


def came_down(played: Played, round_: int, client: int) -> tuple[oracles.State, Mask]:
    """Return model and mask that a client was sent to train."""
    mask = Mask.dense(played.layout)
    for (kind, when, who), payload in played.grid.got:
        if kind == "train" and who == client and when < round_:
            mask = read_mask(payload.arrays, played.layout)
    sent = next(p for where, p in played.grid.sent if where == ("train", round_, client))
    return MaskedValues().decode(sent.arrays, played.layout, mask)


def came_up(played: Played, round_: int, client: int) -> tuple[oracles.State, Mask]:
    got = next(p for where, p in played.grid.got if where == ("train", round_, client))
    return BitmapAndValues().decode(got.arrays, played.layout)


def by_round(played: Played) -> list[tuple[int, int]]:
    return [(record["round"], client) for record in played.records[1:] for client in record["cohort"]]


def close(ours: oracles.State, theirs: oracles.State) -> bool:
    return all(torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5) for name in theirs)


def test_who_prunes_trains_from_the_initial_weights_and_who_does_not_goes_on(played: Played) -> None:
    """Biases and norms go back to the start as well."""
    shop = played.runtime
    w0, pruned = oracles.initial_weights(shop), 0
    for round_, client in by_round(played):
        down, old = came_down(played, round_, client)
        up, new = came_up(played, round_, client)
        start = down if new == old else new.apply(w0)
        assert close(up, oracles.train_locally(shop, start, new.tensors(), round_, client))
        pruned += new != old and round_ > 1
    assert 0 < pruned < 8


def test_the_smallest_fifth_of_each_layer_of_what_came_down_dies(played: Played) -> None:
    layout = played.layout
    for round_, client in by_round(played):
        down, old = came_down(played, round_, client)
        new = came_up(played, round_, client)[1]
        if new == old:
            continue
        size = np.abs(layout.flatten_prunable(down))
        for (_, before, _), (name, span) in zip(old.layers(), layout.prunable_spans.items(), strict=True):
            assert new.alive[span].sum() == before - before // 5, name
            died = old.alive[span] & ~new.alive[span]
            assert size[span][died].max() <= size[span][new.alive[span]].min()


def test_it_prunes_if_what_came_down_is_good_on_the_training_images(played: Played) -> None:
    """All of them, and not the test images: the published gate lets those choose the model."""
    shop = played.runtime
    for round_, client in by_round(played):
        down, old = came_down(played, round_, client)
        load_state(shop.model, down)
        _, accuracy = shop.trainer.evaluate(shop.model, shop.data.train.take(shop.partition.train[client]))
        assert (came_up(played, round_, client)[1] != old) == (accuracy > 0.45)
    for record in played.records[1:]:
        assert record["validation_passes"] == sum(len(shop.partition.train[client]) for client in record["cohort"])


@pytest.mark.parametrize("keys", [{"lotteryfl.accuracy": 1.0}, {"mask.density": 1.0}])
def test_without_pruning_it_is_fedavg(keys: Flat) -> None:
    lottery = play(BASE | {"run.rounds": 2} | keys)
    assert lottery.bits() == play(BASE | {"run.rounds": 2} | keys | {"strategy": "fedavg"}).bits()
    assert lottery.strategy.densities() == (1.0, 1.0)
    if "mask.density" in keys:
        assert lottery.records[1]["validation_passes"] == 0  # nobody looks if nothing can die


def test_a_client_that_makes_other_initial_weights_says_so() -> None:
    def other_weights(grid: Any, message: Any) -> Any:
        message.content["facts"]["weights"] = "0" * 64
        return grid.work(message)

    keys = BASE | {"lotteryfl.accuracy": 0.0, "run.rounds": 2}
    client = play(keys).records[2]["cohort"][0]
    played = play(keys, faults={("train", 2, client): other_weights})
    assert "here; they must be 0000000000000000" in played.records[2]["refused"][str(client)]


@pytest.mark.parametrize(("key", "value"), [("step", 0.0), ("step", 1.5), ("accuracy", -0.1)])
def test_options_are_checked(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"lotteryfl\.{key} is"):
        play(BASE | {f"lotteryfl.{key}": value})
