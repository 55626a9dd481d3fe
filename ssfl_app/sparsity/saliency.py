"""Saliency criteria: a score per weight, larger = keep; and the minibatch they are measured on.

Lee et al., "SNIP: Single-shot network pruning based on connection sensitivity", ICLR 2019; used for federated
clients by Ohib et al., "SSFL", TMLR 2026, arXiv 2405.09037, eq. 5: ``s_k = |dL_k/dw * w|`` at the common
initial weights, on one class-balanced minibatch.

Departures: scores are not divided by their sum (SNIP does; it changes no ranking inside one client), and the
minibatch is not augmented (the author's code takes the first batch of the training loader as it comes).
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from ssfl_app.sparsity.layout import State


def snip(gradient: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> State:
    """Return |g * w| for each tensor of `gradient`, same shapes."""
    return {name: (g * state[name]).abs() for name, g in gradient.items()}


def balanced_batch(labels: npt.NDArray[np.int64], size: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return the indices of a minibatch with equally many images of every class that is present.

    Each of the c classes gives floor(size / c) images, without replacement while it has enough; the rest of
    the batch is filled with one more image of randomly chosen classes.

    Parameters
    ----------
    labels : array of int, shape (n,)
        One client's labels, n >= 1.
    size : int
        Images in the minibatch.
    """
    classes = np.unique(labels)
    counts = np.full(classes.size, size // classes.size)
    counts[rng.permutation(classes.size)[: size % classes.size]] += 1
    chosen = []
    for label, count in zip(classes, counts, strict=True):
        members = np.flatnonzero(labels == label)
        chosen.append(rng.choice(members, count, replace=count > members.size))
    return rng.permutation(np.concatenate(chosen)).astype(np.int64)
