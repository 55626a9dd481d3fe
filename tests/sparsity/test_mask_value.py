"""A mask is a value: its bits on the wire, its digest, how it combines, and what it does to a state."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask

law = settings(deadline=None, derandomize=True, max_examples=60)

LAYOUT = Layout((("a.weight", (2, 3)), ("a.bias", (2,)), ("b.weight", (1, 2, 2, 1))), ("a.weight", "b.weight"))
BITS = st.lists(st.booleans(), min_size=10, max_size=10).map(lambda bits: np.array(bits, dtype=np.bool_))


def mask_of(*alive):
    return Mask(LAYOUT, np.isin(np.arange(10), alive))


def flat_layout(size):
    return Layout((("w", (size, 1)),), ("w",))


@given(st.lists(st.booleans(), max_size=40))
@law
def test_a_bitmap_has_a_bit_for_every_prunable_weight_and_comes_back(bits):
    layout = flat_layout(len(bits))
    mask = Mask(layout, np.array(bits, dtype=np.bool_))
    bitmap = mask.packed()
    assert bitmap.dtype == np.uint8
    assert bitmap.shape == (math.ceil(len(bits) / 8),)
    assert Mask.unpack(layout, bitmap) == mask
    padded = bits + [False] * (-len(bits) % 8)
    assert bytes(bitmap) == int("0" + "".join("01"[bit] for bit in padded), 2).to_bytes(len(padded) // 8, "big")


@pytest.mark.parametrize(
    ("bitmap", "message"),
    [
        (np.zeros(1, np.uint8), "has 1 bytes; this layout needs 2"),
        (np.zeros(3, np.uint8), "has 3 bytes; this layout needs 2"),
        (np.zeros((2, 1), np.uint8), "this layout needs 2"),
        (np.array([0, 0b00100000], np.uint8), "bits set behind its end"),
        (np.array([0, 1], np.uint8), "bits set behind its end"),
    ],
)
def test_bad_bitmaps_are_refused(bitmap, message):
    with pytest.raises(ValueError, match=message):
        Mask.unpack(LAYOUT, bitmap)


def test_a_mask_gives_bool_tensors_by_name():
    back = mask_of(0, 2, 5, 7, 8).tensors()
    assert list(back) == ["a.weight", "b.weight"]
    assert torch.equal(back["a.weight"], torch.tensor([[True, False, True], [False, False, True]]))
    assert torch.equal(back["b.weight"], torch.tensor([False, True, True, False]).view(1, 2, 2, 1))


@pytest.mark.parametrize(
    ("alive", "error"),
    [
        (np.ones(10, np.uint8), TypeError),
        (np.ones(10, np.float32), TypeError),
        (np.ones(9, np.bool_), ValueError),
        (np.ones((10, 1), np.bool_), ValueError),
    ],
)
def test_wrong_arrays_are_refused(alive, error):
    with pytest.raises(error, match="a mask "):
        Mask(LAYOUT, alive)


def test_counts():
    mask = mask_of(0, 5, 6)
    assert (mask.count, mask.density) == (3, 0.3)
    assert list(mask.layers()) == [("a.weight", 2, 6), ("b.weight", 1, 4)]
    assert (Mask.dense(LAYOUT).count, Mask.dense(LAYOUT).density) == (10, 1.0)
    # coordinates of the state: a.weight 0..5, a.bias 6..7, b.weight 8..11
    assert np.flatnonzero(mask.transmitted).tolist() == [0, 5, 6, 7, 8]
    assert (Mask.dense(flat_layout(0)).count, Mask.dense(flat_layout(0)).density) == (0, 0.0)


@given(BITS, BITS)
@law
def test_union_intersection_and_distance(one, other):
    left, right = Mask(LAYOUT, one), Mask(LAYOUT, other)
    ours, theirs = set(np.flatnonzero(one)), set(np.flatnonzero(other))
    assert set(np.flatnonzero((left | right).alive)) == ours | theirs
    assert set(np.flatnonzero((left & right).alive)) == ours & theirs
    assert left.hamming(right) == len(ours ^ theirs) / 10
    assert (left == right) == (ours == theirs)
    assert (left.digest == right.digest) == (ours == theirs)
    if ours == theirs:
        assert hash(left) == hash(right)


def test_masks_of_different_layouts_do_not_combine():
    other = Layout((("a.weight", (2, 3)), ("b.weight", (1, 2, 2, 1))), ("a.weight", "b.weight"))
    assert Mask.dense(LAYOUT) != Mask.dense(other)
    for combine in (Mask.__or__, Mask.__and__, Mask.hamming):
        with pytest.raises(ValueError, match="different layouts"):
            combine(Mask.dense(LAYOUT), Mask.dense(other))


def test_applying_zeroes_the_dead_exactly_and_nothing_else():
    state = {
        "a.weight": torch.tensor([[-1.0, -2.0, 0.0], [-0.0, math.nan, 3.0]]),
        "a.bias": torch.tensor([-7.0, -0.0]),
        "b.weight": torch.tensor([-math.inf, math.inf, 1e-45, -1e-45]).view(1, 2, 2, 1),
    }
    before = {name: tensor.clone() for name, tensor in state.items()}
    got = mask_of(1, 3, 8).apply(state)
    bits = {name: tensor.reshape(-1).view(torch.int32).tolist() for name, tensor in got.items()}
    word = lambda x: int(np.float32(x).view(np.int32))  # noqa: E731
    assert bits["a.weight"] == [0, word(-2.0), 0, word(-0.0), 0, 0]
    assert bits["a.bias"] == [word(-7.0), word(-0.0)]
    assert bits["b.weight"] == [0, 0, word(1e-45), 0]
    assert {name: tensor.shape for name, tensor in got.items()} == {n: t.shape for n, t in state.items()}
    for name, tensor in state.items():
        assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32))
        got[name].fill_(5.0)
        assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32))


def test_a_mask_is_frozen():
    alive = np.ones(10, np.bool_)
    mask = Mask(LAYOUT, alive)
    digest = mask.digest
    alive[:] = False
    mask.tensors()["a.weight"].fill_(False)
    mask.packed()[:] = 0
    with pytest.raises(ValueError, match="read-only"):
        mask.alive[0] = False
    assert mask.count == 10
    assert mask == Mask.dense(LAYOUT)
    assert Mask(LAYOUT, mask.alive).digest == digest


def test_the_digest_tells_bits_shapes_names_and_what_is_prunable_apart():
    alive = np.array([True] * 7 + [False] * 3)
    layouts = [
        LAYOUT,
        Layout((("a.weight", (3, 2)), ("a.bias", (2,)), ("b.weight", (1, 2, 2, 1))), ("a.weight", "b.weight")),
        Layout((("a.weight", (2, 3)), ("a.bias", (3,)), ("b.weight", (1, 2, 2, 1))), ("a.weight", "b.weight")),
        Layout((("a.weight", (2, 3)), ("a.shift", (2,)), ("b.weight", (1, 2, 2, 1))), ("a.weight", "b.weight")),
        Layout((("c.weight", (2, 3)), ("a.bias", (2,)), ("b.weight", (1, 2, 2, 1))), ("c.weight", "b.weight")),
        Layout((("a.weight", (2, 3)), ("a.bias", (2, 2)), ("b.weight", (1, 2, 2, 1))), ("a.weight", "a.bias")),
    ]
    masks = [Mask(layout, alive) for layout in layouts]
    for i in range(10):
        flipped = alive.copy()
        flipped[i] ^= True
        masks.append(Mask(LAYOUT, flipped))
    assert len({mask.digest for mask in masks}) == len(masks) == 16
    assert all(len(mask.digest) == 64 and set(mask.digest) <= set("0123456789abcdef") for mask in masks)
