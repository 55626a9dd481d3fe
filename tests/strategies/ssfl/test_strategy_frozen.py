"""Dead weights that are frozen at the start (mask.dead): the same bits at both ends, whatever is switched on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ssfl_app.comm.payload import Payload
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.algorithm import ServerContext
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.runtime import get_runtime
from ssfl_app.server_app import check_frozen, misfit
from ssfl_app.strategies import REGISTRY
from tests.in_process_grid import SMALL, Played, play, pose

pytestmark = pytest.mark.narrow

FROZEN: Flat = {
    "mask.dead": "frozen",
    "mask.density": 0.05,
    "ssfl.criterion": "gradient",
    "run.rounds": 2,
    "local.momentum": 0.9,
    "local.weight-decay": 0.01,
}


def keys(**changed: Any) -> Flat:
    flat = FROZEN | {key.replace("__", ".").replace("_", "-"): value for key, value in changed.items()}
    return {
        key: value for key, value in flat.items() if not key.startswith("ssfl.") or flat.get("strategy") != "random"
    }


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of weights that no seed draws."""
    state = get_runtime(merge(SMALL, {"run.seed": 5})).initial_state()
    path = tmp_path_factory.mktemp("weights") / "start.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in state.items()}, path)
    return path


def dead_and_alive(played: Played) -> tuple[Any, Any, Any, Any]:
    """Return the bits of dead weights and the values of alive ones, at the end and at the start."""
    layout, alive = played.layout, played.strategy.mask.transmitted
    end, first = (layout.flatten(state) for state in (played.strategy.state, played.runtime.initial_state()))
    return end[~alive].view(np.int32), first[~alive].view(np.int32), end[alive], first[alive]


VARIANTS: dict[str, dict[str, Any]] = {
    "ssfl": {},
    "random": {"strategy": "random"},
    "shuffled": {"strategy": "shuffled"},
    "snip": {"ssfl__criterion": "snip"},
    "error feedback": {"wire__error_feedback": True, "wire__up_values": "int8", "wire__down_values": "bf16"},
    "secure aggregation": {"privacy__secure_aggregation": True},
    "private densities": {"ssfl__criterion": "snip", "ssfl__discovery": "private-densities"},
    "median": {"run__fold": "median"},
    "refresh": {"ssfl__refresh": "scheduled", "ssfl__refresh_round": 2},
    "restart": {"ssfl__refresh": "scheduled", "ssfl__refresh_round": 2, "ssfl__refresh_weights": "restart"},
}


@pytest.mark.parametrize("changed", VARIANTS.values(), ids=VARIANTS)
def test_dead_weights_keep_their_bits_and_alive_ones_learn(changed: dict[str, Any], start: Path) -> None:
    played = play(keys(**changed, model__weights=str(start)))
    dead, dead_before, alive, alive_before = dead_and_alive(played)
    assert dead.size > 0.8 * played.layout.prunable_size
    assert (dead == dead_before).all()
    assert dead.any()
    assert (alive != alive_before).mean() > 0.9
    for state, mask in zip(played.states, played.masks, strict=True):
        flat = played.layout.flatten(state)
        assert (
            flat[~mask.transmitted] == played.layout.flatten(played.runtime.initial_state())[~mask.transmitted]
        ).all()


def test_the_wire_is_that_of_zeros_and_the_network_is_not(start: Path) -> None:
    frozen, zero = (play(keys(model__weights=str(start), mask__dead=dead)) for dead in ("frozen", "zero"))
    assert frozen.strategy.mask == zero.strategy.mask  # the scores are taken at the same weights
    for name in ("bytes_train_up", "bytes_train_down", "bytes_mask_down", "bytes_discovery_up"):
        assert [r.get(name) for r in frozen.records] == [r.get(name) for r in zero.records]
    assert frozen.records[2]["bytes_train_up"] == 4 * 4 * int(frozen.strategy.mask.transmitted.sum())
    assert frozen.bits() != zero.bits()
    assert frozen.records[1]["train_loss"] != zero.records[1]["train_loss"]


def test_goes_on_from_a_checkpoint_to_the_same_bits_and_not_on_another_file(start: Path, tmp_path: Path) -> None:
    wanted = keys(model__weights=str(start), run__checkpoint_every=1)
    whole, half = play(wanted), play(wanted, until=1)
    arrays = {name: array.copy() for name, array in half.strategy.state_dict().items()}

    def go_on(strategy: Any) -> None:
        strategy.load_state_dict(1, arrays)
        check_frozen(strategy, half.runtime.initial_state())
        moved = {name: tensor + 1 for name, tensor in half.runtime.initial_state().items()}
        with pytest.raises(ConfigError, match="the frozen weights of its checkpoint are not the initial ones"):
            check_frozen(strategy, moved)

    assert play(wanted, grid=half.grid, prepare=go_on).bits() == whole.bits()


def test_a_client_that_starts_from_other_weights_is_set_aside_by_name(start: Path) -> None:
    wanted = keys(model__weights=str(start))

    def prepare(strategy: Any) -> None:
        runtime = get_runtime(merge(SMALL, wanted))
        strategy.messenger.registry.misfit = lambda hello: misfit(runtime, hello)

    for told in (None, "0" * 64):
        with pytest.raises(RunFailed, match="starts from other weights than the server"):
            play(wanted, faults={("query.hello", 0, 2): pose(2, weights=told)}, prepare=prepare)


def test_gradient_is_the_mean_magnitude_of_the_gradient() -> None:
    """By hand, at one client with all of its images scored."""
    wanted = keys(run__clients=1, run__cohort=1, run__rounds=1, ssfl__saliency_batch_size=64)
    played = play(wanted)
    (sent,) = [p for (kind, _, _), p in played.grid.got if kind == "query.saliency"]
    assert isinstance(sent, Payload)
    scores = sent.arrays["values"]
    snip = play(wanted | {"ssfl.criterion": "snip"})
    (of_snip,) = [p.arrays["values"] for (kind, _, _), p in snip.grid.got if kind == "query.saliency"]
    weights = np.abs(played.layout.flatten_prunable(played.runtime.initial_state()))
    np.testing.assert_allclose(scores * weights, of_snip, rtol=1e-5, atol=1e-12)
    kept = np.sort(scores)[-played.strategy.mask.count :]
    assert (scores[played.strategy.mask.alive] >= kept[0]).all()


REFUSED = [
    ({"strategy": "topk"}, "mask.dead is 'frozen'; it is 'zero' with strategy topk"),
    ({"strategy": "flash"}, "mask.dead is 'frozen'; it is 'zero' with strategy flash"),
    ({"strategy": "dispfl"}, "mask.dead is 'frozen'; it is 'zero' with strategy dispfl"),
    (
        {"ssfl.criterion": "grasp"},
        "ssfl.criterion is 'grasp'; it is one of snip, pooled-snip, gradient, magnitude",
    ),
    ({"ssfl.criterion": "force"}, "ssfl.criterion is 'force'; it is one of"),
    ({"ssfl.warmup-rounds": 1}, "ssfl.warmup-rounds is 1; it is 0 with mask.dead 'frozen'"),
    (
        {"ssfl.refresh": "scheduled", "ssfl.refresh-round": 2, "ssfl.refresh-weights": "zero"},
        "ssfl.refresh-weights is 'zero'; it is 'initial' or 'restart' with mask.dead 'frozen'",
    ),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_has_no_frozen_weights_is_refused_by_name(changed: Flat, words: str) -> None:
    config = parse(merge(SMALL, {"mask.dead": "frozen"}, changed))
    layout = get_runtime(merge(SMALL)).layout
    with pytest.raises(ConfigError) as error:
        REGISTRY[config.strategy](ServerContext(layout, config.settings))
    assert str(error.value).startswith(words)


def test_every_strategy_either_has_one_mask_or_is_refused() -> None:
    layout = get_runtime(merge(SMALL)).layout
    for name, kind in REGISTRY.items():
        config = parse(merge(SMALL, {"mask.dead": "frozen", "strategy": name}))
        if kind.one_mask:
            assert kind(ServerContext(layout, config.settings)).mask.count == layout.prunable_size
        else:
            with pytest.raises(ConfigError, match=r"mask\.dead"):
                kind(ServerContext(layout, config.settings))
    assert {name for name, kind in REGISTRY.items() if kind.one_mask} == {
        *("ssfl", "random", "shuffled"),
        *("fedavg", "fedprox"),  # under which all weights train
    }


def test_the_file_of_weights_is_read_or_refused_by_name(start: Path, tmp_path: Path) -> None:
    runtime = get_runtime(merge(SMALL, {"model.weights": str(start)}))
    other = get_runtime(merge(SMALL, {"run.seed": 5}))
    assert all(torch.equal(w, runtime.initial_state()[n]) for n, w in runtime.worker_state.model.state_dict().items())
    assert all(torch.equal(w + 0.01, runtime.initial_state()[n]) for n, w in other.initial_state().items())
    with pytest.raises(ConfigError, match=r"model.weights is '/none'; it is a safetensors file"):
        get_runtime(merge(SMALL, {"model.weights": "/none"}))
    names = list(runtime.initial_state())
    for odd, words in (
        ({names[0]: torch.zeros(2, 2)}, "of shape (2, 2) there and of shape"),
        ({"new": torch.zeros(1)}, "new is of shape (1,) there and missing in the model"),
        ({names[-1]: None}, "is missing there and of shape"),
    ):
        state = {name: t for name, t in (runtime.initial_state() | odd).items() if t is not None}
        save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "odd.safetensors")
        with pytest.raises(ConfigError) as error:
            get_runtime(merge(SMALL, {"model.weights": str(tmp_path / "odd.safetensors")}, {"run.seed": len(words)}))
        assert words in str(error.value)
