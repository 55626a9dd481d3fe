"""Vectors of bounded length: what a client adds to a sum at most."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_STEPS = 2.0**31
"""Largest length, in steps: its square is an int64."""


def clipped(values: npt.NDArray[Any], clip: float, step: float = 1.0) -> npt.NDArray[np.int64]:
    """Return a vector in whole steps, int64, whose Euclidean length is at most ``clip / step``.

    A longer vector is shortened; then it is rounded. Rounding can make it too long again, by up to
    half the root of its dimension, so it is shortened until what will be summed is short enough, in exact integer
    arithmetic: the sum over clients moves by at most ``clip / step`` when there is one more of them. The direction
    stays where ``clip / step`` is well above the root of the dimension; with coarser steps most values round to 0.

    Parameters
    ----------
    values : array, shape (n,)
        In the unit of `clip`: floating point, or whole numbers if `step` is 1.
    clip : float
        Largest length.
    step : float
        What a whole step is worth.

    Raises
    ------
    ValueError
        A value is NaN or Inf, or the limit is not in [1, `MOST_STEPS`) steps.
    """
    limit = clip / step
    if not 1 <= limit < MOST_STEPS:
        raise ValueError(f"clip is {limit:g} steps; it is at least 1 and below {MOST_STEPS:g}")
    exact = values.astype(np.float64)
    with np.errstate(over="ignore"):
        length = float(np.linalg.norm(exact))
    if not math.isfinite(length):
        raise ValueError("a vector with NaN or Inf has no length")
    most = math.floor((Fraction(clip) / Fraction(step)) ** 2)
    factor = min(1.0, clip / length) if length else 1.0
    slack = 2.0**-24
    while True:
        whole = np.rint(exact * (factor / step)).astype(np.int64)
        square = squared_length(whole)
        if square <= most:
            return whole
        factor *= min(math.sqrt(most / square), 1 - slack)
        slack = min(2 * slack, 0.5)


def squared_length(whole: npt.NDArray[np.int64]) -> int:
    """Return the sum of the squares of whole numbers below 2**32 in magnitude, whatever it is: int64 wraps around.

    Examples
    --------
    >>> squared_length(np.full(4, 2**31)) == 2**64
    True
    """
    size = np.abs(whole).astype(np.uint64)
    high, low = size >> np.uint64(16), size & np.uint64(0xFFFF)
    return (int(high @ high) << 32) + (int(high @ low) << 17) + int(low @ low)
