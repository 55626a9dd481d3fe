"""What replies of a round become: aggregators, which take them one at a time and do not depend on their order.

================  =======================================================  =====================================
aggregator        of a coordinate                                          used by
================  =======================================================  =====================================
ReplyMean         sum n_k w_k / sum n_k, on the carried vector; or what    one shared mask, or none
                  run.fold makes of the vectors, unweighted (`robust`)
ReplySum          the same mean, of updates that are whole numbers (`sums`)  the same, wire.up-values fixed32
ReplyZerosMean    sum n_k m_k w_k / sum n_k: what is not sent counts as    top-k of weights, SparsyFed
                  0
ReplyOverlapMean  sum n_k m_k w_k / sum n_k m_k; the old value if nobody   personal masks
                  sent it
================  =======================================================  =====================================

``n_k`` is the weight of a reply: its samples, or 1 (run.weighting).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from ssfl_app.comm.messenger import ClientMessenger, Reply
from ssfl_app.core.means import OverlapMean, WeightedMean
from ssfl_app.core.options import Settings
from ssfl_app.core.robust import FEWEST, Held, Rows, folded
from ssfl_app.core.sums import Summation
from ssfl_app.locks import RunFailed
from ssfl_app.sparsity.codec import Codec, LinearCodec
from ssfl_app.sparsity.layout import Layout, State, Vector
from ssfl_app.sparsity.mask import Mask


@dataclass(frozen=True)
class Aggregator:
    """What is done with the replies of one round.

    `add` takes a good reply, and holds none of its arrays longer than it must. `finish` changes the global model by
    all that were added; it is not called if too few came.
    """

    add: Callable[[Reply], None]
    finish: Callable[[], None]


class _Algorithm(Protocol):
    """What is used of a strategy here (`SparseStrategy` says what each part means)."""

    name: ClassVar[str]
    layout: Layout
    settings: Settings
    state: State
    mask: Mask
    messenger: ClientMessenger
    update_norms: dict[int, float]
    clipped: int

    def sent_down(self, round_: int) -> tuple[State, Mask]: ...
    def codec_up(self, round_: int) -> Codec: ...
    def weight(self, reply: Reply) -> int: ...
    def decoded(self, reply: Reply) -> tuple[Vector, Mask]: ...


class ReplyMean:
    """The mean of replies that all carry the same coordinates, or what run.fold says, 0 at the others.

    It is taken on the carried values, so it costs the alive coordinates and not one model a client. Other folds than
    the mean have the vectors wait in a file (`Rows` says what memory and disk that is). Tensors that stay
    (`Codec.stays`) are the server's own.

    Raises
    ------
    TypeError
        The strategy's codec up is not a linear one.
    """

    def __init__(self, strategy: _Algorithm, round_: int) -> None:
        codec, run = strategy.codec_up(round_), strategy.settings.run
        if not isinstance(codec, LinearCodec):
            raise TypeError(f"{strategy.name} sends {codec.name} up; the default fold takes linear codecs only")
        self._strategy, self._codec, self._mask = strategy, codec, strategy.mask
        size = codec.count(strategy.layout, self._mask)
        self._fold: WeightedMean | Rows = WeightedMean(size) if run.fold == "mean" else Rows(size)

    def add(self, reply: Reply) -> None:
        """Add a reply."""
        values = self._codec.vector(reply.arrays, self._strategy.layout, self._mask)
        if isinstance(self._fold, Rows):
            self._fold.add(reply.client, values)
        else:
            self._fold.add(values, self._strategy.weight(reply))

    def finish(self) -> State:
        """Return the model; RunFailed if replies are too few for a robust fold. Nothing can be added any more."""
        fold, run = self._fold, self._strategy.settings.run
        if isinstance(fold, Rows) and len(fold) < FEWEST:
            raise RunFailed(f"run.fold is {run.fold!r}; {len(fold)} replies are there, and it needs {FEWEST}")
        values = folded(fold, run.fold, run.trim) if isinstance(fold, Rows) else fold.value()
        del self._fold, fold  # three times as large as what is made now
        return _model(self._strategy, self._codec, values, self._mask)


class ReplySum:
    """The global model plus the mean update, where clients send updates that are only added; 0 where none is sent.

    The update is from what came down to the clients, which wire.down-values may have rounded.
    """

    def __init__(self, strategy: _Algorithm, round_: int, summation: Summation) -> None:
        codec = strategy.codec_up(round_)
        assert isinstance(codec, LinearCodec)  # `check_sums`
        self._strategy, self._codec, self._mask, self._summation = strategy, codec, strategy.mask, summation
        self._round = round_

    def add(self, reply: Reply) -> None:
        """Add a reply."""
        self._summation.add(reply)

    def finish(self) -> State:
        """Return the model; RunFailed if the sum cannot be told."""
        strategy, layout = self._strategy, self._strategy.layout
        found = self._summation.finish()
        strategy.clipped += found.clipped
        down, _ = strategy.sent_down(self._round)
        values = layout.flatten(down)[self._codec.index(layout, self._mask)] + found.mean
        return _model(strategy, self._codec, values.astype(np.float32), self._mask)


def _model(strategy: _Algorithm, codec: LinearCodec, values: Vector, mask: Mask) -> State:
    """Return the model whose carried values are `values`; what stays or is frozen is the server's own, the rest 0."""
    state = codec.scatter(values, strategy.layout, mask)
    for name in codec.stays(strategy.layout):
        state[name].copy_(strategy.state[name])
    frozen = strategy.settings.mask.frozen and mask.count < mask.alive.size
    return mask.apply(state, strategy.state) if frozen else state


class ReplyZerosMean:
    """The mean of whole models, what a client did not send counting as 0, and the union of their masks."""

    def __init__(self, strategy: _Algorithm) -> None:
        self._strategy, self._mean = strategy, WeightedMean(strategy.layout.size)
        self._sent = np.zeros(strategy.layout.prunable_size, dtype=np.bool_)

    def add(self, reply: Reply) -> None:
        """Add a reply."""
        values, mask = self._strategy.decoded(reply)
        self._mean.add(values, self._strategy.weight(reply))
        self._sent |= mask.alive

    def finish(self, old: State) -> tuple[Vector, Mask]:
        """Return the mean, float32, shape (layout.size,), and the mask; `old` is not read."""
        mean = self._mean.value()
        del self._mean
        return mean, Mask(self._strategy.layout, self._sent)


class ReplyOverlapMean:
    """Each coordinate's mean over the clients that sent it."""

    def __init__(self, strategy: _Algorithm) -> None:
        self._strategy, self._mean = strategy, OverlapMean(strategy.layout.size)

    def add(self, reply: Reply) -> None:
        """Add a reply."""
        values, mask = self._strategy.decoded(reply)
        self._mean.add(values, mask.transmitted, self._strategy.weight(reply))

    def finish(self, old: State) -> tuple[Vector, Mask]:
        """Return the mean, float32, shape (layout.size,), `old` where nobody sent any, and the mask as it was."""
        mean = self._mean.value(self._strategy.layout.flatten(old))
        del self._mean
        return mean, self._strategy.mask


def both(aggregator: Aggregator, beside: Aggregator | None) -> Aggregator:
    """Return what hands each reply to two aggregators, and finishes them one after the other."""
    if beside is None:
        return aggregator

    def add(reply: Reply) -> None:
        aggregator.add(reply)
        beside.add(reply)

    def finish() -> None:
        aggregator.finish()
        beside.finish()

    return Aggregator(add, finish)


def within_norm(strategy: _Algorithm, aggregator: Aggregator, what: str) -> Aggregator:
    """Return an aggregator of the replies whose updates are not much longer than others of their round.

    The rest is refused by name. failures.norm-factor times the median is allowed, of whatever strategy: the lengths
    are `update_norms`. A reply without one passes. All replies wait in a file until the last one is there; then the
    good ones are added by client. `finish` raises RunFailed if too few are left.
    """

    def choose(replies: list[Reply]) -> list[Reply]:
        known, factor = strategy.update_norms, strategy.settings.failures.norm_factor
        # The lower one of two in the middle: of two replies one alone would else say what is usual.
        usual = sorted(known.values())[(len(known) - 1) // 2] if known else 0.0
        good = []
        for reply in replies:
            norm = known.get(reply.client, 0.0)
            if norm <= factor * usual:
                good.append(reply)
            else:
                allowed = f"failures.norm-factor is {factor:g} and the median of this round {usual:.4g}"
                strategy.messenger.report.refuse(reply.client, f"its update is {norm:.4g} long; {allowed}")
        strategy.messenger.report.require(strategy.settings.failures.min_ok_fraction, what)
        return good

    return held_back(aggregator, choose)


def held_back(aggregator: Aggregator, choose: Callable[[list[Reply]], list[Reply]]) -> Aggregator:
    """Return an aggregator whose replies wait in a file until the last one is there; then some are added, by client.

    `choose` is given all of them, sorted by client and without arrays, and returns those that are added.
    """
    held, waiting = Held(), list[Reply]()

    def add(reply: Reply) -> None:
        held.put(reply.client, reply.arrays)
        waiting.append(replace(reply, arrays={}))

    def finish() -> None:
        for reply in choose(sorted(waiting, key=lambda reply: reply.client)):
            aggregator.add(replace(reply, arrays=held.get(reply.client)))
        aggregator.finish()

    return Aggregator(add, finish)
