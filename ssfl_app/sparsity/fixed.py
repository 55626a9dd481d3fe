"""Fixed point: updates and scores as whole numbers that a server needs to know the sum of, and nothing else.

A client k of weight n_k answers with ``q_k = rint(n_k x_k / step)``, so the weighted mean over the clients that
answered is ``step * sum q_k / sum n_k``. Whole numbers add up exactly, in any order and modulo a power of two: the
sum of masked answers has the bits of the sum of clear ones. x is the update (what training changed), or scores.

The weight is in before anything is rounded, so large weights cost no precision: of the mean, one unit is about
``range / 2**31`` (fixed32) or ``range / 2**15`` (fixed16), and m clients are off by at most m / 2 units.

Beside the values stands what else is told as a sum only: how many were clipped, and the training loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ssfl_app.sparsity.values import SUMMED_TYPES, check_values

if TYPE_CHECKING:  # it imports torch
    from ssfl_app.sparsity.layout import Vector

Summand = npt.NDArray[np.uint32] | npt.NDArray[np.uint16]
"""Whole numbers modulo 2**32 or 2**16; negative ones are the upper half."""

LOSS_RANGE = {"fixed32": 2.0**10, "fixed16": 2.0**5}
"""Largest magnitude of a loss that is told as a sum; a larger one counts as that."""

FEWEST_STEPS = 2**10
"""Steps that a client of average weight must have to either side of 0."""

_BLOCK = 1 << 16


@dataclass(frozen=True)
class FixedPoint:
    """How the answers of one exchange are written.

    Attributes
    ----------
    kind : str
        One of `SUMMED_TYPES`.
    step : float
        What one unit is worth in a sum of weighted values; a power of two.
    range : float
        Larger magnitudes are clipped to it.
    loss_step : float
        Of the sum of weighted losses.
    most : int
        Largest count that a client may add.
    """

    kind: str
    step: float
    range: float
    loss_step: float
    most: int

    @classmethod
    def of(cls, kind: str, range_: float, weight: float, clients: int) -> FixedPoint:
        """Return how `clients` of together this weight write values, so that no sum of theirs overflows.

        Raises
        ------
        ValueError
            So many clients leave too few steps for each.
        """
        half = 2 ** (8 * np.dtype(SUMMED_TYPES[kind]).itemsize - 1) - 1 - clients
        steps = half // max(1, clients)
        if steps < FEWEST_STEPS:
            raise ValueError(
                f"{clients} clients leave {max(0, steps)} steps for each of them; it needs {FEWEST_STEPS}"
            )
        step, loss_step = (2.0 ** math.ceil(math.log2(r * weight / half)) for r in (range_, LOSS_RANGE[kind]))
        return cls(kind, step, range_, loss_step, steps)

    def write(
        self, values: Vector, weight: int, rng: np.random.Generator | None = None, loss: float | None = None
    ) -> tuple[Summand, int]:
        """Return the summand of a client, and how many of its values were clipped.

        Parameters
        ----------
        values : array of float32, shape (n,)
        weight : int
            At least 1.
        rng : np.random.Generator, optional
            Rounds stochastically; else to the nearest, ties to even.
        loss : float, optional
            A finite number.

        Returns
        -------
        array of uint32 or uint16, shape (n + 1,), or (n + 2,) with a loss
            The values, the count of clipped ones, and the loss.

        Raises
        ------
        PayloadError
            A value is not finite or too large: the server could not tell.
        """
        check_values(values)
        dtype, size = SUMMED_TYPES[self.kind], values.size
        made, clipped = np.empty(size + (1 if loss is None else 2), dtype=dtype), 0
        for start in range(0, size, _BLOCK):
            part = values[start : start + _BLOCK].astype(np.float64)
            clipped += int(np.count_nonzero(np.abs(part) > self.range))
            np.clip(part, -self.range, self.range, out=part)
            part *= weight / self.step
            whole = np.rint(part) if rng is None else np.floor(part + rng.random(part.size))
            made[start : start + part.size] = whole.astype(np.int64).astype(dtype)
        made[size] = min(clipped, self.most)
        if loss is not None:
            most = LOSS_RANGE[self.kind]
            made[size + 1] = np.int64(round(weight * min(max(loss, -most), most) / self.loss_step)).astype(dtype)
        return made, clipped

    def modulo(self, whole: npt.NDArray[np.int64]) -> Summand:
        """Return whole numbers as a summand."""
        made: Summand = whole.astype(SUMMED_TYPES[self.kind])
        return made

    def in_range(self, summand: Summand, weight: float, values: int) -> bool:
        """Return whether a client, or clients together, of this weight can have made the first `values` numbers."""
        most = math.floor(weight * self.range / self.step) + self.most
        whole = signed(summand[:values])
        return not whole.size or (int(whole.max()) <= most and int(whole.min()) >= -most)

    def mean(self, total: Summand, weight: float) -> npt.NDArray[np.float64]:
        """Return the weighted mean of the values whose sum this is, float64."""
        return signed(total).astype(np.float64) * (self.step / weight)

    def mean_loss(self, total: int, weight: float) -> float:
        """Return the weighted mean of the losses whose sum this is."""
        return total * self.loss_step / weight


def signed(summand: Summand) -> npt.NDArray[np.signedinteger]:
    """Return the numbers with their signs."""
    return summand.view(np.int32 if summand.dtype == np.uint32 else np.int16)
