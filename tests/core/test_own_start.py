"""Flower's wrappers, base class and old Server cannot play our strategies: each is refused before a message."""

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import DifferentialPrivacyServerSideFixedClipping as OldWrapper
from flwr.server.workflow.default_workflows import default_init_params_workflow
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Strategy,
)

from ssfl_app import SSFL
from ssfl_app.config import merge, parse
from ssfl_app.core.strategy import ServerContext
from ssfl_app.runtime import get_runtime
from ssfl_app.simulation.in_process import InlineGrid
from ssfl_app.strategies import REGISTRY
from tests.in_process_grid import SMALL, play

WRAPPERS: dict[str, Callable[[Any], Strategy]] = {
    "server-side fixed": lambda inner: DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 1.0, 3),
    "client-side fixed": lambda inner: DifferentialPrivacyClientSideFixedClipping(inner, 1.0, 1.0, 3),
    "server-side adaptive": lambda inner: DifferentialPrivacyServerSideAdaptiveClipping(inner, 0.1, 30),
    "client-side adaptive": lambda inner: DifferentialPrivacyClientSideAdaptiveClipping(inner, 0.1, 30),
}


def ours(name: str) -> tuple[Strategy, ArrayRecord]:
    """Return a strategy of the app, or the plug-in's, and initial arrays for it."""
    config = parse(merge(SMALL, {"strategy": "ssfl" if name == "SSFL" else name}))
    runtime = get_runtime(config.flat)
    strategy: Strategy = SSFL() if name == "SSFL" else REGISTRY[name](ServerContext(runtime.layout, config.settings))
    return strategy, ArrayRecord(runtime.initial_state())


class SilentGrid(InlineGrid):
    """A grid that no message may reach."""

    def __init__(self) -> None:
        super().__init__(ClientApp(), {}, {1: 0, 2: 1})

    def push_messages(self, messages: Any) -> Any:
        """Fail."""
        raise AssertionError(f"{len(list(messages))} messages were sent")


@pytest.mark.parametrize("name", ["SSFL", "ssfl", "fedavg", "ditto"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_differential_privacy_around_a_strategy_is_refused_before_a_message(wrapper: str, name: str) -> None:
    strategy, initial = ours(name)
    with pytest.raises(TypeError, match=r"own start\(\); .*wrap another one.*noise would be dropped") as raised:
        WRAPPERS[wrapper](strategy).start(SilentGrid(), initial, num_rounds=1)
    assert str(raised.value).startswith(f"{type(strategy).__name__} plays")


@pytest.mark.parametrize("name", ["SSFL", "ssfl"])
def test_a_start_that_is_not_its_own_is_refused_before_a_message(name: str) -> None:
    strategy, initial = ours(name)
    with pytest.raises(TypeError, match=r"Flower's Strategy\.start"):
        Strategy.start(strategy, SilentGrid(), initial, num_rounds=1)


def test_one_that_trains_nobody_or_was_played_before_is_refused_too() -> None:
    initial = ArrayRecord(play({}).runtime.initial_state())
    for strategy in (SSFL(fraction_train=0.0), play({}).strategy):
        with pytest.raises(TypeError, match=r"Flower's Strategy\.start"):
            Strategy.start(strategy, SilentGrid(), initial, num_rounds=1)


@pytest.mark.parametrize("name", ["SSFL", "ssfl"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_flower_s_old_server_is_refused_before_a_message(wrapped: bool, name: str) -> None:
    strategy: Any = ours(name)[0]
    given = OldWrapper(strategy, 1.0, 1.0, 3) if wrapped else strategy
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    with pytest.raises(TypeError, match=r"Message API; .*SecAgg\+.*use flwr\.serverapp\.ServerApp"):
        default_init_params_workflow(SilentGrid(), LegacyContext(context, ServerConfig(1), given))
