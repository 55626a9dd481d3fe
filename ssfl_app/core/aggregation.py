"""Means of replies that an algorithm's `aggregate` can take. None depends on the order of arrival.

==============  =========================================================  =================================
fold            of a coordinate                                            used by
==============  =========================================================  =================================
aggregate_mean    sum n_k w_k / sum n_k, on the carried vector; or what      one shared mask, or none
                run.fold makes of the vectors, unweighted (`robust`)
zeros_mean      sum n_k m_k w_k / sum n_k: what is not sent counts as 0    top-k of weights, SparsyFed
overlap_mean    sum n_k m_k w_k / sum n_k m_k; the old value if nobody     personal masks
                sent it
==============  =========================================================  =================================

``n_k`` is the weight of a reply: its samples, or 1 (run.weighting).
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import ClassVar, Protocol

import numpy as np

from ssfl_app.comm.messenger import Messenger, Reply
from ssfl_app.core.means import OverlapMean, WeightedMean
from ssfl_app.core.options import Settings
from ssfl_app.core.robust import FEWEST, Held, Rows, folded
from ssfl_app.locks import RunFailed
from ssfl_app.sparsity.codec import Codec, LinearCodec
from ssfl_app.sparsity.layout import Layout, State, Vector
from ssfl_app.sparsity.mask import Mask


class _Algorithm(Protocol):
    """What is used of a strategy here (`SparseStrategy` says what each part means)."""

    name: ClassVar[str]
    layout: Layout
    settings: Settings
    mask: Mask
    messenger: Messenger
    update_norms: dict[int, float]

    @property
    def up(self) -> Codec: ...
    def weight(self, reply: Reply) -> int: ...
    def decoded(self, reply: Reply) -> tuple[Vector, Mask]: ...


def aggregate_mean(strategy: _Algorithm, replies: Iterable[Reply]) -> State:
    """Return the mean of replies that all carry the same coordinates, or what run.fold says, 0 at the others.

    It is taken on the carried values, so it costs the alive coordinates and not one model a client. Other folds than
    the mean have the vectors wait in a file (`Rows` says what memory and disk that is).

    Raises
    ------
    TypeError
        The strategy's codec up is not a linear one.
    RunFailed
        There are too few replies for a robust fold.
    """
    codec, layout, mask = strategy.up, strategy.layout, strategy.mask
    if not isinstance(codec, LinearCodec):
        raise TypeError(f"{strategy.name} sends {codec.name} up; the default fold takes linear codecs only")
    run, size = strategy.settings.run, codec.count(layout, mask)
    if run.fold != "mean":
        rows = Rows(size)
        for reply in replies:
            rows.add(reply.client, codec.vector(reply.arrays, layout, mask))
            del reply
        if len(rows) < FEWEST:
            raise RunFailed(f"run.fold is {run.fold!r}; {len(rows)} replies are there, and it needs {FEWEST}")
        return codec.scatter(folded(rows, run.fold, run.trim), layout, mask)
    mean = WeightedMean(size)
    for reply in replies:
        mean.add(codec.vector(reply.arrays, layout, mask), strategy.weight(reply))
        del reply
    values = mean.value()
    del mean
    return codec.scatter(values, layout, mask)


def within_norm(strategy: _Algorithm, replies: Iterable[Reply], what: str) -> Iterator[Reply]:
    """Yield the replies whose updates are not much longer than others of their round; refuse the rest by name.

    failures.norm-factor times the median is allowed, of whatever strategy: the lengths are `update_norms`. A reply
    without one passes. All replies wait in a file until the last one is there, and are yielded by client.

    Raises
    ------
    RunFailed
        Too few are left.
    """
    held, waiting = Held(), list[Reply]()
    for reply in replies:
        held.put(reply.client, reply.arrays)
        waiting.append(replace(reply, arrays={}))
        del reply
    known, factor = strategy.update_norms, strategy.settings.failures.norm_factor
    # The lower one of two in the middle: of two replies one alone would else say what is usual.
    usual = sorted(known.values())[(len(known) - 1) // 2] if known else 0.0
    good = []
    for reply in sorted(waiting, key=lambda reply: reply.client):
        norm = known.get(reply.client, 0.0)
        if norm <= factor * usual:
            good.append(reply)
        else:
            strategy.messenger.refuse(
                reply,
                f"its update is {norm:.4g} long; failures.norm-factor is {factor:g} and the median of this round "
                f"{usual:.4g}",
            )
    strategy.messenger.report.require(strategy.settings.failures.min_ok_fraction, what)
    for reply in good:
        yield replace(reply, arrays=held.get(reply.client))


def zeros_mean(strategy: _Algorithm, replies: Iterable[Reply]) -> tuple[Vector, Mask]:
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


def overlap_mean(strategy: _Algorithm, replies: Iterable[Reply], old: Vector) -> Vector:
    """Return each coordinate's mean over the clients that sent it, float32, shape (layout.size,); else `old`."""
    mean = OverlapMean(strategy.layout.size)
    for reply in replies:
        values, mask = strategy.decoded(reply)
        mean.add(values, mask.transmitted, strategy.weight(reply))
        del reply, values
    return mean.value(old)
