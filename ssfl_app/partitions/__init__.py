"""Deals a data set to the clients of a federation: who holds which images.

A partition is one function in one file, named in `REGISTRY`. It deals the training images; the test images
follow the clients' training classes (`ssfl_app.partitions.matched`).

Examples
--------
>>> import numpy as np
>>> labels = np.repeat(np.arange(4), 25)
>>> dealt = split(PartitionOptions("dirichlet", 0.3, 2), labels, labels[::5], clients=10, seed=1)
>>> [len(indices) for indices in dealt.train]
[10, 10, 10, 10, 10, 10, 10, 10, 10, 10]
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ssfl_app.options import ConfigError
from ssfl_app.partitions import dirichlet, iid, matched, pathological
from ssfl_app.partitions.late import ShiftOptions, split_groups
from ssfl_app.partitions.options import SplitOptions
from ssfl_app.registry import Registry
from ssfl_app.seeding import generator

Indices = npt.NDArray[np.int64]
Splitter = Callable[[Indices, int, SplitOptions, np.random.Generator], list[Indices]]
"""splitter(labels (N,), K clients, options, generator) -> K arrays of indices into `labels`: every image once, no
client without one. `split` has made sure that K <= N; all that is random is drawn from the generator."""

REGISTRY: Registry[Splitter] = Registry(
    "ssfl.partitions",
    {
        "dirichlet": dirichlet.dirichlet,
        "dirichlet-class": dirichlet.dirichlet_class,
        "pathological": pathological.pathological,
        "iid": iid.iid,
    },
    "a function (labels, clients, options, generator) that returns an array of indices for each client",
    callable,
)


@dataclass(frozen=True)
class PartitionOptions(SplitOptions):
    """The section ``partition`` of the configuration: `SplitOptions` with a name that exists."""

    name: str = REGISTRY.field("dirichlet", "who holds what")


@dataclass(frozen=True)
class Partition:
    """The images of every client.

    Attributes
    ----------
    train : tuple of int64 ndarray
        K sorted index arrays into the training images: disjoint, covering, none empty.
    test : tuple of int64 ndarray
        K sorted index arrays into the test images: disjoint. One may be empty where there are few test
        images a client.
    """

    train: tuple[Indices, ...]
    test: tuple[Indices, ...]

    def class_counts(self, labels: Indices, classes: int) -> Indices:
        """Return how many training images of each class each client holds.

        Parameters
        ----------
        labels : int64 ndarray, shape (N,)
            Labels of the training images.
        classes : int
            C, the classes of the data set.

        Returns
        -------
        int64 ndarray, shape (K, C)
        """
        return matched.count(self.train, labels, classes)


def split(
    options: PartitionOptions,
    train_labels: Indices,
    test_labels: Indices,
    clients: int,
    seed: int,
    shift: ShiftOptions | None = None,
) -> Partition:
    """Deal the images of a data set to its clients.

    Parameters
    ----------
    options : PartitionOptions
        Which partition, and its parameters.
    train_labels, test_labels : int64 ndarray, shapes (N,) and (M,)
        Class of each image, 0 <= label < C.
    clients : int
        K.
    seed : int
        The run's seed; the same arguments give the same partition on every machine.
    shift : ShiftOptions, optional
        Classes that join late.

    Raises
    ------
    ConfigError
        More clients than training images, or classes that cannot be dealt as asked.
    """
    rng = generator(seed, "partition", options.name)

    def deal(train: Indices, test: Indices, count: int) -> tuple[tuple[Indices, ...], tuple[Indices, ...]]:
        if not 1 <= count <= len(train):
            raise ConfigError(
                f"run.clients is {count}; the data set has {len(train)} training images, "
                "at least one a client is needed"
            )
        shares = REGISTRY[options.name](train, count, options, rng)
        return tuple(shares), tuple(matched.matched(shares, train, test, rng))

    if shift is None or not shift.round:
        shares = deal(train_labels, test_labels, clients)
    else:
        shares = split_groups(shift, train_labels, test_labels, clients, deal)
    return Partition(*map(_sorted, shares))


def _sorted(shares: tuple[Indices, ...]) -> tuple[Indices, ...]:
    return tuple(np.sort(share).astype(np.int64) for share in shares)
