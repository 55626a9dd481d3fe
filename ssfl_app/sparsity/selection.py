"""The largest of many scores, in linear time and little memory.

The threshold is found as Floyd and Rivest do ("Expected time bounds for selection", CACM 1975): a sample tells
between which two scores it lies almost surely, and only the few scores between them are looked at closely. All scores
are compared, none is moved: 1e8 of them take less than their own memory beside them.
"""

import math

import numpy as np

from ssfl_app.sparsity.layout import Bits, Vector

_SAMPLE = 1 << 16
_WIDTH = 4.0  # standard deviations of the sample's error on either side


def largest(scores: Vector, count: int, ties: str) -> Bits:
    """Return where the `count` largest of `scores`, shape (n,), are; ties "index": the first ones, "keep": all."""
    if count == 0:
        return np.zeros(scores.size, dtype=np.bool_)
    threshold = kth_largest(scores, count)
    if ties == "keep":
        return np.asarray(scores >= threshold)
    alive: Bits = scores > threshold
    equal = np.flatnonzero(scores == threshold)
    alive[equal[: count - int(np.count_nonzero(alive))]] = True
    return alive


def kth_largest(scores: Vector, count: int) -> np.float32:
    """Return the score of which `count` scores, itself included, are at least as large; 1 <= count <= n.

    Every score is a number (not NaN).
    """
    rank = scores.size - count
    if scores.size <= 4 * _SAMPLE:
        return np.float32(np.partition(scores, rank)[rank])
    sample = np.sort(scores[:: scores.size // _SAMPLE])
    place, share = rank / scores.size * sample.size, count / scores.size
    margin = math.ceil(_WIDTH * math.sqrt(sample.size * share * (1 - share))) + 1
    low = sample[max(0, math.floor(place) - margin)] if place > margin else np.float32(-np.inf)
    high = sample[math.ceil(place) + margin] if place + margin + 1 < sample.size else np.float32(np.inf)
    between = scores >= low
    between &= scores <= high
    above = int(np.count_nonzero(scores > high))
    close = scores[between]
    if not above < count <= above + close.size:  # the sample misled: slower, and as right
        close, above = scores, 0
    rank = close.size - (count - above)
    return np.float32(np.partition(close, rank)[rank])
