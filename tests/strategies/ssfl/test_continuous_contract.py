"""The contract of all strategies on SSFL whose mask moves in every round."""

from typing import Any

import pytest

from ssfl_app.testing.test_contract import *  # noqa: F403
from ssfl_app.testing.test_contract import Play
from tests import in_process_grid

pytestmark = pytest.mark.narrow


@pytest.fixture(scope="module")
def keys() -> dict[str, Any]:
    return {"strategy": "ssfl", "ssfl.refresh": "continuous", "ssfl.refresh-every": 1}


@pytest.fixture(scope="module")
def learning() -> dict[str, Any]:
    return {"run.rounds": 3, "local.epochs": 2, "local.lr": 0.2}


@pytest.fixture(scope="module")
def play() -> Play:
    return in_process_grid.play
