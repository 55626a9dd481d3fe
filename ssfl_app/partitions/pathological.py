"""The pathological partition: every client holds the same small number of classes."""

import numpy as np
import numpy.typing as npt

from ssfl_app.options import ConfigError
from ssfl_app.partitions.options import Indices, SplitOptions


def pathological(labels: Indices, clients: int, options: SplitOptions, rng: np.random.Generator) -> list[Indices]:
    """Give each client n = `options.classes` classes, all classes to equally many clients, every image to one.

    The published codes do otherwise: DisPFL hands the same image to several clients; the SSFL code lists
    all combinations of classes (1.7e13 of them for 10 of 100) and leaves some clients half empty.

    Raises
    ------
    ConfigError
        n is above the number of classes; K * n is below it (a class would belong to nobody); a class has
        fewer images than clients that should hold it.

    References
    ----------
    McMahan et al. (2017), arXiv:1602.05629, section 3: the pathological non-IID partition (n = 2).
    """
    names, sizes = np.unique(labels, return_counts=True)
    _check(len(names), clients, options.classes)
    held = _deal(len(names), clients, options.classes, rng)
    shares: list[list[Indices]] = [[] for _ in range(clients)]
    for index, (label, size) in enumerate(zip(names, sizes, strict=True)):
        # In random order, so that the remainders of the classes do not gather at the first clients.
        holders = rng.permutation(np.flatnonzero(held[:, index]))
        if size < len(holders):
            raise ConfigError(
                f"partition.classes is {options.classes}; with {clients} clients, class {label} goes to "
                f"{len(holders)} of them but has {size} training images, at least one each is needed"
            )
        images = rng.permutation(np.flatnonzero(labels == label))
        for holder, part in zip(holders, np.array_split(images, len(holders)), strict=True):
            shares[holder].append(part)
    return [np.concatenate(share) for share in shares]


def _check(classes: int, clients: int, each: int) -> None:
    if each > classes:
        raise ConfigError(f"partition.classes is {each}; the data set has {classes} classes, it is at most that")
    if clients * each < classes:
        raise ConfigError(
            f"partition.classes is {each}; with {clients} clients it is at least {-(-classes // clients)}, "
            f"or some of the {classes} classes belong to nobody"
        )


def _deal(classes: int, clients: int, each: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Return who holds what, (K, C): rows of sum `each`, columns of sums that differ by at most one.

    A client takes the classes that wait for most holders, ties at random. That cannot get stuck: with R
    clients to come, the waiting numbers sum to R * each and none exceeds R, so at most `each` classes wait
    for all R of them, and those are taken first (Gale 1957; Ryser 1957).
    """
    waiting = np.full(classes, clients * each // classes)
    waiting[rng.permutation(classes)[: clients * each % classes]] += 1
    held = np.zeros((clients, classes), dtype=np.bool_)
    for row in held:
        taken = np.lexsort((rng.random(classes), -waiting))[:each]
        row[taken] = True
        waiting[taken] -= 1
    return held
