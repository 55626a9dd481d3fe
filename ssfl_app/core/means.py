"""Streaming weighted means whose bits do not depend on the order of arrival.

Replies are folded as they come, so the server holds one accumulator and not one vector per client. Floating
point addition would make the result depend on who answered first. Here every term is first rounded to integers,
and integer addition commutes: the same replies in any order give the same bits.

The sum is kept in fixed point with 96 bits, of which the last is worth 2**-56: a float32 (24 significant bits) of at
least 2**-32 enters it exactly, a smaller one with an error of at most 2**-57, far under the rounding of any weight or
score that matters. The limits that 96 bits set are checked, not assumed.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from ssfl_app.core.blocks import BLOCK, by_blocks
from ssfl_app.sparsity.layout import Bits, Vector
from ssfl_app.sparsity.values import check_values

MAX_WEIGHT = 2**23
"""Largest sum of weights (samples) in one mean."""

_HIGH = 2.0**24  # one unit of the upper limb is 2**-24
_LOW = 2.0**56
_CARRY = 32  # bits of the lower limb


class _FixedPoint:
    """The weighted sum of vectors, 12 bytes a coordinate however many are added: what both means share."""

    def __init__(self, size: int) -> None:
        self._high = np.zeros(size, dtype=np.int64)
        self._low = np.zeros(size, dtype=np.uint32)
        self.weight = 0

    def add_term(self, values: Vector, weight: int) -> None:
        """Add a vector so many times."""
        self._check_shape("vector", values.shape)
        check_values(values)
        if weight < 1 or self.weight + weight > MAX_WEIGHT:
            raise ValueError(f"a weight is {weight} after {self.weight}; at least 1, together at most {MAX_WEIGHT}")
        by_blocks(partial(self._add, values, weight), self._blocks())
        self.weight += weight

    def _add(self, values: Vector, weight: int, blocks: Sequence[slice]) -> None:
        whole, rest, units = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK, dtype=np.int64)
        for block in blocks:
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

    def mean(self) -> Vector:
        """Return the sum by the weights, float32."""
        mean = np.empty(self._high.size, dtype=np.float32)

        def divide(blocks: Sequence[slice]) -> None:
            for block in blocks:
                mean[block] = self._sum(block) / self.weight

        by_blocks(divide, self._blocks())
        return mean

    def _sum(self, block: slice) -> npt.NDArray[np.float64]:
        total: npt.NDArray[np.float64] = self._high[block] / _HIGH + self._low[block] / _LOW
        return total

    def _blocks(self) -> list[slice]:
        return [slice(start, start + BLOCK) for start in range(0, self._high.size, BLOCK)]

    def _check_shape(self, what: str, shape: tuple[int, ...]) -> None:
        if shape != self._high.shape:
            raise ValueError(f"a {what} has shape {shape}; this mean needs {self._high.shape}")


class WeightedMean:
    """The mean of vectors with weights: whole numbers, or any positive ones.

    A sum is exact for whole weights of together at most `MAX_WEIGHT`. Flower's weights may be larger, or fractions.
    So where these may come, each is written with digits in the base ``MAX_WEIGHT // vectors``, and each digit has a
    sum of its own. Usual counts of examples have one digit, and then this is the mean of whole weights.

    Parameters
    ----------
    vectors : int, optional
        How many may come, at least 1, with any positive weights. None: weights are whole.

    Notes
    -----
    Memory: 12 bytes a coordinate and digit in use. A weight that is not whole is rounded to 1 / base.
    """

    def __init__(self, size: int, vectors: int | None = None) -> None:
        self._size, self._base = size, 0 if vectors is None else MAX_WEIGHT // vectors
        if vectors is not None and self._base < 2:
            raise ValueError(f"{vectors} vectors; a mean takes at most {MAX_WEIGHT // 2}")
        self._sums: dict[int, _FixedPoint] = {}  # digit -> sum; that behind the point is -1

    def add(self, values: Vector, weight: float = 1) -> None:
        """Add one vector of float32, shape (size,), |x| <= MAX_VALUE.

        Raises
        ------
        ValueError
            Wrong shape, a value that is not finite or too large, a weight that is not positive and finite, or whole
            weights that exceed MAX_WEIGHT. The mean is unchanged then.
        """
        for digit, count in self._digits(weight):
            total = self._sums.get(digit) or _FixedPoint(self._size)
            total.add_term(values, count)
            self._sums[digit] = total

    def _digits(self, weight: float) -> Iterator[tuple[int, int]]:
        if not self._base:
            if weight % 1:  # NaN and infinity too
                raise ValueError(f"a weight is {weight}; it is a whole number")
            yield 0, int(weight)
            return
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"a weight is {weight}; it must be a number above 0")
        rest = max(1, round(weight * self._base)) if weight % 1 else int(weight) * self._base
        for digit in itertools.count(-1):
            rest, count = divmod(rest, self._base)
            if count:
                yield digit, count
            if not rest:
                return

    @property
    def weight(self) -> float:
        """The sum of the weights so far."""
        return sum(self._shares().values())

    def _shares(self) -> dict[int, float]:
        return {digit: part.weight * float(self._base) ** digit for digit, part in sorted(self._sums.items())}

    def value(self) -> Vector:
        """Return the mean so far, float32, shape (size,); ValueError if nothing was added."""
        if not self._sums:
            raise ValueError("a mean of nothing; at least one vector must be added")
        if len(self._sums) == 1:
            return next(iter(self._sums.values())).mean()
        parts = (self._sums[digit].mean() * (share / self.weight) for digit, share in self._shares().items())
        return np.asarray(sum(parts, np.zeros(self._size)), dtype=np.float32)


class OverlapMean(_FixedPoint):
    """The mean of vectors that own only some coordinates each, taken over the owners of each coordinate.

    With weights n, owned bits m and values w of each vector: sum(n m w) / sum(n m), and the old value where no vector
    owns the coordinate. Dai et al., "DisPFL", ICML 2022; Vahidian et al., "Sub-FedAvg", ICDCS-W 2021; Li et al.,
    "LotteryFL", SEC 2021; Bibikar et al., "FedDST", AAAI 2022.

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
        self.add_term(np.where(owned, values, np.float32(0)), weight)
        np.add(self._weights, weight, out=self._weights, where=owned)

    def weights(self) -> npt.NDArray[np.int32]:
        """Return the sum of the weights of each coordinate's owners, shape (size,)."""
        return self._weights.copy()

    def value(self, old: Vector) -> Vector:
        """Return the mean so far, float32, shape (size,), and `old`, of that shape, where nobody owned anything."""
        self._check_shape("vector of old values", old.shape)
        mean = old.astype(np.float32)
        for block in self._blocks():
            weights = self._weights[block]
            np.divide(self._sum(block), weights, out=mean[block], where=weights > 0, casting="same_kind")
        return mean
