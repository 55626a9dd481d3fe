"""Sub-FedAvg: when a client adopts a smaller mask. What comes of it is in test_shrinking.py."""

import numpy as np
import pytest

from ssfl_app.config import Flat
from ssfl_app.options import ConfigError
from ssfl_app.sparsity.codec import BitmapAndValues
from ssfl_app.sparsity.layout import Layout, load_state
from ssfl_app.sparsity.mask import Mask
from ssfl_app.strategies.subfedavg import mean_distance
from tests import oracles
from tests.in_process_grid import Played, play

pytestmark = pytest.mark.narrow

ONE: Flat = {"strategy": "subfedavg", "subfedavg.step": 0.2, "local.epochs": 2, "run.rounds": 1}


def replies(played: Played) -> dict[int, tuple[oracles.State, Mask]]:
    got = {client: payload.arrays for (kind, _, client), payload in played.grid.got if kind == "train"}
    return {client: BitmapAndValues().decode(arrays, played.layout) for client, arrays in sorted(got.items())}


def smaller(layout: Layout, state: oracles.State, share: float) -> Mask:
    """Return the dense mask without the smallest weights, by sorting each layer."""
    alive = np.ones(layout.prunable_size, dtype=np.bool_)
    size = np.abs(layout.flatten_prunable(state))
    for span in layout.prunable_spans.values():
        order = np.argsort(size[span], kind="stable")
        alive[span.start + order[: int(share * (span.stop - span.start))]] = False
    return Mask(layout, alive)


def test_the_distance_by_hand() -> None:
    """The mean of 1/4 and 3/4, not the 7 of 20 that differ: small layers count as much as large ones."""
    layout = Layout((("a", (1, 16)), ("b", (1, 4))), ("a", "b"))
    one = np.ones(20, dtype=np.bool_)
    other = one.copy()
    other[[0, 1, 2, 3, 16, 17, 18]] = False
    assert mean_distance(Mask(layout, one), Mask(layout, other)) == 0.5
    assert mean_distance(Mask(layout, one), Mask(layout, one)) == 0


def test_it_prunes_the_smallest_of_each_layer_after_training() -> None:
    played = play(ONE | {"subfedavg.accuracy": 0.1})
    dense = replies(play(ONE | {"subfedavg.distance": 1.0}))
    for client, (state, mask) in replies(played).items():
        assert [alive for _, alive, _ in mask.layers()] == [144 - 28, 4608 - 921, 32768 - 6553, 640 - 128]
        trained, whole = dense[client]
        assert whole.count == 38160
        assert mask == smaller(played.layout, trained, 0.2)
        # The weights are those after training; biases and norms are not pruned.
        after = mask.apply(trained)
        assert all((state[name] == after[name]).all() for name in state)


def test_a_mask_is_adopted_if_it_moved_between_the_first_and_the_last_epoch() -> None:
    probe = play(ONE)
    shop, layout, w0 = probe.runtime, probe.layout, oracles.initial_weights(probe.runtime)
    moved = {}
    for client in probe.records[1]["cohort"]:
        early, late = (
            smaller(layout, oracles.train_locally(shop, w0, {}, 1, client, epochs), 0.2) for epochs in (1, 2)
        )
        moved[client] = mean_distance(early, late)
    low, high = sorted(moved.values())[1:3]
    assert low > 1e-4
    assert high > low + 1e-4  # well above what a rounding error moves
    halfway = play(ONE | {"subfedavg.distance": (low + high) / 2, "subfedavg.accuracy": 0.0})
    adopted = {client: mask.count < 38160 for client, (_, mask) in replies(halfway).items()}
    assert adopted == {client: distance >= high for client, distance in moved.items()}


def test_a_mask_is_adopted_if_the_pruned_model_is_good_on_the_training_images() -> None:
    """Which are not the test images: the published gate lets those choose the model."""
    dense = play(ONE | {"subfedavg.distance": 1.0})
    shop, accuracy = dense.runtime, {}
    for client, (trained, _) in replies(dense).items():
        load_state(shop.model, smaller(dense.layout, trained, 0.2).apply(trained))
        images = shop.data.train.take(shop.partition.train[client])
        accuracy[client] = shop.trainer.evaluate(shop.model, images)[1]
    low, high = sorted(accuracy.values())[1:3]
    assert low < high
    halfway = play(ONE | {"subfedavg.accuracy": (low + high) / 2})
    adopted = {client: mask.count < 38160 for client, (_, mask) in replies(halfway).items()}
    assert adopted == {client: known >= high for client, known in accuracy.items()}
    assert halfway.records[1]["validation_passes"] == sum(len(shop.partition.train[client]) for client in accuracy)
    assert dense.records[1]["validation_passes"] == 0  # asked only of masks that moved
    for client, (state, _) in replies(halfway).items():
        if not adopted[client]:  # it sends what it trained
            assert all((state[name] == replies(dense)[client][0][name]).all() for name in state)


@pytest.mark.parametrize(
    "keys", [{"subfedavg.accuracy": 1.0}, {"mask.density": 1.0}, {"local.epochs": 1}, {"subfedavg.distance": 1.0}]
)
def test_without_pruning_it_is_fedavg(keys: Flat) -> None:
    played = play(ONE | {"run.rounds": 2} | keys)
    fedavg = play({"strategy": "fedavg", "run.rounds": 2, "local.epochs": 2} | keys)
    assert played.strategy.densities() == (1.0, 1.0)
    assert played.bits() == fedavg.bits()


@pytest.mark.parametrize(("key", "value"), [("step", 0.0), ("step", 1.5), ("distance", -1.0), ("accuracy", -0.1)])
def test_options_are_checked(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"subfedavg\.{key} is"):
        play(ONE | {f"subfedavg.{key}": value})
