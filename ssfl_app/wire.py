"""Parcel, and the only translation to and from Flower records.

On the wire a message is a `RecordDict` of two records: "arrays" with one Flower `Array` per flat array of the
codec, and "facts", a `ConfigRecord` of a few scalars. The arrays hold raw little-endian bytes under a serial
type of our own: no 128-byte ``.npy`` header each, no copy to read them, and Flower refuses to misread them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict

from ssfl_app.sparsity.codec import nbytes
from ssfl_app.sparsity.values import Arrays, PayloadError

Fact = bool | int | float | str | bytes
Facts = dict[str, Fact]

SERIAL_TYPE = "ssfl.raw.v1"
_DTYPES = {np.dtype(t).name: np.dtype(t) for t in ("<f4", "<f2", "<u2", "u1", "i1", "<i4", "<i8")}
_MEMORY = "ssfl"


@dataclass(frozen=True)
class Parcel:
    """What one message carries: flat arrays, which are paid for, and facts, a few scalars beside them."""

    arrays: Arrays = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Payload bytes: those of the encoded arrays."""
        return nbytes(self.arrays)


def freeze(arrays: Arrays) -> Arrays:
    """Return the arrays on read-only bytes of their own, which `Packer` then sends without another copy."""
    return {name: np.frombuffer(array.tobytes(), array.dtype) for name, array in arrays.items()}


class Packer:
    """Writes parcels as records; an array that many parcels share becomes one buffer, however many they are."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[npt.NDArray[Any], Array]] = {}

    def record(self, parcel: Parcel) -> RecordDict:
        """Return the parcel as Flower records."""
        arrays = ArrayRecord({name: self._array(array) for name, array in parcel.arrays.items()})
        return RecordDict({"arrays": arrays, "facts": ConfigRecord(dict(parcel.facts))})

    def _array(self, array: npt.NDArray[Any]) -> Array:
        # By name first: NumPy takes None, what `get` would return, for float64.
        known = array.dtype.name in _DTYPES and array.dtype == _DTYPES[array.dtype.name]
        if not known or array.ndim != 1:
            raise TypeError(f"an array is {array.dtype} of rank {array.ndim}; the wire takes flat {list(_DTYPES)}")
        if id(array) not in self._done:
            # The array is kept beside its record, so its id cannot be given to another one meanwhile.
            base = array.base
            data = base if isinstance(base, bytes) and len(base) == array.nbytes else array.tobytes()
            self._done[id(array)] = (array, Array(array.dtype.name, array.shape, SERIAL_TYPE, data))
        return self._done[id(array)][1]


def read_record(record: RecordDict) -> Parcel:
    """Return the parcel of Flower records, whoever sent them.

    The arrays are read-only views of the received bytes. Records are looked up by name: the properties
    `array_records` and so on build reference cycles that would keep every reply alive.

    Raises
    ------
    PayloadError
        The records are not what `Packer` writes.
    """
    arrays, facts = _lookup(record, "arrays", ArrayRecord), _lookup(record, "facts", ConfigRecord)
    return Parcel({name: _read_array(name, array) for name, array in arrays.items()}, _scalars(facts))


def _lookup(record: RecordDict, name: str, kind: type) -> Any:
    found = record.get(name)
    if not isinstance(found, kind):
        raise PayloadError(f"record {name!r} is {type(found).__name__}; it must be {kind.__name__}")
    return found


def _read_array(name: str, array: Array) -> npt.NDArray[Any]:
    dtype = _DTYPES.get(array.dtype)
    if array.stype != SERIAL_TYPE or dtype is None:
        raise PayloadError(f"array {name} is {array.dtype} in {array.stype!r}; it must be {SERIAL_TYPE!r}")
    if tuple(array.shape) != (len(array.data) // dtype.itemsize,) or len(array.data) % dtype.itemsize:
        raise PayloadError(f"array {name} has shape {array.shape} and {len(array.data)} bytes of {array.dtype}")
    return np.frombuffer(array.data, dtype=dtype)


def _scalars(facts: Mapping[str, Any]) -> Facts:
    for name, value in facts.items():
        if not isinstance(value, bool | int | float | str | bytes):
            raise PayloadError(f"fact {name} is {type(value).__name__}; it must be a scalar")
    return dict(facts)


class Memory:
    """What a client keeps between messages: the shared mask, as a bitmap, and its digest.

    Flower's `Context.state` is the store; in deployment it dies with the SuperNode, so it may be found empty at any
    time. In simulation it lies in the server's process, once per client, and crosses to a worker and back with every
    message: there the launcher names a folder, and clients keep the digest only, the bitmap being one file for all.

    Parameters
    ----------
    context : Context
        Flower's, of this node.
    store : Path, optional
        A folder that all clients of this machine share.
    """

    def __init__(self, context: Context, store: Path | None = None) -> None:
        self._state = context.state
        self._store = store

    def bitmap(self, digest: str) -> npt.NDArray[np.uint8] | None:
        """Return the bitmap of the mask with this digest, or None if it is not held."""
        held = self._state.get(_MEMORY)
        if not isinstance(held, ConfigRecord) or held["digest"] != digest:
            return None
        if self._store is not None:
            return np.fromfile(self._store / digest, dtype=np.uint8) if (self._store / digest).exists() else None
        return np.frombuffer(bytes(held["mask"]), dtype=np.uint8)  # type: ignore[arg-type]

    def keep(self, digest: str, bitmap: npt.NDArray[np.uint8]) -> None:
        """Keep a mask; it replaces the one before."""
        if self._store is not None:
            file = self._store / digest
            if not file.exists():
                temporary = file.with_name(f"{digest}.{uuid4().hex}")
                bitmap.tofile(temporary)
                temporary.replace(file)
            self._state[_MEMORY] = ConfigRecord({"digest": digest})
            return
        self._state[_MEMORY] = ConfigRecord({"digest": digest, "mask": bitmap.tobytes()})
