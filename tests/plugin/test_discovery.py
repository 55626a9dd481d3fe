"""The masks of SSFL(mask=..., criterion=...): those that the strategies of `ssfl run` give, bit for bit."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message
from flwr.serverapp.strategy import FedAdam
from torch import nn
from torch.nn.utils import parametrizations

from ssfl_app import SSFL, SparseMod, TopK
from ssfl_app.locks import RunFailed
from ssfl_app.plugin.gradients import under_mask
from ssfl_app.seeding import generator
from ssfl_app.simulation.in_process import InlineGrid
from ssfl_app.sparsity.densities import rescaled
from ssfl_app.sparsity.dynamic import layer_densities, random_mask
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.saliency import pooled_snip
from ssfl_app.strategies.flash import evolved
from tests.plugin.test_rounds import ForeignGrid, Seen, data, direct_mask, fit, foreign_app, net, play, tensors
from tests.plugin.test_strategy import TWO, Tables, tables_app

LAYOUT = Layout.of(net())


def two(rounds: int = 0, app: Any = None, faults: Any = None, **arguments: Any) -> tuple[SSFL, Any]:
    """Play with two nodes, of 60 and 70 examples."""
    strategy = SSFL(density=0.25, seed=3, **{"fraction_evaluate": 0.0, **arguments})
    return play(strategy=strategy, rounds=rounds, grid=ForeignGrid(app or foreign_app(), 2, faults=faults))


# ---- masks that are drawn ----------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_random_mask_is_that_of_the_strategy_random(scope: Any) -> None:
    strategy, result = two(mask="random", scope=scope, rounds=1)
    assert strategy.mask == Mask.random(LAYOUT, 0.25, generator(3, "random-mask"), scope)
    assert all(
        (t[~strategy.mask.tensors()[n]] == 0).all() for n, t in tensors(result.arrays).items() if "weight" in n
    )


def test_shuffled_is_the_mask_of_ssfl_permuted_in_each_layer() -> None:
    strategy, _ = two(mask="shuffled")
    found = direct_mask("samples", 1, 0.25, TWO)
    assert strategy.mask == found.shuffle(generator(3, "shuffle")) != found


def test_a_mask_that_is_drawn_costs_a_minibatch_and_no_training() -> None:
    seen: Seen = []
    two(app=foreign_app(seen), mask="random")
    assert [what for what, _, _ in seen] == ["given"] * 2


def test_another_strategy_may_aggregate_in_a_random_mask() -> None:
    strategy = SSFL(density=0.25, mask="random", inner=FedAdam(fraction_evaluate=0.0))
    play(strategy=strategy, rounds=1, grid=ForeignGrid(foreign_app(), 2))
    assert strategy.mask.count == 44
    assert strategy.history[1]["bytes_train_up"] == 2 * 4 * (44 + 19)


# ---- criteria ----------------------------------------------------------------------------------------


def gradient(partition: int) -> np.ndarray:
    model, (x, y) = net(), data(partition)
    nn.functional.cross_entropy(model(x[:20]), y[:20]).backward()
    return LAYOUT.flatten_prunable({name: p.grad for name, p in model.named_parameters()})  # type: ignore[misc]


def pooled() -> Mask:
    mean = (60 * gradient(0).astype(np.float64) + 70 * gradient(1)) / 130
    return Mask.top(LAYOUT, pooled_snip(mean.astype(np.float32), LAYOUT.flatten_prunable(net().state_dict())), 0.25)


def test_pooled_snip_takes_the_magnitude_of_the_mean_gradient() -> None:
    strategy, _ = two(criterion="pooled-snip")
    assert strategy.mask == pooled() != direct_mask("samples", 1, 0.25, TWO)


def test_a_function_of_the_user_tells_gradients_for_pooled_snip_but_no_scores() -> None:
    def told(message: Any, context: Any) -> Any:
        partition = int(context.node_config["partition-id"])
        spans = LAYOUT.prunable_spans.items()
        shapes = dict(LAYOUT.shapes)
        return {n: gradient(partition)[span].reshape(shapes[n]) for n, span in spans}, len(data(partition)[0])

    strategy, _ = two(app=foreign_app(mods=[SparseMod(told)]), criterion="pooled-snip")
    assert strategy.mask == pooled()
    with pytest.raises(RunFailed, match=r'returns="scores"\) tells scores; criterion "pooled-snip" takes gradients'):
        two(app=foreign_app(mods=[SparseMod(told, returns="scores")]), criterion="pooled-snip")


def test_magnitude_ranks_the_initial_weights() -> None:
    strategy, _ = two(criterion="magnitude")
    assert strategy.mask == Mask.top(LAYOUT, abs(LAYOUT.flatten_prunable(net().state_dict())), 0.25)


# ---- FLASH -------------------------------------------------------------------------------------------


def stage(place: int, masked: bool) -> tuple[np.ndarray, Mask]:
    """Return the layer densities that a node ends with after three trainings, and its last mask."""
    mask, model = Mask.random(LAYOUT, 0.25, generator(3, "flash-start")), net()
    rng = generator(3, "flash-stage", 0, place)
    for done in range(3):
        if done:
            magnitudes = abs(LAYOUT.flatten_prunable(model.state_dict()))
            mask = evolved(mask, magnitudes, Fraction(1, 2) * (1 - Fraction(done, 3)), rng)
        model.load_state_dict(mask.apply(model.state_dict()))
        with under_mask(mask):
            fit(model, place, masked)
        model.load_state_dict(mask.apply(model.state_dict()))
    return np.array(list(layer_densities(mask).values())), mask


@pytest.mark.parametrize("masked", [True, False])
def test_flash_learns_layer_densities_by_calls_of_the_train_function(masked: bool) -> None:
    seen: Seen = []
    app = foreign_app(seen, masked=masked)
    strategy, result = two(app=app, mask="flash", stage_clients=1.0, stage_epochs=3, prune_rate=0.5)
    shares = (60 * stage(0, masked)[0] + 70 * stage(1, masked)[0]) / 130
    counts = rescaled(LAYOUT, dict(zip(LAYOUT.prunable, shares.astype(np.float32).tolist(), strict=True)), 0.25)
    assert strategy.mask == random_mask(LAYOUT, counts, generator(3, "flash-mask"))
    assert len([what for what, _, _ in seen if what == "trained"]) == 2 * 3
    masked_initial = strategy.mask.apply(net().state_dict())  # stage 2 starts from the initial weights
    assert all(torch.equal(t, masked_initial[name]) for name, t in tensors(result.arrays).items())
    bytes_ = 4 * (LAYOUT.prunable_size + len(LAYOUT.prunable))  # a score a weight, and a density a layer
    assert strategy.history[0]["bytes_discovery_up"] == 2 * bytes_


@pytest.mark.parametrize(
    ("densities", "reason"),
    [
        ([1.0, 1.0], "add up to 176 alive weights; sparse learning keeps 44"),
        ([-1.0, 1.0], "are from -1 to 1"),
        ([np.nan, 0.5], "not finite|NaN"),
        ([0.1, 0.1, 0.1], "at most 2|length"),
    ],
)
def test_layer_densities_that_cannot_be_are_refused_by_name(densities: list[float], reason: str) -> None:
    def lie(grid: ForeignGrid, message: Message) -> Message:
        reply = grid.work(message)
        values = np.array(densities, dtype=np.float32)
        array = Array("float32", values.shape, "ssfl.raw.v1", values.tobytes())
        reply.content["arrays"] = ArrayRecord({"values": array})
        return reply

    faults = {("layer_densities", 0, 1): lie}
    with pytest.raises(RunFailed, match=rf"1 of 2 nodes.*{reason}"):
        two(faults=faults, mask="flash", stage_clients=1.0, stage_epochs=2, min_ok_fraction=1.0)


@pytest.mark.parametrize(
    "strategy", [SSFL(density=0.5, mask="flash", stage_epochs=2), TopK(0.5), SSFL(mask="random")]
)
def test_a_tied_tensor_is_one_whatever_the_rule(strategy: SSFL) -> None:
    grid = InlineGrid(tables_app(), {}, {7: 0, 8: 1, 9: 2})
    result = strategy.start(grid, ArrayRecord(Tables().state_dict()), num_rounds=2)
    assert strategy.history[0]["ties"] == {"head.weight": "wte.weight"}
    assert strategy.mask.alive.size == 24
    state = tensors(result.arrays)
    assert torch.equal(state["wte.weight"], state["head.weight"])


# ---- arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"mask": "topk"}, "mask is 'topk'; it is one of ssfl, random, shuffled, flash"),
        ({"criterion": "grasp"}, "criterion is 'grasp'; it is one of snip, pooled-snip, gradient, magnitude"),
        ({"criterion": "synflow"}, "criterion is 'synflow'"),
        ({"criterion": "force"}, "criterion is 'force'"),
        ({"mask": "random", "criterion": "magnitude"}, "criterion is 'magnitude'; mask 'random' does not read it"),
        ({"mask": "random", "min_per_layer": 2}, "min_per_layer is 2; mask 'random' does not read it"),
        ({"mask": "flash", "scope": "layer"}, "scope is 'layer'; mask 'flash' does not read it"),
        ({"prune_rate": 0.5}, "prune_rate is 0.5; mask 'ssfl' does not read it"),
        ({"mask": "flash", "stage_clients": 2.0}, r"stage_clients is 2.0; it is a fraction in \(0, 1\]"),
        ({"mask": "flash", "stage_epochs": 1}, "stage_epochs is 1; it is at least 2"),
        ({"mask": "flash", "stage_epochs": 2.5}, "stage_epochs is 2.5; it is a number of at least 1"),
    ],
)
def test_what_a_mask_does_not_read_or_the_plug_in_cannot_is_refused_at_once(arguments: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}"):
        SSFL(**arguments)


def test_chance_does_not_empty_the_rows_of_a_weight_norm() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 3))
    app = foreign_app()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.plugin.test_rounds.net", lambda norm=False: model)
        with pytest.raises(
            ValueError, match=r"original1'\] have a weight norm, and this mask may leave a row no weight"
        ):
            two(app=app, mask="random")
