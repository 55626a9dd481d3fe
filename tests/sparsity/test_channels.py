"""Which channels stay: counts and widths by hand on a small network, exact budgets, and states that are slices."""

import numpy as np
import pytest
import torch
from torch import nn

from ssfl_app.sparsity.channels import (
    Cost,
    channel_ranks,
    check_widths,
    choose,
    first_units,
    level_ranks,
    narrow_layout,
    narrow_state,
    ranks_in_layers,
    unit_count,
    unit_scores,
    unit_spans,
    unread,
    whole_widths,
    widths_in,
    widths_of,
)
from ssfl_app.sparsity.layout import Layout, load_state, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.training.models import ModelOptions, create, outline
from ssfl_app.training.narrow import narrowed

# 3 -> 4 -> 2 -> 1: 12 + 8 + 2 weights that a mask covers, 7 biases.
MLP = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1))
SMALL = Layout.of(MLP)
# 1 -> 4 in 2 groups -> 1.
GROUPED = Layout.of(nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 1)))


def layout_of(name: str, norm: str = "group") -> Layout:
    return Layout.of(outline(ModelOptions(name=name, norm=norm), (3, 8, 8), 10))


def test_a_unit_scores_what_it_touches() -> None:
    scores = np.arange(22, dtype=np.float32)
    # Unit 0 of the first layer: row 0 of 0.weight (0, 1, 2) and column 0 of 2.weight (12, 16).
    assert unit_scores(SMALL, scores).tolist() == [31, 42, 53, 64, 12 + 13 + 14 + 15 + 20, 16 + 17 + 18 + 19 + 21]
    assert unit_scores(GROUPED, np.arange(8, dtype=np.float32)).tolist() == [0 + 1 + 4 + 5, 2 + 3 + 6 + 7]
    assert unit_spans(SMALL) == [slice(0, 4), slice(4, 6)]
    assert (unit_count(SMALL), unit_count(GROUPED)) == (6, 2)


def test_widths_of_a_small_network_by_hand() -> None:
    ranks, cost = np.array([9, 1, 8, 2, 5, 7], dtype=float), Cost(SMALL)
    # Widths (a, b) cost 3 a + a b + b; the whole network 22. The floor keeps units 0 and 5: (1, 1) costs 5.
    assert [cost.of(widths) for widths in ((1, 1), (2, 1), (2, 2), (3, 2), (4, 2))] == [5, 9, 12, 17, 22]
    for density, kept in (
        (0.25, [0, 5]),  # 5.5: a unit of the second layer more would cost 2
        (0.4, [0, 4, 5]),  # 8.8: unit 2, which ranks higher, would cost 9 and is passed over
        (0.41, [0, 2, 5]),  # 9.02
        (0.6, [0, 2, 4, 5]),  # 13.2
        (1.0, [0, 1, 2, 3, 4, 5]),
    ):
        found = choose(SMALL, ranks, density, cost)
        assert np.flatnonzero(found).tolist() == kept, density
    assert np.flatnonzero(choose(SMALL, ranks, 0.8, cost, floor=3)).tolist() == [0, 2, 3, 4, 5]
    with pytest.raises(
        ValueError, match=r"density is 0.1; the narrowest network costs 5 of 22, so it is at least 0.2273"
    ):
        choose(SMALL, ranks, 0.1, cost)


def test_multiplications_are_weights_by_how_often_they_are_used() -> None:
    cost = Cost(SMALL, {"0.weight": 10, "2.weight": 1, "4.weight": 1})
    assert [cost.of(widths) for widths in ((1, 1), (4, 2))] == [32, 130]
    assert np.flatnonzero(choose(SMALL, np.arange(6.0), 0.3, cost)).tolist() == [3, 4, 5]


@pytest.mark.parametrize("name", ["cnn", "conv4", "resnet18", "resnet50", "resnet20", "resnet110"])
@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_a_budget_is_kept_to_less_than_the_dearest_unit(name: str, norm: str) -> None:
    layout = layout_of(name, norm)
    ranks, cost = np.random.default_rng(3).random(unit_count(layout)), Cost(layout)
    for density in (0.5, 0.25):
        kept = choose(layout, ranks, density, cost)
        smaller = narrow_layout(layout, widths_of(layout, kept))
        budget = int(density * layout.prunable_size)
        assert cost.of(widths_of(layout, kept)) == smaller.prunable_size <= budget
        one_more = min(  # of what is left out nothing fits any more
            narrow_layout(layout, widths_of(layout, kept | (np.arange(kept.size) == unit))).prunable_size
            for unit in np.flatnonzero(~kept)[:: max(1, kept.size // 40)]
        )
        assert one_more > budget


def test_the_same_share_of_each_layer() -> None:
    layout = layout_of("resnet20", "batch")
    scores = np.random.default_rng(5).random(unit_count(layout)).astype(np.float32)
    kept = choose(layout, channel_ranks(layout, scores, "layer"), 0.3, Cost(layout))
    shares = [kept[span].mean() for span in unit_spans(layout)]
    assert max(shares) - min(shares) < 1 / 16 + 1e-9
    for span in unit_spans(layout):
        assert scores[span][kept[span]].min() > scores[span][~kept[span]].max()
    assert ranks_in_layers(SMALL, np.array([3, 3, 9, 1, 0, 0])).tolist() == [0.75, 0.5, 1, 0.25, 1, 0.5]


def test_a_unit_ranks_by_its_score_over_the_weights_that_it_touches() -> None:
    # 7 -> 4 -> 2 -> 1: a unit of the first layer touches 7 + 2 weights, one of the second 4 + 1.
    layout = Layout.of(nn.Sequential(nn.Linear(7, 4), nn.Linear(4, 2), nn.Linear(2, 1)))
    scores = np.array([9, 18, 27, 36, 5, 10], dtype=np.float32)
    assert channel_ranks(layout, scores, "global").tolist() == [1, 2, 3, 4, 1, 2]
    assert channel_ranks(layout, scores, "global", "flops").tolist() == level_ranks(layout, scores).tolist()
    assert level_ranks(layout, scores).tolist() == [0.4, 0.8, 1.2, 1.6, 2 / 3, 4 / 3]
    # Dead everywhere, a layer has scores of 0 and keeps its floor.
    for ranks in (
        channel_ranks(SMALL, np.zeros(6, np.float32), "global"),
        level_ranks(SMALL, np.zeros(6, np.float32)),
    ):
        assert not ranks.any()


def bits(*rows: str) -> np.ndarray:
    return np.array([digit == "1" for digit in "".join(rows)])


def test_what_nothing_reads_by_hand() -> None:
    # The last layer reads unit 1 of the second; that one reads units 0 and 2 of the first, which has nothing alive.
    found = unread(SMALL, bits("111", "111", "000", "111", "0101", "1010", "01"))
    assert found.kept.tolist() == [True, False, True, False, False, True]
    assert (found.channels, found.removed, found.in_groups, found.constant) == (6, 3, 0, 1)
    assert found.said().startswith("3 of 6 inner channels are read by nothing and left out; 0 more share")
    # Of a layer that nothing reads one unit is left.
    none = unread(SMALL, np.zeros(22, dtype=np.bool_))
    assert none.kept.tolist() == [True, False, False, False, True, False]
    assert unread(SMALL, np.ones(22, dtype=np.bool_)).kept.all()
    groups = unread(GROUPED, bits("1111", "0100"))
    assert (groups.kept.tolist(), groups.removed, groups.in_groups) == ([True, False], 2, 1)


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("name", ["cnn", "resnet20"])
def test_without_what_nothing_reads_the_outputs_are_the_same(name: str, norm: str) -> None:
    model = create(ModelOptions(name=name, norm=norm), (3, 8, 8), 5, seed=2)
    layout = Layout.of(model)
    mask = Mask.random(layout, 0.01, np.random.default_rng(1), "layer")
    load_state(model, mask.apply(state_of(model)))
    found = unread(layout, mask.alive)
    small = narrowed(model, layout, found.kept).eval()
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    assert found.removed > 0
    assert torch.allclose(small(x), model.eval()(x), atol=1e-5)


def test_a_state_is_a_slice() -> None:
    state, kept = state_of(MLP), np.array([True, False, False, True, False, True])
    small = narrow_state(SMALL, state, kept)
    assert torch.equal(small["0.weight"], state["0.weight"][[0, 3]])
    assert torch.equal(small["0.bias"], state["0.bias"][[0, 3]])
    assert torch.equal(small["2.weight"], state["2.weight"][[1]][:, [0, 3]])
    assert torch.equal(small["4.weight"], state["4.weight"][:, [1]])
    assert torch.equal(small["4.bias"], state["4.bias"])
    assert {name: tuple(t.shape) for name, t in small.items()} == dict(narrow_layout(SMALL, (2, 1)).shapes)
    assert small["4.bias"].data_ptr() != state["4.bias"].data_ptr()


def test_entries_of_a_channel_lie_together() -> None:
    flat = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 1))
    small = narrow_state(Layout.of(flat), state_of(flat), np.array([False, True]))
    assert torch.equal(small["2.weight"], flat[2].weight[:, 4:])


def test_widths_are_found_in_shapes() -> None:
    layout = layout_of("resnet18")
    widths = tuple(inner.together * (1 + place) for place, inner in enumerate(layout.inner))
    assert widths_in(layout, dict(narrow_layout(layout, widths).shapes)) == widths
    assert widths_in(layout, dict(layout.shapes)) == whole_widths(layout)
    assert widths_of(layout, first_units(layout, widths)) == widths
    shapes = dict(narrow_layout(layout, widths).shapes)
    with pytest.raises(ValueError, match="no narrower network"):
        widths_in(layout, shapes | {"layer1.0.conv2.weight": (64, 64, 3, 3)})
    with pytest.raises(ValueError, match="tensors are"):
        widths_in(layout, {"fc.weight": (10, 512)})


@pytest.mark.parametrize(
    ("widths", "why"),
    [
        ((2,), "there are 1 widths; this model has 2 inner layers"),
        ((0, 1), "the width of 0 is 0; it is 1 to 4 in steps of 1"),
        ((4, 3), "the width of 2 is 3; it is 1 to 2 in steps of 1"),
        ((-(2**31), 1), "the width of 0 is -2147483648"),
    ],
)
def test_widths_that_are_none(widths: tuple[int, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_widths(SMALL, widths)
    with pytest.raises(ValueError, match="in steps of 2"):
        check_widths(GROUPED, (3,))
