"""MOON against a few lines of plain torch."""

import copy

import pytest
import torch
from torch import nn

from ssfl_app.config import Flat
from ssfl_app.strategies.moon import contrast
from ssfl_app.training.step import with_features
from tests import oracles
from tests.in_process_grid import Played, play
from tests.strategies.test_oracles import close

pytestmark = pytest.mark.narrow
KEYS: Flat = {"strategy": "moon", "local.batch-size": 64}


def features(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What goes into the last layer of the CNN."""
    assert isinstance(model, nn.Sequential)
    return model[:-1](inputs)


def frozen(played: Played, state: oracles.State) -> nn.Module:
    model = copy.deepcopy(played.runtime.model)
    model.load_state_dict(state)
    return model


def test_rounds_are_the_papers() -> None:
    mu, temperature = 2.0, 0.5
    played = play(KEYS | {"moon.mu": mu, "moon.temperature": temperature})
    shop = played.runtime
    w = oracles.initial_weights(shop)
    last = dict.fromkeys(range(6), w)
    for record, ours in zip(played.records[1:], played.states[1:], strict=True):
        trained = []
        for client in record["cohort"]:
            others = frozen(played, w), frozen(played, last[client])

            def term(
                model: nn.Module, inputs: torch.Tensor, others: tuple[nn.Module, nn.Module] = others
            ) -> torch.Tensor:
                z = features(model, inputs)
                with torch.no_grad():
                    z_near, z_far = (features(other, inputs) for other in others)
                pull, push = (
                    ((z * other).sum(1) / (z.norm(dim=1) * other.norm(dim=1)) / temperature).exp()
                    for other in (z_near, z_far)
                )
                return mu * -(pull / (pull + push)).log().mean()

            trained.append(oracles.train_locally(shop, w, {}, record["round"], client, term=term))
        close(ours, oracles.mean_of(shop, record["cohort"], trained), atol=1e-5)
        last |= dict(zip(record["cohort"], trained, strict=True))
        w = ours


def test_without_mu_it_is_fedavg() -> None:
    plain = play(KEYS | {"moon.mu": 0.0})
    assert plain.bits() == play(KEYS | {"strategy": "fedavg"}).bits()
    assert play(KEYS | {"moon.mu": 5.0}).bits() != plain.bits()


def test_the_contrastive_term_by_hand() -> None:
    z, near, far = (torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
    assert float(contrast(z, near, far, 0.5)) == pytest.approx(float(torch.log1p(torch.tensor(-2.0).exp())))
    assert float(contrast(z, near, near, 0.5)) == pytest.approx(float(torch.log(torch.tensor(2.0))))


def test_forward_passes_of_both_other_models_are_counted() -> None:
    played = play(KEYS)
    for record in played.records[1:]:
        images = sum(len(played.runtime.partition.train[client]) for client in record["cohort"])
        looks = [
            p.metadata["looks"] for (kind, r, _), p in played.grid.got if (kind, r) == ("train", record["round"])
        ]
        assert sum(looks) == 2 * images


def test_features_are_what_the_last_layer_gets() -> None:
    model, inputs = (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 1), nn.ReLU()),
        torch.randn(4, 1, 5, 5),
    )
    output, found = with_features(model, inputs)
    assert torch.equal(found, model[:2](inputs).flatten(1))
    assert torch.equal(output, model(inputs))
    assert not model[2]._forward_pre_hooks
    with pytest.raises(ValueError, match="the model has no features"):
        with_features(nn.ReLU(), inputs)
