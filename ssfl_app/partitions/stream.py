"""Streams: which of its images a client has in a round, where that changes all the time (``shift.stream``).

The classes lie on a circle. In a round a share of each class's images is in play, and in ``shift.every`` times as
many rounds as there are classes it has gone around once:

===========  ========================================================================================================
shift.stream  share of class c of C in round r, with w = shift.classes
===========  ========================================================================================================
classes      1 for the w classes from floor((r - 1) / every) mod C on, else 0: every so many rounds one class goes
             and one comes
labels       (1 + cos(pi d / w)) / 2 for d < w, else 0, where d is how far c is on the circle from (r - 1) / every:
             a label shift that never stops
===========  ========================================================================================================

Both are w classes' worth of images (labels: for 2 w <= C). Partition and holdings stay what they are. A client uses,
of each class, the share of its own images rounded up, drawn anew in each round; one that has none of what is in play
trains on the next class on the circle that it has. Test images, a client's and the server's, follow the same shares:
accuracy is that on what is in play. What is asked before round 1 is asked of what round 1 has.
"""

import numpy as np
import numpy.typing as npt

from ssfl_app.options import ConfigError
from ssfl_app.partitions.late import ShiftOptions
from ssfl_app.partitions.options import Indices


def check_stream(shift: ShiftOptions, classes: int) -> None:
    """Raise ConfigError unless data of so many classes can be the stream."""
    if shift.stream != "none" and shift.classes >= classes:
        raise ConfigError(f"shift.classes is {shift.classes}; it is below the number of classes, {classes}")


def class_shares(shift: ShiftOptions, classes: int, round_: int) -> npt.NDArray[np.float64]:
    """Return which share of the images of each class is in play in a round, in [0, 1], shape (classes,)."""
    step = (max(round_, 1) - 1) % (shift.every * classes)
    if shift.stream == "classes":
        return np.where((np.arange(classes) - step // shift.every) % classes < shift.classes, 1.0, 0.0)
    ahead = (np.arange(classes) - step / shift.every) % classes
    apart = np.minimum(ahead, classes - ahead)
    shares = np.where(apart < shift.classes, (1 + np.cos(np.pi * apart / shift.classes)) / 2, 0.0)
    rounded: npt.NDArray[np.float64] = shares.round(9)  # the last bits of a cosine differ from machine to machine
    return rounded


def in_play(
    shift: ShiftOptions, classes: int, round_: int, labels: Indices, rng: np.random.Generator, some: bool = False
) -> Indices:
    """Return which images of these labels, shape (N,), are in play in a round: places in them, ascending.

    With `some` at least one, if there is any: those of the next class on the circle that is there.
    """
    shares = class_shares(shift, classes, round_)
    counts = np.bincount(labels, minlength=classes)
    wanted = np.ceil(shares * counts).astype(np.int64)
    if some and not wanted.any() and counts.any():
        first = (max(round_, 1) - 1) // shift.every % classes
        following = next(c % classes for c in range(first, first + classes) if counts[c % classes])
        wanted[following] = counts[following]
    chosen = [rng.permutation(np.flatnonzero(labels == c))[: wanted[c]] for c in np.flatnonzero(wanted)]
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *chosen]))
