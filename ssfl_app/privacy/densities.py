"""Private layer densities: how many weights of each layer stay, from a sum to which each client adds a few numbers.

A client ranks its own scores over all layers and counts, in each layer, the weights among its own k = floor(density *
prunable) best. It sends one number a layer, count / sqrt(size), scaled to Euclidean length 1: 8 to 240 bytes instead
of a score a weight, and no more than 1 by which it can move the sum, whatever its data. The server adds noise, makes
densities of the proportions, and both ends draw the mask inside each layer from a public seed.

Why the square root. Noise is alike in all numbers. With counts it drowns the smallest layers, with densities (count /
size) the largest ones, which hold most of the budget; the root is between the two. All three are measured by
``benchmarks/private_densities.py``.

What is public costs nothing: the densities of small layers (`tiny_layers`), and a floor, a tenth of the density
(`FLOOR`), since an empty layer would end training. Only proportions of the noisy numbers count, so the number of
clients need not be known, and the budget is met exactly.

Departure from the mask that SSFL finds: a mean of the clients' own rankings is flatter than a ranking of the mean
score, and inside a layer the choice is random (`shuffled`).
"""

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from ssfl_app.seeding import generator
from ssfl_app.sparsity.densities import Counts, spread
from ssfl_app.sparsity.layout import Layout, Vector
from ssfl_app.sparsity.mask import Mask, keep_count, none_alive

Shares = npt.NDArray[np.float64]

TINY = 0.02
"""Share of the budget that a layer holds at most to stay dense."""
ALL_TINY = 0.1
"""Share of the budget that these layers hold together at most."""
FLOOR = Fraction(1, 10)
"""Share of the density that every layer keeps."""
LEAST = 1e-9
"""Proportion, to the largest one, of a layer whose number is not above 0; it counts where all others are full."""


def tiny_layers(layout: Layout, density: float, tiny: float = TINY) -> list[str]:
    """Return the layers that stay dense: the smallest of them, by a rule that knows sizes only.

    Each holds at most `tiny` of the budget floor(density * prunable), and all together at most `ALL_TINY` of it.
    """
    budget, together, names = keep_count(density, layout.prunable_size), 0, []
    for name, size in sorted(layout.prunable_sizes.items(), key=lambda item: item[1]):
        together += size
        if size > tiny * budget or together > ALL_TINY * budget:
            break
        names.append(name)
    return names


def own_shares(scores: Vector, layout: Layout, density: float, tiny: float = TINY) -> Shares:
    """Return what a client adds to the sum: float64, shape (layers that are not tiny,), Euclidean length 1.

    Parameters
    ----------
    scores : array, float32, shape (layout.prunable_size,)
        Of this client alone; larger = keep.
    """
    dense = tiny_layers(layout, density, tiny)
    mask = Mask.top(layout, scores, density)
    raw = np.array([alive / math.sqrt(size) for name, alive, size in mask.layers() if name not in dense])
    length = float(np.linalg.norm(raw))
    return raw / length if length else raw


def densities(noised: Shares, layout: Layout, density: float, tiny: float = TINY) -> Counts:
    """Return how many weights of each layer stay, of a noisy sum or mean of `own_shares`.

    The counts add up to floor(density * prunable). Each is at least a tenth of that density (rounded down), at most
    the size of its layer, and that size for `tiny_layers`.

    Raises
    ------
    ValueError
        Not one finite number for each layer that is not tiny, or a density that leaves nothing alive.
    """
    sizes, dense = layout.prunable_sizes, tiny_layers(layout, density, tiny)
    rest = {name: size for name, size in sizes.items() if name not in dense}
    if noised.shape != (len(rest),) or not np.isfinite(noised).all():
        raise ValueError(f"shares are {noised.shape}; they are {len(rest)} finite numbers, one of each larger layer")
    total = keep_count(density, layout.prunable_size)
    if not total:
        raise ValueError(none_alive(layout, density))
    found = {name: max(0.0, float(x)) / math.sqrt(size) for (name, size), x in zip(rest.items(), noised, strict=True)}
    most = max(found.values())
    shares = {name: max(share / most, LEAST) if most else 1.0 for name, share in found.items()}
    least = {name: math.floor(FLOOR * Fraction(repr(float(density))) * size) for name, size in rest.items()}
    counts = {name: sizes[name] for name in dense}
    while True:
        free = {name: size for name, size in rest.items() if name not in counts}
        given = spread(free, shares, total - sum(counts.values()))
        low = [name for name in free if given[name] < least[name]]
        if not low:
            counts |= given
            return {name: counts[name] for name in sizes}
        counts |= {name: least[name] for name in low}


def drawn_mask(layout: Layout, counts: Counts, seed: int) -> Mask:
    """Return the mask with so many alive weights in each layer, at places that both ends draw from the run's seed."""
    alive = np.zeros(layout.prunable_size, dtype=np.bool_)
    for name, span in layout.prunable_spans.items():
        alive[span.start : span.start + counts[name]] = True
    return Mask(layout, alive).shuffle(generator(seed, "private-densities"))
