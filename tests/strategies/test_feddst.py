"""FedDST: how clients move the mask, how the server merges masks, and what that costs."""

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ssfl_app.comm.messenger import Reply
from ssfl_app.comm.payload import Payload
from ssfl_app.config import merge, parse
from ssfl_app.core.strategy import ServerContext
from ssfl_app.options import ConfigError
from ssfl_app.seeding import generator
from ssfl_app.sparsity.codec import BitmapAndValues, MaskedValues
from ssfl_app.sparsity.layout import Layout, load_state
from ssfl_app.sparsity.mask import Mask
from ssfl_app.strategies.feddst import FedDst, FedDstOptions, layer_counts, proximal
from tests.in_process_grid import SMALL, WHOLE, Played, aggregate, answer_error, play, tamper

pytestmark = pytest.mark.narrow

P, R, A, BITMAP = 38160, 170, 7632, 4770  # of the narrow CNN
TINY = Layout((("w", (2, 4)), ("b", (2,))), ("w",))


@cache
def feddst(**keys: Any) -> Played:
    more = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    return play({"strategy": "feddst", "run.evaluate-every": 3} | more)


def up(played: Played, round_: int) -> dict[int, Payload]:
    return {client: payload for (kind, r, client), payload in played.grid.got if (kind, r) == ("train", round_)}


def per_layer(mask: Mask) -> list[int]:
    return [alive for _, alive, _ in mask.layers()]


# ---- the server, by hand -------------------------------------------------------------------------


def fold(*clients: tuple[list[float], int]) -> FedDst:
    """Fold answers of two classes: eight weights, None where dead, and a number of images."""
    strategy = FedDst(ServerContext(TINY, parse(merge(SMALL, {"strategy": "feddst", "mask.density": 0.5})).settings))
    strategy.before_round(1, None)  # type: ignore[arg-type]
    replies = []
    for client, (values, samples) in enumerate(clients):
        mask = Mask(TINY, np.array([value is not None for value in values]))
        state = {"w": torch.tensor([v or 0.0 for v in values]).view(2, 4), "b": torch.tensor([1.0, float(samples)])}
        replies.append(
            Reply(BitmapAndValues().encode(TINY, state, mask), {"round": 1}, client=client, samples=samples)
        )
    aggregate(strategy, 1, iter(replies))
    return strategy


def test_the_server_averages_over_owners_and_keeps_the_largest_of_the_union() -> None:
    _ = None
    strategy = fold(([4.0, -2.0, 1.0, 0.5, _, _, _, _], 1), ([8.0, 2.0, _, _, 3.0, 0.25, _, _], 3))
    # Owners' means: 7, 1, 1, 0.5, 3, 0.25. With absent ones as 0 the third would be 0.25 and go.
    assert strategy.mask.alive.tolist() == [True, True, True, False, True, False, False, False]
    assert strategy.state["w"].flatten().tolist() == [7.0, 1.0, 1.0, 0.0, 3.0, 0.0, 0.0, 0.0]
    assert strategy.state["b"].tolist() == [1.0, 2.5]


def test_an_owned_weight_of_zero_goes_before_one_that_nobody_owns() -> None:
    _ = None
    strategy = fold(([_, _, _, _, 1.0, 2.0, 3.0, 0.0], 1), ([_, _, _, _, 1.0, 2.0, 3.0, 0.0], 1))
    assert strategy.mask.alive.tolist() == [False] * 4 + [True] * 4


def test_layer_densities_are_in_proportion_to_the_sum_of_a_shape_over_its_product() -> None:
    """23/144 and 74/640 fill their layers; the other 6,848 weights are shared out as 54 to 576."""
    layout = feddst().layout
    assert list(layer_counts(layout, 0.2).values()) == [144, 587, 6261, 640]
    assert per_layer(feddst().strategy.mask) == [144, 587, 6261, 640]


# ---- when and how much ---------------------------------------------------------------------------


def test_the_mask_moves_every_so_often_in_the_first_part_of_a_run_and_less_and_less() -> None:
    options = FedDstOptions(every=10, until=0.5, alpha=0.5, proximal=0.0)
    moving = [r for r in range(1, 401) if options.moves(r, 400)]
    assert moving == list(range(1, 200, 10))
    shares = [options.share(r, 400) for r in moving]
    assert shares[0] == 0.5
    assert shares[10] == pytest.approx(0.25)  # after 100 of 200 rounds: cos(pi / 2) = 0
    assert all(one > other > 0 for one, other in pairwise(shares))
    assert [r for r in range(1, 7) if FedDstOptions(2, 1.0, 0.5, 0.0).moves(r, 6)] == [1, 3, 5]


def test_only_such_rounds_change_the_mask_and_send_it() -> None:
    played = feddst(run__rounds=4, feddst__every=2, feddst__until=0.75)
    masks = played.masks
    assert [one != other for one, other in pairwise(masks)] == [True, False, True, False]
    assert ["mask" in up(played, r)[played.records[r]["ok"][0]].arrays for r in (1, 2, 3, 4)] == [True, False] * 2
    assert all(per_layer(mask) == per_layer(masks[0]) for mask in masks)


# ---- the client ----------------------------------------------------------------------------------


def test_a_client_removes_the_smallest_and_lets_the_dead_of_largest_gradient_come_alive() -> None:
    """With one local epoch the mask moves at the weights that came down."""
    played = feddst(feddst__alpha=0.3)
    runtime, layout = played.runtime, played.layout
    first = FedDst(ServerContext(layout, played.strategy.settings))
    first.state = runtime.initial_state()
    first.before_training(None)  # type: ignore[arg-type]
    load_state(runtime.model, first.state)
    magnitudes = np.abs(layout.flatten_prunable(first.state))
    for client, payload in up(played, 1).items():
        images = runtime.data.train.take(runtime.partition.train[client])
        batch = generator(1, "feddst-regrow", 1, client).permutation(len(images))[: SMALL["local.batch-size"]]
        gradient = runtime.trainer.gradient(runtime.model, images.take(batch))
        slopes = np.abs(layout.flatten_prunable(gradient))
        new = Mask.unpack(layout, payload.arrays["mask"])
        for span in layout.prunable_spans.values():
            old, now = first.mask.alive[span], new.alive[span]
            moved = math.floor(0.3 * old.sum())
            weakest = np.argsort(np.where(old, magnitudes[span], np.inf), kind="stable")[:moved]
            dead = ~old
            dead[weakest] = True
            born = np.argsort(np.where(dead, -slopes[span], np.inf), kind="stable")[:moved]
            expected = ~dead
            expected[born] = True
            assert (now == expected).all()
            assert now.sum() == old.sum()
        assert len(up(played, 1)) == 4


def test_what_comes_alive_trains_before_it_is_sent_and_some_of_it_stays() -> None:
    for epochs in (1, 2):
        played = feddst(local__epochs=epochs)
        before, after = first_mask(played), played.masks[1]
        for payload in up(played, 1).values():
            state, own = BitmapAndValues().decode(payload.arrays, played.layout)
            born = own.alive & ~before.alive
            values = played.layout.flatten_prunable(state)[born]
            assert born.sum() > 250
            assert (values != 0).mean() > 0.8
        assert (after.alive & ~before.alive).sum() > 125


def first_mask(played: Played) -> Mask:
    return played.masks[0]


def test_image_passes_are_the_epochs_and_one_minibatch_when_the_mask_moves() -> None:
    played = feddst(local__epochs=2)
    for record, minibatches in ((played.records[1], 1), (played.records[2], 0)):
        images = sum(len(played.runtime.partition.train[client]) for client in record["ok"])
        assert record["image_passes"] == 2 * images + SMALL["local.batch-size"] * 4 * minibatches


def test_alive_weights_keep_their_values_when_the_mask_moves() -> None:
    """Public code ranks them too and sets those of large gradient to 0; after tiny steps they would still be near."""
    played = feddst(local__lr=1e-6)
    before = MaskedValues().decode(sent(played, 1), played.layout, first_mask(played))[0]
    old = played.layout.flatten_prunable(before)
    for payload in up(played, 1).values():
        state, own = BitmapAndValues().decode(payload.arrays, played.layout)
        both = own.alive & first_mask(played).alive
        assert np.abs(played.layout.flatten_prunable(state) - old)[both].max() < 1e-3


def sent(played: Played, round_: int) -> Any:
    return next(payload.arrays for (kind, r, _), payload in played.grid.sent if (kind, r) == ("train", round_))


def test_the_proximal_term_by_hand() -> None:
    model = nn.Linear(2, 1)
    penalty = proximal(model, 3.0)
    assert penalty(model).item() == 0
    with torch.no_grad():
        model.weight += torch.tensor([[1.0, -2.0]])
        model.bias += 2.0
    assert penalty(model).item() == pytest.approx(1.5 * 9)


def test_a_proximal_run_stays_near_what_came_down() -> None:
    ways = []
    for mu in (0.0, 1.0):
        played = feddst(feddst__proximal=mu, data__name=WHOLE["data.name"])  # with few steps it stays near anyway
        down = MaskedValues().decode(sent(played, 2), played.layout, played.masks[1])[0]
        values = [MaskedValues().vector(p.arrays, played.layout, played.masks[1]) for p in up(played, 2).values()]
        start = played.layout.flatten(down)[played.masks[1].transmitted]
        ways.append(max(float(np.linalg.norm(v - start)) for v in values))
    assert ways[1] < 0.8 * ways[0]


# ---- bytes and refusals --------------------------------------------------------------------------


def test_bytes_by_formula() -> None:
    played = feddst(run__evaluate_every=1)
    values = 4 * (A + R)
    bills = [(r["bytes_train_down"], r["bytes_train_up"], r["bytes_evaluate_down"]) for r in played.records[1:]]
    # The mask moves in round 1 only: bitmaps come up, and the merged one goes down to all six with the evaluation.
    assert bills == [
        (4 * values, 4 * (values + BITMAP), 6 * values),
        (4 * values, 4 * values, 6 * values),
        (4 * values, 4 * values, 6 * values),
    ]
    assert [r["bytes_mask_down"] for r in played.records[1:]] == [(4 + 6) * BITMAP, 0, 0]


def across(payload: Payload) -> Payload:
    """Kill a weight of the last layer, and let one of the second come alive."""
    bits = np.unpackbits(payload.arrays["mask"])
    bits[144 + int(np.flatnonzero(bits[144:4752] == 0)[0])] = 1
    bits[P - 1] = 0
    return Payload({**payload.arrays, "mask": np.packbits(bits)}, payload.metadata)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (across, "a mask has 588 alive weights in 3.weight; it must have 587"),
        (lambda p: Payload({"values": p.arrays["values"]}, p.metadata), "no array 'mask'"),
        (lambda p: Payload({**p.arrays, "mask": p.arrays["mask"][:-1]}, p.metadata), "a bitmap has 4769 bytes"),
    ],
)
def test_a_bad_mask_is_refused_by_name(change: Callable[[Payload], Payload], reason: str) -> None:
    client = feddst().records[1]["ok"][1]
    keys = {"strategy": "feddst", "run.evaluate-every": 3}
    refused = play(keys, faults={("train", 1, client): tamper(change)}, until=1)
    missing = play(keys, faults={("train", 1, client): answer_error(5)}, until=1)
    assert reason in refused.records[1]["refused"][str(client)]
    assert refused.bits() == missing.bits()


def test_lossy_values_work_with_and_without_a_mask_that_moves() -> None:
    played = feddst(wire__up_values="fp16", wire__down_values="fp16")
    assert [r["bytes_train_up"] for r in played.records[1:3]] == [4 * (2 * (A + R) + BITMAP), 4 * 2 * (A + R)]
    assert all(not r["refused"] for r in played.records)


def test_options_are_refused_by_name() -> None:
    for key, value in (("every", 0), ("until", 0.0), ("until", 1.5), ("alpha", 0.0), ("proximal", -1.0)):
        with pytest.raises(ConfigError, match=f"feddst.{key} is {value}"):
            parse(merge(SMALL, {"strategy": "feddst", f"feddst.{key}": value}))
    with pytest.raises(ConfigError, match=r"mask.min-per-layer is 3; it is 0 with strategy feddst"):
        feddst(mask__min_per_layer=3)
