"""Value types: how a vector of float32 is written down.

fp32 is exact. The others round, to the nearest value that they have, within a stated relative error of each value or
block. Given a generator they round stochastically: up or down with the odds that make the mean exact, at most twice
that error (Alistarh et al., "QSGD", NeurIPS 2017; Croci et al., "Stochastic rounding", 2022).

=====  ==============  ================================================================
type   bytes a value   largest error of x
=====  ==============  ================================================================
fp32   4               0
fp16   2               2**-11 |x| for 2**-14 <= |x| <= 65504, 2**-25 below
bf16   2               2**-8 |x|
int8   1 + 4 / 1024    max|block| / 254, blocks of 1024 values
log8   1               half a step of x, see below; scores, x >= 0
=====  ==============  ================================================================

fixed32 and fixed16 are whole numbers that the server only adds: `ssfl_app.sparsity.fixed`.

log8 is for scores that are averaged and ranked: what counts is their order, over many octaves. Plain fp16 would turn
every score under 6e-8 into 0. Code 0 is 0; codes 1 to 255 are a geometric series from the 0.5 % quantile of the
positive scores, to which the smaller ones are raised, to their maximum. Over 16 octaves a step is 4.5 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ssfl_app.text import in_a_line

if TYPE_CHECKING:  # it imports torch
    from ssfl_app.sparsity.layout import Vector

Arrays = dict[str, npt.NDArray[Any]]
Allowed = Mapping[str, tuple[npt.DTypeLike, int]]
"""The arrays that a message may have: type and largest length by name."""

VALUE_TYPES = ("fp32", "fp16", "bf16", "int8")
SCORE_TYPES = ("fp32", "bf16", "log8", "fixed32")
SUMMED_TYPES: Mapping[str, npt.DTypeLike] = {"fixed32": np.uint32, "fixed16": np.uint16}
"""Value types of answers that are added as whole numbers, modulo 2**32 or 2**16."""
BLOCK = 1024
LOWEST = 0.005
"""Share of the positive scores that log8 does not tell apart."""

MAX_VALUE = 2.0**15
"""Largest magnitude of a value: beyond it a model has diverged, and the exact mean would overflow."""


class PayloadError(ValueError):
    """Arrays that cannot be what their sender says they are; it is told in a line, whatever words it quotes."""

    def __init__(self, text: str) -> None:
        super().__init__(in_a_line(text))


_TYPES: Mapping[str, npt.DTypeLike] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": np.uint16,
    "int8": np.int8,
    "log8": np.uint8,
    **SUMMED_TYPES,
}


def allowed_values(kind: str, size: int) -> Allowed:
    """Return the arrays that carry at most `size` values."""
    scales = {"int8": -(-size // BLOCK), "log8": 2}
    return {"values": (_TYPES[kind], size)} | ({"scales": (np.float32, scales[kind])} if kind in scales else {})


def write_values(flat: Vector, kind: str, rng: np.random.Generator | None = None) -> Arrays:
    """Return the arrays that carry `flat`, (n,), of at least 0 for log8: "values", and "scales" for int8 and log8.

    `rng` rounds fp16, bf16 and int8 stochastically; without it they are rounded to the nearest.
    """
    if kind == "fp32":
        return {"values": np.ascontiguousarray(flat, dtype=np.float32)}
    if kind == "fp16":
        return {"values": _to_fp16(np.clip(flat, -65504, 65504), rng)}
    if kind == "bf16":
        return {"values": _to_bf16(flat, rng)}
    if kind == "int8":
        return _to_int8(flat, rng)
    if kind == "log8":
        return _to_log8(flat)
    raise ValueError(f"value type is {kind!r}; it is one of {', '.join(dict.fromkeys(VALUE_TYPES + SCORE_TYPES))}")


def read_values(arrays: Mapping[str, npt.NDArray[Any]], kind: str, size: int) -> Vector:
    """Return the float32 vector of shape (size,) that `arrays` carry.

    Raises
    ------
    PayloadError
        An array is missing, or has another type or length.
    """
    values = read_array(arrays, "values", _TYPES[kind], size)
    if kind == "bf16":
        return np.asarray((values.astype(np.uint32) << 16).view(np.float32))
    if kind == "int8":
        scales = read_array(arrays, "scales", np.float32, -(-size // BLOCK))
        # 0 * Inf is NaN and 127 * 3e38 is Inf: whoever reads foreign values refuses both.
        with np.errstate(invalid="ignore", over="ignore"):
            return np.asarray(values.astype(np.float32) * np.repeat(scales, BLOCK)[:size])
    if kind == "log8":
        return np.asarray(_series(read_array(arrays, "scales", np.float32, 2))[values])
    return values.astype(np.float32, copy=False)


@dataclass(frozen=True)
class SecondVector:
    """A vector that travels beside a model, with a value type of its own: arrays "<name>.values", "<name>.scales".

    `size` is how many values it has; `kind` is one of `VALUE_TYPES`, or for scores "log8".
    """

    name: str
    kind: str
    size: int

    def write(self, flat: Vector, rng: np.random.Generator | None = None) -> Arrays:
        """Return the arrays that carry `flat`, shape (size,), as `write_values` rounds it."""
        return {f"{self.name}.{part}": array for part, array in write_values(flat, self.kind, rng).items()}

    def allowed(self) -> Allowed:
        """Return the arrays that `write` makes."""
        return {f"{self.name}.{part}": limit for part, limit in allowed_values(self.kind, self.size).items()}

    def read(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Vector:
        """Return the vector, float32, shape (size,), that is among the arrays of a message.

        Raises
        ------
        PayloadError
            It is not there, of another type or length, or has values that are not finite or above MAX_VALUE.
        """
        own = f"{self.name}."
        try:
            parts = {key.removeprefix(own): array for key, array in arrays.items() if key.startswith(own)}
            flat = read_values(parts, self.kind, self.size)
            check_values(flat)
        except PayloadError as error:
            raise PayloadError(f"{self.name}: {error}") from error
        return flat


def read_array(arrays: Mapping[str, npt.NDArray[Any]], name: str, dtype: Any, size: int | None) -> npt.NDArray[Any]:
    """Return one flat array after checking its type and length (None: any length).

    Raises
    ------
    PayloadError
        The array is missing, or has another type, rank or length.
    """
    if name not in arrays:
        raise PayloadError(f"no array {name!r} among {sorted(arrays)}")
    array = arrays[name]
    if array.dtype != np.dtype(dtype) or array.ndim != 1:
        raise PayloadError(f"{name} is {array.dtype} of rank {array.ndim}; it must be flat {np.dtype(dtype)}")
    if size is not None and array.size != size:
        raise PayloadError(f"{name} has length {array.size}; it must be {size}")
    return array


def check_values(values: npt.NDArray[np.floating]) -> None:
    """Raise PayloadError unless every value is finite and at most MAX_VALUE in magnitude."""
    if not values.size:
        return
    low, high = float(values.min()), float(values.max())
    if np.isfinite(low) and np.isfinite(high) and max(-low, high) <= MAX_VALUE:
        return
    bad = int(np.count_nonzero(~np.isfinite(values)))
    what = f"{bad} values are NaN or Inf" if bad else f"values reach {max(-low, high):.3g} in magnitude"
    raise PayloadError(f"{what}; all must be finite and at most {MAX_VALUE:g}")


def _to_fp16(flat: Vector, rng: np.random.Generator | None) -> npt.NDArray[np.float16]:
    near = flat.astype(np.float16)
    if rng is None:
        return near
    back = near.astype(np.float32)
    other = np.nextafter(near, np.where(flat > back, np.float16(np.inf), np.float16(-np.inf)))
    off = flat != back
    odds = np.zeros(flat.size, dtype=np.float32)
    np.divide(flat - back, other.astype(np.float32) - back, out=odds, where=off)
    return np.where(rng.random(flat.size, dtype=np.float32) < odds, other, near)


def _to_bf16(flat: Vector, rng: np.random.Generator | None) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(flat, dtype=np.float32).view(np.uint32)
    if rng is None:  # on the bits: to the nearest, ties to even
        push: npt.NDArray[np.integer] = 0x7FFF + ((bits >> 16) & 1)
    else:
        push = rng.integers(0, 1 << 16, flat.size, dtype=np.uint16)
    rounded = (bits.astype(np.uint64) + push) >> 16
    # NaN stays NaN because its top mantissa bit is forced.
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x0040, rounded).astype(np.uint16)


def _to_int8(flat: Vector, rng: np.random.Generator | None) -> Arrays:
    blocks = -(-flat.size // BLOCK)
    padded = np.zeros(blocks * BLOCK, dtype=np.float32)
    padded[: flat.size] = flat
    table = padded.reshape(blocks, BLOCK)
    scales = (np.abs(table).max(axis=1) / np.float32(127)).astype(np.float32) if blocks else np.zeros(0, np.float32)
    table /= np.where(scales > 0, scales, np.float32(1))[:, None]
    if rng is None:
        np.rint(table, out=table)
    else:
        table += rng.random(table.shape, dtype=np.float32)
        np.floor(table, out=table)
    codes = np.clip(table, -127, 127).astype(np.int8)
    return {"values": codes.reshape(-1)[: flat.size], "scales": scales}


def _to_log8(flat: Vector) -> Arrays:
    positive = flat[flat > 0]
    if not positive.size:
        return {"values": np.zeros(flat.size, dtype=np.uint8), "scales": np.zeros(2, dtype=np.float32)}
    low, high = np.partition(positive, rank := int(LOWEST * positive.size))[rank], positive.max()
    octaves = np.log2(high) - np.log2(low)
    codes = np.zeros(flat.size, dtype=np.uint8)
    steps = (np.log2(positive) - np.log2(low)) * (np.float32(254) / octaves if octaves > 0 else np.float32(0))
    codes[flat > 0] = 1 + np.clip(np.rint(steps), 0, 254).astype(np.uint8)
    return {"values": codes, "scales": np.array([low, high], dtype=np.float32)}


def _series(scales: npt.NDArray[np.float32]) -> Vector:
    """Return what the 256 codes of log8 mean."""
    low, high = (float(scale) for scale in scales)
    if low == high == 0:
        return np.zeros(256, dtype=np.float32)
    if not 0 < low <= high < np.inf:
        raise PayloadError(f"scales are {low:g} and {high:g}; they are finite, and 0 < the first <= the second")
    series = np.exp2(np.linspace(np.log2(low), np.log2(high), 255))
    return np.concatenate([[0.0], series]).astype(np.float32)
