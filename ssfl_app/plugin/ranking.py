"""From mean scores to the mask: which tensors compete with each other, and which are ranked within themselves only.

A tensor that starts at 0 everywhere is scored by |g|, which says nothing beside the |g * w| of others. One that has
no score above 0 at any client, LoRA's A beside a B of zeros, would die whole without being worse than others. Both
keep their own share `density`, the first by |g| and the second by |w|; what is left of the whole is ranked together.
Where a user's own function tells scores, they are taken as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ssfl_app.plugin.gradient_probe import starts_at_zero
from ssfl_app.plugin.state_spec import StateSpec
from ssfl_app.sparsity.layout import Bits, Layout, Vector, direction_of
from ssfl_app.sparsity.mask import Mask, Scope, alive_count, keep_count, largest, none_alive

_FIRST, _LAST = np.finfo(np.float32).max, np.finfo(np.float32).min


@dataclass(frozen=True)
class MaskRule:
    """How many weights are kept, and where: arguments of `SSFL`."""

    density: float
    scope: Scope
    min_per_layer: int

    def check(self, layout: Layout) -> None:
        """Raise ValueError for a density under which nothing of these tensors is kept."""
        if not alive_count(layout, self.density, self.scope, self.min_per_layer):
            raise ValueError(none_alive(layout, self.density))


def unscorable(layout: Layout, model: Vector, scores: Vector) -> list[str]:
    """Return the tensors that start at 0 and have no score above 0: there is nothing to rank them by."""
    return [name for name in starts_at_zero(layout, model) if not scores[layout.prunable_spans[name]].any()]


def within(layout: Layout, model: Vector, scores: Vector) -> dict[str, str]:
    """Return by what tensors are ranked that are ranked within themselves only: "gradient" or "magnitude"."""
    zero = starts_at_zero(layout, model)
    silent = [name for name, span in layout.prunable_spans.items() if not scores[span].any() and name not in zero]
    return dict.fromkeys(zero, "gradient") | dict.fromkeys(silent, "magnitude")


def check_unranked(spec: StateSpec) -> None:
    """Raise ValueError where chance may take all weights of a row whose norm must not be 0."""
    if rows := _rows(spec):
        raise ValueError(
            f"{[*rows]} have a weight norm, and this mask may leave a row no weight; keep them out of prunable"
        )


def top(spec: StateSpec, model: Vector, scores: Vector, wanted: MaskRule, alone: Mapping[str, str]) -> Mask:
    """Return the mask of the highest scores.

    Parameters
    ----------
    model : array of float32, shape (layout.size,)
        The initial weights.
    scores : array of float32, shape (layout.prunable_size,)
        Mean over the clients.
    alone : mapping of str to str
        What `within` returned; empty: all scores compare.

    Raises
    ------
    ValueError
        A density that keeps nothing, or less than `min_per_layer` or the rows of a weight norm need.
    """
    layout = spec.layout
    wanted.check(layout)
    scores, reserved = scores.copy(), np.zeros(scores.size, dtype=np.bool_)
    for name, by in alone.items():
        span = layout.prunable_spans[name]
        if by == "magnitude":
            scores[span] = np.abs(model[layout.spans[name]])
        if wanted.scope == "global":
            size = span.stop - span.start
            kept = max(keep_count(wanted.density, size), min(wanted.min_per_layer, size))
            reserved[span] = largest(scores[span], kept)
            scores[span] = _LAST
    for name, rows in _rows(spec).items():
        span = layout.prunable_spans[name]
        best = _best_of(scores[span], rows)
        reserved[span] |= best
        need, size = int(np.count_nonzero(best)), span.stop - span.start
        if wanted.scope == "layer" and need > max(keep_count(wanted.density, size), wanted.min_per_layer):
            raise ValueError(_too_few(wanted, name, need))
    need = int(np.count_nonzero(reserved))
    if wanted.scope == "global" and need > keep_count(wanted.density, layout.prunable_size):
        raise ValueError(_too_few(wanted, f"{[*alone, *_rows(spec)]}", need))
    scores[reserved] = _FIRST
    return Mask.top(layout, scores, wanted.density, wanted.scope, min_per_layer=wanted.min_per_layer)


def _too_few(wanted: MaskRule, what: str, need: int) -> str:
    return f"density is {wanted.density}; it leaves less than the {need} weights that {what} needs, so raise it"


def _rows(spec: StateSpec) -> dict[str, tuple[Sequence[int], int | None]]:
    """Return for each direction of a weight norm its shape and the axis of its rows (None: one in all).

    A row without a weight would be 0/0.
    """
    shapes, found = dict(spec.layout.shapes), dict[str, tuple[Sequence[int], int | None]]()
    for name, shape in shapes.items():
        direction = direction_of(name, shapes)
        if direction is not None and direction in spec.layout.prunable:
            axis = next((axis for axis, size in enumerate(shape) if size > 1), None)
            found[direction] = (shapes[direction], axis)
    return found


def _best_of(scores: Vector, rows: tuple[Sequence[int], int | None]) -> Bits:
    shape, axis = rows
    table = np.arange(scores.size).reshape(shape)
    table = table.reshape(1, -1) if axis is None else np.moveaxis(table, axis, 0).reshape(shape[axis], -1)
    best = np.zeros(scores.size, dtype=np.bool_)
    best[table[np.arange(len(table)), scores[table].argmax(axis=1)]] = True
    return best
