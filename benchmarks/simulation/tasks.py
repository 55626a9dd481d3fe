"""The two tasks, as keys of `ssfl run`, and the same work as a `Workload` for everybody else."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.simulation.workload import Workload
from ssfl_app import config as configuration
from ssfl_app.core.strategy import ServerContext
from ssfl_app.runtime import load_federation
from ssfl_app.sparsity.layout import Layout
from ssfl_app.strategies import REGISTRY
from ssfl_app.training import models

CIFAR10 = os.environ.get("SSFL_CIFAR10", str(Path(__file__).parents[3] / "shared" / "data" / "cifar10"))
"""The folder of train and test parquet files (columns img.bytes, label), e.g. the Hub's uoft-cs/cifar10."""


@dataclass(frozen=True)
class Task:
    """What is run: `keys` for `ssfl run` without strategy, and `workload`, a folder that `Workload.save` wrote."""

    name: str
    keys: str
    workload: Path
    clients: int
    cohort: int
    rounds: int


def write_cifar(source: Path, target: Path, images: int, tests: int) -> None:
    """Write the first so many training and test images of CIFAR-10 as parquet files.

    The app has no key to use a part of a data set, and all 50,000 images make rounds of a minute on two cores.
    """
    import pyarrow.parquet as pq

    target.mkdir(parents=True)
    for part, count in (("train", images), ("test", tests)):
        file = next(source.glob(f"*{part}*.parquet"))
        # With the metadata: names of the classes are in it.
        pq.write_table(pq.read_table(file).slice(0, count), target / f"{part}-00000-of-00001.parquet")


def keys_of(name: str, work: Path, images: int, tiny: bool) -> str:
    """Return the keys of a task; everything that is not named has the app's default."""
    keys = "run.device='cpu' "
    if name == "cifar10":
        data = work / f"cifar10-{images}"
        if not data.exists():
            write_cifar(Path(CIFAR10), data, images, max(100, images // 10))
        # One epoch in batches of 32, as in docs/results.md; the last round is the only one that is evaluated.
        keys += f"data.name='parquet' data.path='{data}' data.augment='crop-flip' "
        keys += "model.name='resnet20' local.epochs=1 local.batch-size=32 "
        keys += "run.rounds=5 run.evaluate-every=5 "
    else:
        keys += "run.evaluate-every=20 "
    if tiny:
        keys += "run.clients=4 run.cohort=2 run.rounds=4 run.evaluate-every=4 local.epochs=1 "
    return keys


def make(name: str, work: Path, images: int, tiny: bool, more: str = "") -> Task:
    """Return a task: cifar10 or digits; `more` are further keys for all contestants."""
    keys = f"{keys_of(name, work, images, tiny)} {more}"
    config = configuration.parse(configuration.merge(configuration.read_overrides([keys])))
    folder, run = work / f"work-{name}-{len(list(work.iterdir()))}", config.settings.run
    workload_of(config).save(folder)
    return Task(name, keys, folder, run.clients, run.cohort, run.rounds)


def workload_of(config: configuration.Config) -> Workload:
    """Return what a configuration trains: data, partition and cohorts are those of the app itself."""
    data, partition = load_federation(config)
    layout = Layout.of(models.outline(config.model, data.shape, data.classes))
    strategy = REGISTRY["fedavg"](ServerContext(layout, config.settings))
    local, run = config.settings.local, config.settings.run
    metadata: Mapping[str, object] = {
        "model": config.model.name,
        "norm": config.model.norm,
        "classes": data.classes,
        "seed": run.seed,
        "epochs": local.epochs,
        "batch_size": local.batch_size,
        "lr": local.lr,
        "lr_decay": local.lr_decay,
        "momentum": local.momentum,
        "weight_decay": local.weight_decay,
        "clip": local.clip,
        "augment": data.transform.augment,
        "mean": data.transform.mean,
        "std": data.transform.std,
    }
    cohorts = np.array([strategy.cohort(round_) for round_ in range(1, run.rounds + 1)])
    pixels, labels = data.train.inputs.numpy(), data.train.labels.numpy()
    return Workload(np.ascontiguousarray(pixels), labels.copy(), partition.train, cohorts, dict(metadata))
