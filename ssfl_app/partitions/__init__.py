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

from ssfl_app.options import ConfigError
from ssfl_app.partitions import dirichlet, iid, matched, pathological
from ssfl_app.partitions.late import ShiftOptions, split_groups
from ssfl_app.partitions.options import Indices as Indices
from ssfl_app.partitions.options import SplitOptions
from ssfl_app.registry import Registry
from ssfl_app.seeding import generator

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
        """Return how many training images, of these labels (N,), of each class each client holds, int64 (K, C)."""
        return matched.count(self.train, labels, classes)


def split(
    options: PartitionOptions,
    train_labels: Indices,
    test_labels: Indices,
    clients: int,
    seed: int,
    shift: ShiftOptions | None = None,
) -> Partition:
    """Deal the images of a data set, of labels int64 (N,) and (M,), to its K clients.

    The same arguments give the same partition on every machine. `shift` says which classes join late, if any.

    Raises
    ------
    ConfigError
        More clients than training images, or classes that cannot be dealt as asked.
    """
    rng = generator(seed, "partition", options.name)

    def deal(train: Indices, test: Indices, count: int) -> tuple[tuple[Indices, ...], tuple[Indices, ...]]:
        if not 1 <= count <= len(train):
            rule = f"the data set has {len(train)} training images, at least one a client is needed"
            raise ConfigError(f"run.clients is {count}; {rule}")
        shares = REGISTRY[options.name](train, count, options, rng)
        return tuple(shares), tuple(matched.matched(shares, train, test, rng))

    if shift is None or not shift.round:
        shares = deal(train_labels, test_labels, clients)
    else:
        shares = split_groups(shift, train_labels, test_labels, clients, deal)
    return Partition(*(tuple(np.sort(share).astype(np.int64) for share in part) for part in shares))
