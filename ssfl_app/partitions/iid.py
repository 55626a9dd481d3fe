"""The partition without heterogeneity: images dealt at random."""

import numpy as np

from ssfl_app.partitions.options import Indices, SplitOptions


def iid(labels: Indices, clients: int, options: SplitOptions, rng: np.random.Generator) -> list[Indices]:
    """Deal shuffled images in equal numbers; the first clients get the remainder."""
    return list(np.array_split(rng.permutation(len(labels)), clients))
