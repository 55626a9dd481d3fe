"""Moves masks while a model trains: coordinates die (`drop`), others come alive (`grow`), or both at once (`swap`).

Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity", Nature Comm. 2018
(random regrowth); Evci et al., "Rigging the lottery", ICML 2020 (regrowth by gradient, cosine decay); per client in
Dai et al., "DisPFL", ICML 2022.

All functions but `swap` say with `Counts` how many coordinates of each prunable tensor they choose; all return a new
mask. The counts name every prunable tensor; scores and magnitudes are float32, shape (layout.prunable_size,), and
finite. What does not fit a layout is a ValueError. Chance is drawn layer after layer from the generator passed in.
"""

import math

import numpy as np

from ssfl_app.sparsity.densities import Counts
from ssfl_app.sparsity.layout import Bits, Layout, Vector
from ssfl_app.sparsity.mask import Mask, Scope, keep_count, largest


def random_mask(layout: Layout, counts: Counts, rng: np.random.Generator) -> Mask:
    """Return a mask with counts[name] uniformly random coordinates alive in each layer."""
    return Mask(layout, _choose(layout, Mask.dense(layout).alive, counts, rng))


def top_mask(layout: Layout, scores: Vector, counts: Counts) -> Mask:
    """Return a mask with the counts[name] largest scores of each layer alive, the lower index first among equals."""
    _check_vector("scores", scores, layout)
    return Mask(layout, _choose(layout, Mask.dense(layout).alive, counts, scores))


def drop(mask: Mask, magnitudes: Vector, counts: Counts) -> Mask:
    """Return the mask without the counts[name] alive coordinates of smallest magnitude in each layer.

    Among equals the higher index dies first. No magnitude is negative, also where the mask is dead.
    """
    alive = {name: count for name, count, _ in mask.layers()}
    _check_counts(counts, alive)
    _check_vector("magnitudes", magnitudes, mask.layout)
    if (magnitudes < 0).any():
        raise ValueError(f"{np.count_nonzero(magnitudes < 0)} magnitudes are negative; all must be at least 0")
    kept = {name: alive[name] - counts[name] for name in alive}
    return Mask(mask.layout, _choose(mask.layout, mask.alive, kept, magnitudes))


def grow(mask: Mask, counts: Counts, by: Vector | np.random.Generator) -> Mask:
    """Return the mask with counts[name] dead coordinates of each layer alive again.

    `by` are scores, of which the largest come back, the lower index first among equals; or a generator, for
    uniformly random ones.
    """
    if isinstance(by, np.ndarray):
        _check_vector("scores", by, mask.layout)
    return Mask(mask.layout, mask.alive | _choose(mask.layout, ~mask.alive, counts, by))


def swap(
    mask: Mask, scores: Vector, candidates: Bits, share: float, scope: Scope = "global", min_per_layer: int = 0
) -> Mask:
    """Return the mask in which the weakest alive coordinates have given way to stronger candidates.

    The weakest is held against the strongest candidate, the next weakest against the next strongest, and so on as
    long as the candidate's score is the larger one. Among equals the lower index stays and comes first.

    Parameters
    ----------
    scores : Vector
        Read where the mask or `candidates` is true.
    candidates : bool ndarray, shape (layout.prunable_size,)
        Dead coordinates that may come alive.
    share : float
        In (0, 1]: floor(share * alive) coordinates are exchanged at most.
    scope : {"global", "layer"}
        Exchange among all layers together, or in each on its own.
    min_per_layer : int
        The best `min_per_layer` alive coordinates of each layer stay.
    """
    layout = mask.layout
    _check_vector("scores", scores, layout)
    if candidates.shape != mask.alive.shape or (candidates & mask.alive).any():
        raise ValueError(f"candidates are {candidates.shape}, some may be alive; they are dead ones of this layout")
    alive, may_go = mask.alive.copy(), mask.alive.copy()
    for span in layout.prunable_spans.values() if min_per_layer else ():
        places = span.start + np.flatnonzero(mask.alive[span])
        may_go[places[largest(scores[places], min(min_per_layer, places.size))]] = False
    whole = [slice(0, layout.prunable_size)]
    for span in layout.prunable_spans.values() if scope == "layer" else whole:
        most = keep_count(share, int(np.count_nonzero(mask.alive[span])))
        old, new = (span.start + np.flatnonzero(bits[span]) for bits in (may_go, candidates))
        old = old[np.lexsort((-old, scores[old]))][:most]
        new = new[np.argsort(-scores[new], kind="stable")][: old.size]
        stronger = scores[new] > scores[old[: new.size]]  # at first all of them, then none
        alive[old[: new.size][stronger]] = False
        alive[new[stronger]] = True
    return Mask(layout, alive)


def layer_densities(mask: Mask) -> dict[str, float]:
    """Return alive / size of each prunable tensor."""
    return {name: alive / max(1, size) for name, alive, size in mask.layers()}


def cosine_drop(alpha: float, round_: int, rounds: int) -> float:
    """Return the share of alive coordinates to move: alpha / 2 * (1 + cos(pi * round_ / rounds)).

    It falls from `alpha` in round 0 to 0 in round `rounds`.
    """
    return alpha / 2 * (1 + math.cos(math.pi * round_ / rounds))


def _choose(layout: Layout, candidates: Bits, counts: Counts, by: Vector | np.random.Generator) -> Bits:
    # True at counts[name] candidates of each layer: those of largest score, or by chance.
    possible = {name: int(np.count_nonzero(candidates[span])) for name, span in layout.prunable_spans.items()}
    _check_counts(counts, possible)
    chosen = np.zeros(layout.prunable_size, dtype=np.bool_)
    for name, span in layout.prunable_spans.items():
        places = span.start + np.flatnonzero(candidates[span])
        if isinstance(by, np.ndarray):
            chosen[places[largest(by[places], counts[name])]] = True
        else:
            chosen[by.choice(places, counts[name], replace=False, shuffle=False)] = True
    return chosen


def _check_counts(counts: Counts, possible: Counts) -> None:
    unknown = sorted(set(counts) ^ set(possible))
    if unknown:
        raise ValueError(f"counts names {unknown} do not match the prunable tensors {list(possible)}")
    for name, most in possible.items():
        if not 0 <= counts[name] <= most:
            raise ValueError(f"count of {name} is {counts[name]}; it is in 0..{most}")


def _check_vector(what: str, vector: Vector, layout: Layout) -> None:
    if vector.shape != (layout.prunable_size,):
        raise ValueError(f"{what} have shape {vector.shape}; this layout needs ({layout.prunable_size},)")
    bad = int(np.count_nonzero(~np.isfinite(vector)))
    if bad:
        raise ValueError(f"{bad} {what} are NaN or Inf; all must be finite")
