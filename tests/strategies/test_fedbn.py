"""FedBN against a few lines of plain torch, and that norm layers never travel."""

import numpy as np
import pytest
import torch

from ssfl_app.config import Flat
from ssfl_app.options import ConfigError
from ssfl_app.sparsity.layout import Layout, state_of
from ssfl_app.strategies.fedbn import FedBn, WithoutNorms
from tests import oracles
from tests.in_process_grid import play
from tests.strategies.test_oracles import close, same

pytestmark = pytest.mark.narrow
KEYS: Flat = {"strategy": "fedbn", "model.norm": "batch", "local.batch-size": 64}


def test_rounds_are_the_papers() -> None:
    """Every client has norms of its own; the mean is of all else; a client is tested with its own norms."""
    played = play(KEYS)
    shop, layout = played.runtime, played.layout
    start = oracles.initial_weights(shop)
    w = {name: start[name] for name, _ in layout.shapes}
    norms = [name for name in w if name.startswith(("1.", "4."))]
    assert sorted(layout.norms) == sorted(norms)
    assert len(norms) == 2 * 4  # weight, bias, mean and variance
    own = {client: {name: w[name] for name in norms} for client in range(6)}
    for record, ours in zip(played.records[1:], played.states[1:], strict=True):
        round_, cohort = record["round"], record["cohort"]
        trained = [oracles.train_locally(shop, start | w | own[client], {}, round_, client) for client in cohort]
        own |= {k: {name: t[name].clone() for name in norms} for k, t in zip(cohort, trained, strict=True)}
        mean = oracles.mean_of(shop, cohort, [{name: t[name] for name in w} for t in trained])
        close(ours, mean | {name: start[name] for name in norms}, atol=1e-5)
        w = ours
    for client, said in played.strategy.personal_accuracy.items():
        shop.model.load_state_dict(start | w | own[client])
        test = shop.data.test.take(shop.partition.test[client])
        shop.model.eval()
        with torch.no_grad():
            right = (shop.model(shop.data.transform.test(test.inputs)).argmax(1) == test.labels).double().mean()
        assert said == pytest.approx(float(right), abs=1.01 / len(test))
    same({name: w[name] for name in norms}, {name: start[name] for name in norms})


def test_what_travels_has_no_norms() -> None:
    played = play(KEYS | {"run.rounds": 1})
    layout = played.layout
    carried = layout.size - 4 * (16 + 32)
    assert {p.arrays["values"].size for (kind, *_), p in played.grid.got if kind == "train"} == {carried}
    assert played.records[1]["bytes_train_down"] == 4 * 4 * carried
    state = layout.unflatten(np.arange(layout.size, dtype=np.float32))
    codec = WithoutNorms()
    back, _ = codec.decode(codec.encode(layout, state, played.strategy.mask), layout, played.strategy.mask)
    for name, tensor in back.items():
        assert torch.equal(tensor, torch.zeros_like(tensor) if name in layout.norms else state[name]), name


def test_norms_of_every_kind_are_found_and_a_model_without_is_refused() -> None:
    model = torch.nn.ModuleDict(
        {
            "a": torch.nn.LayerNorm(3),
            "b": torch.nn.Linear(3, 3),
            "c": torch.nn.InstanceNorm1d(3, track_running_stats=True),
        }
    )
    norms = ("a.weight", "a.bias", "c.running_mean", "c.running_var")
    assert Layout.of(model).norms == norms
    assert set(state_of(model)) == {*norms, "b.weight", "b.bias"}
    with pytest.raises(ConfigError, match=r"strategy is 'fedbn'; the model has no norm layers"):
        play(KEYS | {"model.norm": "none"})
    assert not FedBn.uses_density
