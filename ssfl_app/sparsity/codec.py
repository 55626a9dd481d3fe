"""Codecs: a state and its mask <-> the flat arrays that an algorithm pays for.

Law, for every codec: ``decode(encode(state, mask), layout, mask) == (mask.apply(state), mask)``, within the
value type's stated error. The bytes of a message are the bytes of these arrays (`nbytes`); nothing computes a
cost beside them.

===============  =====================================  ==========================================
codec            arrays                                 who must know the mask beforehand
===============  =====================================  ==========================================
Dense            values of all coordinates              nobody (the mask is not carried)
MaskedValues     values of alive + dense remainder      both ends: SSFL's training rounds
BitmapAndValues  the same + 1 bit a prunable weight     nobody
Indexed          the same + int32 index of each alive   nobody; less than a bitmap below density 1/32
BitmapOnly       1 bit a prunable weight                nobody; carries no values (FedPM)
===============  =====================================  ==========================================
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from ssfl_app.sparsity.layout import Index, Layout, State, Vector, from_gpu
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
    """One way of writing a state under a mask, with values of one of `ssfl_app.sparsity.values.VALUE_TYPES`.

    `encode` rounds stochastically with a generator; to the nearest without one. On `device`, where it is set, a codec
    that can puts together what it decodes; else, and where it is None, on the CPU.
    """

    name: ClassVar[str]
    device: torch.device | None = None

    def __init__(self, values: str = "fp32", rng: np.random.Generator | None = None) -> None:
        self.values, self.rng = values, rng

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

    def stays(self, layout: Layout) -> tuple[str, ...]:
        """Return the tensors that never travel: each end keeps its own. Default: none."""
        return ()

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

    def index_on(self, layout: Layout, mask: Mask, device: torch.device) -> torch.Tensor | None:
        """Return `index` on a device, int64; None: all."""
        places = self.positions(layout, mask)
        return None if places.all() else torch.from_numpy(np.flatnonzero(places)).to(device)

    def count(self, layout: Layout, mask: Mask) -> int:
        """Return how many coordinates are carried."""
        return int(np.count_nonzero(self.positions(layout, mask)))

    def encode(self, layout: Layout, state: State, mask: Mask) -> Arrays:
        """Return the carried coordinates of the state."""
        if mask.count == mask.alive.size:
            return write_values(self.pick(layout, state, mask), self.values, self.rng)
        flat = layout.flatten(state)
        flat[np.flatnonzero(~mask.transmitted)] = 0
        return write_values(flat[self.index(layout, mask)], self.values, self.rng)

    def pick(self, layout: Layout, state: State, mask: Mask) -> Vector:
        """Return what a state has at the carried coordinates; on a GPU it is picked there."""
        together = layout.joined(state)
        if together is None:
            return layout.flatten(state)[self.index(layout, mask)]
        index = self.index_on(layout, mask, together.device)
        return from_gpu(together if index is None else together[index])

    def decode(self, arrays: ArrayMap, layout: Layout, mask: Mask) -> tuple[State, Mask]:
        """Return the state with 0 wherever nothing was carried."""
        return self.scatter(self.vector(arrays, layout, mask), layout, mask), mask

    def check(self, arrays: ArrayMap, layout: Layout, mask: Mask) -> None:
        """Raise PayloadError unless type, length and every value are right."""
        check_values(self.vector(arrays, layout, mask))

    def vector(self, arrays: ArrayMap, layout: Layout, mask: Mask) -> Vector:
        """Return the carried values as float32."""
        return read_values(arrays, self.values, self.count(layout, mask))

    def scatter(self, vector: Vector, layout: Layout, mask: Mask) -> State:
        """Return the state whose carried coordinates are `vector`."""
        if self.device is None or self.device.type == "cpu":
            return layout.scatter(vector, self.index(layout, mask))
        return layout.scatter_on(self.device, vector, self.index_on(layout, mask, self.device))


class Dense(LinearCodec):
    """Every coordinate that travels."""

    name = "dense"

    def positions(self, layout: Layout, mask: Mask) -> npt.NDArray[np.bool_]:
        """Return all coordinates but those that stay."""
        places = np.ones(layout.size, dtype=np.bool_)
        for name in self.stays(layout):
            places[layout.spans[name]] = False
        return places

    def count(self, layout: Layout, mask: Mask) -> int:
        """Return how many they are."""
        return super().count(layout, mask) if self.stays(layout) else layout.size

    def decode(self, arrays: ArrayMap, layout: Layout, mask: Mask) -> tuple[State, Mask]:
        """Return the state with dead coordinates at 0."""
        state, _ = super().decode(arrays, layout, mask)
        return state if mask.count == mask.alive.size else mask.apply(state), mask


class MaskedValues(LinearCodec):
    """Alive coordinates and the dense remainder; the mask is known to both ends (checked by its digest)."""

    name = "shared-mask"

    def positions(self, layout: Layout, mask: Mask) -> npt.NDArray[np.bool_]:
        """Return the alive coordinates and those no mask covers."""
        return mask.transmitted

    def index(self, layout: Layout, mask: Mask) -> Index:
        """Return where they are."""
        return _carried(mask)

    def index_on(self, layout: Layout, mask: Mask, device: torch.device) -> torch.Tensor | None:
        """Return where they are, on a device; it is kept with the mask."""
        if mask.count == mask.alive.size:
            return None
        if mask.on_device is None or mask.on_device.device.type != device.type:  # "cuda" is "cuda:0"
            mask.on_device = super().index_on(layout, mask, device)
        return mask.on_device

    def count(self, layout: Layout, mask: Mask) -> int:
        """Return how many they are."""
        return mask.count + layout.size - layout.prunable_size

    def encode(self, layout: Layout, state: State, mask: Mask) -> Arrays:
        """Return them; what the state holds at dead coordinates does not matter."""
        return write_values(self.pick(layout, state, mask), self.values, self.rng)


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
        return MaskedValues(self.values).decode(arrays, layout, read_mask(arrays, layout))


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
        index = _read_places(arrays, "index", layout)
        alive = np.zeros(layout.prunable_size, dtype=np.bool_)
        alive[index] = True
        return MaskedValues(self.values).decode(arrays, layout, Mask(layout, alive))


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


CODECS: dict[str, type[Codec]] = {c.name: c for c in (Dense, MaskedValues, BitmapAndValues, Indexed, BitmapOnly)}


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


def write_moved(before: Mask, after: Mask) -> Arrays:
    """Return the array "moved": where two masks of one layout differ, int32, ascending."""
    return {"moved": np.flatnonzero(before.alive ^ after.alive).astype(np.int32)}


def read_moved(arrays: ArrayMap, before: Mask) -> Mask:
    """Return the mask that differs from `before` at the places of the array "moved".

    Raises
    ------
    PayloadError
        It is missing, or its places do not rise strictly within those of the layout.
    """
    moved = _read_places(arrays, "moved", before.layout)
    alive = before.alive.copy()
    alive[moved] ^= True
    return Mask(before.layout, alive)


def _read_places(arrays: ArrayMap, name: str, layout: Layout) -> npt.NDArray[np.int32]:
    places = read_array(arrays, name, np.int32, None)
    # Neighbours are compared, not subtracted: int32 differences of hostile values wrap around.
    rising = (places[1:] > places[:-1]).all()
    if places.size and (not rising or places[0] < 0 or places[-1] >= layout.prunable_size):
        raise PayloadError(f"{name} must rise strictly within 0..{layout.prunable_size - 1}")
    return places


def _allowed_bitmap(layout: Layout) -> Allowed:
    return {"mask": (np.uint8, -(-layout.prunable_size // 8))}
