"""Densities: how many coordinates of each prunable tensor stay alive.

`erk` is the Erdos-Renyi-Kernel rule of Evci et al., "Rigging the lottery", ICML 2020, as the public code of Dai et
al., "DisPFL", ICML 2022, has it. `rescaled` is how Babakniya et al., "Revisiting sparsity hunting in federated
learning" (FLASH), TMLR 2023, turn layer densities that clients found into a mask of one density.

Departures are stated at each function. Everything is counted in fractions, never in floating point: a density that is
written 0.29 means 29 of 100, and a floor is the floor of the rational number.
"""

import math
from collections.abc import Mapping
from fractions import Fraction

from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import keep_count

Counts = dict[str, int]
"""Coordinates of each prunable tensor, by name, in the order of the layout."""


def uniform(layout: Layout, density: float) -> Counts:
    """Return floor(density * size) of each prunable tensor."""
    return {name: keep_count(density, size) for name, size in layout.prunable_sizes.items()}


def erk(layout: Layout, density: float) -> Counts:
    """Return the Erdos-Renyi-Kernel counts: layer densities proportional to sum(shape) / prod(shape), at most 1.

    The common factor is such that `density` holds over all tensors of the state, biases and norms included. The
    published loop makes the tensors with the largest density dense while that exceeds 1, and solves for the factor
    anew; capping a tensor only raises the factor, so making all of them dense at once ends at the same one. Each
    count is rounded down, so the total falls short of the budget by less than one coordinate a tensor.

    Departures: tensors that are not prunable are always dense. Biases and norms are that by the published rule as
    well, unless its factor ends below 1: the sum(shape) / prod(shape) of a vector is 1. And floors are exact; the
    published ones, in floating point, can be off by one.

    Raises
    ------
    ValueError
        The density is not in (0, 1], or is used up by the tensors that are not prunable.
    """
    sizes, shapes = layout.prunable_sizes, dict(layout.shapes)
    dense = layout.size - layout.prunable_size
    if keep_count(density, layout.size) < dense:
        least = math.ceil(Fraction(dense, layout.size) * 10**6) / 10**6
        raise ValueError(
            f"density is {density}; with {dense} of {layout.size} coordinates always dense it is at least {least}"
        )
    raw = {name: Fraction(sum(shapes[name]), size) for name, size in sizes.items()}
    budget = Fraction(repr(float(density))) * layout.size - dense
    return {name: math.floor(share) for name, share in _fill(sizes, raw, budget).items()}


def rescaled(layout: Layout, shares: Mapping[str, float], density: float) -> Counts:
    """Return counts of layer density min(factor * share, 1) with one factor for all layers.

    They add up to exactly floor(density * layout.prunable_size), or, where shares are 0, to the size of all other
    layers if that is less. The coordinates that rounding down leaves over go one each to the layers with the
    largest fractional remainder, the first of equals.

    `shares` has one of each prunable tensor, e.g. the mean of the densities that clients found, of which only the
    proportions count: a ValueError if one is missing, of another tensor, not finite or negative.
    """
    unknown = sorted(set(shares) ^ set(layout.prunable))
    if unknown:
        raise ValueError(f"shares names {unknown} do not match the prunable tensors {list(layout.prunable)}")
    for name, share in shares.items():
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"share of {name} is {share}; it must be finite and at least 0")
    return spread(layout.prunable_sizes, shares, keep_count(density, layout.prunable_size))


def spread(sizes: Counts, shares: Mapping[str, float], budget: int) -> Counts:
    """Return `budget` coordinates as counts of some tensors, as `rescaled` does; `shares` are finite, at least 0."""
    exact = {name: Fraction(float(shares[name])) for name in sizes}
    filled = _fill(sizes, exact, Fraction(budget))
    counts = {name: math.floor(share) for name, share in filled.items()}
    left = int(sum(filled.values())) - sum(counts.values())
    for name in sorted(counts, key=lambda name: counts[name] - filled[name])[:left]:
        counts[name] += 1
    return counts


def _fill(sizes: Counts, shares: Mapping[str, Fraction], budget: Fraction) -> dict[str, Fraction]:
    # Water-filling: min(factor * share, 1) * size of each layer, together `budget`. A layer that is full stays full,
    # because what it gives back raises the factor of the others.
    filled = dict.fromkeys(sizes, Fraction(0))
    rest = [name for name in sizes if shares[name] > 0]
    while rest:
        factor = budget / sum(shares[name] * sizes[name] for name in rest)
        full = [name for name in rest if factor * shares[name] >= 1]
        if not full:
            return filled | {name: factor * shares[name] * sizes[name] for name in rest}
        filled |= {name: Fraction(sizes[name]) for name in full}
        budget -= sum(sizes[name] for name in full)
        rest = [name for name in rest if name not in full]
    return filled
