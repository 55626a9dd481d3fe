"""What both ends know of a foreign state dict: names, shapes, types and order, and which tensors are pruned.

A state dict that is not ours holds more than float32 tensors. Floating tensors of any width are averaged; they travel
as one flat float32 vector and get their own type back. Everything else (``num_batches_tracked``, index tables) is
*fixed*: it stays what it was in the server's initial arrays, travels once with this sheet, and is never averaged.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord

from ssfl_app.sparsity.layout import Layout, Vector
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Arrays, PayloadError, take


@dataclass(frozen=True)
class Sheet:
    """Names, shapes and types of a state dict, in its order, and the bytes of the tensors that are not averaged.

    Attributes
    ----------
    tensors : tuple of (str, tuple of int, str)
        Name, shape and NumPy type of every array, in order.
    prunable : tuple of str
        The floating tensors that the mask covers, in the same order.
    keys : pair of str
        Names of the ArrayRecord and of the ConfigRecord that the foreign functions read.
    fixed : bytes
        The arrays that are not floating, one after the other, row-major.
    """

    tensors: tuple[tuple[str, tuple[int, ...], str], ...]
    prunable: tuple[str, ...]
    keys: tuple[str, str]
    fixed: bytes

    @classmethod
    def of(cls, arrays: ArrayRecord, prunable: Iterable[str] | None, keys: tuple[str, str]) -> "Sheet":
        """Return the sheet of a model.

        Parameters
        ----------
        arrays : ArrayRecord
            ``ArrayRecord(model.state_dict())``.
        prunable : iterable of str, optional
            Names of the tensors to prune. Default: floating, at least 2 dimensions, name ending in "weight".
        keys : pair of str
            Names of the ArrayRecord and of the ConfigRecord in a message.

        Raises
        ------
        ValueError
            Nothing is prunable, or `prunable` names a tensor that is missing or not floating.
        """
        known = {name: array.numpy() for name, array in arrays.items()}
        tensors = tuple((name, array.shape, array.dtype.str) for name, array in known.items())
        floating = {name for name, array in known.items() if array.dtype.kind == "f"}
        if prunable is None:
            chosen = {name for name in floating if name.endswith("weight") and known[name].ndim >= 2}
        else:
            chosen = set(prunable)
            if wrong := sorted(chosen - floating):
                raise ValueError(f"prunable names {wrong}; floating tensors of the model are {sorted(floating)}")
        if not chosen:
            raise ValueError(
                f"nothing is prunable among {list(known)}; a tensor is if it is floating, has 2 dimensions or more "
                "and a name that ends in 'weight'. Name others with prunable=[...]"
            )
        fixed = b"".join(array.tobytes() for name, array in known.items() if name not in floating)
        return cls(tensors, tuple(name for name in known if name in chosen), keys, fixed)

    @cached_property
    def layout(self) -> Layout:
        """Names and shapes of the floating tensors: what is averaged."""
        return Layout(tuple((name, shape) for name, shape, kind in self.tensors if _floating(kind)), self.prunable)

    @cached_property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 over all of it, fixed arrays included."""
        return hashlib.sha256(self._text() + self.fixed).hexdigest()[:16]

    def digest_under(self, mask: Mask) -> str:
        """Return what both ends must share to exchange values: 16 hex digits over the sheet and a mask."""
        return hashlib.sha256((self.digest + mask.digest).encode()).hexdigest()[:16]

    # ---- the sheet on the wire ----------------------------------------------------------------

    def _text(self) -> bytes:
        return json.dumps([self.tensors, self.prunable, self.keys]).encode()

    def written(self) -> Arrays:
        """Return the sheet as flat arrays of bytes, which are counted like all others."""
        text = {"sheet": np.frombuffer(self._text(), dtype=np.uint8)}
        return text | ({"fixed": np.frombuffer(self.fixed, dtype=np.uint8)} if self.fixed else {})

    @classmethod
    def read(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "Sheet":
        """Return the sheet that `written` wrote.

        Raises
        ------
        PayloadError
            There is none, or it is not one.
        """
        fixed = take(arrays, "fixed", np.uint8, None).tobytes() if "fixed" in arrays else b""
        try:
            tensors, prunable, keys = json.loads(take(arrays, "sheet", np.uint8, None).tobytes())
            rows = tuple((str(name), tuple(map(int, shape)), str(kind)) for name, shape, kind in tensors)
            return cls(rows, tuple(prunable), (keys[0], keys[1]), fixed)
        except (TypeError, ValueError, IndexError) as error:
            raise PayloadError(f"a sheet cannot be read: {error}") from error

    # ---- a model <-> one vector --------------------------------------------------------------

    def flatten(self, arrays: ArrayRecord) -> Vector:
        """Return the floating tensors as one float32 vector, shape (layout.size,).

        Raises
        ------
        ValueError
            Names or shapes are not those of this sheet.
        """
        names = [name for name, _, _ in self.tensors]
        if set(arrays) != set(names):
            odd = sorted(set(arrays) ^ set(names))
            raise ValueError(f"the arrays differ from those that were sent in {odd}; the names must stay {names}")
        flat = np.empty(self.layout.size, dtype=np.float32)
        for name, shape in self.layout.shapes:
            array = arrays[name].numpy()
            if array.shape != shape:
                raise ValueError(f"array {name} came back with shape {array.shape}; it must stay {shape}")
            with np.errstate(over="ignore"):  # becomes Inf, which the server refuses by name
                flat[self.layout.spans[name]] = array.reshape(-1)
        return flat

    def dense(self, flat: Vector) -> ArrayRecord:
        """Return the whole model, with names, shapes, types and order as they came.

        Parameters
        ----------
        flat : array of float32, shape (layout.size,)
        """
        arrays, start = {}, 0
        for name, shape, kind in self.tensors:
            if _floating(kind):
                array = flat[self.layout.spans[name]].reshape(shape).astype(kind)
            else:
                count = int(np.prod(shape, dtype=np.int64))
                array = np.frombuffer(self.fixed, kind, count, start).reshape(shape)
                start += array.nbytes
            arrays[name] = Array(np.asarray(array))
        return ArrayRecord(arrays)

    def spread(self, values: Vector, mask: Mask) -> Vector:
        """Return the vector of all coordinates with `values` where `mask` carries them, and 0 elsewhere."""
        flat = np.zeros(self.layout.size, dtype=np.float32)
        flat[mask.carried] = values
        return flat


def _floating(kind: str) -> bool:
    return np.dtype(kind).kind == "f"
