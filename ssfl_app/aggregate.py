"""Streaming weighted mean whose bits do not depend on the order of arrival.

Replies are folded as they come, so the server holds one accumulator and not one vector per client. Floating
point addition would make the result depend on who answered first. Here every term is first rounded to integers,
and integer addition commutes: the same replies in any order give the same bits.

The sum is kept in fixed point with 96 bits, of which the last is worth 2**-56: a float32 (24 significant bits) of at
least 2**-32 enters it exactly, a smaller one with an error of at most 2**-57, far under the rounding of any weight or
score that matters. The limits that 96 bits set are checked, not assumed.
"""

import numpy as np

from ssfl_app.sparsity.layout import Vector
from ssfl_app.sparsity.values import check_values

MAX_WEIGHT = 2**23
"""Largest sum of weights (samples) in one mean."""

_HIGH = 2.0**24  # one unit of the upper limb is 2**-24
_LOW = 2.0**56
_CARRY = 32  # bits of the lower limb
_BLOCK = 1 << 18  # coordinates worked on at a time: temporaries stay in the cache


class WeightedMean:
    """The mean of vectors with integer weights.

    Parameters
    ----------
    size : int
        Coordinates of every vector.

    Notes
    -----
    Memory: 12 bytes a coordinate, however many vectors are added.
    """

    def __init__(self, size: int) -> None:
        self._high = np.zeros(size, dtype=np.int64)
        self._low = np.zeros(size, dtype=np.uint32)
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
            high = np.floor(exact * _HIGH)
            low = np.rint((exact - high / _HIGH) * _LOW)  # 0 to 2**32
            total = low.astype(np.int64) * weight + self._low[block]
            self._high[block] += high.astype(np.int64) * weight + (total >> _CARRY)
            self._low[block] = total & 0xFFFFFFFF
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
