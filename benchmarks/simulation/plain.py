"""The same local training in plain PyTorch: no Flower, no messages, no evaluation, no mean.

The loop is written here once more, so that a slow loop in the package would show. Model, initial weights, images,
order, augmentation and learning rate are the app's, by its own random streams: the loss of round 1 is therefore that
of the app's round 1, and `efficiency` compares the two.
"""

import multiprocessing
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.simulation import workload
from ssfl_app.data.dataset import Transform
from ssfl_app.seeding import generator
from ssfl_app.training import models
from ssfl_app.training.malloc import keep_heap

Result = dict[str, Any]


class Trainer:
    """Trains clients of a workload, each from the initial weights: what weights are does not change the time."""

    def __init__(self, folder: Path) -> None:
        work = workload.load(folder)
        metadata = work.metadata
        self.metadata, self.shares, self.cohorts = metadata, work.shares, work.cohorts
        self.pixels, self.labels = torch.from_numpy(work.pixels), torch.from_numpy(work.labels)
        options = models.ModelOptions(metadata["model"], metadata["norm"])
        self.model = models.create(options, tuple(work.pixels.shape[1:]), metadata["classes"], metadata["seed"])
        self.initial = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.transform = Transform(tuple(metadata["mean"]), tuple(metadata["std"]), metadata["augment"])

    def train(self, round_: int, client: int) -> tuple[float, int]:
        """Train one client in one round; return its mean loss and how many images it has."""
        metadata, share = self.metadata, torch.from_numpy(self.shares[client])
        pixels, labels = self.pixels[share], self.labels[share]
        self.model.load_state_dict(self.initial)
        self.model.train()
        rng = generator(metadata["seed"], "train", round_, client)
        rate = metadata["lr"] * metadata["lr_decay"] ** (round_ - 1)
        parameters = list(self.model.parameters())
        # foreach is the faster variant on a CPU too: the reference shall not be a slow one.
        stepper = torch.optim.SGD(
            parameters, rate, metadata["momentum"], weight_decay=metadata["weight_decay"], foreach=True
        )
        total = torch.zeros((), dtype=torch.float64)
        for _ in range(metadata["epochs"]):
            for chosen in torch.from_numpy(rng.permutation(len(labels))).split(metadata["batch_size"]):
                stepper.zero_grad()
                loss = F.cross_entropy(self.model(self.transform.train(pixels[chosen], rng)), labels[chosen])
                loss.backward()
                if metadata["clip"]:
                    nn.utils.clip_grad_norm_(parameters, metadata["clip"])
                stepper.step()
                total += loss.detach() * len(chosen)
        return float(total) / (metadata["epochs"] * len(labels)), len(labels)


_trainer: Trainer
_together: threading.Barrier


def _begin(folder: Path, threads: int, together: threading.Barrier) -> None:
    global _trainer, _together
    torch.set_num_threads(threads)
    keep_heap()  # as the app does: the reference shall not be a slow one
    _trainer, _together = Trainer(folder), together


def _warm(client: int) -> None:
    _trainer.train(1, client)
    _together.wait()  # so that no worker takes two of these


def _train(where: tuple[int, int]) -> tuple[float, int]:
    return _trainer.train(*where)


def measure(folder: Path, processes: int, threads: int, rounds: Iterable[int]) -> Result:
    """Time the training of some rounds: clients are handed to `processes` workers with `threads` threads each.

    Every worker trains one client before the clock starts.
    """
    cohorts = workload.load(folder).cohorts
    context = multiprocessing.get_context("spawn")  # a fork would share the parent's thread pool
    found = []
    with context.Pool(processes, _begin, (folder, threads, context.Barrier(processes))) as pool:
        pool.map(_warm, [int(cohorts[0][0])] * processes, chunksize=1)
        for round_ in rounds:
            began = time.monotonic()
            told = pool.map(_train, [(round_, int(client)) for client in cohorts[round_ - 1]], chunksize=1)
            seconds, samples = time.monotonic() - began, sum(n for _, n in told)
            loss = sum(loss * n for loss, n in told) / samples
            found.append({"round": round_, "seconds": seconds, "samples": samples, "loss": loss})
    return {
        "processes": processes,
        "threads": threads,
        "rounds": found,
        "typical": median(r["seconds"] for r in found),
    }
