"""The partition without heterogeneity: images dealt at random."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ssfl_app.partitions import PartitionOptions


def iid(
    labels: npt.NDArray[np.int64], clients: int, options: "PartitionOptions", rng: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """Deal shuffled images in equal numbers; the first clients get the remainder."""
    return list(np.array_split(rng.permutation(len(labels)), clients))
