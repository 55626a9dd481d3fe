"""Codecs: what goes in comes out, at the bytes that the formulas say, and nothing malformed gets in."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssfl_app.sparsity.codec import CODECS, BitmapAndValues, BitmapOnly, Dense, Indexed, MaskedValues, nbytes
from ssfl_app.sparsity.layout import Layout, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import VALUE_TYPES

law = settings(deadline=None, derandomize=True, max_examples=60)

EDGES = [0.0, -0.0, 1e-45, -1e-45, 2.0**15, -(2.0**15), 1 / 3]
FLOATS = st.one_of(st.sampled_from(EDGES), st.floats(-(2.0**15), 2.0**15, width=32))
CARRIES_VALUES = [name for name in CODECS if name != "bits-only"]


@st.composite
def worlds(draw):
    """A layout with or without dense remainder, a state with zeros in it, and any mask, empty and full too."""
    shapes, prunable = [], []
    for i in range(draw(st.integers(1, 3))):
        rest = draw(st.sampled_from([(2,), (1,), (5,), (2, 3, 1)]))
        shapes.append((f"{i}.weight", (draw(st.integers(1, 4)), *rest)))
        prunable.append(f"{i}.weight")
        if draw(st.booleans()):
            shapes.append((f"{i}.bias", draw(st.sampled_from([(1,), (3,), ()]))))
    layout = Layout(tuple(shapes), tuple(prunable))
    sizes = {name: int(np.prod(shape)) for name, shape in shapes}
    state = {
        name: torch.tensor(draw(st.lists(FLOATS, min_size=sizes[name], max_size=sizes[name]))).view(shape)
        for name, shape in shapes
    }
    count = sum(sizes[name] for name in prunable)
    bits = draw(st.one_of(st.just([False] * count), st.just([True] * count), st.lists(st.booleans(), min_size=count)))
    return layout, state, Mask(layout, np.array(bits[:count], dtype=np.bool_))


def masked(layout, state, mask):
    """The state with dead weights at 0, by the mask's bits alone; 1-d arrays."""
    got, start = {}, 0
    for name, _ in layout.shapes:
        got[name] = state[name].numpy().reshape(-1).copy()
        if name in layout.prunable:
            got[name][~mask.alive[start : start + got[name].size]] = 0.0
            start += got[name].size
    return got


def assert_bits(layout, state, expected):
    assert [(name, tuple(tensor.shape)) for name, tensor in state.items()] == list(layout.shapes)
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        assert tensor.reshape(-1).numpy().tobytes() == expected[name].tobytes()


@pytest.mark.parametrize("name", CARRIES_VALUES)
@given(worlds())
@law
def test_what_is_encoded_is_decoded_bit_for_bit(name, world):
    layout, state, mask = world
    arrays = CODECS[name]().encode(layout, state, mask)
    assert all(array.ndim == 1 for array in arrays.values())
    CODECS[name]().check(arrays, layout, mask)
    got, told = CODECS[name]().decode(arrays, layout, mask)
    assert told == mask
    assert_bits(layout, got, masked(layout, state, mask))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("values", VALUE_TYPES)
@given(worlds())
@settings(law, max_examples=20)  # of each of 20 pairs
def test_what_is_encoded_is_allowed(name, values, world):
    """Whoever reads it says beforehand which arrays it may have, of which type and how long."""
    layout, state, mask = world
    allowed = CODECS[name](values).allowed(layout)
    arrays = CODECS[name](values).encode(layout, state, mask)
    assert set(arrays) == set(allowed)
    for key, array in arrays.items():
        assert array.dtype == np.dtype(allowed[key][0])
        assert array.size <= allowed[key][1]


@pytest.mark.parametrize("codec", [BitmapAndValues, Indexed])
@given(worlds())
@law
def test_codecs_that_carry_the_mask_do_not_need_to_know_it(codec, world):
    layout, state, mask = world
    got, told = codec().decode(codec().encode(layout, state, mask), layout, Mask(layout, ~mask.alive))
    assert told == mask
    assert_bits(layout, got, masked(layout, state, mask))


@given(worlds())
@law
def test_bits_only_carries_the_mask_and_no_state(world):
    layout, state, mask = world
    arrays = BitmapOnly().encode(layout, state, mask)
    BitmapOnly().check(arrays, layout, mask)
    assert list(arrays) == ["mask"]
    assert BitmapOnly().decode(arrays, layout, mask) == ({}, mask)


@pytest.mark.parametrize("name", CARRIES_VALUES)
def test_batch_norm_buffers_travel_and_counters_do_not(name):
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    model(torch.arange(32.0).view(2, 1, 4, 4))  # moves the running statistics
    layout = Layout.of(model)
    assert layout.prunable == ("0.weight", "3.weight")
    # conv 18; norm weight, bias, mean, variance 2 each; linear 24 + 3
    assert (layout.size, layout.prunable_size) == (18 + 8 + 27, 18 + 24)
    assert "1.num_batches_tracked" not in dict(layout.shapes)
    state, mask = state_of(model), Mask(layout, np.arange(42) % 3 == 0)
    assert not torch.equal(state["1.running_mean"], torch.zeros(2))
    got, _ = CODECS[name]().decode(CODECS[name]().encode(layout, state, mask), layout, mask)
    assert_bits(layout, got, masked(layout, state, mask))


@pytest.mark.parametrize("name", CARRIES_VALUES)
@pytest.mark.parametrize("values", VALUE_TYPES)
def test_lossy_values_stay_within_the_stated_error(name, values):
    layout = Layout((("w", (60, 50)), ("b", (500,))), ("w",))
    rng = np.random.default_rng(3)
    flat = rng.choice([-1, 1], 3500) * np.exp2(rng.uniform(-24, 15, 3500)).astype(np.float32)
    state, mask = layout.unflatten(flat.astype(np.float32)), Mask(layout, rng.random(3000) < 0.4)
    codec = CODECS[name](values)
    arrays = codec.encode(layout, state, mask)
    codec.check(arrays, layout, mask)
    got, told = codec.decode(arrays, layout, mask)
    assert told == mask
    true = np.concatenate(list(masked(layout, state, mask).values())).astype(np.float64)
    error = np.abs(layout.flatten(got) - true)
    assert np.all(error[:3000][~mask.alive] == 0)
    if values == "int8":
        carried = np.ones(3500, bool) if name == "dense" else np.concatenate([mask.alive, np.ones(500, bool)])
        error, true = error[carried], true[carried]
        for start in range(0, error.size, 1024):
            block = slice(start, start + 1024)
            assert error[block].max() <= np.abs(true[block]).max() / 254 * (1 + 1e-5)
        assert error.max() > 0
    else:
        size = np.abs(true)
        limit = {"fp32": 0 * size, "bf16": size / 2**8, "fp16": np.where(size < 2**-14, 2.0**-25, size / 2**11)}
        assert np.all(error <= limit[values])
        assert (error.max() > 0) == (values != "fp32")


@pytest.mark.parametrize(("values", "each"), [("fp32", 4), ("fp16", 2), ("bf16", 2), ("int8", 1)])
@pytest.mark.parametrize("alive", [0, 1, 1000, 2500])
def test_bytes_by_hand(values, each, alive):
    layout = Layout((("a", (50, 20)), ("g", (77,)), ("b", (30, 10, 5, 1))), ("a", "b"))
    bits = np.zeros(2500, np.bool_)
    bits[np.random.default_rng(1).permutation(2500)[:alive]] = True
    state, mask = layout.unflatten(np.ones(2577, np.float32)), Mask(layout, bits)

    def cost(count):  # int8 adds a float32 scale a block of 1024
        return each * count + (4 * -(-count // 1024) if values == "int8" else 0)

    expected = {
        Dense: cost(2577),
        MaskedValues: cost(alive + 77),
        BitmapAndValues: cost(alive + 77) + 313,
        Indexed: cost(alive + 77) + 4 * alive,
        BitmapOnly: 313,
    }
    assert set(expected) == set(CODECS.values())
    for codec, size in expected.items():
        assert nbytes(codec(values).encode(layout, state, mask)) == size, codec.name


def test_bytes_of_resnet18_with_ten_classes():
    # 11,164,352 conv and linear weights, 9,600 norm weights and biases, 10 linear biases.
    layout = Layout((("w", (11_164_352, 1)), ("rest", (9_610,))), ("w",))
    mask = Mask(layout, np.arange(11_164_352) % 2 == 0)
    state = layout.unflatten(np.zeros(11_173_962, np.float32))
    half = nbytes(MaskedValues().encode(layout, state, mask))
    assert half == 22_367_144
    assert round(half / 1e6, 3) == 22.367
    assert mask.packed().nbytes == 1_395_544
    assert nbytes(Dense().encode(layout, state, mask)) == 44_695_848
