"""Classes that join late: the scripted distribution shift of SSFL's one-shot adaptation (TMLR 2026, section 4.3).

The last `shift.clients` clients hold the last `shift.classes` classes and nothing else; the other clients hold the
other classes. Within each group the images are dealt by the partition of the run. The late clients take part from
round `shift.round` on: before that they neither train nor are asked for scores, but they are tested, which shows what
the model knows of their classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ssfl_app.options import ConfigError, at_least, choice
from ssfl_app.partitions.options import Indices

Shares = tuple[Indices, ...]
Split = Callable[[Indices, Indices, int], tuple[Shares, Shares]]
"""split(train labels, test labels, clients) -> (train, test) indices of each client."""


@dataclass(frozen=True)
class ShiftOptions:
    """Keys of the section ``shift``; round 0: nobody joins late. `ssfl_app.partitions.stream` has the streams."""

    round: int = at_least(0, 0, "from this round on clients with new classes take part; 0: nobody joins late")
    clients: int = at_least(1, 4, "how many: the last ones")
    classes: int = at_least(1, 2, "which classes only they hold: the last ones; of a stream: how many are in play")
    stream: str = choice(
        "none", "classes", "labels", about="what clients train and test on changes over rounds (docs/streams.md)"
    )
    every: int = at_least(1, 5, "of a stream: rounds in which it moves on by one class")

    def present(self, clients: int, round_: int) -> int:
        """Return how many of `clients` take part in a round; they are the first ones."""
        return clients - self.clients if round_ < self.round else clients

    def check(self, clients: int, cohort: int) -> None:
        """Raise ConfigError unless there is one shift at most and the clients of the start suffice for a cohort."""
        if self.round and self.stream != "none":
            raise ConfigError(f"shift.stream is {self.stream!r}; it is 'none' where shift.round is above 0")
        if self.round and self.present(clients, 0) < cohort:
            raise ConfigError(
                f"shift.clients is {self.clients}; of {clients} clients at least run.cohort, {cohort}, start early"
            )


def split_groups(
    shift: ShiftOptions, train: Indices, test: Indices, clients: int, split: Split
) -> tuple[Shares, Shares]:
    """Deal the late classes to the late clients and the others to the others, of `clients` in all.

    `train` (N,) and `test` (M,) are the class of each image; `split` deals the images of one group. A ConfigError
    says that no class is left for the clients of the start.
    """
    names = np.unique(train)
    if shift.classes >= len(names):
        raise ConfigError(f"shift.classes is {shift.classes}; it is below the number of classes, {len(names)}")
    first_late = names[-shift.classes]
    shares: tuple[list[Indices], list[Indices]] = ([], [])
    for late, count in ((False, clients - shift.clients), (True, shift.clients)):
        images = [np.flatnonzero((labels >= first_late) == late) for labels in (train, test)]
        dealt = split(train[images[0]], test[images[1]], count)
        for mine, where, part in zip(shares, images, dealt, strict=True):
            mine.extend(where[indices] for indices in part)
    return tuple(shares[0]), tuple(shares[1])
