"""Which clients a model serves: images and classes of each client against its accuracy, from run folders.

Ohib et al., "SSFL", TMLR 2026, arXiv 2405.09037, figure 4 c-d.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr
from scipy.stats import spearmanr

from ssfl_app.metrics import Metric
from ssfl_app.options import ConfigError
from ssfl_app.results.run_folder import Run, run_labels, run_names, train_counts

Spearman = tuple[float, float] | None
"""Spearman's rank correlation and its p-value; None where it has no meaning."""


@dataclass(frozen=True)
class ClientPoints:
    """The clients of one run that have an accuracy, N of them; arrays have shape (N,)."""

    run: str
    label: str
    personal: bool  # whether `accuracy` is that of the clients' own models, not of the global one
    clients: NDArray[np.int64]  # their numbers
    images: NDArray[np.int64]  # training images
    classes: NDArray[np.int64]  # that these are of
    entropy: NDArray[np.float64]  # of their classes, in bits: 0 for one class, log2(C) for C equally frequent ones
    accuracy: NDArray[np.float64]  # on the client's own test images, or what `metric` is; an accuracy is in [0, 1]
    spearman: dict[str, Spearman]  # its correlation with "images", "classes" and "entropy"
    metric: Metric

    def record(self) -> dict[str, Any]:
        """Return all numbers as JSON has them."""
        arrays = ("clients", "images", "classes", "entropy", "accuracy")
        together = {name: found and {"rho": found[0], "p": found[1]} for name, found in self.spearman.items()}
        known = {"run": self.run, "label": self.label, "models": "personal" if self.personal else "global"}
        known["metric"] = self.metric.name
        return {**known, **{name: getattr(self, name).tolist() for name in arrays}, "spearman": together}


def study_clients(runs: Sequence[Run]) -> list[ClientPoints]:
    """Return images, classes and accuracy of the clients of each run, and how they go together.

    The accuracy is that of a client's personal model on its own test images where a run has such models, else that of
    the global model. Clients without one are left out. ConfigError: there is no run, or one without any accuracy.
    """
    if not runs:
        raise ConfigError("runs is empty; a study of clients is made of one run or more")
    named = zip(runs, run_names(runs), run_labels(runs), strict=True)
    return [_points(run, name, label) for run, name, label in named]


def _points(run: Run, name: str, label: str) -> ClientPoints:
    rows = run.clients["clients"] if run.clients else []
    personal = any(row.get("personal_accuracy") is not None for row in rows)
    key = "personal_accuracy" if personal else "accuracy"
    chosen = [index for index, row in enumerate(rows) if row.get(key) is not None]
    if not chosen:
        raise ConfigError(f"{run.folder} has no client accuracies; the study needs them in clients.json")
    counts = train_counts(run)[chosen]
    accuracy = np.array([rows[index][key] for index in chosen], dtype=np.float64)
    numbers = np.array([rows[index]["client"] for index in chosen], dtype=np.int64)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    entropy = np.asarray(entr(shares).sum(axis=1) / np.log(2), dtype=np.float64)
    images, classes = counts.sum(axis=1), np.count_nonzero(counts, axis=1)
    metadata = {"images": images, "classes": classes, "entropy": entropy}
    together = {what: _spearman(values, accuracy) for what, values in metadata.items()}
    return ClientPoints(name, label, personal, numbers, images, classes, entropy, accuracy, together, run.metric)


def _spearman(x: NDArray[Any], y: NDArray[np.float64]) -> Spearman:
    # Ranks of equal numbers have no correlation, and two points always have one of 1.
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    found = spearmanr(x, y)
    return float(found.statistic), float(found.pvalue)
