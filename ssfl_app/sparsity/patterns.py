"""Masks in which weights stay or go by a pattern: two of four in a row, or whole blocks.

A tensor is taken as a matrix, (first axis, the others one after the other), as the kernels of sparse products take a
linear layer. Both patterns promise counts, and no speed.
"""

import numpy as np
import numpy.typing as npt

from ssfl_app.sparsity.layout import Bits, Layout, Vector
from ssfl_app.sparsity.mask import Mask, Scope, keep_count

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

SIDE = 4
"""Rows and columns of a block."""


def two_of_four(layout: Layout, scores: Vector) -> Mask:
    """Return the mask of the two largest scores of each four weights that follow each other in a row.

    What is left over at the end of a row counts as four with zeros: of one or two weights all stay, of three the best
    two. Of equal scores the first stays.
    """
    alive = np.zeros(layout.prunable_size, dtype=np.bool_)
    for name, rows in _matrices(layout, scores).items():
        height, width = rows.shape
        fours = np.full((height, -(-width // 4) * 4), -np.inf, dtype=np.float32)
        fours[:, :width] = rows
        order = np.argsort(-fours.reshape(-1, 4), axis=1, kind="stable")[:, :2]
        bits = np.zeros((fours.size // 4, 4), dtype=np.bool_)
        np.put_along_axis(bits, order, True, axis=1)
        alive[layout.prunable_spans[name]] = bits.reshape(height, -1)[:, :width].reshape(-1)
    return Mask(layout, alive)


def blocks(layout: Layout, scores: Vector, density: float, scope: Scope = "global", min_per_layer: int = 0) -> Mask:
    """Return the mask of the blocks of `SIDE` x `SIDE` weights whose mean score is largest.

    Blocks at the edge of a matrix are smaller. A block that no longer fits into floor(density * size) weights, of all
    layers or with `scope` "layer" of each, is passed over, so that fewer than a block's weights are lacking. As many
    best blocks of each layer as have `min_per_layer` weights come first.
    """
    owners, means, sizes = _blocks(layout, scores)
    for part in owners.values():
        best = np.argsort(-means[part], kind="stable")[: -(-min_per_layer // SIDE**2)]
        means[part.start + best] = np.inf
    kept = np.zeros(means.size, dtype=np.bool_)
    parts = [slice(0, means.size)] if scope == "global" else [*owners.values()]
    for part, total in zip(
        parts, [layout.prunable_size] if scope == "global" else layout.prunable_sizes.values(), strict=True
    ):
        kept[part] = _fill(means[part], sizes[part], keep_count(density, total))
    return _mask_of(layout, owners, kept)


def shuffled_blocks(layout: Layout, mask: Mask, rng: np.random.Generator) -> Mask:
    """Return a mask with as many blocks of each size in each layer as one of blocks has, at other places."""
    owners, means, sizes = _blocks(layout, mask.alive.astype(np.float32))
    kept = means > 0
    for part in owners.values():
        for size in np.unique(sizes[part]):
            alike = part.start + np.flatnonzero(sizes[part] == size)
            kept[alike] = rng.permutation(kept[alike])
    return _mask_of(layout, owners, kept)


def _matrices(layout: Layout, scores: Vector) -> dict[str, Vector]:
    if scores.shape != (layout.prunable_size,) or not np.isfinite(scores).all():
        raise ValueError(f"scores have shape {scores.shape}; they are {layout.prunable_size} finite numbers")
    shapes = dict(layout.shapes)
    return {name: scores[span].reshape(shapes[name][0], -1) for name, span in layout.prunable_spans.items()}


def _blocks(layout: Layout, scores: Vector) -> tuple[dict[str, slice], Floats, Counts]:
    """Return where each layer's blocks lie in a vector of all, their mean scores (float64), and their sizes."""
    owners, means, sizes, end = dict[str, slice](), list[Floats](), list[Counts](), 0
    for name, rows in _matrices(layout, scores).items():
        starts = [np.arange(0, length, SIDE) for length in rows.shape]
        total = np.add.reduceat(np.add.reduceat(rows.astype(np.float64), starts[0], axis=0), starts[1], axis=1)
        sides = [np.minimum(SIDE, length - start) for length, start in zip(rows.shape, starts, strict=True)]
        size = np.outer(*sides)
        means.append((total / size).reshape(-1))
        sizes.append(size.reshape(-1))
        owners[name], end = slice(end, end + size.size), end + size.size
    return owners, np.concatenate(means), np.concatenate(sizes)


def _fill(means: Floats, sizes: Counts, budget: int) -> Bits:
    kept, left, order = np.zeros(means.size, dtype=np.bool_), budget, np.argsort(-means, kind="stable")
    first = np.searchsorted(np.cumsum(sizes[order]), budget, side="right")
    kept[order[:first]], left = True, budget - int(sizes[order[:first]].sum())
    for block in order[first:].tolist():
        if not left:
            break
        if sizes[block] <= left:
            kept[block], left = True, left - int(sizes[block])
    return kept


def _mask_of(layout: Layout, owners: dict[str, slice], kept: Bits) -> Mask:
    alive, shapes = np.zeros(layout.prunable_size, dtype=np.bool_), dict(layout.shapes)
    for name, part in owners.items():
        height, width = shapes[name][0], layout.prunable_sizes[name] // shapes[name][0]
        grid = kept[part].reshape(-(-height // SIDE), -1)
        whole = np.repeat(np.repeat(grid, SIDE, axis=0), SIDE, axis=1)[:height, :width]
        alive[layout.prunable_spans[name]] = whole.reshape(-1)
    return Mask(layout, alive)
