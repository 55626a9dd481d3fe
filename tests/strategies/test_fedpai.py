"""FedPaI: masks of clients' own by GraSP, or channels that the server removes by synaptic flow."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from torch.nn import functional

from ssfl_app.config import Flat
from ssfl_app.core.strategy import ServerContext
from ssfl_app.options import ConfigError
from ssfl_app.seeding import generator
from ssfl_app.sparsity.channels import Cost, channel_ranks, choose, narrow_state, unit_count, widths_of
from ssfl_app.sparsity.saliency import balanced_batch
from ssfl_app.strategies.fedpai import FedPai
from tests import oracles
from tests.in_process_grid import Played, answer_error, play
from tests.strategies.test_oracles import close

pytestmark = pytest.mark.narrow

KEYS: Flat = {"strategy": "fedpai", "local.batch-size": 64}
CHANNELS: Flat = KEYS | {"mask.granularity": "channel", "local.lr": 0.05}
BITMAP = 38160 // 8


# ---- every client for itself ---------------------------------------------------------------------


def grasp_scores(played: Played, client: int) -> np.ndarray:
    """w (H g) of a client's minibatch, by double backward of the gradient's own square, in float64."""
    shop, w0 = played.runtime, oracles.initial_weights(played.runtime)
    options, part = shop.config.settings.sections["ssfl"], shop.partition.train[client]
    rng = generator(shop.config.settings.run.seed, "saliency", client, 0)
    batch = part[balanced_batch(shop.data.train.labels.numpy()[part], options.saliency_batch_size, rng)]
    inputs, labels = shop.data.transform.test(shop.data.train.inputs[batch]), shop.data.train.labels[batch]
    weights = {name: w0[name].clone().requires_grad_() for name in played.layout.prunable}
    output = torch.func.functional_call(shop.model.train(), w0 | weights, (inputs,))
    loss = functional.cross_entropy(output / options.grasp_temperature, labels)
    slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    half = sum((g * g).sum() for g in slopes) / 2  # whose gradient is H g
    products = torch.autograd.grad(half, list(weights.values()))
    return np.concatenate([(w * p).detach().numpy().ravel() for w, p in zip(weights.values(), products, strict=True)])


def test_a_clients_mask_is_graspss_on_its_own_images() -> None:
    played = play(KEYS, until=0)
    for client in (0, 3):
        scores, mask = grasp_scores(played, client), played.strategy.mask_for(client)
        best = np.zeros(scores.size, dtype=bool)
        best[np.argsort(-scores, kind="stable")[: int(0.2 * scores.size)]] = True
        # Both are sums in float32, in other orders: a few at the very threshold may change places.
        assert int((best ^ mask.alive).sum()) <= 20
        assert mask.count == int(0.2 * scores.size)


def test_masks_are_the_clients_own_and_stay() -> None:
    played = play(KEYS)
    masks = [played.strategy.mask_for(client) for client in range(6)]
    assert len({mask.digest for mask in masks}) == 6
    assert [mask.digest for mask in masks] == [play(KEYS, until=0).strategy.mask_for(c).digest for c in range(6)]
    by_chance = 2 * 0.2 * 0.8
    assert masks[0].hamming(masks[1]) < 0.9 * by_chance
    assert play(KEYS | {"strategy": "local-saliency"}).strategy.mask_for(0) != masks[0]


def test_the_server_averages_over_those_who_hold_a_weight() -> None:
    played = play(KEYS | {"run.rounds": 1})
    total, held = np.zeros(played.layout.size), np.zeros(played.layout.size)
    for (kind, _, client), payload in played.grid.got:
        if kind == "train":
            mask, samples = played.strategy.mask_for(client).transmitted, int(payload.metadata["samples"])
            total[mask] += samples * payload.arrays["values"].astype(np.float64)
            held[mask] += samples
    w0 = played.layout.flatten(played.runtime.initial_state())
    expected = np.where(held > 0, total / np.maximum(held, 1), w0)
    assert np.allclose(played.layout.flatten(played.strategy.state), expected, rtol=1e-6, atol=1e-9)
    assert played.records[1]["personal_accuracy_mean"] is not None


def test_a_client_is_trained_inside_its_mask() -> None:
    played = play(KEYS | {"run.rounds": 1})
    w0, client = oracles.initial_weights(played.runtime), played.records[1]["cohort"][0]
    mask = played.strategy.mask_for(client)
    (payload,) = [p for where, p in played.grid.got if where == ("train", 1, client)]
    bits = {name: bit.float() for name, bit in mask.tensors().items()}
    start = {name: w * bits[name] if name in bits else w for name, w in w0.items()}
    ours = played.layout.scatter(payload.arrays["values"], mask.transmitted)
    close(ours, oracles.train_locally(played.runtime, start, bits, 1, client))


def test_a_client_that_was_lost_in_setup_gets_a_random_mask() -> None:
    lost = play(KEYS, faults={("query.own_mask", 0, 2): answer_error(5)})
    assert lost.strategy.mask_for(2) == play({"strategy": "random-local"}).strategy.mask_for(2)


# ---- the server for all --------------------------------------------------------------------------


def test_the_server_keeps_the_channels_through_which_most_flows() -> None:
    """Against the net of |w0| without norms and biases, for an input of ones, written as its layers are."""
    played = play(CHANNELS | {"run.rounds": 1})
    whole, w0 = played.runtime.layout, oracles.initial_weights(played.runtime)
    w = {name: w0[name].abs().double().requires_grad_() for name in whole.prunable}
    x = torch.ones(1, *played.runtime.data.shape, dtype=torch.float64)
    x = functional.conv2d(functional.conv2d(x, w["0.weight"], padding=1), w["3.weight"], padding=1)
    x = functional.adaptive_avg_pool2d(x, 4).flatten(1)
    x = functional.linear(functional.linear(x, w["8.weight"]), w["10.weight"])
    slopes = dict(zip(w, torch.autograd.grad(x.sum(), list(w.values())), strict=True))
    flow = {name: (w[name] * slope).detach().numpy() for name, slope in slopes.items()}
    sums = [
        flow["0.weight"].sum((1, 2, 3)) + flow["3.weight"].sum((0, 2, 3)),
        flow["3.weight"].sum((1, 2, 3)) + flow["8.weight"].reshape(64, 32, -1).sum((0, 2)),
        flow["8.weight"].sum(1) + flow["10.weight"].sum(0),
    ]
    units = [flows.reshape(inner.units, -1).sum(1) for inner, flows in zip(whole.inner, sums, strict=True)]
    ranks = channel_ranks(whole, np.concatenate(units).astype(np.float32), "global")
    kept = choose(whole, ranks, 0.2, Cost(whole))
    small = narrow_state(whole, w0, kept)
    first = next(payload for where, payload in played.grid.sent if where[0] == "train")
    assert first.arrays["widths"].tolist() == list(widths_of(whole, kept))
    assert np.array_equal(first.arrays["values"], played.strategy.layout.flatten(small))


def test_one_smaller_network_is_trained_by_all_without_a_question() -> None:
    played = play(CHANNELS)
    layout, whole = played.strategy.layout, played.runtime.layout
    assert unit_count(layout) < unit_count(whole)
    assert 0.85 * 0.2 < played.records[-1]["density"] <= 0.2
    assert played.records[0]["bytes_discovery_up"] == played.records[0]["bytes_discovery_down"] == 0
    for record in played.records[1:]:
        assert record["bytes_train_up"] == 4 * 4 * layout.size
        assert record["bytes_train_down"] == 4 * (4 * layout.size + 4 * len(layout.inner))
        assert record["bytes_mask_down"] == 0
        assert record["local_accuracy_mean"] is not None
        assert record["personal_accuracy_mean"] is None
    assert played.records[-1]["train_loss"] < played.records[1]["train_loss"]
    assert play(CHANNELS, luck=7).bits() == played.bits()


def test_channels_go_on_from_a_snapshot_to_the_same_bits(tmp_path: Path) -> None:
    keys = CHANNELS | {"run.checkpoint-every": 1}
    half, whole = play(keys, folder=tmp_path, until=1), play(CHANNELS)
    arrays = {name: array.copy() for name, array in half.strategy.state_dict().items()}
    again = FedPai(ServerContext(half.runtime.layout, half.strategy.settings, folder=tmp_path))
    again.load_state_dict(1, arrays)
    finished = Played(again, half.runtime, half.grid)
    again.callback = finished
    again.start(half.grid, ArrayRecord(half.runtime.initial_state()), 3)
    assert finished.bits() == whole.bits()


def test_bytes_of_masks() -> None:
    played = play(KEYS)
    assert played.records[0]["bytes_discovery_up"] == 6 * BITMAP
    assert all(record["bytes_mask_down"] == 0 for record in played.records[1:])


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"mask.granularity": "2:4"}, "mask.granularity is '2:4'; it is 'weight' or 'channel' with strategy fedpai"),
        ({"mask.granularity": "channel", "mask.density": 0.001}, "the narrowest network costs"),
        ({"run.fold": "krum"}, "run.fold is 'krum'; it is 'mean' with strategy fedpai"),
        ({"mask.dead": "frozen"}, "mask.dead is 'frozen'; it is 'zero' with strategy fedpai"),
    ],
)
def test_options_are_checked(keys: Flat, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        play(KEYS | keys)
