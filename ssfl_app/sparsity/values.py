"""Value types: how a vector of float32 is written down.

fp32 is exact. The others are lossy within a stated relative error of each value or block:

=====  ==============  ================================================================
type   bytes a value   largest error of x
=====  ==============  ================================================================
fp32   4               0
fp16   2               2**-11 |x| for 2**-14 <= |x| <= 65504, 2**-25 below
bf16   2               2**-8 |x|
int8   1 + 4 / 1024    max|block| / 254, blocks of 1024 values
=====  ==============  ================================================================
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ssfl_app.sparsity.layout import Vector

Arrays = dict[str, npt.NDArray[Any]]

VALUE_TYPES = ("fp32", "fp16", "bf16", "int8")
BLOCK = 1024

MAX_VALUE = 2.0**15
"""Largest magnitude of a value: beyond it a model has diverged, and the exact mean would overflow."""


class PayloadError(ValueError):
    """Arrays that cannot be what their sender says they are."""


def write_values(flat: Vector, kind: str) -> Arrays:
    """Return the arrays that carry `flat`: "values", and "scales" for int8."""
    if kind == "fp32":
        return {"values": np.ascontiguousarray(flat, dtype=np.float32)}
    if kind == "fp16":
        return {"values": np.clip(flat, -65504, 65504).astype(np.float16)}
    if kind == "bf16":
        return {"values": _to_bf16(flat)}
    if kind == "int8":
        return _to_int8(flat)
    raise ValueError(f"value type is {kind!r}; it is one of {', '.join(VALUE_TYPES)}")


def read_values(arrays: Mapping[str, npt.NDArray[Any]], kind: str, size: int) -> Vector:
    """Return the float32 vector of shape (size,) that `arrays` carry.

    Raises
    ------
    PayloadError
        An array is missing, or has another type or length.
    """
    dtype = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "int8": np.int8}[kind]
    values = take(arrays, "values", dtype, size)
    if kind == "bf16":
        return np.asarray((values.astype(np.uint32) << 16).view(np.float32))
    if kind == "int8":
        scales = take(arrays, "scales", np.float32, -(-size // BLOCK))
        # 0 * Inf is NaN and 127 * 3e38 is Inf: whoever reads foreign values refuses both.
        with np.errstate(invalid="ignore", over="ignore"):
            return np.asarray(values.astype(np.float32) * np.repeat(scales, BLOCK)[:size])
    return values.astype(np.float32, copy=False)


def take(arrays: Mapping[str, npt.NDArray[Any]], name: str, dtype: Any, size: int | None) -> npt.NDArray[Any]:
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


def _to_bf16(flat: Vector) -> npt.NDArray[np.uint16]:
    # Round to nearest, ties to even, on the bits; NaN stays NaN because its top mantissa bit is forced.
    bits = np.ascontiguousarray(flat, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x0040, rounded).astype(np.uint16)


def _to_int8(flat: Vector) -> Arrays:
    blocks = -(-flat.size // BLOCK)
    padded = np.zeros(blocks * BLOCK, dtype=np.float32)
    padded[: flat.size] = flat
    table = padded.reshape(blocks, BLOCK)
    scales = (np.abs(table).max(axis=1) / np.float32(127)).astype(np.float32) if blocks else np.zeros(0, np.float32)
    safe = np.where(scales > 0, scales, np.float32(1))
    codes = np.clip(np.rint(table / safe[:, None]), -127, 127).astype(np.int8)
    return {"values": codes.reshape(-1)[: flat.size], "scales": scales}
