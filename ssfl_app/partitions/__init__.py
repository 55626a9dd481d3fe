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
from ssfl_app.partitions import dirichlet, flwr_partitioner, iid, matched, pathological, quantity
from ssfl_app.partitions.late import ShiftOptions, split_groups
from ssfl_app.partitions.options import Indices as Indices
from ssfl_app.partitions.options import SplitOptions
from ssfl_app.registry import Registry
from ssfl_app.seeding import generator
from ssfl_app.text import one_line

Splitter = Callable[[Indices, int, SplitOptions, np.random.Generator], list[Indices]]
"""splitter(labels (N,), K clients, options, generator) -> K arrays of indices into `labels`: every image once, no
client without one. `split` has made sure that K <= N; all that is random is drawn from the generator."""

NATURAL = "natural"
"""The partition that the data bring with them."""

REGISTRY: Registry[Splitter] = Registry(
    "ssfl.partitions",
    {
        "dirichlet": dirichlet.dirichlet,
        "dirichlet-class": dirichlet.dirichlet_class,
        "pathological": pathological.pathological,
        "iid": iid.iid,
        "quantity": quantity.quantity,
        NATURAL: iid.iid,  # without late clients `split` deals it; the data say who holds what
    },
    "a function (labels, clients, options, generator) that returns an array of indices for each client, or a "
    "partitioner of flwr-datasets",
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
    owners: tuple[Indices, Indices] | None = None,
) -> Partition:
    """Deal the samples of a data set, of labels int64 (N,) and (M,), to its K clients.

    The same arguments give the same partition on every machine. `shift` says which classes join late, if any;
    `owners` to which client of their own the samples belong, for the partition "natural". Of more clients than K
    the seed draws K.

    Raises
    ------
    ConfigError
        More clients than training images, or classes that cannot be dealt as asked.
    """
    if options.options and options.name in REGISTRY:
        raise ConfigError(f"partition.options has {', '.join(options.options)}; {options.name} takes none")
    rng = generator(seed, "partition", options.name)
    if options.name == NATURAL:
        return _natural(clients, owners, shift, rng)

    def deal(train: Indices, test: Indices, count: int) -> tuple[tuple[Indices, ...], tuple[Indices, ...]]:
        if not 1 <= count <= len(train):
            rule = f"the data set has {len(train)} training images, at least one a client is needed"
            raise ConfigError(f"run.clients is {count}; {rule}")
        found = REGISTRY[options.name]
        if flwr_partitioner.is_partitioner(found):
            shares = flwr_partitioner.deal(found, train, count, options, rng)
        elif options.name in REGISTRY:
            shares = found(train, count, options, rng)
        else:
            try:
                shares = found(train, count, options, rng)
            except Exception as error:
                raise ConfigError(f"partition.name is {options.name!r}; it says {one_line(error)}") from error
        if options.name not in REGISTRY:
            _check_dealt(options.name, shares, len(train), count)
        return tuple(shares), tuple(matched.matched(shares, train, test, rng))

    if shift is None or not shift.round:
        shares = deal(train_labels, test_labels, clients)
    else:
        shares = split_groups(shift, train_labels, test_labels, clients, deal)
    return Partition(*(tuple(np.sort(share).astype(np.int64) for share in part) for part in shares))


def _check_dealt(name: str, shares: object, samples: int, clients: int) -> None:
    """Raise ConfigError unless each client has an array of indices, none empty, and no sample is dealt twice."""
    lists = [np.asarray(share) for share in shares] if isinstance(shares, list | tuple) else []
    well = len(lists) == clients and all(a.ndim == 1 and len(a) and a.dtype.kind in "iu" for a in lists)
    dealt = np.concatenate(lists) if well else np.empty(0)
    if not well or dealt.min() < 0 or dealt.max() >= samples or len(np.unique(dealt)) < len(dealt):
        rule = f"it gives {clients} arrays of indices below {samples}, none empty and no index twice"
        raise ConfigError(f"partition.name is {name!r}; {rule}")


def _natural(
    clients: int, owners: tuple[Indices, Indices] | None, shift: ShiftOptions | None, rng: np.random.Generator
) -> Partition:
    if owners is None:
        raise ConfigError("partition.name is 'natural'; these data do not say which client a sample belongs to")
    if shift is not None and shift.round:
        raise ConfigError(f"shift.round is {shift.round}; it is 0 with partition.name 'natural'")
    known = np.unique(owners[0])
    if clients > len(known):
        raise ConfigError(
            f"run.clients is {clients}; these data have {len(known)} clients of their own: ask for that many"
        )
    chosen = known if clients == len(known) else np.sort(rng.choice(known, clients, replace=False))
    return Partition(*(tuple(np.flatnonzero(part == owner) for owner in chosen) for part in owners))
