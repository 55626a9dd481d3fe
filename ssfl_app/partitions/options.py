"""What a partition reads of the section ``partition``."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ssfl_app.options import Scalar, anything, free, option

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SplitOptions:
    """The fields that a splitter may read; `PartitionOptions` adds which names there are."""

    name: str = anything("the name of a partition", "dirichlet")
    # The bound keeps infinity out, and sums of gamma draws within float64.
    alpha: float = option(
        "a number above 0 and at most 1e6",
        lambda value: 0 < value <= 1e6,
        0.3,
        "concentration of both dirichlet partitions and of quantity",
    )
    classes: int = option(
        "a number of at least 1", lambda value: value >= 1, 2, "classes a client of the pathological partition"
    )
    options: Mapping[str, Scalar] = free("arguments of a partitioner of flwr-datasets, or of your own")
