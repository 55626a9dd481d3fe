import os
from collections.abc import Iterator

# One thread: CI has two cores, and bits must not depend on how many there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from dataclasses import replace

import numpy as np
import pytest
import torch

from ssfl_app.data.readers import READERS, ArrayDataset, digits

torch.set_num_threads(1)


def few_digits(path: str, download: bool, image_size: int) -> ArrayDataset:
    """Read every second digit: a run costs half, and still learns something."""
    raw = digits(path, download, image_size)
    train, test = np.arange(0, len(raw.train), 2), np.arange(0, len(raw.test), 2)
    return replace(
        raw,
        train=raw.train[train],
        train_labels=raw.train_labels[train],
        test=raw.test[test],
        test_labels=raw.test_labels[test],
    )


READERS["few-digits"] = few_digits  # before `ssfl_app.data.dataset` is imported, which lists them


@pytest.fixture(autouse=True, scope="module")
def images(request: pytest.FixtureRequest) -> Iterator[None]:
    """Play the runs of a module that is marked `few` on every second digit."""
    from tests.in_process_grid import FEW, MEMO

    MEMO.images = FEW if request.node.get_closest_marker("few") else {}
    yield
    MEMO.images = {}


@pytest.fixture(autouse=True)
def no_shared_runs_under_changed_code(request: pytest.FixtureRequest) -> Iterator[None]:
    """Play every run anew in tests that monkeypatch something."""
    from tests.in_process_grid import MEMO

    MEMO.enabled = "monkeypatch" not in request.fixturenames
    yield
    MEMO.enabled = True
