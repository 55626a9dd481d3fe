"""Codecs: a state and its mask <-> the flat arrays that an algorithm pays for.

Law, for every codec: ``decode(encode(state, mask), layout, mask) == (mask.apply(state), mask)``, within the
value type's stated error. The bytes of a message are the bytes of these arrays (`nbytes`); nothing computes a
cost beside them.

=============  =====================================  ==========================================
codec          arrays                                 who must know the mask beforehand
=============  =====================================  ==========================================
Dense          values of all coordinates              nobody (the mask is not carried)
MaskedValues     values of alive + dense remainder      both ends: SSFL's training rounds
BitmapAndValues        the same + 1 bit a prunable weight     nobody
Indexed        the same + int32 index of each alive   nobody; less than a bitmap below density 1/32
Csr            the same as scipy CSR, per tensor      nobody; the encoding that SSFL v1 states
BitmapOnly       1 bit a prunable weight                nobody; carries no values (FedPM)
=============  =====================================  ==========================================
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ssfl_app.sparsity.layout import Index, Layout, State, Vector
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import (
    Allowed,
    Arrays,
    PayloadError,
    allowed_values,
    check_values,
    read_array,
    read_values,
    write_values,
)

ArrayMap = Mapping[str, npt.NDArray[Any]]


def nbytes(arrays: ArrayMap) -> int:
    """Return the payload bytes of a message."""
    return sum(array.nbytes for array in arrays.values())


class Codec(ABC):
    """One way of writing a state under a mask.

    Parameters
    ----------
    values : str
        Value type, one of `ssfl_app.sparsity.values.VALUE_TYPES`.
    rng : numpy.random.Generator, optional
        `encode` rounds stochastically with it; to the nearest without one.
    """

    name: ClassVar[str]

    def __init__(self, values: str = "fp32", rng: np.random.Generator | None = None) -> None:
        self.values = values
        self.rng = rng

    @abstractmethod
    def encode(self, layout: Layout, state: State, mask: Mask) -> Arrays:
        """Return the flat arrays that carry `state` under `mask`."""

    @abstractmethod
    def decode(self, arrays: ArrayMap, layout: Layout, mask: Mask) -> tuple[State, Mask]:
        """Return state and mask. `mask` is what the receiver knows; a codec that carries one ignores it.

        Raises
        ------
        PayloadError
            The arrays are not what this codec writes for this layout.
        """

    def allowed(self, layout: Layout) -> Allowed:
        """Return the arrays that `encode` may write, whatever the mask; known before anything is unfolded."""
        return allowed_values(self.values, layout.size)

    def check(self, arrays: ArrayMap, layout: Layout, mask: Mask) -> None:
        """Raise PayloadError unless `decode` will succeed and every value is finite."""
        state, _ = self.decode(arrays, layout, mask)
        check_values(layout.flatten(state))


class LinearCodec(Codec):
    """A codec whose values are coordinates at places both ends know: means can be taken on the vector."""

    @abstractmethod
    def positions(self, layout: Layout, mask: Mask) -> npt.NDArray[np.bool_]:
        """Return a bool vector of shape (layout.size,): the coordinates that are carried, in order."""

    def index(self, layout: Layout, mask: Mask) -> Index:
        """Return `places` to index a vector with: NumPy picks by numbers faster than by bits."""
        places = self.positions(layout, mask)
        return slice(None) if places.all() else np.flatnonzero(places)

    def count(self, layout: Layout, mask: Mask) -> int:
        """Return how many coordinates are carried."""
        return int(np.count_nonzero(self.positions(layout, mask)))

    def encode(self, layout: Layout, state: State, mask: Mask) -> Arrays:
        """Return the carried coordinates of the state."""
        flat = layout.flatten(state)
        if mask.count < mask.alive.size:
            flat[np.flatnonzero(~mask.transmitted)] = 0
        return write_values(flat[self.index(layout, mask)], self.values, self.rng)

    def decode(self, arrays: ArrayMap, layout: Layout, mask: Mask) -> tuple[State, Mask]:
        """Return the state with 0 wherever nothing was carried."""
        state = self.scatter(self.vector(arrays, layout, mask), layout, mask)
        return self.masked(state, mask), mask

    def masked(self, state: State, mask: Mask) -> State:
        """Return the state with dead coordinates at 0, for codecs that carry them."""
        return state

    def check(self, arrays: ArrayMap, layout: Layout, mask: Mask) -> None:
        """Raise PayloadError unless type, length and every value are right."""
        check_values(self.vector(arrays, layout, mask))

    def vector(self, arrays: ArrayMap, layout: Layout, mask: Mask) -> Vector:
        """Return the carried values as float32."""
        return read_values(arrays, self.values, self.count(layout, mask))

    def scatter(self, vector: Vector, layout: Layout, mask: Mask) -> State:
        """Return the state whose carried coordinates are `vector`."""
        return layout.scatter(vector, self.index(layout, mask))


class Dense(LinearCodec):
    """Every coordinate."""

    name = "dense"

    def positions(self, layout: Layout, mask: Mask) -> npt.NDArray[np.bool_]:
        """Return all coordinates."""
        return np.ones(layout.size, dtype=np.bool_)

    def count(self, layout: Layout, mask: Mask) -> int:
        """Return how many they are."""
        return layout.size

    def masked(self, state: State, mask: Mask) -> State:
        """Return the state with dead coordinates at 0."""
        return state if mask.count == mask.alive.size else mask.apply(state)


class MaskedValues(LinearCodec):
    """Alive coordinates and the dense remainder; the mask is known to both ends (checked by its digest)."""

    name = "shared-mask"

    def positions(self, layout: Layout, mask: Mask) -> npt.NDArray[np.bool_]:
        """Return the alive coordinates and those no mask covers."""
        return mask.transmitted

    def index(self, layout: Layout, mask: Mask) -> Index:
        """Return where they are."""
        return _carried(mask)

    def count(self, layout: Layout, mask: Mask) -> int:
        """Return how many they are."""
        return mask.count + layout.size - layout.prunable_size

    def encode(self, layout: Layout, state: State, mask: Mask) -> Arrays:
        """Return them; what the state holds at dead coordinates does not matter."""
        return write_values(layout.flatten(state)[self.index(layout, mask)], self.values, self.rng)


@functools.lru_cache(maxsize=2)
def _carried(mask: Mask) -> Index:
    # Kept for the masks in use, of which SSFL has one: 8 bytes for each carried coordinate.
    return slice(None) if mask.count == mask.alive.size else np.flatnonzero(mask.transmitted)


class BitmapAndValues(Codec):
    """A bitmap of ceil(prunable / 8) bytes, then the values as `MaskedValues` writes them."""

    name = "bitmask"

    def encode(self, layout: Layout, state: State, mask: Mask) -> Arrays:
        """Return the bitmap and the values."""
        return {**MaskedValues(self.values, self.rng).encode(layout, state, mask), "mask": mask.packed()}

    def allowed(self, layout: Layout) -> Allowed:
        """Return the arrays that may be written."""
        return {**super().allowed(layout), **_allowed_bitmap(layout)}

    def decode(self, arrays: ArrayMap, layout: Layout, mask: Mask | None = None) -> tuple[State, Mask]:
        """Return the state and the mask that the bitmap tells."""
        carried = read_mask(arrays, layout)
        return MaskedValues(self.values).decode(arrays, layout, carried)


class Indexed(Codec):
    """The position of every alive coordinate as int32, then the values as `MaskedValues` writes them."""

    name = "indexed"

    def encode(self, layout: Layout, state: State, mask: Mask) -> Arrays:
        """Return positions (ascending) and values."""
        index = np.flatnonzero(mask.alive).astype(np.int32)
        return {**MaskedValues(self.values, self.rng).encode(layout, state, mask), "index": index}

    def allowed(self, layout: Layout) -> Allowed:
        """Return the arrays that may be written."""
        return {**super().allowed(layout), "index": (np.int32, layout.prunable_size)}

    def decode(self, arrays: ArrayMap, layout: Layout, mask: Mask | None = None) -> tuple[State, Mask]:
        """Return the state and the mask that the positions tell."""
        index = read_array(arrays, "index", np.int32, None)
        # Neighbours are compared, not subtracted: int32 differences of hostile values wrap around.
        rising = (index[1:] > index[:-1]).all()
        if index.size and (not rising or index[0] < 0 or index[-1] >= layout.prunable_size):
            raise PayloadError(f"index must rise strictly within 0..{layout.prunable_size - 1}")
        alive = np.zeros(layout.prunable_size, dtype=np.bool_)
        alive[index] = True
        return MaskedValues(self.values).decode(arrays, layout, Mask(layout, alive))


class Csr(Codec):
    """Compressed sparse rows by scipy: every prunable tensor as a matrix (out, rest).

    The paper's first version states this encoding. An int32 column for every value costs as much as the value, so
    at density 0.5 it saves nothing over dense; it is here so that those bytes can be compared.
    """

    name = "csr"

    def encode(self, layout: Layout, state: State, mask: Mask) -> Arrays:
        """Return "values" (alive of each tensor, then the dense remainder), "indices" and "indptr"."""
        from scipy import sparse

        shapes, flat = dict(layout.shapes), layout.flatten(state)
        indices, indptr = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for name, span in layout.prunable_spans.items():
            # From the mask's coordinates: an alive weight that is exactly 0 is stored like any other.
            rows, columns = np.nonzero(mask.alive[span].reshape(shapes[name][0], -1))
            matrix = sparse.csr_matrix((np.ones(rows.size, np.float32), (rows, columns)), shape=_matrix(shapes[name]))
            indices.append(matrix.indices.astype(np.int32))
            indptr.append(matrix.indptr.astype(np.int32))
        alive, rest = mask.transmitted & layout.is_prunable, ~layout.is_prunable
        values = write_values(np.concatenate([flat[alive], flat[rest]]), self.values, self.rng)
        return {**values, "indices": np.concatenate(indices), "indptr": np.concatenate(indptr)}

    def allowed(self, layout: Layout) -> Allowed:
        """Return the arrays that may be written."""
        rows = sum(shape[0] + 1 for name, shape in layout.shapes if name in layout.prunable_spans)
        tables = {"indices": (np.int32, layout.prunable_size), "indptr": (np.int32, rows)}
        return {**super().allowed(layout), **tables}

    def decode(self, arrays: ArrayMap, layout: Layout, mask: Mask | None = None) -> tuple[State, Mask]:
        """Return the state and the mask that the sparsity structure tells."""
        shapes = dict(layout.shapes)
        rows = {name: _matrix(shapes[name])[0] + 1 for name in layout.prunable}
        indptr = read_array(arrays, "indptr", np.int32, sum(rows.values()))
        indices = read_array(arrays, "indices", np.int32, None)
        alive, row, entry = np.zeros(layout.prunable_size, dtype=np.bool_), 0, 0
        for name, span in layout.prunable_spans.items():
            pointers = indptr[row : row + rows[name]]
            columns = indices[entry : entry + max(0, int(pointers[-1]))]
            alive[span] = _csr_pattern(name, pointers, columns, _matrix(shapes[name]))
            row, entry = row + rows[name], entry + columns.size
        if entry != indices.size:
            raise PayloadError(f"indices has length {indices.size}; indptr accounts for {entry}")
        carried = Mask(layout, alive)
        values = read_values(arrays, self.values, carried.count + layout.size - layout.prunable_size)
        flat = np.zeros(layout.size, dtype=np.float32)
        flat[carried.transmitted & layout.is_prunable] = values[: carried.count]
        flat[~layout.is_prunable] = values[carried.count :]
        return layout.unflatten(flat), carried


class BitmapOnly(Codec):
    """The bitmap alone. The decoded state is empty: the algorithm says what the bits mean."""

    name = "bits-only"

    def encode(self, layout: Layout, state: State, mask: Mask) -> Arrays:
        """Return the bitmap."""
        return {"mask": mask.packed()}

    def allowed(self, layout: Layout) -> Allowed:
        """Return the bitmap, which is all that is written."""
        return _allowed_bitmap(layout)

    def decode(self, arrays: ArrayMap, layout: Layout, mask: Mask | None = None) -> tuple[State, Mask]:
        """Return an empty state and the mask."""
        return {}, read_mask(arrays, layout)

    def check(self, arrays: ArrayMap, layout: Layout, mask: Mask | None = None) -> None:
        """Raise PayloadError unless the bitmap is well formed."""
        read_mask(arrays, layout)


CODECS: dict[str, type[Codec]] = {c.name: c for c in (Dense, MaskedValues, BitmapAndValues, Indexed, Csr, BitmapOnly)}


def read_mask(arrays: ArrayMap, layout: Layout) -> Mask:
    """Return the mask of the array "mask".

    Raises
    ------
    PayloadError
        It is missing or not a bitmap of this layout.
    """
    bitmap = read_array(arrays, "mask", np.uint8, None)
    try:
        return Mask.unpack(layout, bitmap)
    except ValueError as error:
        raise PayloadError(str(error)) from error


def _allowed_bitmap(layout: Layout) -> Allowed:
    return {"mask": (np.uint8, -(-layout.prunable_size // 8))}


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], int(np.prod(shape[1:], dtype=np.int64))


def _csr_pattern(
    name: str, pointers: npt.NDArray[np.int32], columns: npt.NDArray[np.int32], shape: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    from scipy import sparse

    # scipy trusts its inputs in places; what comes from a client is checked before it gets there.
    rising = pointers[0] == 0 and pointers[-1] == columns.size and (pointers[1:] >= pointers[:-1]).all()
    if not rising or (columns.size and (columns.min() < 0 or columns.max() >= shape[1])):
        raise PayloadError(f"indices of {name} do not describe a matrix of shape {shape}")
    matrix = sparse.csr_matrix((np.ones(columns.size, np.bool_), columns, pointers), shape=shape)
    if not matrix.has_canonical_format:
        raise PayloadError(f"indices of {name} are not sorted and unique in each row")
    return np.asarray(matrix.toarray(), dtype=np.bool_).reshape(-1)
