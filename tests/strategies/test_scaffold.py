"""SCAFFOLD against a few lines of plain torch, what it sends, and what it refuses."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ssfl_app.comm.payload import Payload
from ssfl_app.config import Flat
from ssfl_app.options import ConfigError
from ssfl_app.strategies.scaffold import Scaffold
from tests import oracles
from tests.in_process_grid import Played, play, tamper
from tests.strategies.test_oracles import close

pytestmark = pytest.mark.narrow
KEYS: Flat = {"strategy": "scaffold", "local.batch-size": 64}


def control(played: Played) -> np.ndarray:
    assert isinstance(played.strategy, Scaffold)
    return played.strategy.control


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_rounds_are_the_papers(weighting: str) -> None:
    """Algorithm 1 with option II; each round starts from the package's model, and the twin has its own variates."""
    played = play(KEYS | {"run.weighting": weighting})
    shop, options = played.runtime, played.strategy.settings.local
    x = oracles.initial_weights(shop)
    c = {name: torch.zeros_like(tensor) for name, tensor in x.items()}
    own = dict.fromkeys(range(6), c)
    for record, ours in zip(played.records[1:], played.states[1:], strict=True):
        round_, cohort = record["round"], record["cohort"]
        held = [len(shop.partition.train[client]) for client in cohort]
        shares = [n / sum(held) if weighting == "samples" else 1 / len(cohort) for n in held]
        changes, mean = [], {name: torch.zeros_like(t, dtype=torch.float64) for name, t in x.items()}
        for client, share, n in zip(cohort, shares, held, strict=True):
            shift = {name: c[name] - own[client][name] for name in x}
            y = oracles.train_locally(shop, x, {}, round_, client, shift=shift)
            length = math.ceil(n / options.batch_size) * options.lr * options.lr_decay ** (round_ - 1)
            plus = {name: own[client][name] - c[name] + (x[name] - y[name]) / length for name in x}
            changes.append((share, {name: plus[name] - own[client][name] for name in x}))
            own[client] = plus
            mean = {name: mean[name] + share * y[name].double() for name in x}
        close(ours, {name: tensor.float() for name, tensor in mean.items()}, atol=1e-5)
        c = {name: c[name] + len(cohort) / 6 * sum(s * d[name] for s, d in changes) for name in x}
        x = ours
    close(played.layout.unflatten(control(played)), c, atol=1e-4)
    assert np.abs(control(played)).max() > 0.01


def test_where_everybody_trains_c_is_the_mean_of_all_control_variates(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    played = play(KEYS | {"run.cohort": 6, "run.weighting": "uniform", "scaffold.values": "int8"}, folder=tmp_path)
    files = [tmp_path / f"client-{client:05d}" / "000003.safetensors" for client in range(6)]
    kept = np.mean([load_file(file)["control"] for file in files], axis=0)
    np.testing.assert_allclose(control(played), kept, atol=1e-6)  # what rounding took is not lost


def test_control_variates_travel_in_their_own_type_and_never_to_a_test() -> None:
    played = play(KEYS | {"scaffold.values": "int8", "run.rounds": 1})
    size, record = played.layout.size, played.records[1]
    both = 4 * size + size + 4 * math.ceil(size / 1024)
    assert (record["bytes_train_down"], record["bytes_train_up"]) == (4 * both, 4 * both)
    assert record["bytes_evaluate_down"] == 6 * 4 * size


def test_a_loud_control_variate_is_refused_as_a_loud_model_is() -> None:
    keys, client = KEYS | {"failures.norm-factor": 3.0}, play(KEYS).records[2]["cohort"][0]

    def louder(payload: Payload) -> Payload:
        return replace(payload, arrays={**payload.arrays, "control.values": 20 * payload.arrays["control.values"]})

    refused = play(keys, faults={("train", 2, client): tamper(louder)}).records[2]["refused"]
    assert list(refused) == [str(client)]
    assert "failures.norm-factor is 3 and the median" in refused[str(client)]
    assert play(keys).records[2]["refused"] == {}


def test_running_statistics_have_no_control_variate() -> None:
    played = play(KEYS | {"model.norm": "batch", "run.rounds": 2})
    variates = played.layout.unflatten(control(played))
    for name, tensor in variates.items():
        assert bool(tensor.any()) != ("running" in name), name


def test_refuses_a_control_variate_that_is_not_finite_and_momentum() -> None:
    def poison(payload: Payload) -> Payload:
        values = payload.arrays["control.values"].copy()
        values[3] = np.inf
        return replace(payload, arrays={**payload.arrays, "control.values": values})

    client = play(KEYS).records[2]["cohort"][0]
    refused = play(KEYS, faults={("train", 2, client): tamper(poison)})
    assert "control: 1 values are NaN or Inf" in refused.records[2]["refused"][str(client)]
    with pytest.raises(ConfigError, match=r"local\.momentum is 0\.9; it is 0 with strategy scaffold"):
        play(KEYS | {"local.momentum": 0.9})
