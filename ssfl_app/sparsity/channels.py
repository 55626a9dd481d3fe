"""Which inner channels of a network stay, and the smaller network that they make.

A *unit* is what stays or goes by itself: a channel, or under GroupNorm all channels of a group, so that what is
left is normalised as before. Units are numbered over all inner layers in the order of `Layout.inner`. *Widths* are
how many channels each inner layer has.

The budget is the density times what the whole network has: of weights that a mask covers, so that the number of
weights is that of an unstructured mask of this density; or of multiplications.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from ssfl_app.sparsity.inner import InnerChannels
from ssfl_app.sparsity.layout import Bits, Layout, State, Vector
from ssfl_app.sparsity.mask import Scope, keep_count

Widths = tuple[int, ...]
Ranks = npt.NDArray[np.float64]


def whole_widths(layout: Layout) -> Widths:
    """Return the widths of a network from which nothing was removed."""
    return tuple(inner.size for inner in layout.inner)


def unit_spans(layout: Layout) -> list[slice]:
    """Return where the units of each inner layer lie in a vector of all of them."""
    ends = np.cumsum([0, *(inner.units for inner in layout.inner)]).tolist()
    return [slice(first, last) for first, last in pairwise(ends)]


def unit_count(layout: Layout) -> int:
    """Return how many units there are."""
    return sum(inner.units for inner in layout.inner)


def unit_scores(layout: Layout, scores: Vector) -> Vector:
    """Return the score of each unit, float32, shape (units,): the sum over the weights that it touches.

    These are the weights that make its channels and those that read them. `scores` are those of weights, shape
    (layout.prunable_size,).
    """
    shapes, found = dict(layout.shapes), np.zeros(unit_count(layout))
    for inner, span in zip(layout.inner, unit_spans(layout), strict=True):
        for name, axis in inner.pairs:
            if name in layout.prunable_spans:
                of_tensor = scores[layout.prunable_spans[name]].reshape(shapes[name])
                found[span] += np.moveaxis(of_tensor, axis, 0).reshape(inner.units, -1).sum(axis=1, dtype=np.float64)
    return found.astype(np.float32)


def ranks_in_layers(layout: Layout, scores: Vector | Ranks) -> Ranks:
    """Return ranks, shape (units,), by which each inner layer keeps the same share of its units: its best ones."""
    ranks = np.zeros(unit_count(layout))
    for inner, span in zip(layout.inner, unit_spans(layout), strict=True):
        ranks[span.start + np.argsort(-scores[span], kind="stable")] = 1 - np.arange(inner.units) / inner.units
    return ranks


def channel_ranks(layout: Layout, scores: Vector, scope: Scope, budget: str = "parameters") -> Ranks:
    """Return the ranks of units, float64, shape (units,), of their `scores`: larger = keep.

    By plain sums, of which some layers have many more weights a unit than others, one of them would keep a channel of
    a hundred. With scope "global" and a `budget` of parameters it is the score by the weights that the unit touches
    in the whole network, what it brings by what it costs; with one of "flops" the score by the mean of its layer,
    since a channel of an early layer costs hundreds of times as much there. With "layer" each layer keeps the same
    share. docs/structure.md has how these rules were chosen.
    """
    if scope == "layer":
        return ranks_in_layers(layout, scores)
    if budget == "flops":
        return level_ranks(layout, scores)
    ranks, cost, widths = scores.astype(np.float64), Cost(layout), whole_widths(layout)
    for place, span in enumerate(unit_spans(layout)):
        ranks[span] *= layout.inner[place].units / cost.around(place, widths)
    return ranks


def level_ranks(layout: Layout, scores: Vector) -> Ranks:
    """Return ranks of units that are of one size in all layers: scores by the mean score of their layer."""
    ranks = scores.astype(np.float64)
    for span in unit_spans(layout):
        ranks[span] /= ranks[span].mean() or 1.0
    return ranks


def widths_of(layout: Layout, kept: Bits) -> Widths:
    """Return the widths when the units `kept`, bool, shape (units,), stay."""
    spans = unit_spans(layout)
    return tuple(int(kept[span].sum()) * inner.together for inner, span in zip(layout.inner, spans, strict=True))


def check_widths(layout: Layout, widths: Sequence[int]) -> Widths:
    """Return widths as a tuple; ValueError unless each is a whole number of units of its layer, at least one."""
    wanted = [f"{inner.together} to {inner.size} in steps of {inner.together}" for inner in layout.inner]
    if len(widths) != len(wanted):
        raise ValueError(f"there are {len(widths)} widths; this model has {len(wanted)} inner layers")
    for inner, width, rule in zip(layout.inner, widths, wanted, strict=True):
        if not 0 < width <= inner.size or width % inner.together:
            raise ValueError(f"the width of {inner.name} is {width}; it is {rule}")
    return tuple(int(width) for width in widths)


def first_units(layout: Layout, widths: Widths) -> Bits:
    """Return the units of these widths that come first in each layer, bool, shape (units,)."""
    kept = np.zeros(unit_count(layout), dtype=np.bool_)
    for inner, span, width in zip(layout.inner, unit_spans(layout), widths, strict=True):
        kept[span.start : span.start + width // inner.together] = True
    return kept


def narrow_layout(layout: Layout, widths: Widths) -> Layout:
    """Return the layout of the network of these widths."""
    shapes = {name: list(shape) for name, shape in layout.shapes}
    for inner, width in zip(layout.inner, widths, strict=True):
        for name, axis in inner.pairs:
            shapes[name][axis] = shapes[name][axis] // inner.size * width
    return replace(
        layout,
        shapes=tuple((name, tuple(shape)) for name, shape in shapes.items()),
        inner=tuple(replace(inner, size=width) for inner, width in zip(layout.inner, widths, strict=True)),
    )


def widths_in(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> Widths:
    """Return the widths of a narrower network of which the shapes of a state are known.

    Raises
    ------
    ValueError
        It is no narrower network of this layout.
    """
    whole = dict(layout.shapes)
    if shapes.keys() != whole.keys():
        raise ValueError(f"tensors are {sorted(shapes)}; those of this model are {sorted(whole)}")
    found = []
    for inner in layout.inner:
        name, axis = inner.pairs[0]
        entries = whole[name][axis] // inner.size
        found.append(shapes[name][axis] // entries if axis < len(shapes[name]) else 0)
    widths = check_widths(layout, found)
    if dict(narrow_layout(layout, widths).shapes) != {name: tuple(shape) for name, shape in shapes.items()}:
        raise ValueError("shapes are those of no narrower network of this model")
    return widths


def entries(inner: InnerChannels, length: int, kept: Bits) -> torch.Tensor:
    """Return the places along an axis of this length that belong to the units of `kept`, bool, shape (units,)."""
    return torch.from_numpy(np.flatnonzero(np.repeat(kept, length // inner.units)))


def narrow_state(layout: Layout, state: Mapping[str, torch.Tensor], kept: Bits) -> State:
    """Return the state of the smaller network: what the whole one has of the units `kept`."""
    found = dict(state)
    for inner, span in zip(layout.inner, unit_spans(layout), strict=True):
        for name, axis in inner.pairs:
            places = entries(inner, found[name].shape[axis], kept[span])
            found[name] = found[name].index_select(axis, places.to(found[name].device))
    return {name: tensor.clone() for name, tensor in found.items()}


class Cost:
    """What a network costs, as a function of its widths.

    Parameters
    ----------
    layout : Layout
    times : mapping of str to int, optional
        How often a forward pass of one sample multiplies by each weight of a prunable tensor, by its name; then the
        cost is that of multiplications. Default: once, and the cost is the number of weights.
    """

    def __init__(self, layout: Layout, times: Mapping[str, int] | None = None) -> None:
        self._layout = layout
        self._fixed = {
            name: size * (1 if times is None else times[name]) for name, size in layout.prunable_sizes.items()
        }
        self._inner: dict[str, list[int]] = {name: [] for name in layout.prunable}
        self._read: list[list[str]] = []
        for place, inner in enumerate(layout.inner):
            names = [name for name, _ in inner.pairs if name in self._inner]
            self._read.append(list(dict.fromkeys(names)))
            for name in names:
                self._inner[name].append(place)

    def of(self, widths: Sequence[int]) -> int:
        """Return the cost of the network."""
        return sum(self.tensor(name, widths) for name in self._fixed)

    def tensor(self, name: str, widths: Sequence[int]) -> int:
        """Return what one tensor costs."""
        # Whole numbers: each width divides what the tensor has of it.
        cost = self._fixed[name]
        for place in self._inner[name]:
            cost = cost // self._layout.inner[place].size * widths[place]
        return cost

    def around(self, place: int, widths: Sequence[int]) -> int:
        """Return what the tensors cost that an inner layer touches."""
        return sum(self.tensor(name, widths) for name in self._read[place])


def choose(layout: Layout, ranks: Ranks, density: float, cost: Cost, floor: int = 1) -> Bits:
    """Return the units that stay, bool, shape (units,): those of the largest ranks that the budget holds.

    Each inner layer keeps its best `floor` channels, at least a unit. Then units come in the order of their ranks,
    of equal ones the first; one that the budget no longer holds is passed over.

    Parameters
    ----------
    ranks : array of float64, shape (units,)
    density : float
        The share of `cost` that the network may cost.

    Raises
    ------
    ValueError
        The density is below what the floor costs.
    """
    kept = np.zeros(unit_count(layout), dtype=np.bool_)
    order = np.argsort(-ranks, kind="stable")
    owner = np.repeat(np.arange(len(layout.inner)), [inner.units for inner in layout.inner])
    for inner, span in zip(layout.inner, unit_spans(layout), strict=True):
        least = min(inner.units, max(1, -(-floor // inner.together)))
        kept[span.start + np.argsort(-ranks[span], kind="stable")[:least]] = True
    widths, total = list(widths_of(layout, kept)), cost.of(whole_widths(layout))
    budget, spent = keep_count(density, total), cost.of(widths_of(layout, kept))
    if spent > budget:
        least_share = math.ceil(Fraction(spent, total) * 10**4) / 10**4
        rule = f"the narrowest network costs {spent:,} of {total:,}, so it is at least {least_share}"
        raise ValueError(f"density is {density}; {rule}")
    for unit in order[~kept[order]].tolist():
        place = int(owner[unit])
        before = cost.around(place, widths)
        widths[place] += layout.inner[place].together
        after = spent + cost.around(place, widths) - before
        if after <= budget:
            kept[unit], spent = True, after
        else:
            widths[place] -= layout.inner[place].together
    return kept


@dataclass(frozen=True)
class Unread:
    """Which units of a network with a mask can be removed and change no output.

    Attributes
    ----------
    kept : array of bool, shape (units,)
        The others.
    channels, removed : int
        Of all inner layers, and of them those that go.
    in_groups : int
        Channels that nothing reads either, but which GroupNorm normalises together with others.
    constant : int
        Channels that have no alive weight and are read: what their bias or norm makes of nothing is a number.
    """

    kept: Bits
    channels: int
    removed: int
    in_groups: int
    constant: int

    def said(self) -> str:
        """Return it as a line."""
        left_out = f"{self.removed} of {self.channels} inner channels are read by nothing and left out"
        in_groups = f"{self.in_groups} more share a group of GroupNorm with others"
        return f"{left_out}; {in_groups}; {self.constant} have no alive weight but a value that is read"


def unread(layout: Layout, alive: Bits) -> Unread:
    """Return the units that no alive weight reads, nor only weights of other such units.

    Each inner layer keeps one at least. Layers that read along their first axis are none of those this knows: where
    nothing prunable reads along another one, all units stay.
    """
    shapes = dict(layout.shapes)
    bits = {name: alive[span].reshape(shapes[name]).copy() for name, span in layout.prunable_spans.items()}
    spans, kept = unit_spans(layout), np.ones(unit_count(layout), dtype=np.bool_)

    def touched(inner: InnerChannels, makes: bool) -> Bits:
        """Return which channels an alive weight makes, or reads."""
        found, known = np.zeros(inner.size, dtype=np.bool_), False
        for name, axis in inner.pairs:
            if name in bits and (axis == 0) == makes:
                found |= np.moveaxis(bits[name], axis, 0).reshape(inner.size, -1).any(axis=1)
                known = True
        return found if known else np.ones(inner.size, dtype=np.bool_)

    before = -1
    while before != (before := int(kept.sum())):
        for inner, span in zip(layout.inner, spans, strict=True):
            kept[span] = touched(inner, makes=False).reshape(inner.units, -1).any(axis=1)
            kept[span.start] |= not kept[span].any()
            dead = np.flatnonzero(np.repeat(~kept[span], inner.together))
            for name, axis in inner.pairs:
                if name in bits and axis == 0:
                    rows = bits[name].reshape(inner.size, -1)
                    rows[dead] = False
    removed = in_groups = constant = 0
    for inner, span in zip(layout.inner, spans, strict=True):
        stays, read = np.repeat(kept[span], inner.together), touched(inner, makes=False)
        removed += int((~stays).sum())
        in_groups += int((stays & ~read).sum())
        constant += int((read & ~touched(inner, makes=True)).sum())
    return Unread(kept, sum(inner.size for inner in layout.inner), removed, in_groups, constant)
