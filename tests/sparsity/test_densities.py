"""Counts of each layer: the published figures of ERK, and sums that are exact."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.sparsity.densities import erk, rescaled, uniform
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import keep_count
from ssfl_app.training.models import ModelOptions, outline

law = settings(deadline=None, derandomize=True, max_examples=80)

LAYOUT = Layout(
    (("a.weight", (10, 10)), ("a.bias", (10,)), ("b.weight", (20, 10, 3, 3)), ("c.weight", (4, 20))),
    ("a.weight", "b.weight", "c.weight"),
)


def resnet18(norm="group"):
    return Layout.of(outline(ModelOptions(name="resnet18", norm=norm), (3, 8, 8), 10))


def sizes(layout):
    return {name: math.prod(shape) for name, shape in layout.shapes if name in layout.prunable}


def published(layout, density, dense):
    """DisPFL's calculate_sparsities and init_masks, as they are written, over every tensor of the state."""
    dense = set(dense)
    while True:
        divisor, rhs, raw = 0.0, 0.0, {}
        for name, shape in layout.shapes:
            count = np.prod(shape)
            if name in dense:
                rhs -= count * (1 - density)
            else:
                rhs += count * density
                raw[name] = np.sum(shape) / np.prod(shape)
                divisor += raw[name] * count
        if not raw:
            break
        epsilon = rhs / divisor
        if max(raw.values()) * epsilon <= 1:
            break
        dense |= {name for name in raw if raw[name] == max(raw.values())}
    sparsities = {name: 0.0 if name in dense else 1 - epsilon * raw[name] for name, _ in layout.shapes}
    return {name: int((1 - sparsities[name]) * np.prod(shape)) for name, shape in layout.shapes}


@st.composite
def layouts(draw):
    shapes, prunable = [], []
    for i in range(draw(st.integers(1, 5))):
        rank = draw(st.sampled_from([2, 4]))
        shapes.append((f"{i}.weight", tuple(draw(st.integers(1, 9)) for _ in range(rank))))
        prunable.append(f"{i}.weight")
        if draw(st.booleans()):
            shapes.append((f"{i}.bias", (draw(st.integers(1, 3)),)))
    return Layout(tuple(shapes), tuple(prunable))


# ---- uniform --------------------------------------------------------------------------------------


def test_uniform_is_the_floor_in_each_layer():
    assert uniform(LAYOUT, 0.29) == {"a.weight": 29, "b.weight": 522, "c.weight": 23}
    with pytest.raises(ValueError, match=r"density is 1\.5"):
        uniform(LAYOUT, 1.5)


# ---- ERK ------------------------------------------------------------------------------------------


def test_erk_at_one_half_has_the_published_figures_of_resnet18():
    layout = resnet18()
    assert (len(layout.shapes), layout.size - layout.prunable_size) == (62, 9_610)
    counts, size = erk(layout, 0.5), sizes(layout)
    assert list(counts) == list(layout.prunable)
    assert sum(counts.values()) + 9_610 == 5_586_977
    sparse = {name: round(counts[name] / size[name], 4) for name in counts if counts[name] < size[name]}
    assert sparse == {
        "layer3.0.conv2.weight": 0.7197,
        "layer3.1.conv1.weight": 0.7197,
        "layer3.1.conv2.weight": 0.7197,
        "layer4.0.conv1.weight": 0.5377,
        "layer4.0.conv2.weight": 0.3578,
        "layer4.1.conv1.weight": 0.3578,
        "layer4.1.conv2.weight": 0.3578,
    }
    assert 62 - len(sparse) == 55  # tensors that are dense


def test_erk_at_a_twentieth_has_the_published_figures_of_resnet18():
    layout = resnet18()
    size, counts = sizes(layout), erk(layout, 0.05)
    density = {name: counts[name] / size[name] for name in counts}
    dense = {name for name in density if density[name] == 1}
    assert dense == {"conv1.weight", "layer2.0.downsample.0.weight", "fc.weight"}
    for name in density:
        if name.startswith("layer1"):
            assert round(density[name], 3) == 0.229
        if name.startswith("layer4") and "conv" in name:
            wanted = 0.0413 if name == "layer4.0.conv1.weight" else 0.0275
            assert round(density[name], 4) == wanted


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.5, 0.8, 0.95])
def test_erk_agrees_with_the_published_code_which_is_told_of_no_dense_tensor(norm, density):
    layout = resnet18(norm)
    theirs = published(layout, density, ())
    assert erk(layout, density) == {name: theirs[name] for name in layout.prunable}
    assert all(theirs[name] == math.prod(shape) for name, shape in layout.shapes if name not in layout.prunable)


def test_erk_by_hand():
    # raw * size is the sum of the shape: 20, 36, 24. Of 1990 coordinates 199 live, 10 are the bias: 189 for 80, so
    # the factor is 2.3625: 47.25 of 100, 85.05 of 1800, 56.7 of 80.
    assert erk(LAYOUT, 0.1) == {"a.weight": 47, "b.weight": 85, "c.weight": 56}
    # 398 live, 388 for 80, factor 4.85: a would have 97 of 100, c 116.4 of 80. With c dense 308 are left for 56,
    # factor 5.5: a would have 110. With a dense too, 208 are left for b.
    assert erk(LAYOUT, 0.2) == {"a.weight": 100, "b.weight": 208, "c.weight": 80}


@given(layouts(), st.integers(1, 100))
@law
def test_erk_is_the_published_loop_with_the_other_tensors_dense(layout, hundredths):
    density, size = hundredths / 100, sizes(layout)
    rest = layout.size - layout.prunable_size
    if hundredths * layout.size < 100 * rest:
        with pytest.raises(ValueError, match=rf"density is {density}; with {rest} of {layout.size} coordinates"):
            erk(layout, density)
        return
    counts = erk(layout, density)
    theirs = published(layout, density, {name for name, _ in layout.shapes if name not in layout.prunable})
    assert all(abs(counts[name] - theirs[name]) <= 1 for name in counts)  # their floors are of floating point
    assert all(0 <= counts[name] <= size[name] for name in counts)
    short = hundredths * layout.size - 100 * (rest + sum(counts.values()))
    assert 0 <= short < 100 * len(counts)


def test_erk_at_density_one_is_dense():
    assert erk(LAYOUT, 1) == sizes(LAYOUT)


def test_erk_names_the_smallest_density_that_the_dense_tensors_leave():
    layout = resnet18()
    with pytest.raises(ValueError, match=r"density is 0\.0008; with 9610 of 11173962 .* at least 0\.000861"):
        erk(layout, 0.0008)
    assert sum(erk(layout, 0.000861).values()) > 0  # 10 coordinates are left
    with pytest.raises(ValueError, match=r"density is 0\.0;"):
        erk(layout, 0.0)


# ---- rescaled -------------------------------------------------------------------------------------


def three(*lengths):
    return Layout(
        tuple((str(i), (length, 1)) for i, length in enumerate(lengths)), tuple(map(str, range(len(lengths))))
    )


@pytest.mark.parametrize(
    ("lengths", "shares", "density", "counts"),
    [
        ((100, 100, 200), (0.1, 0.2, 0.05), 0.2, (20, 40, 20)),  # 40 alive at factor 1, 80 are wanted
        ((100, 100, 200), (10, 20, 5), 0.2, (20, 40, 20)),  # only the proportions count
        ((100, 100, 100), (0.2, 0.1, 0.1), 0.7, (100, 55, 55)),  # 105 of the first do not fit
        ((10, 10, 10), (4, 2, 1), 0.8, (10, 9, 5)),  # 13.7 of 10; then 14 as 2 : 1, 9.33 and 4.67
        ((100, 40, 40), (8, 3, 1), 0.9, (100, 40, 22)),  # the second is full once the first is: 46.5 of 40
        ((3, 3, 3), (1, 1, 1), 0.5, (2, 1, 1)),  # 4 of 9: a tie
        ((5, 3, 7), (1, 1, 1), 0.5, (2, 2, 3)),  # 2.33, 1.4, 3.27 of 7: the second has the largest remainder
        ((10, 10, 10), (0, 1, 1), 0.5, (0, 8, 7)),
        ((10, 10, 10), (0, 0, 0.001), 0.9, (0, 0, 10)),  # 27 are wanted; 10 can live
        ((10, 10, 10), (0, 0, 0), 0.5, (0, 0, 0)),
        ((10, 10, 10), (1e-300, 5, 1e300), 1, (10, 10, 10)),
    ],
)
def test_rescaled_by_hand(lengths, shares, density, counts):
    layout = three(*lengths)
    got = rescaled(layout, dict(zip(layout.prunable, shares, strict=True)), density)
    assert list(got.items()) == list(zip(layout.prunable, counts, strict=True))


@given(layouts(), st.integers(1, 100), st.data())
@law
def test_rescaled_is_exact_and_within_one_coordinate_of_the_common_factor(layout, hundredths, data):
    share = st.one_of(st.sampled_from([0.1, 0.5, 1.0]), st.floats(1e-3, 1))
    shares = {name: data.draw(share) for name in layout.prunable}
    size, counts = sizes(layout), rescaled(layout, shares, hundredths / 100)
    total = hundredths * layout.prunable_size // 100
    assert sum(counts.values()) == total == keep_count(hundredths / 100, layout.prunable_size)
    low, high = 0.0, 2000.0  # at 1000 every layer is dense
    for _ in range(100):
        factor = (low + high) / 2
        alive = sum(min(factor * shares[name], 1) * size[name] for name in size)
        low, high = (factor, high) if alive < total else (low, factor)
    for name in counts:
        assert abs(counts[name] - min(high * shares[name], 1) * size[name]) < 1 + 1e-6
        assert counts[name] <= size[name]


@pytest.mark.parametrize(
    ("shares", "density", "message"),
    [
        ({"0": 1, "1": 1}, 0.5, r"\['2'\] do not match"),
        ({"0": 1, "1": 1, "2": 1, "x": 1}, 0.5, r"\['x'\] do not match"),
        ({"0": 1, "1": float("nan"), "2": 1}, 0.5, "share of 1 is nan; it must be finite and at least 0"),
        ({"0": 1, "1": float("inf"), "2": 1}, 0.5, "share of 1 is inf"),
        ({"0": 1, "1": 1, "2": -0.1}, 0.5, r"share of 2 is -0\.1"),
        ({"0": 1, "1": 1, "2": 1}, 0, "density is 0"),
    ],
)
def test_rescaled_refuses_what_is_no_share(shares, density, message):
    with pytest.raises(ValueError, match=message):
        rescaled(three(3, 4, 5), shares, density)
