"""Top-k: what is chosen, what the server makes of it, and that error feedback loses nothing."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from ssfl_app.comm.messenger import Reply
from ssfl_app.comm.payload import ClientState, Payload
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.strategy import ServerContext
from ssfl_app.options import ConfigError
from ssfl_app.runtime import Runtime, get_runtime
from ssfl_app.sparsity.codec import BitmapAndValues, Dense, Indexed
from ssfl_app.sparsity.layout import Layout, Vector, load_state, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.strategies.topk import Topk, TopkClient, chosen
from tests import oracles
from tests.in_process_grid import SMALL, Played, aggregate, answer_error, play, tamper

pytestmark = pytest.mark.narrow

P, R = 38_160, 170  # prunable weights of the narrow CNN, and its biases and norm weights
K = math.floor(0.2 * P)
SMALLEST = Layout((("0.weight", (1, 4)), ("0.bias", (1,))), ("0.weight",))
FEEDBACK: Flat = {"strategy": "topk", "topk.of": "update", "topk.error-feedback": True, "mask.density": 0.01}


def topk(**keys: Any) -> Played:
    return play({"strategy": "topk", **{key.replace("__", ".").replace("_", "-"): v for key, v in keys.items()}})


def fedavg() -> Played:
    return play({"strategy": "fedavg", "run.rounds": 1})


def server(keys: Flat) -> Topk:
    return Topk(
        ServerContext(SMALLEST, parse(merge(SMALL, {"strategy": "topk", "mask.density": 0.5}, keys)).settings)
    )


def reply(client: int, samples: int, weights: list[float], bias: float) -> Reply:
    state = {"0.weight": torch.tensor([weights]), "0.bias": torch.tensor([bias])}
    mask = Mask(SMALLEST, np.array(weights) != 0)
    return Reply(BitmapAndValues().encode(SMALLEST, state, mask), {"round": 1}, client=client, samples=samples)


@pytest.mark.parametrize(
    ("keys", "wanted", "alive"),
    [
        ({}, [7.0, 0.5, -3.0, 0.0, 4.0], [True, True, True, False]),
        ({"topk.mean": "overlap"}, [7.0, 2.0, -4.0, 9.0, 4.0], [True] * 4),
        ({"topk.of": "update"}, [16.0, 9.5, 6.0, 9.0, 5.0], [True] * 4),
        ({"run.weighting": "uniform"}, [6.0, 1.0, -2.0, 0.0, 3.0], [True, True, True, False]),
    ],
)
def test_the_means_by_hand(keys: Flat, wanted: list[float], alive: list[bool]) -> None:
    """Of 4 samples 1 is a client's that sent (4, 2, -, -) and 3 are one's that sent (8, -, -4, -).

    The second coordinate, 2, shrinks to 1/4 of itself, the share of those who hold it.
    """
    strategy = server(keys)
    strategy.state = SMALLEST.unflatten(np.array([9, 9, 9, 9, 1], dtype=np.float32))
    aggregate(strategy, 1, iter([reply(0, 1, [4, 2, 0, 0], 1), reply(1, 3, [8, 0, -4, 0], 5)]))
    assert SMALLEST.flatten(strategy.state).tolist() == wanted
    assert strategy.mask.alive.tolist() == alive
    assert strategy.densities()[0] == sum(alive) / 4
    assert strategy.mask_for(0) == Mask.dense(SMALLEST)


def test_largest_means_magnitude_and_the_bias_is_not_ranked() -> None:
    settings = parse(merge(SMALL, {"strategy": "topk", "mask.density": 0.5})).settings
    values = np.array([-3, 1, 2, -0.5, 100], dtype=np.float32)
    assert chosen(SMALLEST, values, settings.mask).alive.tolist() == [True, False, True, False]


@pytest.mark.parametrize(("mean", "index"), [("zeros", "bitmap"), ("overlap", "bitmap"), ("zeros", "int32")])
def test_with_density_1_it_is_fedavg(mean: str, index: str) -> None:
    assert topk(mask__density=1.0, topk__mean=mean, topk__index=index, run__rounds=1).bits() == fedavg().bits()


def test_updates_with_density_1_are_fedavg_up_to_rounding() -> None:
    ours = topk(mask__density=1.0, topk__of="update", run__rounds=1)
    gap = ours.layout.flatten(ours.strategy.state) - ours.layout.flatten(fedavg().strategy.state)
    assert np.abs(gap).max() < 1e-6


def slow_round(played: Played, round_: int, of: str, mean: str) -> Vector:
    """The algorithm once more: plain loops and sorting."""
    layout, partition = played.layout, played.runtime.partition
    old = layout.flatten(played.states[round_ - 1]).astype(np.float64)
    total, weights, samples = np.zeros(layout.size), np.zeros(layout.size), 0
    for client in played.records[round_]["cohort"]:
        trained = oracles.train_locally(played.runtime, played.states[round_ - 1], {}, round_, client)
        values = layout.flatten(trained) - (old if of == "update" else 0)
        order = np.argsort(-np.abs(values[layout.is_prunable]), kind="stable")
        held = np.ones(layout.size)
        held[np.flatnonzero(layout.is_prunable)[order[K:]]] = 0
        n = len(partition.train[client])
        total, weights, samples = total + n * held * values, weights + n * held, samples + n
    if mean == "overlap":
        return np.where(weights > 0, total / np.maximum(weights, 1), old)
    return total / samples + (old if of == "update" else 0)


@pytest.mark.parametrize(("of", "mean"), [("weights", "zeros"), ("weights", "overlap"), ("update", "zeros")])
def test_a_run_is_what_the_slow_way_makes_of_each_round(of: str, mean: str) -> None:
    played = topk(
        topk__of=of, topk__mean=mean, partition__name="dirichlet-class", run__rounds=2, local__batch_size=16
    )
    for round_ in (1, 2):
        theirs, ours = slow_round(played, round_, of, mean), played.layout.flatten(played.states[round_])
        # A pair at the very threshold may change places between two float32 sums.
        assert np.count_nonzero(~np.isclose(ours, theirs, rtol=1e-4, atol=2e-6)) <= 4


@pytest.mark.parametrize(("index", "places"), [("bitmap", P // 8), ("int32", 4 * K)])
def test_bytes_of_a_round(index: str, places: int) -> None:
    record = topk(topk__index=index, run__rounds=1).records[1]
    assert record["bytes_train_up"] == 4 * (4 * (K + R) + places)
    assert record["bytes_train_down"] == 4 * 4 * (P + R)
    assert record["bytes_evaluate_down"] == 6 * 4 * (P + R)
    assert record["bytes_mask_down"] == 0


def test_how_places_travel_changes_no_bit() -> None:
    assert topk(topk__index="int32", run__rounds=1).bits() == topk(topk__index="bitmap", run__rounds=1).bits()


def test_the_mask_is_the_union_of_what_came_up_and_weights_outside_it_come_back() -> None:
    played = topk()
    unions = []
    for round_ in (1, 2, 3):
        sent = [payload for (kind, r, _), payload in played.grid.got if (kind, r) == ("train", round_)]
        masks = [BitmapAndValues().decode(payload.arrays, played.layout)[1] for payload in sent]
        assert [mask.count for mask in masks] == [K] * 4
        unions.append(masks[0] | masks[1] | masks[2] | masks[3])
    assert unions == played.masks[1:]
    assert [record["density"] for record in played.records[1:]] == [union.density for union in unions]
    assert (unions[1].alive & ~unions[0].alive).any()  # the model went down dense, and clients trained all of it


@pytest.mark.parametrize(("of", "mean"), [("weights", "overlap"), ("update", "zeros")])
def test_the_other_means_keep_the_model_dense(of: str, mean: str) -> None:
    played = topk(topk__of=of, topk__mean=mean, partition__name="dirichlet-class", run__rounds=2)
    assert [record["density"] for record in played.records[1:]] == [1, 1]
    assert played.layout.flatten(played.strategy.state)[played.layout.is_prunable].all()


def test_scope_and_floor_of_the_mask_hold_for_what_is_sent() -> None:
    def counts(**keys: Any) -> list[int]:
        played = topk(run__rounds=1, **keys)
        sent = next(payload for (kind, _, _), payload in played.grid.got if kind == "train")
        mask = BitmapAndValues().decode(sent.arrays, played.layout)[1]
        return [alive for _, alive, _ in mask.layers()]

    sizes = [144, 4_608, 32_768, 640]
    assert counts(mask__scope="layer") == [math.floor(0.2 * size) for size in sizes]
    floored = counts(mask__density=0.02, mask__min_per_layer=140)
    assert min(floored) >= 140 > min(counts(mask__density=0.02))
    assert sum(floored) == math.floor(0.02 * P)


# ---- error feedback ------------------------------------------------------------------------------


def rule_of(shop: Runtime, client: int = 0) -> TopkClient:
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    rule = shop.rule(client, ClientState(context, client))
    assert isinstance(rule, TopkClient)
    return rule


@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_what_was_sent_and_what_is_kept_add_up_to_all_updates(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stich et al., 2018: e_T + sum_t top(d_t) = sum_t (w_t,k - w_t). All in eighths, so exact with fp32."""
    shop = get_runtime(merge(SMALL, FEEDBACK, {"wire.up-values": values}))
    layout, rule, rng = shop.layout, rule_of(shop), np.random.default_rng(1)
    updates = [(rng.integers(-32, 33, layout.size) / 8).astype(np.float32) for _ in range(3)]
    downs = [(rng.integers(-32, 33, layout.size) / 8).astype(np.float32) for _ in range(3)]

    def fit(self: TopkClient, round_: int, *_: Any, **__: Any) -> float:
        model = self.context.model
        load_state(model, layout.unflatten(layout.flatten(state_of(model)) + updates[round_ - 1]))
        return 0.5

    monkeypatch.setattr(TopkClient, "fit", fit)
    total = np.zeros(layout.size)
    for round_, down in enumerate(downs, start=1):
        metadata = {"round": round_, "since": round_ - 1, "digest": shop.dense.digest}
        payload = Payload(Dense().encode(layout, layout.unflatten(down), shop.dense), metadata)
        came, mask = BitmapAndValues(values).decode(rule.train(payload).arrays, layout)
        assert mask.count == math.floor(0.01 * P)
        total += layout.flatten(came)
    kept = rule.context.memory.load(3)
    assert kept is not None
    exact = values == "fp32"
    assert bool((kept["residual"][mask.transmitted] == 0).all()) == exact  # rounding on the wire is kept as well
    assert np.abs(total + kept["residual"] - sum(updates)).max() <= (0 if exact else 1e-4)
    assert np.count_nonzero(kept["residual"]) > 0.9 * P


def test_feedback_changes_what_is_sent_from_the_second_time_on() -> None:
    keys: Flat = {"run.cohort": 6, "run.rounds": 2, "run.evaluate-every": 2}
    with_it, without = play(FEEDBACK | keys), play(FEEDBACK | keys | {"topk.error-feedback": False})
    same = [np.array_equal(*(p.layout.flatten(p.states[round_]) for p in (with_it, without))) for round_ in range(3)]
    assert same == [True, True, False]


def test_what_the_server_never_took_is_not_counted_as_sent() -> None:
    def poison(payload: Payload) -> Payload:
        return Payload({**payload.arrays, "values": payload.arrays["values"] * np.float32("nan")}, payload.metadata)

    refused, lost = (
        play(FEEDBACK | {"run.cohort": 6, "run.evaluate-every": 3}, faults={("train", 2, 0): fault})
        for fault in (tamper(poison), answer_error(5))
    )
    assert list(refused.records[2]["refused"]) == ["0"]
    assert refused.bits() == lost.bits()


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"topk.error-feedback": True}, r"topk.error-feedback is true; with topk.of 'weights' it is false"),
        ({"topk.of": "update", "topk.mean": "overlap"}, r"topk.mean is 'overlap'; with topk.of 'update' it is"),
        ({"mask.min-per-layer": 40}, "mask.min-per-layer is 40; it reserves 4 weights, and the density leaves 2"),
        ({"topk.of": "gradient"}, "topk.of is 'gradient'; it is one of weights, update"),
        ({"topk.mean": "plain"}, "topk.mean is 'plain'; it is one of zeros, overlap"),
        ({"topk.index": "csr"}, "topk.index is 'csr'; it is one of bitmap, int32"),
        ({"topk.error-feedback": 1}, "topk.error-feedback is 1; it is true or false"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_run(keys: Flat, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        server(keys)


def everything(payload: Payload) -> Payload:
    """The dense model in the place of its largest part."""
    layout = get_runtime(merge(SMALL, {"strategy": "topk"})).layout
    state, _ = BitmapAndValues().decode(payload.arrays, layout)
    return Payload(BitmapAndValues().encode(layout, state, Mask.dense(layout)), payload.metadata)


def falling(payload: Payload) -> Payload:
    return Payload({**payload.arrays, "index": payload.arrays["index"][::-1].copy()}, payload.metadata)


@pytest.mark.parametrize(
    ("index", "change", "why"),
    [
        ("bitmap", everything, f"{P} weights came up; mask.density 0.2 is {K}"),
        ("int32", falling, "index must rise strictly"),
    ],
)
def test_a_reply_that_is_not_what_was_asked_for_is_refused(index: str, change: Any, why: str) -> None:
    keys: Flat = {"strategy": "topk", "topk.index": index, "run.rounds": 1}
    client = play(keys).records[1]["cohort"][1]
    record = play(keys, faults={("train", 1, client): tamper(change)}).records[1]
    assert why in record["refused"][str(client)]
    assert len(record["ok"]) == 3


def test_both_ends_write_and_read_the_declared_codec() -> None:
    played = topk(topk__index="int32", run__rounds=1)
    assert isinstance(played.strategy.codec_up(1), Indexed)
    assert {name for _, payload in played.grid.got for name in payload.arrays} == {"index", "values"}
