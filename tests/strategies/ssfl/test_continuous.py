"""SSFL's continuous refresh: a share of the mask moves every few rounds, by scores that come beside the values."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, RecordDict

from ssfl_app.comm.payload import ClientState, Payload
from ssfl_app.config import Flat
from ssfl_app.core.client import Need
from ssfl_app.core.strategy import ServerContext
from ssfl_app.options import ConfigError
from ssfl_app.seeding import generator
from ssfl_app.sparsity.codec import write_moved
from ssfl_app.sparsity.layout import load_state
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.saliency import balanced_batch
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.strategies.ssfl.continuous import scored_weights
from tests.in_process_grid import ANY, Played, answer_error, forget, play, tamper

pytestmark = pytest.mark.narrow

MOVES: Flat = {"ssfl.refresh": "continuous", "ssfl.refresh-every": 1, "ssfl.refresh-sample": 0.2}
P, ALIVE, REST, BITMAP = 38160, 7632, 170, 4770
SAMPLE = math.floor(0.2 * (P - ALIVE))
MOST = math.floor(0.05 * ALIVE)


def moved(played: Played, round_: int) -> tuple[Any, Any]:
    """Return which weights left the mask and which came at the end of a round."""
    before, after = played.masks[round_ - 1].alive, played.masks[round_].alive
    return before & ~after, after & ~before


# ---- what moves ----------------------------------------------------------------------------------


def test_the_mask_keeps_its_size_and_moves_by_the_share_at_most_but_not_after_the_last_round() -> None:
    played = play(MOVES)
    assert {mask.count for mask in played.masks} == {ALIVE}
    counts = [int(moved(played, round_)[1].sum()) for round_ in (1, 2, 3)]
    assert counts == [MOST, MOST, 0]
    assert [record.get("swapped", {}).get("weights", 0) for record in played.records[1:]] == counts


def test_it_moves_in_every_nth_round_from_the_first_one_on() -> None:
    keys: Flat = {"run.rounds": 7, "ssfl.refresh-every": 2, "ssfl.refresh-round": 3, "run.evaluate-every": 7}
    played = play(MOVES | keys)
    assert [record["round"] for record in played.records if "swapped" in record] == [4, 6]


def test_dense_rounds_come_first() -> None:
    played = play(MOVES | {"ssfl.warmup-rounds": 1})
    assert [record["round"] for record in played.records if "swapped" in record] == [2]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_layers_keep_their_floors(scope: str) -> None:
    keys: Flat = {"mask.scope": scope, "mask.min-per-layer": 100, "mask.density": 0.02, "ssfl.refresh-share": 0.9}
    played = play(MOVES | keys)
    layers = [{name: alive for name, alive, _ in mask.layers()} for mask in played.masks]
    assert all(min(counts.values()) >= 100 for counts in layers)
    assert moved(played, 1)[1].any()
    if scope == "layer":
        assert all(counts == layers[0] for counts in layers)


@pytest.mark.parametrize("criterion", ["snip", "gradient"])
def test_the_move_is_that_of_the_mean_scores_at_the_model_that_came_down(criterion: str) -> None:
    """By hand: gradients of the sparse model, alive weights and initial ones, and a pairing of the two ends."""
    played = play(MOVES | {"ssfl.criterion": criterion, "run.rounds": 2})
    shop, layout, before = played.runtime, played.layout, played.masks[0].alive
    came, start = layout.flatten_prunable(played.states[0]), layout.flatten_prunable(shop.initial_state())
    value = np.where(before, came, start) if criterion == "snip" else np.ones(P)
    total = np.zeros(P)
    cohort = played.records[1]["cohort"]
    for client in cohort:
        data = shop.data.train.take(shop.partition.train[client])
        rng = generator(1, "saliency", client, 1)  # of round 1: not the minibatch that found the mask
        load_state(shop.model, played.states[0])
        gradient = shop.trainer.gradient(shop.model, data.take(balanced_batch(data.labels.numpy(), 64, rng)))
        total += len(data) * np.abs(layout.flatten_prunable(gradient) * value)
    dead = np.flatnonzero(~before)
    sample = dead[generator(1, "refresh-sample", 1).choice(dead.size, SAMPLE, replace=False, shuffle=False)]
    leave = sorted(np.flatnonzero(before), key=lambda place: (total[place], -place))[:MOST]
    come = sorted(sample, key=lambda place: (-total[place], place))[:MOST]
    expected = before.copy()
    for old, new in zip(leave, come, strict=True):
        if total[new] > total[old]:
            expected[old], expected[new] = False, True
    # Sums in another order may rank two weights the other way around.
    assert np.count_nonzero(expected ^ played.masks[1].alive) <= 4


# ---- what becomes of values ----------------------------------------------------------------------


@pytest.mark.parametrize("start", ["initial", "zero"])
def test_what_comes_starts_at_w0_or_0_and_what_leaves_is_told(start: str) -> None:
    played, never = play(MOVES | {"ssfl.refresh-weights": start}), play({})
    layout, (left, come) = played.layout, moved(played, 1)
    now, trained = layout.flatten_prunable(played.states[1]), layout.flatten_prunable(never.states[1])
    w0 = layout.flatten_prunable(played.runtime.initial_state())
    assert (now[come] == (w0[come] if start == "initial" else 0)).all()
    assert not now[left].any()
    kept = played.masks[1].alive & ~come
    assert (now[kept] == trained[kept]).all()
    assert played.records[1]["swapped"]["norm"] == pytest.approx(np.linalg.norm(trained[left]), rel=1e-6)


def test_frozen_dead_weights_are_the_initial_ones_whatever_moved() -> None:
    played = play(MOVES | {"mask.dead": "frozen", "ssfl.criterion": "gradient"})
    layout, w0 = played.layout, played.layout.flatten_prunable(played.runtime.initial_state())
    for state, mask in zip(played.states, played.masks, strict=True):
        assert (layout.flatten_prunable(state)[~mask.alive] == w0[~mask.alive]).all()
    assert moved(played, 2)[1].any()


# ---- bytes ---------------------------------------------------------------------------------------


def test_scores_are_paid_where_the_mask_moves() -> None:
    up = [record["bytes_train_up"] for record in play(MOVES).records[1:]]
    values, scores = 4 * (ALIVE + REST), 4 * (ALIVE + SAMPLE)
    assert up == [4 * (values + scores), 4 * (values + scores), 4 * values]
    short = play(MOVES | {"ssfl.score-values": "log8"}).records[1]["bytes_train_up"]
    assert short == 4 * (values + ALIVE + SAMPLE + 8)


@pytest.mark.parametrize(("share", "places"), [(0.05, True), (0.1, False)])
def test_who_holds_the_mask_before_gets_what_differs_where_that_is_less(share: float, places: bool) -> None:
    """Six clients test after round 1, of which four trained; in round 2 all six hold the mask before."""
    played = play(MOVES | {"ssfl.refresh-share": share})
    count = math.floor(share * ALIVE)
    assert [int(moved(played, r)[1].sum()) for r in (1, 2)] == [count, count]
    assert (4 * 2 * count < BITMAP) == places
    told = 4 * 2 * count if places else BITMAP
    down = [record["bytes_mask_down"] for record in played.records[1:]]
    assert down == [4 * BITMAP + 4 * told + 2 * BITMAP, 6 * told, 0]


def test_a_deflated_bitmap_may_be_less_than_the_places() -> None:
    """What counts is what would be sent: here 76 bits of 38,160, and 608 bytes if all of them move."""
    keys: Flat = {"mask.density": 0.002, "ssfl.refresh-share": 1.0, "ssfl.refresh-sample": 1.0}
    for bitmaps, places in (("plain", True), ("zlib", False)):
        sent = play(MOVES | keys | {"wire.bitmaps": bitmaps}).grid.sent
        assert any("moved" in payload.arrays for where, payload in sent if where[0] == "evaluate") == places


def test_who_forgot_the_mask_before_gets_the_bitmap() -> None:
    plain = play(MOVES)
    client = plain.records[1]["cohort"][0]
    forgetful = play(MOVES, faults={("evaluate", 1, client): forget})
    assert forgetful.bits() == plain.bits()
    assert forgetful.records[1]["local_accuracy"] == plain.records[1]["local_accuracy"]
    more = forgetful.records[1]["bytes_mask_down"] - plain.records[1]["bytes_mask_down"]
    assert more == BITMAP


# ---- what differs is refused if it is wrong ------------------------------------------------------


def holder() -> tuple[Any, Mask, Mask]:
    """Return a client that holds a mask, this mask, and another one."""
    played = play(MOVES)
    before, after = played.masks[:2]
    memory = ClientState(Context(1, 1, {}, RecordDict(), {}), 0)
    memory.keep(before.digest, before.packed())
    return played.runtime.rule(0, memory), before, after


def test_a_client_makes_the_mask_of_what_differs_and_keeps_it() -> None:
    rule, before, after = holder()
    message = Payload(write_moved(before, after), {"before": before.digest})
    assert rule.known_mask(message, after.digest) == after
    assert rule.context.mask(after.digest) == after
    # An answer that was lost: the server tells it again, and the mask before is gone.
    assert rule.known_mask(message, after.digest) == after


def test_wrong_differences_are_refused_and_the_held_mask_stays() -> None:
    rule, before, after = holder()
    right = write_moved(before, after)["moved"]
    wrong = {
        "the message states": right[1:],
        "has length|it must be flat": right.astype(np.float32),
        "must rise strictly": right[::-1].copy(),
        f"within 0..{P - 1}": np.append(right, np.int32(P)),
    }
    for words, places in wrong.items():
        with pytest.raises(PayloadError, match=words):
            rule.known_mask(Payload({"moved": places}, {"before": before.digest}), after.digest)
        assert rule.context.mask(before.digest) == before
    for facts in ({}, {"before": after.digest}, {"before": "../../x"}):
        with pytest.raises(Need, match="mask"):
            rule.known_mask(Payload({"moved": right}, facts), after.digest)


# ---- order, resuming, other options --------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"ssfl.score-fold": "median", "run.fold": "trimmed-mean"},
        {"ssfl.score-fold": "normalised", "failures.norm-factor": 3.0},
        {"wire.error-feedback": True, "wire.up-values": "int8", "wire.down-values": "bf16"},
        {"ssfl.saliency-weighting": "uniform", "ssfl.score-values": "bf16", "ssfl.saliency-batches": 2},
    ],
    ids=["median", "norm-factor", "error-feedback", "bf16"],
)
def test_other_options_go_with_it_in_any_order_of_replies(keys: Flat) -> None:
    one, other = play(MOVES | keys), play(MOVES | keys, luck=1)
    assert one.grid.log != other.grid.log
    assert one.bits() == other.bits()
    assert one.masks == other.masks
    assert moved(one, 2)[1].any()


def test_a_resumed_run_moves_on_as_the_uninterrupted_one(tmp_path: Path) -> None:
    keys = MOVES | {"run.checkpoint-every": 1, "run.rounds": 4, "wire.error-feedback": True, "wire.up-values": "fp16"}
    whole, half = play(keys), play(keys, folder=tmp_path, until=2)
    arrays = {name: array.copy() for name, array in half.strategy.state_dict().items()}
    rest = play(keys, folder=tmp_path, until=3)
    again = type(rest.strategy)(ServerContext(whole.layout, rest.strategy.settings, folder=tmp_path))
    again.load_state_dict(2, arrays)
    finished = Played(again, whole.runtime, rest.grid)
    again.callback = finished
    again.start(rest.grid, ArrayRecord(whole.runtime.initial_state()), 4)
    assert finished.bits() == whole.bits()
    assert again.mask == whole.strategy.mask


# ---- liars ---------------------------------------------------------------------------------------


def lie(change: Any) -> Any:
    return tamper(lambda payload: replace(payload, arrays=change(dict(payload.arrays))))


LIES = {
    "scores reach -1; those of snip must be at least 0": lambda a: a | {"scores.values": a["scores.values"] - 1},
    "scores: 1 values are NaN": lambda a: a | {"scores.values": np.append(a["scores.values"][1:], np.float32("nan"))},
    "scores: values reach": lambda a: a | {"scores.values": a["scores.values"] + np.float32(1e6)},
    "scores: values has length": lambda a: a | {"scores.values": a["scores.values"][1:]},
    "scores: no array 'values'": lambda a: {"values": a["values"]},
    "scores.values has length": lambda a: a | {"scores.values": np.zeros(ANY // 64, np.float32)},
}


@pytest.mark.parametrize("words", LIES)
def test_who_lies_in_its_scores_is_refused_by_name_and_changes_no_more_than_one_who_is_lost(words: str) -> None:
    client = play(MOVES).records[1]["cohort"][1]
    lying = play(MOVES, faults={("train", 1, client): lie(LIES[words])})
    lost = play(MOVES, faults={("train", 1, client): answer_error(5)})
    refused = lying.records[1]["refused"]
    assert list(refused) == [str(client)]
    assert refused[str(client)].startswith(words)
    assert lying.bits() == lost.bits()
    assert lying.masks[-1] == lost.masks[-1]


def test_a_well_formed_lie_decides_a_move_under_the_mean_and_hardly_anything_under_the_median() -> None:
    """One of six scores the honest choice 0 and shouts for as many other candidates."""
    kept = {}
    for fold in ("mean", "normalised", "median"):
        keys = MOVES | {"run.cohort": 6, "ssfl.score-fold": fold, "partition.name": "iid"}
        honest = play(keys)
        _, come = moved(honest, 1)
        sample = scored_weights(honest.masks[0], honest.strategy.settings, 1)[ALIVE:]
        others = np.flatnonzero(~come[sample])[: 2 * MOST]

        def shout(arrays: dict[str, Any], others: Any = others) -> dict[str, Any]:
            scores = np.zeros_like(arrays["scores.values"])
            scores[ALIVE + others] = 32768
            return arrays | {"scores.values": scores}

        lying = play(keys, faults={("train", 1, 2): lie(shout)})
        assert moved(lying, 1)[1].sum() <= MOST
        kept[fold] = (moved(lying, 1)[1] & come).sum() / come.sum()
    assert kept["mean"] == 0
    assert kept["normalised"] < 0.1
    assert kept["median"] > 0.8


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ssfl.criterion": "grasp"}, "ssfl.criterion is 'grasp'; it is 'snip' or 'gradient' with ssfl.refresh"),
        ({"ssfl.refresh-weights": "restart"}, "ssfl.refresh-weights is 'restart'; it is 'initial' or 'zero'"),
        ({"mask.granularity": "2:4", "mask.density": 0.5}, "mask.granularity is '2:4'; it is 'weight' with"),
        ({"mask.granularity": "channel"}, "ssfl.refresh is 'continuous'; it is 'never' with mask.granularity"),
        ({"strategy": "shuffled"}, "ssfl.refresh is 'continuous'; it is never, scheduled or drift with strategy"),
        ({"ssfl.score-values": "fixed32"}, "ssfl.refresh is 'continuous'; it is 'never': ssfl.score-values is"),
        ({"privacy.secure-aggregation": True}, "ssfl.refresh is 'continuous'; it is 'never': with privacy.secure"),
        ({"ssfl.refresh-every": 0}, "ssfl.refresh-every is 0; it is a number of at least 1"),
        ({"ssfl.refresh-share": 0.0}, "ssfl.refresh-share is 0.0; it is a fraction"),
        ({"ssfl.refresh-sample": 1.5}, "ssfl.refresh-sample is 1.5; it is a fraction"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(keys: Flat, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        play(MOVES | keys)


def test_nodes_that_draw_other_initial_weights_are_told_apart_at_the_greeting() -> None:
    """Scores of dead weights are of w0, so server and clients compare its digest."""
    assert play(MOVES).runtime.start_digest
    assert not play({}).runtime.start_digest
