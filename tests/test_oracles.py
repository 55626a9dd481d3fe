"""The package against the slow twins of oracles.py, in every round.

Each round starts from the package's model: two float32 runs that differ in the last bit drift apart after a while,
because somewhere a ReLU switches, and that would hide or fake a disagreement.
"""

import pytest
import torch

from tests import oracles
from tests.in_process_grid import Played, play


def compare(played: Played, mask: oracles.State, atol: float = 1e-6) -> None:
    assert len(played.records) == 4
    w = oracles.initial_weights(played.workshop)
    for record, ours in zip(played.records[1:], played.states[1:], strict=True):
        theirs = oracles.one_round(played.workshop, w, mask, record["round"], record["cohort"])
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=atol)
        w = ours


def test_fedavg() -> None:
    compare(play({"strategy": "fedavg"}), {})


# dirichlet-class gives clients of very different sizes, so that weights and scores are really weighted.
@pytest.mark.parametrize("partition", ["dirichlet", "dirichlet-class"])
def test_ssfl(partition: str) -> None:
    played = play({"strategy": "ssfl", "partition.name": partition})
    sizes = {len(part) for part in played.workshop.partition.train}
    assert len(sizes) > 2 or partition == "dirichlet"
    mask = oracles.saliency_mask(played.workshop, oracles.initial_weights(played.workshop))
    ours = played.strategy.mask.tensors()
    assert ours.keys() == mask.keys()
    differing = sum(int((ours[name] ^ mask[name]).sum()) for name in mask)
    # The scores of both are sums in other orders: a pair at the very threshold may change places.
    assert differing <= 2
    compare(played, ours)


def test_fedavg_when_every_step_is_clipped() -> None:
    # The twin takes the norm in float64; the last bit of the factor then differs in each of the 15 steps.
    compare(play({"strategy": "fedavg", "local.clip": 0.05, "local.lr": 0.2}), {}, atol=2e-5)
