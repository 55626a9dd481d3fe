"""The server side of an algorithm, by its hooks alone."""

import pytest
from torch import nn

from ssfl_app.config import merge, parse
from ssfl_app.core.client import ClientAlgorithm
from ssfl_app.core.options import Settings
from ssfl_app.core.strategy import ServerContext, SparseStrategy
from ssfl_app.options import ConfigError
from ssfl_app.sparsity.codec import BitmapAndValues, Codec, Dense
from ssfl_app.sparsity.layout import Layout, state_of
from ssfl_app.strategies import REGISTRY
from tests.in_process_grid import SMALL


class AlternatingClient(ClientAlgorithm):
    """Gets dense models in odd rounds, and models with their mask in even ones."""

    @classmethod
    def codec_down(cls, settings: Settings, round_: int) -> type[Codec]:
        return Dense if round_ % 2 else BitmapAndValues


class Alternating(SparseStrategy):
    name = "alternating"
    client = AlternatingClient


def test_a_model_is_encoded_anew_where_the_codec_of_a_round_is_another_one() -> None:
    model = nn.Linear(4, 2)
    strategy = Alternating(ServerContext(Layout.of(model), parse(merge(SMALL)).settings))
    strategy.state = state_of(model)
    first = strategy.eval_payload(1, 0)
    assert set(first.arrays) == {"values"}
    assert strategy.eval_payload(1, 1).arrays is first.arrays
    assert set(strategy.train_payload(2, 0).arrays) == {"values", "mask"}


@pytest.mark.parametrize("name", ["dispfl", "fedfomo", "spafl"])
@pytest.mark.parametrize("metric", ["central", "local"])
def test_a_global_model_that_is_not_there_stops_no_run(name: str, metric: str) -> None:
    def made(metric: str) -> SparseStrategy:
        settings = parse(merge(SMALL, {"strategy": name, "stop.metric": metric})).settings
        return REGISTRY[name](ServerContext(Layout.of(nn.Linear(4, 2)), settings))

    with pytest.raises(ConfigError, match=f"stop.metric is '{metric}'; it is auto or personal with strategy {name}"):
        made(metric)
    assert {made(other).name for other in ("auto", "personal")} == {name}


@pytest.mark.parametrize("name", REGISTRY)
def test_a_floor_is_refused_where_a_ranking_cannot_hold_it_and_nowhere_else(name: str) -> None:
    """Two layers of 8 weights each: at density 0.25 a ranking leaves 4 alive, and a floor of 3 reserves 6."""
    layout = Layout.of(nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2), nn.Linear(2, 4)))
    ranks = {"ssfl", "shuffled", "local-saliency", "topk", "sparsyfed", "zerofl", "fedpai"}
    wanted: dict[str, str | float] = {"strategy": name, "mask.density": 0.25, "mask.min-per-layer": 3}
    for scope in ("global", "layer"):
        context = ServerContext(
            layout, parse(merge(SMALL, {"zerofl.r-mask": 0.0}, wanted, {"mask.scope": scope})).settings
        )
        floor = REGISTRY[name].has_floor
        if floor and not (name in ranks and scope == "global"):
            REGISTRY[name](context)
        else:
            with pytest.raises(ConfigError, match="it reserves 6 weights" if floor else "it is 0 with strategy"):
                REGISTRY[name](context)
