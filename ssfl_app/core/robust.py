"""Robust means, in which one lying client has a bounded influence, and files in which replies wait for the last one.

A mean can be streamed; a median, or a choice among replies, cannot. So replies wait in a temporary file that has no
name (in TMPDIR; it is gone with its process), and are folded a block of coordinates at a time. No fold depends on the
order of arrival: rows are sorted by client, and what is equal goes to the lower number.

=============  ==================================================  ===============================================
fold           of n vectors                                        from
=============  ==================================================  ===============================================
trimmed_mean   of each coordinate, without the floor(trim n)       Yin, Chen, Ramchandran and Bartlett,
               largest and as many of the smallest                 "Byzantine-robust distributed learning", ICML 2018
median         of each coordinate                                  the same
krum           the one vector whose n - f - 2 nearest others are   Blanchard, El Mhamdi, Guerraoui and Stainer,
               closest, f = floor(trim n)                          "Machine learning with adversaries", NeurIPS 2017
=============  ==================================================  ===============================================

All three are unweighted, as published: the weight would be what the liar says.

Departures: where so few answer that n - f - 2 is below 1, krum looks at the one nearest other vector.
"""

import itertools
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from io import BufferedRandom

import numpy as np
import numpy.typing as npt
import torch

from ssfl_app.core.blocks import BLOCK, by_blocks
from ssfl_app.core.means import WeightedMean
from ssfl_app.sparsity.layout import Bits, Layout, Vector
from ssfl_app.sparsity.values import MAX_VALUE, Arrays, check_values

FOLDS = ("mean", "trimmed-mean", "median", "krum")
SCORE_FOLDS = ("mean", "normalised", "median")

VALUES = 1 << 20
"""Values of one block: of all replies together, so its memory does not grow with their number."""


class Rows:
    """Vectors of `size` coordinates, one a client, in a file without a name.

    Notes
    -----
    Disk: 4 bytes a coordinate and client. Memory: a block of at most max(`VALUES`, clients) values at a time: 4 bytes
    each, and at most 20 more for what a fold computes with them, so 24 MiB up to a million clients.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as this object)
        self._rows: dict[int, int] = {}  # client -> where its vector lies

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, client: int, values: Vector) -> None:
        """Add the vector of a client, float32, shape (size,), |x| <= MAX_VALUE.

        Raises
        ------
        ValueError
            Wrong shape, a value that is not finite or too large, or a second vector of this client.
        """
        if values.shape != (self._size,) or client in self._rows:
            what = f"a vector of shape {values.shape}; one of ({self._size},) is needed"
            raise ValueError(f"client {client} has {what}")
        check_values(values)
        self._file.seek(4 * self._size * len(self._rows))
        self._file.write(np.ascontiguousarray(values, dtype=np.float32).data)
        self._rows[client] = len(self._rows)

    def row(self, client: int) -> Vector:
        """Return the vector of a client."""
        vector = np.empty(self._size, dtype=np.float32)
        self._read(client, 0, vector)
        return vector

    def clients(self) -> list[int]:
        """Return the clients, ascending: the rows of each block."""
        return sorted(self._rows)

    def blocks(self) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
        """Yield which coordinates, and their values of all clients, shape (clients, coordinates); at least one."""
        if not self._rows:
            raise ValueError("a fold of nothing; at least one vector must be added")
        clients, width = self.clients(), max(1, VALUES // len(self._rows))
        for start in range(0, self._size, width):
            part = slice(start, min(start + width, self._size))
            block = np.empty((len(clients), part.stop - start), dtype=np.float32)
            for row, client in zip(block, clients, strict=True):
                self._read(client, start, row)
            yield part, block

    def _read(self, client: int, start: int, into: Vector) -> None:
        _fill(into, self._file, 4 * (self._rows[client] * self._size + start), client)


def _fill(into: npt.NDArray[np.generic], file: BufferedRandom, start: int, client: int) -> None:
    """Read a flat array of a client from where it was written in a temporary file."""
    file.seek(start)
    if file.readinto(into.view(np.uint8).data) != into.nbytes:
        raise OSError(f"the temporary file of replies is shorter than what was written to it (client {client})")


FEWEST = 3
"""Replies of a round below which no fold can tell who lies."""


def share_of(trim: float, count: int) -> int:
    """Return floor(trim * count), of the decimal that `trim` is written as."""
    return math.floor(Fraction(repr(trim)) * count)


def trimmed_mean(rows: Rows, trim: float) -> Vector:
    """Return each coordinate's mean without the share `trim` of the rows at either end, in [0, 0.5); float32.

    Of three rows or more at least one at either end, unless `trim` is 0: it stays robust where replies are lost.
    """
    least = 1 if trim and len(rows) >= FEWEST else 0
    mean, cut = np.empty(rows._size, dtype=np.float32), max(least, share_of(trim, len(rows)))
    for part, block in rows.blocks():
        block.sort(axis=0)
        mean[part] = block[cut : len(rows) - cut].mean(axis=0, dtype=np.float64)
    return mean


def median(rows: Rows) -> Vector:
    """Return each coordinate's median, float32; with an even number of rows the mean of the middle two."""
    middle, values = len(rows) // 2, np.empty(rows._size, dtype=np.float32)
    for part, block in rows.blocks():
        block.sort(axis=0)
        values[part] = block[middle - 1 + len(rows) % 2 : middle + 1].mean(axis=0, dtype=np.float64)
    return values


def krum(rows: Rows, trim: float) -> Vector:
    """Return the vector of the client that Krum chooses if the share `trim` of the rows may lie; float32."""
    clients, count = rows.clients(), len(rows)
    apart = np.zeros((count, count))
    for _, block in rows.blocks():
        for i in range(count - 1):
            for j in range(i + 1, count):  # a pair at a time: differences, since squares of large values cancel badly
                apart[i, j] += np.square(np.subtract(block[i], block[j], dtype=np.float64)).sum()
    apart += apart.T
    near = max(1, count - share_of(trim, count) - 2)
    scores = np.sort(apart, axis=1)[:, 1 : near + 1].sum(axis=1)  # the nearest one is itself
    return rows.row(clients[int(np.argmin(scores))])


def folded(rows: Rows, fold: str, trim: float) -> Vector:
    """Return what run.fold, of `FOLDS` but "mean", makes of the rows."""
    if fold == "trimmed-mean":
        return trimmed_mean(rows, trim)
    return median(rows) if fold == "median" else krum(rows, trim)


class ScoreFold:
    """The fold of clients' scores, of which only the ranking matters.

    ==========  ================================================================================================
    kind        what one client can do
    ==========  ================================================================================================
    mean        all: scores a few times as large as everybody else's decide the ranking
    normalised  its weight's share: each client's scores are divided by the sum of their magnitudes first
    median      of the normalised scores, coordinate by coordinate, unweighted: nothing beyond what others say there
    ==========  ================================================================================================
    """

    def __init__(self, kind: str, size: int) -> None:
        self._kind, self._size = kind, size
        self._fold: WeightedMean | Rows = Rows(size) if kind == "median" else WeightedMean(size)

    def add(self, client: int, scores: Vector, weight: int) -> None:
        """Add the scores of a client, float32, shape (size,), |x| <= MAX_VALUE, with a weight of at least 1."""
        if self._kind != "mean":
            scores = normalised(scores)
        if isinstance(self._fold, Rows):
            self._fold.add(client, scores)
        else:
            self._fold.add(scores, weight)

    def value(self) -> Vector:
        """Return the fold so far, float32, shape (size,)."""
        return median(self._fold) if isinstance(self._fold, Rows) else self._fold.value()


def normalised(scores: Vector) -> Vector:
    """Return scores whose magnitudes have one sum, whatever they had before; all 0 stay 0.

    The sum is that of ones, or as much of it as a fold can take at one coordinate. Float32 would lose the smallest of
    10 million scores that add up to 1.
    """
    total = float(np.abs(scores).sum(dtype=np.float64))
    scale = min(scores.size, MAX_VALUE / 2) / total if total else 0.0
    return np.multiply(scores, scale, dtype=np.float64).astype(np.float32)


class Held:
    """Arrays of replies in a file without a name, to be read again once.

    Notes
    -----
    Disk: the encoded replies. Memory: one of them at a time.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._places: dict[int, tuple[int, dict[str, tuple[np.dtype[np.generic], int]]]] = {}

    def put(self, client: int, arrays: Arrays) -> None:
        """Keep flat arrays."""
        start = self._file.seek(0, 2)
        for array in arrays.values():
            self._file.write(np.ascontiguousarray(array).data)
        self._places[client] = start, {name: (array.dtype, array.size) for name, array in arrays.items()}

    def get(self, client: int) -> Arrays:
        """Return them; OSError if the file ends before they do."""
        start, kinds = self._places[client]
        arrays = {name: np.empty(size, dtype=kind) for name, (kind, size) in kinds.items()}
        for array in arrays.values():
            _fill(array, self._file, start, client)
            start += array.nbytes
        return arrays


def there(layout: Layout, state: Mapping[str, torch.Tensor], places: Bits) -> list[Vector]:
    """Return what a state has at `places`, bool, shape (layout.size,): a vector a tensor, in order.

    A tensor that is carried whole is not copied: nothing may write to it as long as the vectors are used.
    """
    vectors = []
    for name, span in layout.spans.items():
        at, values = places[span], state[name].detach().reshape(-1).cpu().numpy()
        vectors.append(values if at.all() else values[at])
    return vectors


def distance(values: Vector, old: Iterable[Vector] | None = None) -> float:
    """Return the Euclidean length of values, float32, minus `old`: pieces that are together as long (`there`), or 0.

    Squares are summed in blocks of 2^15 that stay in the cache, and the blocks' sums without rounding: the relative
    error is below 1e-14, and no second vector is in memory.
    """
    pairs, start = [], 0
    for piece in [np.broadcast_to(np.float32(0), values.shape)] if old is None else old:
        for first in range(0, piece.size, BLOCK):
            before = piece[first : first + BLOCK]
            pairs.append((values[start : (start := start + before.size)], before))

    def squares(pairs: Sequence[tuple[Vector, Vector]]) -> list[float]:
        room, sums = np.empty(BLOCK), []
        for now, before in pairs:
            change = room[: before.size]
            np.subtract(now, before, out=change, dtype=np.float64)
            sums.append(float(np.square(change, out=change).sum()))
        return sums

    return math.sqrt(math.fsum(itertools.chain(*by_blocks(squares, pairs))))
