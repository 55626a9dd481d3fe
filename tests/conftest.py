import functools
import gc
import os
from collections.abc import Callable, Iterator

# One thread: CI has two cores, and bits must not depend on how many there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
# Triton's kernels run on the CPU; read when Triton is imported, by whomever.
os.environ.setdefault("TRITON_INTERPRET", "1")

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssfl_app.data import dataset
from ssfl_app.data.readers import ArrayDataset, digits
from ssfl_app.training import models

torch.set_num_threads(1)
pytest.register_assert_rewrite("ssfl_app.testing.test_contract", "ssfl_app.testing.grid")


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


dataset.READERS["few-digits"] = few_digits


def narrow_cnn(channels: int, classes: int, norm: Callable[[int], nn.Module], width: float) -> nn.Module:
    """Return the CNN with half of the channels and units: 38,000 weights, and a step costs a third."""
    return models._cnn(channels, classes, norm, width / 2)


# Test files of half a minute and more, the longest first: so that none of them runs alone at the end.
LONG = (
    "simulation/test_ray.py",
    "system/test_examples.py",
    "system/test_engines.py",
    "deployment/test_run.py",
    "simulation/test_cluster.py",
    "strategies/test_contract.py",
    "system/test_liars.py",
    "test_docs_pages.py",
    "system/test_own.py",
    "system/test_failing_writes.py",
    "training/test_gpu.py",
    "system/test_order.py",
    "experiments/test_reproduce.py",
    "experiments/test_sweep.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files first; Makefile gives files to processes in this order."""
    rank = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_collection_finish() -> None:
    """Leave the libraries' objects out of every later collection: Flower makes one an `ArrayRecord` that it reads."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def installation_is_checked_once() -> Iterator[None]:
    """Look once at what is installed: that takes 0.1 s, and tests call the command line 500 times."""
    from ssfl_app import installed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(installed, "check_installed", functools.cache(installed.check_installed))
        yield


@pytest.fixture(autouse=True, scope="module")
def small_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Play the runs of a module that is marked `few` on every second digit, of `narrow` with `narrow_cnn` too."""
    from ssfl_app import runtime
    from tests.in_process_grid import FEW, MEMO

    marks = {mark.name for mark in request.node.iter_markers()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MEMO, "images", FEW if marks & {"few", "narrow"} else {})
        if "narrow" in marks:
            # The names of models are fixed where the options are defined, so that this one has the wide one's name.
            patch.setitem(models.REGISTRY, "cnn", models.of_images(narrow_cnn))
            patch.setattr(MEMO, "runs", {})
            patch.setattr(MEMO, "answers", {})
            runtime._open.cache_clear()
        yield
    if "narrow" in marks:
        runtime._open.cache_clear()


@pytest.fixture(autouse=True)
def no_shared_runs_under_changed_code(request: pytest.FixtureRequest) -> Iterator[None]:
    """Play every run anew in tests that monkeypatch something."""
    from tests.in_process_grid import MEMO

    MEMO.enabled = "monkeypatch" not in request.fixturenames
    yield
    MEMO.enabled = True
