"""The partition without heterogeneity: images dealt at random."""

import numpy as np
import numpy.typing as npt

from ssfl_app.partitions.options import SplitOptions


def iid(
    labels: npt.NDArray[np.int64], clients: int, options: SplitOptions, rng: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """Deal shuffled images in equal numbers; the first clients get the remainder."""
    return list(np.array_split(rng.permutation(len(labels)), clients))
