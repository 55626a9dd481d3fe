"""Local masks: whose mask is what, the two means, and the bytes."""

import numpy as np
import pytest

from ssfl_app.comm.payload import Payload
from ssfl_app.config import Flat
from ssfl_app.sparsity.mask import Mask
from tests.in_process_grid import Played, answer_error, forget, play, tamper

pytestmark = pytest.mark.narrow

NAMES = ["local-saliency", "random-local"]
BITMAP = 38160 // 8


def masks(played: Played) -> list[Mask]:
    return [played.strategy.mask_for(client) for client in range(6)]


@pytest.mark.parametrize("name", NAMES)
def test_every_client_has_a_mask_of_its_own_with_the_exact_density(name: str) -> None:
    found = masks(play({"strategy": name, "run.rounds": 1}))
    assert {mask.count for mask in found} == {int(0.2 * 38160)}
    assert len({mask.digest for mask in found}) == 6


def test_random_masks_overlap_by_chance_and_salient_ones_by_more() -> None:
    random, salient = (masks(play({"strategy": name, "run.rounds": 1})) for name in reversed(NAMES))
    by_chance = 2 * 0.2 * 0.8  # two independent masks differ in 2 d (1 - d)
    assert random[0].hamming(random[1]) == pytest.approx(by_chance, rel=0.03)
    assert salient[0].hamming(salient[1]) < 0.75 * by_chance


def test_with_one_client_local_saliency_is_ssfl() -> None:
    one: Flat = {"run.clients": 1, "run.cohort": 1}
    local, ssfl = play({"strategy": "local-saliency", **one}), play({"strategy": "ssfl", **one})
    assert local.strategy.mask_for(0) == ssfl.strategy.mask
    # Outside the mask the local variant's server keeps w0; inside they are the same model.
    alive = ssfl.strategy.mask.transmitted
    ours, theirs = (run.layout.flatten(run.strategy.state) for run in (local, ssfl))
    assert (ours[alive] == theirs[alive]).all()


@pytest.mark.parametrize("mean", ["overlap", "zeros"])
def test_the_mean_by_hand(mean: str) -> None:
    """From the replies of round 1: over those who hold a coordinate, or over all."""
    played = play({"strategy": "random-local", "run.rounds": 1, "local-mask.mean": mean})
    layout = played.layout
    total, held, everyone = (np.zeros(layout.size) for _ in range(3))
    for (kind, _, client), payload in played.grid.got:
        if kind == "train":
            mask, samples = played.strategy.mask_for(client).transmitted, int(payload.metadata["samples"])
            total[mask] += samples * payload.arrays["values"].astype(np.float64)
            held[mask] += samples
            everyone += samples
    w0 = layout.flatten(played.runtime.initial_state())
    expected = np.where(held > 0, total / np.maximum(held, 1), w0) if mean == "overlap" else total / everyone
    assert np.allclose(layout.flatten(played.strategy.state), expected, rtol=1e-6, atol=1e-9)
    assert ((held == 0) & layout.is_prunable).sum() > 250  # the case that tells them apart occurs


def test_zeros_shrink_what_few_hold() -> None:
    """A weight that one of four equal clients holds is divided by four: v1 of the paper lost to this."""
    overlap, zeros = (
        play({"strategy": "random-local", "run.rounds": 1, "local-mask.mean": mean, "run.weighting": "uniform"})
        for mean in ("overlap", "zeros")
    )
    owners = sum(overlap.strategy.mask_for(c).transmitted.astype(int) for c in overlap.records[1]["cohort"])
    one = (owners == 1) & overlap.layout.is_prunable
    ours, theirs = (run.layout.flatten(run.strategy.state)[one] for run in (overlap, zeros))
    assert np.allclose(theirs, ours / 4, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_bytes(name: str) -> None:
    played = play({"strategy": name})
    alive = int(0.2 * 38160) + played.layout.size - 38160
    setup, *rounds = played.records
    assert setup["bytes_discovery_down"] == 0
    assert setup["bytes_discovery_up"] == (6 * BITMAP if name == "local-saliency" else 0)
    for record in rounds:
        assert record["bytes_train_down"] == record["bytes_train_up"] == 4 * 4 * alive
        assert record["bytes_evaluate_down"] == 6 * 4 * alive
        assert record["bytes_mask_down"] == 0  # each client made its own


def test_a_client_that_forgot_its_salient_mask_gets_it_back() -> None:
    plain = play({"strategy": "local-saliency"})
    client = plain.records[2]["cohort"][0]
    forgetful = play({"strategy": "local-saliency"}, faults={("train", 2, client): forget})
    assert forgetful.bits() == plain.bits()
    assert forgetful.records[2]["bytes_mask_down"] == BITMAP


def test_a_client_that_was_lost_in_setup_gets_a_random_mask() -> None:
    lost = play({"strategy": "local-saliency"}, faults={("query.own_mask", 0, 2): answer_error(5)})
    random = play({"strategy": "random-local"})
    assert lost.strategy.mask_for(2) == random.strategy.mask_for(2)
    assert lost.records[0]["lost"] == {"2": "Flower error 5: scripted"}
    assert all(not record["lost"] and not record["refused"] for record in lost.records[1:])


def test_a_mask_of_another_density_is_refused() -> None:
    def fuller(payload: Payload) -> Payload:
        bits = np.unpackbits(payload.arrays["mask"])
        bits[np.flatnonzero(bits == 0)[0]] = 1
        return Payload({"mask": np.packbits(bits)}, payload.metadata)

    played = play({"strategy": "local-saliency"}, faults={("query.own_mask", 0, 2): tamper(fuller)})
    assert played.records[0]["refused"] == {"2": "a mask has 7633 alive weights; mask.density is 0.2"}
