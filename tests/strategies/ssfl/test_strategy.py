"""SSFL and its controls: what each mask is, on a real model."""

import math

import numpy as np
import pytest

from ssfl_app.config import Flat
from ssfl_app.sparsity.mask import Mask
from tests.in_process_grid import Played, play

pytestmark = pytest.mark.narrow

ONE: Flat = {"run.rounds": 1, "run.evaluate-every": 1}


def mask(**keys: bool | int | float | str) -> Mask:
    return played(**keys).strategy.mask


def played(**keys: bool | int | float | str) -> Played:
    return play({**ONE, **{key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}})


def per_layer(m: Mask) -> list[int]:
    return [alive for _, alive, _ in m.layers()]


def test_shuffled_has_the_density_of_ssfl_in_each_layer_and_other_weights() -> None:
    ssfl, shuffled = mask(strategy="ssfl"), mask(strategy="shuffled")
    assert per_layer(shuffled) == per_layer(ssfl)
    # Two independent masks of density d in one layer differ in 2 d (1 - d) of it, far from 0.
    expected = sum(2 * a * (1 - a / n) for _, a, n in ssfl.layers()) / ssfl.layout.prunable_size
    assert ssfl.hamming(shuffled) == pytest.approx(expected, rel=0.05)


def test_random_spreads_over_all_layers_or_has_the_exact_count_in_each() -> None:
    over_all, in_each = mask(strategy="random"), mask(strategy="random", mask__scope="layer")
    sizes = [size for _, _, size in over_all.layers()]
    assert over_all.count == math.floor(0.2 * sum(sizes))
    assert per_layer(in_each) == [math.floor(0.2 * size) for size in sizes]
    assert per_layer(over_all) != per_layer(in_each)
    for alive, size in zip(per_layer(over_all), sizes, strict=True):
        assert abs(alive - 0.2 * size) < 5 * math.sqrt(0.16 * size)


def test_ssfl_ranks_all_layers_together_unless_told_otherwise() -> None:
    sizes = np.array([size for _, _, size in mask(strategy="ssfl").layers()])
    density = np.array(per_layer(mask(strategy="ssfl"))) / sizes
    assert density.max() > 2 * density.min()
    assert per_layer(mask(strategy="ssfl", mask__scope="layer")) == [math.floor(0.2 * size) for size in sizes]


def test_a_floor_keeps_weights_in_each_layer_and_the_total() -> None:
    low = mask(strategy="ssfl", mask__density=0.02)
    floored = mask(strategy="ssfl", mask__density=0.02, mask__min_per_layer=130)
    assert min(per_layer(low)) < 130 <= min(per_layer(floored))
    assert low.count == floored.count


def test_only_a_share_of_the_clients_is_asked() -> None:
    run = played(strategy="ssfl", ssfl__saliency_share=0.5)
    asked = run.records[0]["asked"]
    assert len(asked) == 3
    assert [client for kind, _, client in sorted(run.grid.log) if kind == "query.saliency"] == asked
    assert run.strategy.mask != mask(strategy="ssfl")


def test_more_minibatches_bring_the_mask_nearer_to_that_of_all_images() -> None:
    # 240 images a client: 15 minibatches of 64 see most of them, and some several times.
    whole = mask(strategy="ssfl", ssfl__saliency_batches=15)
    few, more = (mask(strategy="ssfl", ssfl__saliency_batches=n, run__seed=1) for n in (1, 4))
    assert more.hamming(whole) < few.hamming(whole)


def test_weighting_by_samples_and_uniform_differ_where_clients_do() -> None:
    unequal = {"strategy": "ssfl", "partition__name": "dirichlet-class"}
    assert mask(**unequal) != mask(**unequal, ssfl__saliency_weighting="uniform")
    assert played(**unequal).bits() != played(**unequal, run__weighting="uniform").bits()


def test_a_training_round_carries_the_alive_values_and_the_dense_remainder_and_nothing_else() -> None:
    run = played(strategy="ssfl")
    # 0.2 * 38,160 prunable weights are alive; 170 biases and norm weights are dense. Four clients train.
    assert run.records[1]["bytes_train_down"] == run.records[1]["bytes_train_up"] == 4 * 4 * (7632 + 170)
    assert run.records[1]["bytes_mask_down"] == 6 * 4770


def test_the_mask_is_found_before_round_1_and_kept() -> None:
    run = play({"strategy": "ssfl"})
    digests = {payload.metadata["digest"] for where, payload in run.grid.sent if where[0] in ("train", "evaluate")}
    assert digests == {run.strategy.mask.digest}


@pytest.mark.parametrize("values", ["fp16", "bf16", "int8"])
def test_lossy_values_on_the_wire_learn_and_cost_less(values: str) -> None:
    exact = play({"strategy": "ssfl", "local.epochs": 2})
    lossy = play({"strategy": "ssfl", "local.epochs": 2, "wire.down-values": values, "wire.up-values": values})
    last = lossy.records[-1]
    assert abs(last["central_accuracy"] - exact.records[-1]["central_accuracy"]) < 0.05
    ratio = exact.records[-1]["bytes_train_up"] / last["bytes_train_up"]
    assert ratio == pytest.approx({"fp16": 2, "bf16": 2, "int8": 4}[values], rel=0.01)
