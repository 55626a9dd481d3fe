"""Streaming weighted means whose bits do not depend on the order of arrival.

Replies are folded as they come, so the server holds one accumulator and not one vector per client. Floating
point addition would make the result depend on who answered first. Here every term is first rounded to integers,
and integer addition commutes: the same replies in any order give the same bits.

The sum is kept in fixed point with 96 bits, of which the last is worth 2**-56: a float32 (24 significant bits) of at
least 2**-32 enters it exactly, a smaller one with an error of at most 2**-57, far under the rounding of any weight or
score that matters. The limits that 96 bits set are checked, not assumed.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ssfl_app.sparsity.layout import Bits, Vector
from ssfl_app.sparsity.values import check_values

MAX_WEIGHT = 2**23
"""Largest sum of weights (samples) in one mean."""

BLOCK = 1 << 15
"""Coordinates worked on at a time: temporaries stay in the cache."""

_HIGH = 2.0**24  # one unit of the upper limb is 2**-24
_LOW = 2.0**56
_CARRY = 32  # bits of the lower limb


class _FixedPoint:
    """The weighted sum of vectors: what both means share.

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

    def _add(self, values: Vector, weight: int) -> None:
        self._check_shape("vector", values.shape)
        check_values(values)
        if weight < 1 or self.weight + weight > MAX_WEIGHT:
            raise ValueError(f"a weight is {weight} after {self.weight}; at least 1, together at most {MAX_WEIGHT}")
        whole, rest, units = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK, dtype=np.int64)
        for block in self._blocks():
            high, low = self._high[block], self._low[block]
            floor, part, integers = whole[: high.size], rest[: high.size], units[: high.size]
            np.multiply(values[block], _HIGH, out=part, dtype=np.float64)
            np.floor(part, out=floor)
            part -= floor  # exact, 0 to 1
            part *= _LOW / _HIGH
            np.copyto(integers, np.rint(part, out=part), casting="unsafe")  # 0 to 2**32
            integers *= weight
            integers += low
            np.copyto(low, integers, casting="unsafe")  # modulo 2**32
            integers >>= _CARRY
            high += integers
            np.copyto(integers, floor, casting="unsafe")
            integers *= weight
            high += integers
        self.weight += weight

    def _sum(self, block: slice) -> npt.NDArray[np.float64]:
        total: npt.NDArray[np.float64] = self._high[block] / _HIGH + self._low[block] / _LOW
        return total

    def _blocks(self) -> Iterator[slice]:
        return (slice(start, start + BLOCK) for start in range(0, self._high.size, BLOCK))

    def _check_shape(self, what: str, shape: tuple[int, ...]) -> None:
        if shape != self._high.shape:
            raise ValueError(f"a {what} has shape {shape}; this mean needs {self._high.shape}")


class WeightedMean(_FixedPoint):
    """The mean of vectors with integer weights."""

    def add(self, values: Vector, weight: int = 1) -> None:
        """Add one vector of float32, shape (size,), |x| <= MAX_VALUE, with a weight of at least 1.

        Raises
        ------
        ValueError
            Wrong shape, a value that is not finite or too large, or weights that exceed MAX_WEIGHT. The mean
            is unchanged then.
        """
        self._add(values, weight)

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
        for block in self._blocks():
            mean[block] = self._sum(block) / self.weight
        return mean


class OverlapMean(_FixedPoint):
    """The mean of vectors that own only some coordinates each, taken over the owners of each coordinate.

    With weights n, owned bits m and values w of each vector: sum(n m w) / sum(n m), and the old value where no vector
    owns the coordinate. Dai et al., "DisPFL", ICML 2022; Vahidian et al., "Sub-FedAvg", ICDCS-W 2021; Li et al.,
    "LotteryFL", SEC 2021; Bibikar et al., "FedDST", AAAI 2022.

    Parameters
    ----------
    size : int
        Coordinates of every vector.

    Notes
    -----
    Memory: 16 bytes a coordinate, however many vectors are added, and 4 more while one is added.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._weights = np.zeros(size, dtype=np.int32)  # at most MAX_WEIGHT each

    def add(self, values: Vector, owned: Bits, weight: int = 1) -> None:
        """Add the owned coordinates of one vector, with a weight of at least 1.

        Parameters
        ----------
        values : array of float32, shape (size,)
            |x| <= MAX_VALUE where owned; anything elsewhere.
        owned : array of bool, shape (size,)
            The coordinates that count.

        Raises
        ------
        TypeError, ValueError
            `owned` is not bool; wrong shapes, an owned value that is not finite or too large, or weights of all
            vectors that exceed MAX_WEIGHT. The mean is unchanged then.
        """
        if owned.dtype != np.bool_:
            raise TypeError(f"owned is {owned.dtype}; it must be bool")
        self._check_shape("vector", values.shape)
        self._check_shape("vector of owned bits", owned.shape)
        self._add(np.where(owned, values, np.float32(0)), weight)
        np.add(self._weights, weight, out=self._weights, where=owned)

    def weights(self) -> npt.NDArray[np.int32]:
        """Return the sum of the weights of each coordinate's owners, shape (size,)."""
        return self._weights.copy()

    def value(self, old: Vector) -> Vector:
        """Return the mean so far, float32, shape (size,), and `old`, of that shape, where nobody owned anything.

        Raises
        ------
        ValueError
            `old` has the wrong shape.
        """
        self._check_shape("vector of old values", old.shape)
        mean = old.astype(np.float32)
        for block in self._blocks():
            weights = self._weights[block]
            np.divide(self._sum(block), weights, out=mean[block], where=weights > 0, casting="same_kind")
        return mean
