"""Mask: which coordinates of the prunable tensors are alive.

A mask is a frozen value. A tensor that it does not cover (biases, norms) is dense. It is always passed along
explicitly and never inferred from zeros: an alive weight may be exactly 0.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from ssfl_app.sparsity.layout import Bits, Layout, State, Vector

Scope = Literal["global", "layer"]


def keep_count(density: float, size: int) -> int:
    """Return floor(density * size), with `density` read as the decimal it is written as.

    In binary floating point 0.29 * 100 is 28.999...; a user who writes 0.29 means 29 of 100.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it is a fraction in (0, 1]")
    return math.floor(Fraction(repr(float(density))) * size)


def largest(scores: Vector, count: int) -> Bits:
    """Return where the `count` largest of `scores`, shape (n,), are; of equal ones the first. No score is NaN."""
    if not count:
        return np.zeros(scores.size, dtype=np.bool_)
    rank = scores.size - count
    threshold = np.partition(scores, rank)[rank]
    alive: Bits = scores > threshold
    equal = np.flatnonzero(scores == threshold)
    alive[equal[: count - int(np.count_nonzero(alive))]] = True
    return alive


def alive_count(layout: Layout, density: float, scope: Scope = "global", min_per_layer: int = 0) -> int:
    """Return how many coordinates `Mask.top` and `Mask.random` keep; they refuse to keep none."""
    counts = [keep_count(density, span.stop - span.start) for span in _groups(layout, scope)]
    return sum(map(max, counts, _reserved(layout, min_per_layer)) if scope == "layer" else counts)


def check_floor(layout: Layout, density: float, scope: Scope, min_per_layer: int) -> None:
    """Raise ValueError unless a ranking at a density leaves as many coordinates alive as `min_per_layer` reserves."""
    total, reserved = alive_count(layout, density, scope, min_per_layer), sum(_reserved(layout, min_per_layer))
    if reserved > total:
        raise ValueError(
            f"min-per-layer is {min_per_layer}; it reserves {reserved} weights, and the density leaves {total}"
        )


def _reserved(layout: Layout, min_per_layer: int) -> list[int]:
    return [min(min_per_layer, size) for size in layout.prunable_sizes.values()]


def none_alive(layout: Layout, density: float) -> str:
    """Return what is wrong with a density under which nothing would train."""
    size = layout.prunable_size
    return f"density is {density}; it leaves none of {size:,} prunable weights alive: one is {1 / size:.1e} of them"


class Mask:
    """The alive coordinates of a layout's prunable tensors.

    `alive` is bool, shape (layout.prunable_size,): the prunable tensors one after the other, each row-major. Another
    type is a TypeError, another shape a ValueError. In `on_device` a codec keeps what it makes of the mask on a GPU,
    for the thread that works with this mask.
    """

    on_device: torch.Tensor | None = None

    def __init__(self, layout: Layout, alive: Bits) -> None:
        if alive.dtype != np.bool_:
            raise TypeError(f"a mask is {alive.dtype}; it must be bool")
        if alive.shape != (layout.prunable_size,):
            raise ValueError(f"a mask has shape {alive.shape}; this layout needs ({layout.prunable_size},)")
        self.layout, self.alive = layout, alive.copy()
        self.alive.flags.writeable = False

    # ---- births ------------------------------------------------------------------------------

    @classmethod
    def dense(cls, layout: Layout) -> "Mask":
        """Return the mask under which everything is alive."""
        return cls(layout, np.ones(layout.prunable_size, dtype=np.bool_))

    @classmethod
    def top(
        cls, layout: Layout, scores: Vector, density: float, scope: Scope = "global", *, min_per_layer: int = 0
    ) -> "Mask":
        """Keep the coordinates with the largest scores, shape (layout.prunable_size,), and of equal ones the first.

        Parameters
        ----------
        density : float
            Fraction in (0, 1]; exactly floor(density * size) coordinates stay alive.
        scope : {"global", "layer"}
            Rank all layers together (SSFL, eq. 7), or each on its own with the same density.
        min_per_layer : int
            Each layer keeps at least its best `min_per_layer` coordinates (or all it has). Global ranking
            can otherwise empty a layer at low densities. With scope "global" the total stays exact.

        Raises
        ------
        ValueError
            Non-finite scores, wrong shape, density out of range or too low to leave one alive, or a floor that needs
            more than the total.
        """
        if scores.shape != (layout.prunable_size,):
            raise ValueError(f"scores have shape {scores.shape}; this layout needs ({layout.prunable_size},)")
        if not np.isfinite(scores).all():
            raise ValueError(f"{np.count_nonzero(~np.isfinite(scores))} scores are NaN or Inf; all must be finite")
        check_floor(layout, density, scope, min_per_layer)
        if layout.prunable_size and not alive_count(layout, density, scope, min_per_layer):
            raise ValueError(none_alive(layout, density))
        if min_per_layer and scope == "global":
            scores = _with_floor(layout, scores, min_per_layer)
        alive = np.zeros(layout.prunable_size, dtype=np.bool_)
        for span in _groups(layout, scope):
            size = span.stop - span.start
            least = min(min_per_layer, size) if scope == "layer" else 0
            alive[span] = largest(scores[span], max(keep_count(density, size), least))
        return cls(layout, alive)

    @classmethod
    def random(cls, layout: Layout, density: float, rng: np.random.Generator, scope: Scope = "global") -> "Mask":
        """Keep floor(density * size) random coordinates, over all layers or in each; a ValueError if that is none."""
        if layout.prunable_size and not alive_count(layout, density, scope):
            raise ValueError(none_alive(layout, density))
        alive = np.zeros(layout.prunable_size, dtype=np.bool_)
        for span in _groups(layout, scope):
            size = span.stop - span.start
            kept = rng.choice(size, keep_count(density, size), replace=False, shuffle=False)
            alive[span.start + kept] = True
        return cls(layout, alive)

    def shuffle(self, rng: np.random.Generator) -> "Mask":
        """Return the mask with each layer's bits permuted: same density per layer, other places."""
        alive = self.alive.copy()
        for span in self.layout.prunable_spans.values():
            alive[span] = rng.permutation(alive[span])
        return Mask(self.layout, alive)

    # ---- bits on the wire --------------------------------------------------------------------

    def packed(self) -> npt.NDArray[np.uint8]:
        """Return the mask as a bitmap of ceil(prunable / 8) bytes."""
        return np.packbits(self.alive)

    @classmethod
    def unpack(cls, layout: Layout, bitmap: npt.NDArray[np.uint8]) -> "Mask":
        """Return the mask of a bitmap.

        Raises
        ------
        ValueError
            The bitmap has not exactly ceil(prunable / 8) bytes, or a padding bit is set.
        """
        expected = -(-layout.prunable_size // 8)
        if bitmap.shape != (expected,):
            raise ValueError(f"a bitmap has {bitmap.size} bytes; this layout needs {expected}")
        bits = np.unpackbits(bitmap).astype(np.bool_)
        if bits[layout.prunable_size :].any():
            raise ValueError("a bitmap has bits set behind its end; they must be 0")
        return cls(layout, bits[: layout.prunable_size])

    @cached_property
    def digest(self) -> str:
        """The SHA-256 (hex) over layout and bits, which both ends share; in fewer bits collisions can be found."""
        return hashlib.sha256(self.layout.digest.encode() + self.packed().tobytes()).hexdigest()

    # ---- views -------------------------------------------------------------------------------

    @cached_property
    def transmitted(self) -> Bits:
        """Return a bool vector of shape (layout.size,): alive coordinates and the dense remainder."""
        flags = np.ones(self.layout.size, dtype=np.bool_)
        flags[self.layout.is_prunable] = self.alive
        return flags

    def tensors(self, device: torch.device | str = "cpu") -> State:
        """Return the mask as bool tensors by name."""
        shapes = dict(self.layout.shapes)
        return {
            name: torch.from_numpy(self.alive[span].copy()).view(shapes[name]).to(device)
            for name, span in self.layout.prunable_spans.items()
        }

    def apply(self, state: Mapping[str, torch.Tensor], dead: Mapping[str, torch.Tensor] | None = None) -> State:
        """Return the state with every dead coordinate at exactly 0, or at its value in the state `dead`."""
        bits = self.tensors()
        rest = {name: torch.zeros(()) if dead is None else dead[name].cpu() for name in bits}
        # where, not a product: -1 * 0 would be -0.0, which is another bit pattern than 0.
        return {n: torch.where(bits[n], t.cpu(), rest[n]) if n in bits else t.cpu().clone() for n, t in state.items()}

    def layers(self) -> Iterator[tuple[str, int, int]]:
        """Yield (name, alive, size) for each prunable tensor."""
        for name, span in self.layout.prunable_spans.items():
            yield name, int(self.alive[span].sum()), self.layout.prunable_sizes[name]

    # ---- numbers -----------------------------------------------------------------------------

    @cached_property
    def count(self) -> int:
        """Number of alive coordinates."""
        return int(np.count_nonzero(self.alive))

    @property
    def density(self) -> float:
        """Alive / size over the prunable tensors."""
        return self.count / max(1, self.layout.prunable_size)

    def hamming(self, other: "Mask") -> float:
        """Return the fraction of coordinates in which two masks of one layout differ."""
        return float(np.count_nonzero(self.alive ^ self._same(other))) / max(1, self.alive.size)

    def jaccard_distance(self, other: "Mask") -> float:
        """Return 1 - |both alive| / |either alive|: 0 for equal masks, 1 for disjoint ones."""
        either = int(np.count_nonzero(self.alive | self._same(other)))
        return (either - int(np.count_nonzero(self.alive & other.alive))) / max(1, either)

    def __or__(self, other: "Mask") -> "Mask":
        return Mask(self.layout, self.alive | self._same(other))

    def __and__(self, other: "Mask") -> "Mask":
        return Mask(self.layout, self.alive & self._same(other))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.layout == other.layout and bool((self.alive == other.alive).all())

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Mask({self.count} of {self.layout.prunable_size} alive, {self.digest})"

    def _same(self, other: "Mask") -> Bits:
        if other.layout != self.layout:
            raise ValueError(f"masks of different layouts: {self.layout.digest} and {other.layout.digest}")
        return other.alive


def _groups(layout: Layout, scope: Scope) -> list[slice]:
    if scope == "layer":
        return list(layout.prunable_spans.values())
    if scope == "global":
        return [slice(0, layout.prunable_size)]
    raise ValueError(f"scope is {scope!r}; it is global or layer")


def _with_floor(layout: Layout, scores: Vector, floor: int) -> Vector:
    # The reserved coordinates become unbeatable; the rest compete for what is left of the total.
    raised = scores.astype(np.float32, copy=True)
    for name, span in layout.prunable_spans.items():
        raised[span][largest(scores[span], min(floor, layout.prunable_sizes[name]))] = np.inf
    return raised
