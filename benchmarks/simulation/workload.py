"""One piece of work for all contestants: which images, who holds them, who trains when, and how.

A folder with ``arrays.npz`` and ``facts.json``, so that processes of other environments read it too: this module
needs NumPy only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes
    ----------
    pixels : uint8 array, shape (N, C, H, W)
    labels : int64 array, shape (N,)
    shares : tuple of int64 arrays
        The images of each client.
    cohorts : int64 array, shape (R, K)
        The clients of each round; round 1 comes first.
    facts : dict
        The model (model, norm, classes, seed), the recipe (epochs, batch_size, lr, lr_decay, momentum, weight_decay,
        clip) and what is done to images (augment, mean, std).
    """

    pixels: npt.NDArray[np.uint8]
    labels: Indices
    shares: tuple[Indices, ...]
    cohorts: Indices
    metadata: dict[str, Any]

    @property
    def rounds(self) -> int:
        return len(self.cohorts)

    @property
    def steps(self) -> int:
        """Optimizer steps of round 1; the clients have equal shares, so it is that of every round."""
        batch = self.metadata["batch_size"]
        return sum(self.metadata["epochs"] * -(-len(self.shares[client]) // batch) for client in self.cohorts[0])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        ends = np.cumsum([len(share) for share in self.shares])
        arrays = {"pixels": self.pixels, "labels": self.labels, "cohorts": self.cohorts}
        np.savez(folder / "arrays.npz", held=np.concatenate(self.shares), ends=ends, **arrays)
        (folder / "facts.json").write_text(json.dumps(self.metadata))


def load(folder: Path) -> Workload:
    with np.load(folder / "arrays.npz") as file:
        shares = tuple(np.split(file["held"], file["ends"][:-1]))
        arrays = {name: file[name] for name in ("pixels", "labels", "cohorts")}
    return Workload(shares=shares, metadata=json.loads((folder / "facts.json").read_text()), **arrays)
