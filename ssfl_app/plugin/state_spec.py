"""What both ends know of a foreign state dict: names, shapes, types and order, and which tensors are pruned.

A state dict that is not ours holds more than float32 tensors. Floating tensors of any width are averaged; they travel
as one flat float32 vector and get their own type back; a complex number is two reals. Everything else
(``num_batches_tracked``, index tables) is *fixed*: it stays what it was in the server's initial arrays, travels once
with this spec, and is never averaged. A tensor with several names (*ties*) travels once, under the first of them.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from logging import WARNING
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord
from flwr.common import log

from ssfl_app.sparsity.layout import Layout, Vector, is_prunable
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Arrays, PayloadError, read_array


class Untied(ValueError):
    """Two names of one tensor came back with different arrays."""

    def __init__(self, name: str, first: str) -> None:
        super().__init__(f"{name} and {first} came back with other values; all others have them tied")
        self.names = (first, name)


@dataclass(frozen=True)
class StateSpec:
    """Names, shapes and types of a state dict, in its order, and the bytes of the tensors that are not averaged.

    `tensors` are name, shape and NumPy type of every array, and `prunable` the floating ones that the mask covers, in
    the same order. `keys` are the names of the ArrayRecord and of the ConfigRecord that the foreign functions read.
    `fixed` are the arrays that are not floating, one after the other, row-major; `ties` each later name of a floating
    tensor that has several, and its first name.
    """

    tensors: tuple[tuple[str, tuple[int, ...], str], ...]
    prunable: tuple[str, ...]
    keys: tuple[str, str]
    fixed: bytes
    ties: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, arrays: ArrayRecord, prunable: Iterable[str] | None, keys: tuple[str, str]) -> "StateSpec":
        """Return the spec of a model, ``ArrayRecord(model.state_dict())``.

        Without `prunable` names that is pruned which `is_prunable` tells; the clients say what of it are buffers or
        norms.

        Raises
        ------
        ValueError
            Nothing is prunable, or `prunable` names a tensor that is missing or not of real floating numbers.
        """
        known = {name: array.numpy() for name, array in arrays.items()}
        shapes = {name: array.shape for name, array in known.items()}
        tensors = tuple((name, shapes[name], array.dtype.str) for name, array in known.items())
        real = {name for name, array in known.items() if array.dtype.kind == "f"}
        if prunable is None:
            chosen = {name for name in real if is_prunable(name, shapes)}
        else:
            chosen = set(prunable)
            if wrong := sorted(chosen - real):
                raise ValueError(f"prunable names {wrong}; tensors of real floating numbers are {sorted(real)}")
        if not chosen:
            unnamed = "; ArrayRecord(net.state_dict()) would keep the names" if all(map(str.isdigit, known)) else ""
            raise ValueError(
                f"nothing is prunable among {list(known)}; a tensor is if its numbers are real and floating and it "
                f"has 2 dimensions or more. Name others with prunable=[...]{unnamed}"
            )
        fixed = b"".join(array.tobytes() for array in known.values() if not _averaged(array.dtype.str))
        return cls(tensors, tuple(name for name in known if name in chosen), keys, fixed)

    def settled(self, ties: Iterable[tuple[str, str]], dense: Iterable[str]) -> "StateSpec":
        """Return the spec under which tensors travel once, whatever their names, and some are not pruned after all.

        Of `ties` the first name is prunable if any of its names is; those in `dense` are not.
        """
        first, left = dict(ties), set(dense)
        chosen = {first.get(name, name) for name in self.prunable} - left
        names = (name for name, _, _ in self.tensors)
        return replace(self, ties=tuple(first.items()), prunable=tuple(name for name in names if name in chosen))

    def narrowed(self, flat: Vector, wider: "StateSpec") -> Vector:
        """Return the vector of this spec of a vector of the one that it was settled from."""
        if self.layout.size == wider.layout.size:
            return flat
        return np.concatenate([flat[wider.layout.spans[name]] for name, _ in self.layout.shapes])

    def with_shapes(self, layout: Layout) -> "StateSpec":
        """Return the spec of a network whose averaged tensors have the shapes of this layout, and the same names."""
        shapes = dict(layout.shapes)
        rows = ((name, shapes.get(name, shape)[: len(shape)], kind) for name, shape, kind in self.tensors)
        return replace(self, tensors=tuple(rows))

    @cached_property
    def layout(self) -> Layout:
        """Names and shapes of the floating tensors: what is averaged. A complex number is two of its coordinates."""
        later = dict(self.ties)
        rows = ((name, shape, kind) for name, shape, kind in self.tensors if _averaged(kind) and name not in later)
        shapes = tuple((name, (*shape, 2) if _complex(kind) else shape) for name, shape, kind in rows)
        return Layout(shapes, self.prunable)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 (hex) over all of it, fixed arrays included."""
        return hashlib.sha256(self._text() + self.fixed).hexdigest()

    def digest_under(self, mask: Mask, frozen: Vector | None = None) -> str:
        """Return the SHA-256 (hex) over spec, mask and frozen weights, which both ends share to exchange values."""
        shared = (self.digest + mask.digest).encode() + (b"" if frozen is None else frozen.tobytes())
        return hashlib.sha256(shared).hexdigest()

    # ---- the spec on the wire ----------------------------------------------------------------

    def _text(self) -> bytes:
        return json.dumps([self.tensors, self.prunable, self.keys, self.ties]).encode()

    def written(self) -> Arrays:
        """Return the spec as flat arrays of bytes, which are counted like all others."""
        text = {"sheet": np.frombuffer(self._text(), dtype=np.uint8)}
        return text | ({"fixed": np.frombuffer(self.fixed, dtype=np.uint8)} if self.fixed else {})

    @classmethod
    def read(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "StateSpec":
        """Return the spec that `written` wrote; PayloadError if there is none, or it is not one."""
        fixed = read_array(arrays, "fixed", np.uint8, None).tobytes() if "fixed" in arrays else b""
        try:
            tensors, prunable, keys, ties = json.loads(read_array(arrays, "sheet", np.uint8, None).tobytes())
            rows = tuple((str(name), tuple(map(int, shape)), str(kind)) for name, shape, kind in tensors)
            pairs = tuple((str(name), str(first)) for name, first in ties)
            return cls(rows, tuple(prunable), (keys[0], keys[1]), fixed, pairs)
        except (TypeError, ValueError, IndexError) as error:
            raise PayloadError(f"a sheet cannot be read: {error}") from error

    # ---- a model <-> one vector --------------------------------------------------------------

    def flatten(self, arrays: ArrayRecord, *, fixed_too: bool = True) -> Vector:
        """Return the floating tensors as one float32 vector, shape (layout.size,).

        With `fixed_too` arrays that are not averaged must be as they were sent. Without, a strategy made a mean of
        them, in which 3 * 5 / 3 need not be 5, and nobody reads it.

        Raises
        ------
        Untied
            Names of one tensor have different arrays.
        ValueError
            Names or shapes are not those of this spec, or a table that is not averaged was changed.
        """
        names = [name for name, _, _ in self.tensors]
        if set(arrays) != set(names):
            odd = sorted(set(arrays) ^ set(names))
            raise ValueError(f"the arrays differ from those that were sent in {odd}; the names must stay {names}")
        flat, first, fixed = np.empty(self.layout.size, dtype=np.float32), dict(self.ties), self._fixed()
        for name, shape, kind in self.tensors:
            array = arrays[name].numpy()
            if array.shape != shape:
                raise ValueError(f"array {name} came back with shape {array.shape}; it must be {shape}")
            if name in fixed:
                if fixed_too:
                    _check_fixed(name, array, fixed[name])
                continue
            if _complex(kind) != (array.dtype.kind == "c"):
                raise ValueError(f"array {name} came back as {array.dtype}; it must be {np.dtype(kind)}")
            if _complex(kind):
                array = np.ascontiguousarray(array).view(array.real.dtype)
            with np.errstate(over="ignore"):  # becomes Inf, which the server refuses by name
                values = array.reshape(-1).astype(np.float32, copy=False)
            if name not in first:
                flat[self.layout.spans[name]] = values
            elif not np.array_equal(values, flat[self.layout.spans[first[name]]], equal_nan=True):
                raise Untied(name, first[name])
        return flat

    def dense(self, flat: Vector) -> ArrayRecord:
        """Return the whole model of a vector, shape (layout.size,): names, shapes, types and order as they came."""
        arrays, first, fixed = {}, dict(self.ties), self._fixed()
        for name, shape, kind in self.tensors:
            if name in fixed:
                array = fixed[name]
            else:
                array = flat[self.layout.spans[first.get(name, name)]]
                if _complex(kind):
                    array = array.astype(np.empty(0, kind).real.dtype).view(kind)
                array = array.reshape(shape).astype(kind)
            arrays[name] = Array(np.asarray(array))
        return ArrayRecord(arrays)

    def _fixed(self) -> dict[str, npt.NDArray[Any]]:
        arrays, start = {}, 0
        for name, shape, kind in self.tensors:
            if not _averaged(kind):
                count = int(np.prod(shape, dtype=np.int64))
                arrays[name] = np.frombuffer(self.fixed, kind, count, start).reshape(shape)
                start += arrays[name].nbytes
        return arrays

    def spread(self, values: Vector, mask: Mask, frozen: Vector | None = None) -> Vector:
        """Return the vector of all coordinates: `values` where `mask` carries them, and elsewhere `frozen` or 0."""
        flat = np.zeros(self.layout.size, dtype=np.float32)
        flat[mask.transmitted] = values
        if frozen is not None:
            flat[~mask.transmitted] = frozen
        return flat


def _averaged(kind: str) -> bool:
    return np.dtype(kind).kind in "fc"


def _complex(kind: str) -> bool:
    return np.dtype(kind).kind == "c"


def _check_fixed(name: str, array: npt.NDArray[Any], sent: npt.NDArray[Any]) -> None:
    """Refuse a table that was changed; a counter that was is no harm, and one but BatchNorm's is told."""
    if np.array_equal(array, sent):
        return
    if array.ndim:
        raise ValueError(
            f"array {name} ({sent.dtype}) came back changed; only floating and complex arrays are averaged, so what "
            "was learned in it would be lost"
        )
    if not name.endswith("num_batches_tracked"):
        counted = "%s (%s) counted to %s; under SSFL it starts from %s in every round"
        log(WARNING, counted, name, sent.dtype, array, sent)
