"""Means over replies that an algorithm's `fold` can take. None depends on the order of arrival.

==============  =========================================================  =================================
mean            of a coordinate                                            used by
==============  =========================================================  =================================
carried_mean    sum n_k w_k / sum n_k, on the carried vector               one shared mask, or none
zeros_mean      sum n_k m_k w_k / sum n_k: what is not sent counts as 0    top-k of weights, SparsyFed
overlap_mean    sum n_k m_k w_k / sum n_k m_k; the old value if nobody     personal masks
                sent it
==============  =========================================================  =================================

``n_k`` is the weight of a reply: its samples, or 1 (run.weighting).
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ssfl_app.aggregate import OverlapMean, WeightedMean
from ssfl_app.sparsity.codec import LinearCodec
from ssfl_app.sparsity.layout import State, Vector
from ssfl_app.sparsity.mask import Mask
from ssfl_app.strategies.post import Reply

if TYPE_CHECKING:
    from ssfl_app.strategies.base import SparseStrategy


def carried_mean(strategy: "SparseStrategy", replies: Iterable[Reply]) -> State:
    """Return the mean of replies that all carry the same coordinates, 0 at the others.

    It is taken on the carried values, so it costs the alive coordinates and not one model a client.

    Raises
    ------
    TypeError
        The strategy's codec up is not a linear one.
    """
    codec, layout, mask = strategy.up, strategy.layout, strategy.mask
    if not isinstance(codec, LinearCodec):
        raise TypeError(f"{strategy.name} sends {codec.name} up; the default fold takes linear codecs only")
    mean = WeightedMean(codec.count(layout, mask))
    for reply in replies:
        mean.add(codec.vector(reply.arrays, layout, mask), strategy.weight(reply))
        del reply
    values = mean.value()
    del mean
    return codec.expand(values, layout, mask)


def zeros_mean(strategy: "SparseStrategy", replies: Iterable[Reply]) -> tuple[Vector, Mask]:
    """Return the mean of whole models, what a client did not send counting as 0, and the union of their masks.

    The mean is float32, shape (layout.size,).
    """
    mean, sent = WeightedMean(strategy.layout.size), np.zeros(strategy.layout.prunable_size, dtype=np.bool_)
    for reply in replies:
        values, mask = strategy.decoded(reply)
        mean.add(values, strategy.weight(reply))
        sent |= mask.alive
        del reply, values
    return mean.value(), Mask(strategy.layout, sent)


def overlap_mean(strategy: "SparseStrategy", replies: Iterable[Reply], old: Vector) -> Vector:
    """Return each coordinate's mean over the clients that sent it, float32, shape (layout.size,); else `old`."""
    mean = OverlapMean(strategy.layout.size)
    for reply in replies:
        values, mask = strategy.decoded(reply)
        mean.add(values, mask.carried, strategy.weight(reply))
        del reply, values
    return mean.value(old)
