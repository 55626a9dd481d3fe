"""FedProx against a few lines of plain torch."""

import pytest
import torch
from torch import nn

from ssfl_app.config import Flat
from ssfl_app.options import ConfigError
from tests import oracles
from tests.in_process_grid import Played, play
from tests.strategies.test_oracles import close

pytestmark = pytest.mark.narrow
KEYS: Flat = {"run.rounds": 2, "local.batch-size": 64}


def fedprox(mu: float) -> Played:
    return play(KEYS | {"strategy": "fedprox", "fedprox.mu": mu})


def test_a_round_is_the_papers() -> None:
    mu, played = 0.5, fedprox(0.5)
    w = oracles.initial_weights(played.runtime)
    for record, ours in zip(played.records[1:], played.states[1:], strict=True):

        def term(model: nn.Module, inputs: torch.Tensor, centre: oracles.State = w) -> torch.Tensor:
            return mu / 2 * sum(((p - centre[name]) ** 2).sum() for name, p in model.named_parameters())

        shop, cohort = played.runtime, record["cohort"]
        trained = [oracles.train_locally(shop, w, {}, record["round"], client, term=term) for client in cohort]
        close(ours, oracles.mean_of(shop, cohort, trained))
        w = ours


def test_without_mu_it_is_fedavg_and_with_more_it_stays_nearer() -> None:
    assert fedprox(0).bits() == play(KEYS | {"strategy": "fedavg"}).bits()

    def moved(played: Played) -> float:
        first, last = (played.layout.flatten(state) for state in (played.states[0], played.states[-1]))
        return float(((last - first) ** 2).sum())

    assert moved(fedprox(1.0)) < moved(fedprox(0.1)) < moved(fedprox(0))


def test_refuses_a_negative_mu() -> None:
    with pytest.raises(ConfigError, match=r"fedprox\.mu is -1\.0; it is a number of at least 0"):
        fedprox(-1.0)
