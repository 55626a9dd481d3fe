"""Partitioners of flwr-datasets: ``partition.name = "flwr_datasets.partitioner:DirichletPartitioner"``.

They get ``partition.options``, and, where they take them, the number of clients, a seed of the run's, and the column
of the labels, which is called label.
"""

import inspect
import warnings
from typing import Any

import numpy as np

from ssfl_app.options import ConfigError
from ssfl_app.partitions.options import Indices, SplitOptions


def is_partitioner(found: object) -> bool:
    """Return whether this is a class of partitioners; flwr-datasets need not be installed."""
    return isinstance(found, type) and hasattr(found, "load_partition")


def deal(kind: Any, labels: Indices, clients: int, options: SplitOptions, rng: np.random.Generator) -> list[Indices]:
    """Return what a partitioner of the class `kind` deals to each client; it may leave samples out.

    Raises
    ------
    ConfigError
        It does not take the options, cannot deal so, deals to another number of clients, or leaves one without a
        sample.
    """
    from datasets import Dataset

    given = {"num_partitions": clients, "partition_by": "label", "seed": int(rng.integers(2**31))}
    taken = inspect.signature(kind).parameters
    arguments = {name: value for name, value in given.items() if name in taken}
    arguments |= {name.replace("-", "_"): value for name, value in options.options.items()}
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of each new try
            partitioner = kind(**arguments)
            partitioner.dataset = Dataset.from_dict({"label": labels, "index": np.arange(len(labels))})
            count = partitioner.num_partitions
            shares = [
                np.asarray(partitioner.load_partition(k)["index"], np.int64) for k in range(min(count, clients))
            ]
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(f"partition.name is {options.name!r}; called with {arguments} it says {error}") from error
    if count != clients:
        raise ConfigError(f"run.clients is {clients}; {options.name} deals these data to {count} clients")
    if empty := [client for client, share in enumerate(shares) if not len(share)]:
        raise ConfigError(f"partition.name is {options.name!r}; it leaves client {empty[0]} without a sample")
    return shares
