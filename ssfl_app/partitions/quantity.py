"""Clients of different sizes, with samples at random."""

import numpy as np

from ssfl_app.partitions.dirichlet import none_empty
from ssfl_app.partitions.options import Indices, SplitOptions


def quantity(labels: Indices, clients: int, options: SplitOptions, rng: np.random.Generator) -> list[Indices]:
    """Deal shuffled samples in shares that are one draw from Dir(alpha, ..., alpha) over the clients.

    A client left without a sample takes one from the client that has the most.

    References
    ----------
    Li, Diao, Chen and He (2022), arXiv:2102.02079, section 3.2: quantity skew.
    """
    steps = np.cumsum(rng.dirichlet(np.full(clients, options.alpha)))
    cuts = np.rint(steps[:-1] / steps[-1] * len(labels)).astype(np.int64)
    return none_empty(np.split(rng.permutation(len(labels)), cuts), rng)
