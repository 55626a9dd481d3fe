import os
from collections.abc import Iterator

# One thread: CI has two cores, and bits must not depend on how many there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_shared_runs_under_changed_code(request: pytest.FixtureRequest) -> Iterator[None]:
    """Play every run anew in tests that monkeypatch something."""
    from tests.in_process_grid import MEMO

    MEMO.enabled = "monkeypatch" not in request.fixturenames
    yield
    MEMO.enabled = True
