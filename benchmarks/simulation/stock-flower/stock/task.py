"""The model, a client's images and how they are trained: the quickstart's shape, our model and recipe."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ssfl_app.data.dataset import Transform
from ssfl_app.training.models import ModelOptions, create


@functools.cache
def facts_of(folder: str) -> dict[str, Any]:
    """Return the recipe."""
    return json.loads((Path(folder) / "facts.json").read_text())


@functools.cache
def arrays_of(folder: str) -> dict[str, np.ndarray]:
    """Return the data set, read once a process, as the quickstart keeps its FederatedDataset."""
    with np.load(Path(folder) / "arrays.npz") as file:
        return {name: file[name] for name in ("pixels", "labels", "held", "ends")}


def share_of(folder: str, client: int) -> np.ndarray:
    """Return the places of a client's images."""
    arrays = arrays_of(folder)
    return np.split(arrays["held"], arrays["ends"][:-1])[client]


def make_model(folder: str) -> nn.Module:
    """Return the model with its initial weights, made anew for each message as the quickstart does."""
    metadata = facts_of(folder)
    options = ModelOptions(metadata["model"], metadata["norm"])
    return create(options, tuple(arrays_of(folder)["pixels"].shape[1:]), metadata["classes"], metadata["seed"])


class Partition(Dataset):
    """One client's images, transformed image by image with torchvision."""

    def __init__(self, folder: str, client: int) -> None:
        metadata, self.arrays, self.share = facts_of(folder), arrays_of(folder), share_of(folder, client)
        steps: list[Any] = [transforms.ToPILImage()]
        if metadata["augment"] == "crop-flip":
            steps += [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        steps += [transforms.ToTensor(), transforms.Normalize(metadata["mean"], metadata["std"])]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.share)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return an image and its label."""
        place = self.share[index]
        pixels = torch.from_numpy(self.arrays["pixels"][place])
        return self.transform(pixels), int(self.arrays["labels"][place])


class Batches:
    """One client's images as tensors that are transformed a batch at a time, as `ssfl_app` does."""

    def __init__(self, folder: str, client: int) -> None:
        metadata, arrays = facts_of(folder), arrays_of(folder)
        share = share_of(folder, client)
        self.pixels, self.labels = (
            torch.from_numpy(arrays["pixels"][share]),
            torch.from_numpy(arrays["labels"][share]),
        )
        self.transform = Transform(tuple(metadata["mean"]), tuple(metadata["std"]), metadata["augment"])
        self.batch, self.rng, self.examples = metadata["batch_size"], np.random.default_rng(), len(share)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield batches in random order."""
        for chosen in torch.from_numpy(self.rng.permutation(self.examples)).split(self.batch):
            yield self.transform.train(self.pixels[chosen], self.rng), self.labels[chosen]


class Loader(DataLoader):
    """A DataLoader that says how many images it has under the name that `Batches` has for it."""

    @property
    def examples(self) -> int:
        """The number of images."""
        return len(self.dataset)


def load_data(folder: str, client: int, kind: str) -> Loader | Batches:
    """Return the batches of one client."""
    if kind == "batched":
        return Batches(folder, client)
    return Loader(Partition(folder, client), batch_size=facts_of(folder)["batch_size"], shuffle=True)


def train(model: nn.Module, loader: Loader | Batches, folder: str, lr: float) -> float:
    """Train with SGD, and return the mean loss of the batches."""
    metadata = facts_of(folder)
    decay, momentum = metadata["weight_decay"], metadata["momentum"]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    criterion = nn.CrossEntropyLoss()
    model.train()
    running, steps = 0.0, 0
    for _ in range(metadata["epochs"]):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            if metadata["clip"]:
                nn.utils.clip_grad_norm_(model.parameters(), metadata["clip"])
            optimizer.step()
            running, steps = running + loss.item(), steps + 1
    return running / steps
