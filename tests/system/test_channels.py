"""mask.granularity "channel": all that a run does is done with the smaller network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn

import ssfl_app
from ssfl_app.comm.payload import Payload
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.strategy import ServerContext
from ssfl_app.options import ConfigError
from ssfl_app.results.export import read_sparse
from ssfl_app.runtime import check
from ssfl_app.server_app import privacy_ledger
from ssfl_app.sparsity.channels import (
    Cost,
    choose,
    level_ranks,
    narrow_layout,
    narrow_state,
    ranks_in_layers,
    unit_count,
    unit_scores,
    unit_spans,
    whole_widths,
    widths_of,
)
from ssfl_app.sparsity.layout import Layout, state_digest, state_of
from ssfl_app.sparsity.patterns import two_of_four
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.strategies import REGISTRY
from ssfl_app.testing import grid
from ssfl_app.training.models import ModelOptions, create
from ssfl_app.training.narrow import flops, of_widths
from tests.in_process_grid import SMALL, Played, play

pytestmark = pytest.mark.narrow

CHANNELS: Flat = {"mask.granularity": "channel", "run.rounds": 2, "local.lr": 0.05}
NAMES = ("ssfl", "random", "shuffled")


def played(strategy: str = "ssfl", **keys: bool | int | float | str) -> Played:
    return play(
        CHANNELS | {"strategy": strategy} | {k.replace("__", ".").replace("_", "-"): v for k, v in keys.items()}
    )


def widths(run: Played) -> tuple[int, ...]:
    return whole_widths(run.strategy.layout)


@pytest.mark.parametrize("strategy", NAMES)
def test_a_run_sends_the_small_network_and_its_widths_and_no_mask(strategy: str) -> None:
    run = played(strategy)
    layout, whole = run.strategy.layout, run.runtime.layout
    assert 0.9 * 0.2 < layout.prunable_size / whole.prunable_size <= 0.2
    assert run.records[-1]["density"] == layout.prunable_size / whole.prunable_size
    assert run.records[-1]["density_all"] == layout.size / whole.size
    for record in run.records[1:]:
        assert record["bytes_train_up"] == 4 * 4 * layout.size
        assert record["bytes_train_down"] == 4 * (4 * layout.size + 4 * len(layout.inner))
        assert record["bytes_mask_down"] == 0
    # A number for each pair of channels and each hidden unit: 8 + 16 + 64 of 38,160 weights.
    assert unit_count(whole) == 88
    assert run.records[0]["bytes_discovery_up"] == (0 if strategy == "random" else 6 * 4 * 88)
    assert run.records[-1]["train_loss"] < run.records[1]["train_loss"]


def test_it_is_sliced_from_the_initial_weights_by_the_mean_score() -> None:
    run = played()
    whole, w0 = run.runtime.layout, run.runtime.initial_state()
    answers = {where[2]: payload for where, payload in run.grid.got if where[0] == "query.saliency"}
    mean = sum(p.metadata["samples"] * p.arrays["values"].astype(float) for p in answers.values())
    first = next(payload for where, payload in run.grid.sent if where[0] == "train")
    assert first.arrays["widths"].tolist() == list(widths(run))
    best = np.zeros(unit_count(whole), dtype=np.bool_)
    for inner, span, width in zip(whole.inner, unit_spans(whole), widths(run), strict=True):
        best[span.start + np.argsort(-mean[span], kind="stable")[: width // inner.together]] = True
    small = narrow_layout(whole, widths(run))
    assert np.array_equal(first.arrays["values"], small.flatten(narrow_state(whole, w0, best)))


def test_a_client_answers_sums_of_the_scores_of_its_weights() -> None:
    by_weight = {where[2]: p for where, p in play({"strategy": "ssfl"}).grid.got if where[0] == "query.saliency"}
    for where, payload in played().grid.got:
        if where[0] == "query.saliency":
            expected = unit_scores(played().runtime.layout, by_weight[where[2]].arrays["values"])
            assert np.array_equal(payload.arrays["values"], expected)


def test_controls() -> None:
    ssfl, shuffled = played("ssfl"), played("shuffled")
    assert widths(ssfl) == widths(shuffled)
    assert ssfl.strategy.layout == shuffled.strategy.layout
    assert ssfl.bits() != shuffled.bits()
    uniform = widths(played("random", mask__scope="layer"))
    whole = played("random").runtime.layout
    shares = [width / inner.size for width, inner in zip(uniform, whole.inner, strict=True)]
    assert max(shares) - min(shares) <= 2 / 16
    assert min(widths(played("ssfl", mask__min_per_layer=12))) >= 12


def test_a_budget_of_multiplications() -> None:
    run = played(mask__budget="flops", mask__density=0.3)
    model = run.runtime.model
    small = of_widths(model, run.runtime.layout, widths(run))
    assert 0.85 * 0.3 < flops(small, (1, 8, 8)) / flops(model, (1, 8, 8)) <= 0.3


@pytest.mark.parametrize(
    "keys",
    [
        {"model.name": "conv4"},
        {"model.name": "resnet20", "mask.density": 0.5},
        {"model.norm": "batch"},
        {"wire.down-values": "int8", "wire.up-values": "int8", "wire.error-feedback": True},
        {"ssfl.score-values": "log8"},
        {"run.fold": "trimmed-mean"},
        {"failures.norm-factor": 100.0},
    ],
)
def test_with_other_models_and_wires(keys: Flat) -> None:
    run = play(CHANNELS | {"strategy": "ssfl", "run.clients": 3, "run.cohort": 3, "run.rounds": 1} | keys)
    assert not run.records[1].get("refused")
    assert not run.records[1].get("lost")
    assert run.strategy.layout.prunable_size < run.runtime.layout.prunable_size
    assert np.isfinite(run.records[1]["central_loss"])


def test_density_1_is_dense() -> None:
    run = played(mask__density=1.0)
    assert run.strategy.layout == run.runtime.layout
    dense = play({"strategy": "fedavg", "run.rounds": 2, "local.lr": 0.05})
    assert run.bits() == dense.bits()


def test_order_of_replies_and_a_lost_memory_change_nothing() -> None:
    assert played().bits() == play(CHANNELS | {"strategy": "ssfl"}, luck=7).bits()


def test_it_goes_on_from_a_snapshot_to_the_same_bits(tmp_path: Path) -> None:
    keys = CHANNELS | {"strategy": "ssfl", "run.checkpoint-every": 1}
    half, whole = play(keys, folder=tmp_path, until=1), played()
    arrays = {name: array.copy() for name, array in half.strategy.state_dict().items()}
    assert arrays["widths"].tolist() == list(widths(whole))
    again = REGISTRY["ssfl"](ServerContext(half.runtime.layout, half.strategy.settings, folder=tmp_path))
    again.load_state_dict(1, arrays)
    finished = Played(again, half.runtime, half.grid)
    again.callback = finished
    again.start(half.grid, ArrayRecord(half.runtime.initial_state()), 2)
    assert finished.bits() == whole.bits()
    bad = arrays | {"widths": arrays["widths"] * 2 + 1}
    with pytest.raises(ValueError, match="the width of 0 is"):
        REGISTRY["ssfl"](ServerContext(half.runtime.layout, half.strategy.settings)).load_state_dict(1, bad)


def test_a_masked_sum_of_scores_and_updates_has_the_bits_of_a_clear_one() -> None:
    more = {"run.clients": 5, "run.cohort": 4, "wire.range": 100.0}
    clear = {"wire.up-values": "fixed32", "ssfl.score-values": "fixed32"}
    runs = [play(CHANNELS | more | keys) for keys in (clear, {"privacy.secure-aggregation": True})]
    assert runs[0].bits() == runs[1].bits()
    assert widths(runs[0]) == widths(runs[1])
    exact = play(CHANNELS | more)
    assert widths(exact) == widths(runs[0])


PRIVATE: Flat = {"run.clients": 12, "run.cohort": 6, "run.rounds": 1, "mask.density": 0.3}


def test_private_channels_are_noisy_means_of_ranks_at_the_price_of_private_densities(tmp_path: Path) -> None:
    keys = CHANNELS | PRIVATE | {"privacy.level": "client", "privacy.noise-multiplier": 1.0, "privacy.delta": 1e-3}
    config = parse(merge(SMALL, keys))
    assert config.settings.sections["ssfl"].discovery == "private-channels"
    ledger = privacy_ledger(config, tmp_path)
    other = privacy_ledger(parse(merge(SMALL, keys, {"mask.granularity": "weight"})), tmp_path / "weights")
    assert ledger is not None
    assert other is not None
    assert ledger.budget == other.budget
    run = grid.play(keys | {"data.name": "few-digits"}, ledger=ledger)
    answers = [reply.arrays["values"] for where, reply in run.grid.got if where[0] == "query.channel_ranks"]
    assert [values.size for values in answers] == [unit_count(run.runtime.layout)] * 12
    assert run.strategy.layout.prunable_size <= 0.3 * run.runtime.layout.prunable_size
    assert run.records[-1]["epsilon"] == ledger.epsilon > 0


def test_without_noise_private_channels_are_means_of_ranks() -> None:
    keys = CHANNELS | PRIVATE | {"ssfl.discovery": "private-channels", "ssfl.score-values": "fixed32"}
    run, whole = play(keys), played().runtime.layout
    clear = play(CHANNELS | PRIVATE)
    ranks = np.zeros(unit_count(whole))
    for where, payload in clear.grid.got:
        if where[0] == "query.saliency":
            own = level_ranks(whole, payload.arrays["values"])
            ranks += own / np.linalg.norm(own)
    assert widths(run) == widths_of(whole, choose(whole, ranks, 0.3, Cost(whole)))


@pytest.mark.parametrize("granularity", ["2:4", "block"])
@pytest.mark.parametrize("strategy", NAMES)
def test_patterns_are_masks_of_weights(strategy: str, granularity: str) -> None:
    keys = {"strategy": strategy, "mask.granularity": granularity, "mask.density": 0.5, "run.rounds": 1}
    run = play(keys)
    mask = run.strategy.mask
    if granularity == "2:4":
        assert two_of_four(mask.layout, mask.alive.astype(np.float32)) == mask
    else:
        assert 0.5 * mask.alive.size - 16 < mask.count <= 0.5 * mask.alive.size
    assert run.records[1]["bytes_train_up"] == 4 * 4 * int(mask.transmitted.sum())


@pytest.mark.parametrize("told", [[3, 8, 30], [0, 2, 1], [16, 32, 65], [4, 8]])
def test_a_client_refuses_widths_that_are_none(told: list[int]) -> None:
    run = played()
    algorithm = run.runtime.rule(0, None)  # type: ignore[arg-type]
    sent = next(payload for where, payload in run.grid.sent if where[0] == "train")
    with pytest.raises(PayloadError, match="width"):
        algorithm.load(Payload(sent.arrays | {"widths": np.array(told, dtype=np.int32)}, sent.metadata))


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"strategy": "dispfl"}, "mask.granularity is 'channel'; it is 'weight' with strategy dispfl"),
        ({"mask.dead": "frozen"}, "mask.dead is 'frozen'; it is 'zero' with mask.granularity 'channel'"),
        ({"mask.density": 0.001}, "mask.density is 0.001; the narrowest network costs"),
        ({"mask.min-per-layer": 24}, "mask.density is 0.2; the narrowest network costs"),
        ({"ssfl.criterion": "grasp"}, "ssfl.criterion is 'grasp'; it is 'snip' with mask.granularity 'channel'"),
        (
            {"ssfl.discovery": "private-densities"},
            "ssfl.discovery is 'private-densities'; it is 'scores' or 'private-ch",
        ),
        (
            {"mask.granularity": "weight", "ssfl.discovery": "private-channels"},
            "it is 'scores' or 'private-densities'",
        ),
        ({"mask.granularity": "2:4"}, "mask.density is 0.2; it is 0.5 with mask.granularity '2:4'"),
        (
            {"mask.granularity": "2:4", "mask.density": 0.5, "ssfl.criterion": "force"},
            "ssfl.criterion is 'force'; it is",
        ),
        ({"mask.granularity": "block", "mask.density": 1e-4}, "leaves 3 weights, less than a block"),
        ({"ssfl.warmup-rounds": 1}, "ssfl.warmup-rounds is 1; it is 0 with"),
        ({"ssfl.refresh": "scheduled", "ssfl.refresh-round": 2}, "ssfl.refresh is 'scheduled'; it is 'never' with"),
        (
            {"model.name": "tests.system.test_channels:secretive"},
            "does not say which .* model.name is 'tests.*secretive'",
        ),
    ],
)
def test_what_it_does_not_do_is_named(keys: Flat, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        check(parse(merge(SMALL, CHANNELS, keys)))
    if "model.name" in keys:
        check(parse(merge(SMALL, keys)))


class _Secretive(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(inputs, 8), nn.Linear(8, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(self.a(x.flatten(1)).relu())
        return y


def secretive(shape: tuple[int, ...], outputs: int, norm: str) -> nn.Module:
    return _Secretive(int(np.prod(shape)), outputs)


def test_a_run_folder_has_the_small_network_and_exports_it(tmp_path: Path) -> None:
    keys = {"clients": 3, "rounds": 1, "local_epochs": 1, "engine_concurrent": 1, "quiet": True}
    run = ssfl_app.run(density=0.2, out=tmp_path / "run", mask_granularity="channel", **keys)  # type: ignore[arg-type]
    assert run.summary is not None
    model = run.model()
    layout = Layout.of(model)
    assert list(run.summary["widths"].values()) == [inner.size for inner in layout.inner]
    assert run.summary["mask_sha256"] is None
    assert not run.mask
    assert run.summary["model_sha256"] == state_digest(layout, state_of(model))
    whole = Layout.of(create(ModelOptions("cnn"), (1, 8, 8), 10, seed=1))
    assert run.summary["parameters"] == whole.size
    assert run.summary["alive"] == layout.prunable_size < 0.2 * whole.prunable_size
    state, _ = read_sparse(run.export("safetensors"))
    assert state_digest(layout, state) == run.summary["model_sha256"]
    program = torch.export.load(run.export("torch-export")).module()
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(program(images), model(run.transform.test(images)), atol=1e-5)
    # A run that is broken off goes on to the same bits.
    again = ssfl_app.run(
        density=0.2,
        out=tmp_path / "long",
        mask_granularity="channel",
        run_checkpoint_every=1,
        **keys | {"rounds": 2},  # type: ignore[arg-type]
    )
    status = json.loads((tmp_path / "long" / "status.json").read_text())
    assert status["status"] == "finished"
    assert again.summary is not None
    assert again.summary["widths"] == run.summary["widths"]


def test_ranks_of_a_layer_are_shares() -> None:
    whole = played().runtime.layout
    assert set(ranks_in_layers(whole, np.zeros(unit_count(whole)))[:8]) == {1 - k / 8 for k in range(8)}
