"""Streaming weighted mean whose bits do not depend on the order of arrival.

Replies are folded as they come, so the server holds one accumulator and not one vector per client. Floating
point addition would make the result depend on who answered first. Here every term is first rounded to integers,
and integer addition commutes: the same replies in any order give the same bits.

Each float32 x is split into two 64-bit fixed-point limbs, x ~ high * 2**-24 + low * 2**-62. That is exact for
|x| >= 2**-38 (a float32 has 24 significant bits) and off by at most 2**-63 below, far under float32 rounding of
any weight or mean score that matters. The limits this needs are checked, not assumed.
"""

import numpy as np

from ssfl_app.sparsity.layout import Vector
from ssfl_app.sparsity.values import check_values

MAX_WEIGHT = 2**23
"""Largest sum of weights (samples) in one mean."""

_HIGH = 2.0**24
_LOW = 2.0**62
_BLOCK = 1 << 18  # coordinates worked on at a time: temporaries stay in the cache


class WeightedMean:
    """The mean of vectors with integer weights.

    Parameters
    ----------
    size : int
        Coordinates of every vector.

    Notes
    -----
    Memory: 16 bytes a coordinate, however many vectors are added.
    """

    def __init__(self, size: int) -> None:
        self._high = np.zeros(size, dtype=np.int64)
        self._low = np.zeros(size, dtype=np.int64)
        self.weight = 0

    def add(self, values: Vector, weight: int = 1) -> None:
        """Add one vector of float32, shape (size,), |x| <= MAX_VALUE, with a weight of at least 1.

        Raises
        ------
        ValueError
            Wrong shape, a value that is not finite or too large, or weights that exceed MAX_WEIGHT. The mean
            is unchanged then.
        """
        if values.shape != self._high.shape:
            raise ValueError(f"a vector has shape {values.shape}; this mean needs {self._high.shape}")
        check_values(values)
        if weight < 1 or self.weight + weight > MAX_WEIGHT:
            raise ValueError(f"a weight is {weight} after {self.weight}; at least 1, together at most {MAX_WEIGHT}")
        for start in range(0, values.size, _BLOCK):
            block = slice(start, start + _BLOCK)
            exact = values[block].astype(np.float64)
            high = np.rint(exact * _HIGH)
            low = np.rint((exact - high / _HIGH) * _LOW)
            self._high[block] += high.astype(np.int64) * weight
            self._low[block] += low.astype(np.int64) * weight
        self.weight += weight

    def value(self) -> Vector:
        """Return the mean so far, float32, shape (size,).

        Raises
        ------
        ValueError
            Nothing was added.
        """
        if not self.weight:
            raise ValueError("a mean of nothing; at least one vector must be added")
        mean = np.empty(self._high.size, dtype=np.float32)
        for start in range(0, mean.size, _BLOCK):
            block = slice(start, start + _BLOCK)
            mean[block] = (self._high[block] / _HIGH + self._low[block] / _LOW) / self.weight
        return mean
