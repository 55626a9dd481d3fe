"""The workload under Apple's pfl: FederatedAveraging on a SimulatedBackend. Runs in pfl's own environment.

python pfl_run.py WORKLOAD MARKS. Several processes work on one cohort if PFL_WORKER_ADDRESSES and PFL_WORKER_RANK are
set; the threads of each are OMP_NUM_THREADS.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn
from torch.nn import functional as F

from benchmarks.simulation import workload
from benchmarks.simulation.workload import Workload
from ssfl_app.data.dataset import Transform
from ssfl_app.training import models


class Classifier(nn.Module):
    """The app's model with the two methods that pfl asks for."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        metadata = work.metadata
        options = models.ModelOptions(metadata["model"], metadata["norm"])
        self.net = models.create(options, tuple(work.pixels.shape[1:]), metadata["classes"], metadata["seed"])

    def loss(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.net(inputs), labels)

    @torch.no_grad()
    def metrics(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        # pfl evaluates in its first iteration, whatever the frequency: that round is left out.
        return {"loss": Weighted(float(self.loss(inputs, labels)) * len(labels), len(labels))}


class Share(Dataset):
    """One client's images: shuffled, augmented and normalised in every epoch, as the app does it."""

    def __init__(self, raw: tuple[torch.Tensor, torch.Tensor], transform: Transform, client: int) -> None:
        super().__init__(raw_data=raw, user_id=str(client))
        self.transform, self.rng = transform, np.random.default_rng(client)

    def iter(self, batch_size: int | None) -> Iterator[list[torch.Tensor]]:
        pixels, labels = self.raw_data
        for chosen in torch.from_numpy(self.rng.permutation(len(labels))).split(batch_size or len(labels)):
            yield [self.transform.train(pixels[chosen], self.rng), labels[chosen]]


class Marks(TrainingProcessCallback):
    """Notes when each round ended."""

    def __init__(self, file: Path | None) -> None:
        self.file = file

    def mark(self, round_: int) -> None:
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps({"round": round_, "time": time.monotonic()}) + "\n")

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        self.mark(0)
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self.mark(central_iteration + 1)
        return False, Metrics()


def data_of(work: Workload) -> FederatedDataset:
    """Return the clients' images; who comes next is who comes next in the app's cohorts."""
    pixels, labels = torch.from_numpy(work.pixels), torch.from_numpy(work.labels)
    transform = Transform(tuple(work.metadata["mean"]), tuple(work.metadata["std"]), work.metadata["augment"])

    def share(client: int) -> Share:
        where = torch.from_numpy(work.shares[client])
        return Share((pixels[where], labels[where]), transform, client)

    return FederatedDataset(share, functools.partial(next, iter([int(c) for c in work.cohorts.reshape(-1)])))


def main() -> None:
    work, marks = workload.load(Path(sys.argv[1])), Path(sys.argv[2])
    metadata, first = work.metadata, os.environ.get("PFL_WORKER_RANK", "0") == "0"
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    net = Classifier(work)
    local = functools.partial(
        torch.optim.SGD, momentum=metadata["momentum"], weight_decay=metadata["weight_decay"], foreach=True
    )
    model = PyTorchModel(net, local, torch.optim.SGD(net.parameters(), lr=1.0))  # 1: the mean, as FedAvg takes it
    data = data_of(work)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=work.cohorts.shape[1],
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_learning_rate=metadata["lr"],
            local_num_epochs=metadata["epochs"],
            local_batch_size=metadata["batch_size"],
            local_max_grad_norm=metadata["clip"] or None,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=500),
        callbacks=[Marks(marks if first else None)],
    )
    if first:
        versions = {name: metadata.version(name) for name in ("pfl", "numpy")} | {"torch": torch.__version__}
        print("versions", json.dumps(versions), flush=True)


if __name__ == "__main__":
    main()
