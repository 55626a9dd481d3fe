"""The package against the slow twins of oracles.py, in every round.

Each round starts from the package's model: two float32 runs that differ in the last bit drift apart after a while,
because somewhere a ReLU switches, and that would hide or fake a disagreement.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ssfl_app.comm.messenger import Reply
from ssfl_app.comm.payload import ClientState, Payload
from ssfl_app.config import Flat
from ssfl_app.sparsity.codec import BitmapAndValues, MaskedValues
from ssfl_app.sparsity.dynamic import random_mask
from ssfl_app.strategies.feddst import FedDst
from tests import oracles
from tests.in_process_grid import Played, aggregate, play

pytestmark = pytest.mark.narrow


def close(ours: oracles.State, theirs: oracles.State, atol: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=atol)


def same(ours: oracles.State, theirs: oracles.State) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def compare(played: Played, mask: oracles.State, atol: float = 1e-6) -> None:
    assert len(played.records) == 4
    w = oracles.initial_weights(played.runtime)
    for record, ours in zip(played.records[1:], played.states[1:], strict=True):
        theirs = oracles.one_round(played.runtime, w, mask, record["round"], record["cohort"])
        close(ours, theirs, atol)
        w = ours


def test_fedavg() -> None:
    compare(play({"strategy": "fedavg", "local.batch-size": 16}), {})


# dirichlet-class gives clients of very different sizes, so that weights and scores are really weighted.
@pytest.mark.parametrize("partition", ["dirichlet", "dirichlet-class"])
def test_ssfl(partition: str) -> None:
    played = play({"strategy": "ssfl", "partition.name": partition})
    sizes = {len(part) for part in played.runtime.partition.train}
    assert len(sizes) > 2 or partition == "dirichlet"
    mask = oracles.saliency_mask(played.runtime, oracles.initial_weights(played.runtime))
    ours = played.strategy.mask.tensors()
    assert ours.keys() == mask.keys()
    differing = sum(int((ours[name] ^ mask[name]).sum()) for name in mask)
    # The scores of both are sums in other orders: a pair at the very threshold may change places.
    assert differing <= 2
    compare(played, ours)


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"ssfl.criterion": "snip"}, 1),
        ({"ssfl.criterion": "iterative-snip", "ssfl.steps": 5}, 5),
        ({"ssfl.criterion": "force", "ssfl.steps": 5}, 5),
    ],
)
@pytest.mark.parametrize("density", [0.5, 0.1, 0.02])
def test_masks_of_one_client_differ_in_no_bit(keys: Flat, steps: int, density: float) -> None:
    one: Flat = {"strategy": "ssfl", "run.clients": 1, "run.cohort": 1, "mask.density": density}
    played = play(one | keys, until=0)
    w0 = oracles.initial_weights(played.runtime)
    theirs = oracles.mask_in_steps(played.runtime, w0, steps, keys["ssfl.criterion"] == "force")
    ours = played.strategy.mask.tensors()
    assert ours.keys() == theirs.keys()
    assert sum(int((ours[name] ^ theirs[name].bool()).sum()) for name in ours) == 0
    assert played.strategy.mask.density == pytest.approx(density, abs=1e-4)


def test_feddst_merges_and_prunes() -> None:
    """Of five clients whose masks have moved apart, a half of each layer."""
    played = play({"strategy": "feddst"}, until=0)
    strategy, layout, rng = played.strategy, played.layout, np.random.default_rng(3)
    assert isinstance(strategy, FedDst)
    masks = [random_mask(layout, strategy.counts, rng) for _ in range(5)]
    samples = [3, 41, 7, 12, 25]
    models = [mask.apply(layout.unflatten(rng.standard_normal(layout.size).astype(np.float32))) for mask in masks]
    replies = [
        Reply(BitmapAndValues().encode(layout, state, mask), {"round": 1}, client=client, samples=samples[client])
        for client, (state, mask) in enumerate(zip(models, masks, strict=True))
    ]
    aggregate(strategy, 1, replies)
    model, mask = oracles.feddst_merged(models, [mask.tensors() for mask in masks], samples, strategy.counts)
    ours = strategy.mask.tensors()
    assert sum(int((ours[name] ^ mask[name].bool()).sum()) for name in ours) == 0
    close(strategy.state, model)


def test_fedavg_when_every_step_is_clipped() -> None:
    # The twin takes the norm in float64; the last bit of the factor then differs in each of the 15 steps.
    compare(play({"strategy": "fedavg", "local.clip": 0.05, "local.lr": 0.2}), {}, atol=2e-5)


def test_ditto(tmp_path: Path) -> None:
    """The global model, and every personal one: those of clients that were not sampled do not change."""
    # Large batches make few steps, so that two float32 runs have little time to drift apart.
    keys: Flat = {"strategy": "ditto", "local.batch-size": 128}
    played = play(keys, folder=tmp_path)  # before round 5 nothing that was remembered is deleted
    shop, layout = played.runtime, played.layout
    w = oracles.initial_weights(shop)
    own = dict.fromkeys(range(6), w)
    for record, ours in zip(played.records[1:], played.states[1:], strict=True):
        round_, cohort = record["round"], record["cohort"]
        theirs = {client: oracles.ditto_personal(shop, own[client], w, round_, client) for client in cohort}
        close(ours, oracles.one_round(shop, w, {}, round_, cohort, epochs=2))
        for client in cohort:
            file = tmp_path / f"client-{client:05d}" / f"{round_:06d}.safetensors"
            kept = load_file(file)["model"]
            own[client] = layout.unflatten(kept)
            close(own[client], theirs[client])
        w = ours
    for client in range(6):
        kept = ClientState(played.grid.context_of(client), client, tmp_path).load(3)
        same(own[client], oracles.initial_weights(shop) if kept is None else layout.unflatten(kept["model"]))


@pytest.mark.parametrize("regrow", ["random", "gradient"])
def test_dispfl(regrow: str) -> None:
    """What each client starts from, trains to and moves its mask to, and the mean of all, in every round."""
    keys: Flat = {"dispfl.regrow": regrow, "gossip.neighbours": 2, "local.batch-size": 64}
    # Clients of very different sizes: the mean is unweighted.
    played = play({"strategy": "dispfl", "partition.name": "dirichlet-class", **keys})
    shop, layout = played.runtime, played.layout
    w0, clients = oracles.initial_weights(shop), range(6)
    masks = [oracles.dispfl_first_mask(shop, client, w0) for client in clients]  # of the next training
    used = list(masks)  # of the last one
    models = [w0] * 6

    def payloads(log: list) -> dict[tuple[int, int], Payload]:  # type: ignore[type-arg]
        return {(round_, client): payload for (kind, round_, client), payload in log if kind == "train"}

    sent, got = payloads(played.grid.sent), payloads(played.grid.got)
    for round_ in (1, 2, 3):
        after = []
        for client in clients:
            start, mask = BitmapAndValues().decode(sent[round_, client].arrays, layout)
            same(mask.tensors(), masks[client])
            peers = [client, *oracles.dispfl_neighbours(shop, round_, client)]
            mean = oracles.mean_over_owners([models[j] for j in peers], [used[j] for j in peers])
            close(start, {name: t * masks[client][name] if name in mask.tensors() else t for name, t in mean.items()})
            trained, _ = MaskedValues().decode(got[round_, client].arrays, layout, mask)
            close(trained, oracles.train_locally(shop, start, masks[client], round_, client))
            moved = BitmapAndValues().decode(got[round_, client].arrays, layout)[1].tensors()
            same(moved, oracles.dispfl_next_mask(shop, trained, masks[client], round_, client))
            after.append((trained, moved))
        used, masks = masks, [moved for _, moved in after]
        models = [trained for trained, _ in after]
        close(played.states[round_], oracles.mean_over_owners(models, used))
