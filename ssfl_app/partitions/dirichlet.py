"""Label skew by Dirichlet draws: clients of one size (`dirichlet`) or of any (`dirichlet_class`)."""

import numpy as np
import numpy.typing as npt

from ssfl_app.partitions.options import Indices, SplitOptions

# Below this a client's prior on the classes that are left is rounding noise of the draw (alpha near 0).
_NO_MASS = 1e-200


def dirichlet(labels: Indices, clients: int, options: SplitOptions, rng: np.random.Generator) -> list[Indices]:
    """Deal images to clients of equal size, each with its own prior over the classes.

    Each gets N // K images, the first N % K clients one more. Client k draws a prior from Dir(alpha, ..., alpha),
    with alpha of the options, over the classes. All places of all clients are then
    filled in random order: a place takes an image of a class drawn from its client's prior, renormalised
    over the classes that have images left. (DisPFL redraws instead, which can take for ever: with alpha 0.3
    on CIFAR-10 a client was seen with 7e-8 of its prior on what was left.) A client whose prior has nothing
    on what is left draws in proportion to what is left. The last places take what there is, so a client's
    classes are near its prior, not equal to it.

    References
    ----------
    Hsu, Qi and Brown (2019), arXiv:1909.06335, section 3.1: the prior a client; Acar et al. (2021),
    arXiv:2111.04263: equal sizes without replacement; the partition of DisPFL and of the SSFL code.
    """
    pools = _pools(labels, rng)
    priors = rng.dirichlet(np.full(len(pools), options.alpha), size=clients)
    sizes = np.full(clients, len(labels) // clients)
    sizes[: len(labels) % clients] += 1
    places = rng.permutation(np.repeat(np.arange(clients), sizes))
    drawn = _draw_classes(priors, np.array([len(pool) for pool in pools]), places, rng)
    images = np.empty(len(labels), dtype=np.int64)
    for index, pool in enumerate(pools):
        images[drawn == index] = pool
    return [images[places == client] for client in range(clients)]


def _draw_classes(
    priors: npt.NDArray[np.float64], left: Indices, places: Indices, rng: np.random.Generator
) -> Indices:
    """Return the class (N,) of each place (N,), given priors (K, C) and the images `left` (C,)."""
    left = left.copy()
    priors = priors.copy()
    ladders = np.cumsum(priors, axis=1)
    drawn = np.empty(len(places), dtype=np.int64)
    for index, (client, chance) in enumerate(zip(places, rng.random(len(places)), strict=True)):
        ladder = ladders[client]
        if ladder[-1] < _NO_MASS:
            ladder = np.cumsum(left)
        # side="right" skips steps of height zero: a class without images or without prior is never drawn.
        label = int(np.searchsorted(ladder, chance * ladder[-1], side="right"))
        drawn[index] = label
        left[label] -= 1
        if left[label] == 0:
            priors[:, label] = 0.0
            ladders = np.cumsum(priors, axis=1)
    return drawn


def dirichlet_class(labels: Indices, clients: int, options: SplitOptions, rng: np.random.Generator) -> list[Indices]:
    """Deal each class by its own Dirichlet draw over the clients: sizes and classes both differ.

    The shares of the clients in class c are a draw from Dir(alpha, ..., alpha) over the clients, rounded so
    that every image is used. A client left without an image takes one from the client that has the most.

    References
    ----------
    Yurochkin et al. (2019), arXiv:1905.12022, section 4: the heterogeneous partition.
    """
    shares: list[list[Indices]] = [[] for _ in range(clients)]
    for pool in _pools(labels, rng):
        steps = np.cumsum(rng.dirichlet(np.full(clients, options.alpha)))
        # The last client ends at the last image whatever the sum's rounding error is.
        cuts = np.rint(steps[:-1] / steps[-1] * len(pool)).astype(np.int64)
        for share, images in zip(shares, np.split(pool, cuts), strict=True):
            share.append(images)
    return none_empty([np.concatenate(share) for share in shares], rng)


def none_empty(shares: list[Indices], rng: np.random.Generator) -> list[Indices]:
    """Give every empty client a random image of the largest one (the first of them, on a tie)."""
    sizes = np.array([len(share) for share in shares])
    for client in np.flatnonzero(sizes == 0):
        giver = int(np.argmax(sizes))
        images = rng.permutation(shares[giver])
        shares[client], shares[giver] = images[:1], images[1:]
        sizes[client], sizes[giver] = 1, sizes[giver] - 1
    return shares


def _pools(labels: Indices, rng: np.random.Generator) -> list[Indices]:
    """Return the shuffled images of each class that has any, in the order of the labels."""
    return [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
