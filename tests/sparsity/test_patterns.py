"""Masks in a pattern: two of four, and blocks, by hand and by count."""

import numpy as np
import pytest

from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.patterns import SIDE, blocks, shuffled_blocks, two_of_four
from ssfl_app.training.models import ModelOptions, outline

# Rows of 8, of 7 (2 x 7 kernels) and of 2 weights.
SMALL = Layout(
    (("a.weight", (2, 8)), ("a.bias", (2,)), ("b.weight", (1, 1, 7)), ("c.weight", (3, 2))),
    ("a.weight", "b.weight", "c.weight"),
)


def scores_of(layout: Layout, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random(layout.prunable_size).astype(np.float32)


def layout_of(name: str) -> Layout:
    return Layout.of(outline(ModelOptions(name=name), (3, 8, 8), 10))


def test_two_of_four_by_hand() -> None:
    scores = np.array(
        [9, 1, 8, 2, 0, 0, 0, 0, 1, 2, 3, 4, 4, 3, 2, 1, *(5, 6, 7, 8, 3, 1, 2), *(0, 0, 1, 1, 2, 2)],
        dtype=np.float32,
    )
    kept = np.flatnonzero(two_of_four(SMALL, scores).alive).tolist()
    # Of equal ones the first; of the three at the end of a row the best two; rows of two stay.
    assert kept == [0, 2, 4, 5, 10, 11, 12, 13, 18, 19, 20, 22, 23, 24, 25, 26, 27, 28]


@pytest.mark.parametrize("name", ["cnn", "conv4", "resnet20"])
def test_two_of_four_keeps_half_of_each_row(name: str) -> None:
    layout = layout_of(name)
    mask = two_of_four(layout, scores_of(layout))
    for tensor, span in layout.prunable_spans.items():
        rows = mask.alive[span].reshape(dict(layout.shapes)[tensor][0], -1)
        whole, rest = divmod(rows.shape[1], 4)
        assert (rows[:, : 4 * whole].reshape(-1, 4).sum(axis=1) == 2).all()
        assert (rows[:, 4 * whole :].sum(axis=1) == min(rest, 2)).all()


def test_blocks_by_hand() -> None:
    # Blocks: two of 2 x 4, one of 1 x 4 and of 1 x 3, one of 3 x 2; 29 weights.
    scores = np.repeat(np.array([3, 5, 3, 5, 9, 1, 4], dtype=np.float32), [4, 4, 4, 4, 4, 3, 6])
    assert np.flatnonzero(blocks(SMALL, scores, 0.5).alive).tolist() == [4, 5, 6, 7, 12, 13, 14, 15, *range(16, 20)]
    # 20.3 weights: of the first three blocks there are 18, and no other fits.
    assert blocks(SMALL, scores, 0.7).count == 12 + 6
    in_each = blocks(SMALL, scores, 0.6, "layer")
    assert [alive for _, alive, _ in in_each.layers()] == [8, 4, 0]
    lone = np.where(np.arange(29) < 16, scores, 0).astype(np.float32)
    assert [alive for _, alive, _ in blocks(SMALL, lone, 0.65).layers()] == [16, 0, 0]
    assert [alive for _, alive, _ in blocks(SMALL, lone, 0.65, min_per_layer=1).layers()] == [8, 4, 6]


@pytest.mark.parametrize("name", ["cnn", "conv4", "resnet20"])
@pytest.mark.parametrize("density", [0.5, 0.1])
def test_blocks_stay_whole_and_fill_the_budget(name: str, density: float) -> None:
    layout = layout_of(name)
    mask = blocks(layout, scores_of(layout), density)
    budget = int(density * layout.prunable_size)
    assert budget - SIDE**2 < mask.count <= budget
    for tensor, span in layout.prunable_spans.items():
        rows = mask.alive[span].reshape(dict(layout.shapes)[tensor][0], -1)
        for top in range(0, rows.shape[0], SIDE):
            for left in range(0, rows.shape[1], SIDE):
                part = rows[top : top + SIDE, left : left + SIDE]
                assert part.all() or not part.any()


def test_shuffled_blocks_have_the_counts_of_each_layer_and_other_places() -> None:
    layout = layout_of("cnn")
    mask = blocks(layout, scores_of(layout), 0.2)
    other = shuffled_blocks(layout, mask, np.random.default_rng(2))
    assert [alive for _, alive, _ in other.layers()] == [alive for _, alive, _ in mask.layers()]
    assert other.hamming(mask) > 0.2
    assert shuffled_blocks(layout, Mask.dense(layout), np.random.default_rng(2)) == Mask.dense(layout)


def test_scores_that_are_none() -> None:
    for bad in (np.zeros(3, dtype=np.float32), np.full(SMALL.prunable_size, np.nan, dtype=np.float32)):
        with pytest.raises(ValueError, match="finite numbers"):
            two_of_four(SMALL, bad)
        with pytest.raises(ValueError, match="finite numbers"):
            blocks(SMALL, bad, 0.5)
