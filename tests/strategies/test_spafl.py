"""SpaFL: thresholds travel and are averaged, weights stay and follow them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ssfl_app.comm.messenger import Reply
from ssfl_app.comm.payload import Payload
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.strategy import ServerContext
from ssfl_app.options import ConfigError
from ssfl_app.sparsity.layout import Layout, State
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.strategies.spafl import SpaFl, Thresholds, joined, moved, parted, restart_collapsed
from ssfl_app.training.reparam import alive_filters
from tests import oracles
from tests.in_process_grid import SMALL, Played, aggregate, forget, play, tamper
from tests.strategies.test_oracles import close

pytestmark = pytest.mark.narrow

FILTERS = (16, 32, 64, 10)
"""Of the narrow network's layers."""
# Rates at which filters die within few rounds, and come back.
KEYS: Flat = {"strategy": "spafl", "local.batch-size": 16, "local.lr": 0.3, "spafl.penalty": 0.02}


# ---- by hand -------------------------------------------------------------------------------------


def test_weights_go_against_the_change_of_their_thresholds() -> None:
    """By the sign of their filter's sum, over the size of a kernel, or over the inputs of a linear layer."""
    weights = {
        "c": torch.tensor([[[[1.0, -3.0]], [[1.0, 0.0]]], [[[1.0, 1.0]], [[1.0, 1.0]]]]),  # sums -1 and 4
        "l": torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, -1.0, 0.0, 0.0]]),  # 10 and 0
        "b": torch.tensor([5.0]),
    }
    found = moved(weights, {"c": torch.tensor([0.5, -0.25]), "l": torch.tensor([0.5, 0.5])})
    assert found["c"].tolist() == [[[[1.25, -2.75]], [[1.25, 0.25]]], [[[1.125] * 2], [[1.125] * 2]]]
    assert found["l"].tolist() == [[0.875, 1.875, 2.875, 3.875], [1.0, -1.0, 0.0, 0.0]]
    assert found["b"] is weights["b"]
    assert weights["l"][0, 0] == 1


def test_a_layer_with_hardly_a_filter_left_starts_anew() -> None:
    weights = {"a": torch.ones(200, 2), "b": torch.ones(2, 2)}
    above = torch.full((200,), 2.0)
    above[:2] = 0.5  # a hundredth is alive
    thresholds = {"a": above, "b": torch.tensor([0.5, 2.0])}
    restart_collapsed(weights, thresholds)
    assert not thresholds["a"].any()
    assert thresholds["b"].tolist() == [0.5, 2.0]
    more = torch.full((200,), 2.0)
    more[:3] = 0.5
    restart_collapsed(weights, {"a": more})
    assert more[:4].tolist() == [0.5, 0.5, 0.5, 2.0]


def two_layers(**keys: Any) -> SpaFl:
    layout = Layout((("a.weight", (2, 3)), ("a.bias", (2,)), ("b.weight", (1, 2))), ("a.weight", "b.weight"))
    flat = merge(SMALL, {"strategy": "spafl", **{k.replace("__", "."): v for k, v in keys.items()}})
    strategy = SpaFl(ServerContext(layout, parse(flat).settings))
    ones = torch.ones(2, 3)
    strategy.state = {"a.weight": ones, "a.bias": torch.zeros(2), "b.weight": torch.tensor([[1.0, -3.0]])}
    return strategy


def reply(client: int, samples: int, alive: int, *thresholds: float) -> Reply:
    values = {"values": np.array(thresholds, dtype=np.float32)}
    return Reply(values, {"alive": alive, "round": 1}, client=client, samples=samples)


REPLIES = (reply(0, 3, 5, 1.0, 0.0, -1.0), reply(4, 1, 2, 0.0, 0.5, 1.0))


def test_the_server_takes_the_mean_of_thresholds_and_of_what_clients_counted() -> None:
    strategy = two_layers()
    assert strategy.densities() == (1.0, 1.0)
    aggregate(strategy, 1, REPLIES)
    assert strategy.thresholds.tolist() == [0.75, 0.125, -0.5]
    density = (5 + 2 + 4 * 8) / 6 / 8  # clients that never trained have all 8 weights
    assert strategy.densities() == pytest.approx((density, (density * 8 + 2) / 10))
    uniform = two_layers(run__weighting="uniform")  # as published
    aggregate(uniform, 1, REPLIES[::-1])
    assert uniform.thresholds.tolist() == [0.5, 0.25, 0.0]


def test_the_model_that_is_left_is_the_initial_one_moved_and_pruned() -> None:
    strategy = two_layers(run__weighting="uniform")
    aggregate(strategy, 1, (reply(0, 1, 8, 1.5, 0.375, 1.0),))
    model = strategy.model()
    assert model["a.weight"].tolist() == [[0.0] * 3, [0.875] * 3]  # 1 - 1.5 / 3 is not above 1.5
    assert model["b.weight"].tolist() == [[1.5, -2.5]]
    assert strategy.state["a.weight"].eq(1).all()


def test_a_snapshot_holds_thresholds_and_counts() -> None:
    strategy, again = two_layers(), two_layers()
    aggregate(strategy, 1, REPLIES)
    again.load_state_dict(1, {name: array.copy() for name, array in strategy.state_dict().items()})
    assert again.thresholds.tolist() == strategy.thresholds.tolist()
    assert again.densities() == strategy.densities()
    with pytest.raises(ValueError, match="array 'thresholds' is float32 of shape"):
        again.load_state_dict(1, strategy.state_dict() | {"thresholds": np.zeros(2, np.float32)})


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_thresholds_are_one_vector_in_the_order_of_the_layers(kind: str) -> None:
    layout, codec = two_layers().layout, Thresholds(kind)
    state = {"a.weight": torch.tensor([0.25, -0.5]), "b.weight": torch.tensor([1.0])}
    arrays = codec.encode(layout, state, Mask.dense(layout))
    back, mask = codec.decode(arrays, layout, Mask.dense(layout))
    assert mask == Mask.dense(layout)
    assert joined(layout, back) == pytest.approx(np.array([0.25, -0.5, 1.0], np.float32), abs=1 / 254)
    codec.check(arrays, layout, mask)
    with pytest.raises(PayloadError, match="values has length 2; it must be 3"):
        codec.check(arrays | {"values": arrays["values"][:2]}, layout, mask)


# ---- a run ---------------------------------------------------------------------------------------


def test_rounds_are_the_papers(tmp_path: Path) -> None:
    """Each client's weights and thresholds after each round, what the server makes of them, which model is tested."""
    played = play(KEYS, folder=tmp_path)
    shop, layout = played.runtime, played.layout
    start, zero = oracles.initial_weights(shop), parted(layout, np.zeros(sum(FILTERS), dtype=np.float32))
    kept: dict[int, tuple[State, State, State]] = dict.fromkeys(range(6), (start, zero, zero))
    tau, counts, shares = zero, dict.fromkeys(range(6), layout.prunable_size), set[float]()

    def arrived(client: int) -> State:
        weights, _, seen = kept[client]
        return oracles.spafl_moved(weights, {name: tau[name] - seen[name] for name in tau})

    for round_, record in enumerate(played.records[1:], start=1):
        came: dict[int, State] = {}
        for client in record["cohort"]:
            weights, thresholds = oracles.spafl_trained(shop, arrived(client), tau, round_, client)
            file = load_file(tmp_path / f"client-{client:05d}" / f"{round_:06d}.safetensors")
            own = layout.unflatten(file["model"]), parted(layout, file["thresholds"]), parted(layout, file["seen"])
            close(own[0], weights, atol=1e-5)
            close(own[1], thresholds, atol=1e-5)
            close(own[2], tau)
            kept[client], came[client] = own, own[1]
            bits = {name: alive_filters(own[0][name], each) for name, each in own[1].items()}
            counts[client] = sum(int(b.sum()) * own[0][name][0].numel() for name, b in bits.items())
            shares |= {float(b.float().mean()) for b in bits.values()}
        tau = oracles.mean_of(shop, record["cohort"], [came[client] for client in record["cohort"]])
        assert record["density"] == pytest.approx(sum(counts.values()) / 6 / layout.prunable_size)
        sent = next(payload for where, payload in played.grid.sent if where[:2] == ("evaluate", round_))
        close(parted(layout, sent.arrays["values"]), tau)
    assert any(0 < share < 1 for share in shares)  # some filters of a layer died
    for client, said in played.strategy.personal_accuracy.items():
        weights, thresholds = arrived(client), kept[client][1]
        for name, each in thresholds.items():
            weights[name][~alive_filters(weights[name], each)] = 0
        shop.model.load_state_dict(weights)
        shop.model.eval()
        test = shop.data.test.take(shop.partition.test[client])
        with torch.no_grad():
            right = (shop.model(shop.data.transform.test(test.inputs)).argmax(1) == test.labels).double().mean()
        assert said == pytest.approx(float(right), abs=1.01 / len(test))


def test_nothing_but_thresholds_crosses_the_wire() -> None:
    played = play(KEYS)
    sizes = {
        (where[0], tuple((name, array.size) for name, array in payload.arrays.items()))
        for log in (played.grid.sent, played.grid.got)
        for where, payload in log
        if where[0] in ("train", "evaluate")
    }
    values = (("values", sum(FILTERS)),)
    assert sizes == {("train", values), ("evaluate", values), ("evaluate", ())}
    assert played.layout.prunable_size == 38160
    assert all(record["central_accuracy"] is None for record in played.records[1:])


def test_thresholds_may_travel_in_fewer_bits() -> None:
    played = play(KEYS | {"run.rounds": 1, "wire.up-values": "fp16", "wire.down-values": "bf16"})
    record = played.records[1]
    assert (record["bytes_train_down"], record["bytes_train_up"]) == (4 * 2 * sum(FILTERS),) * 2


def test_the_penalty_raises_thresholds_and_density_is_not_read() -> None:
    plain, high = (play(KEYS | {"spafl.penalty": penalty, "run.rounds": 1}) for penalty in (0.0, 0.02))
    ours = [run.strategy.thresholds.mean() for run in (plain, high) if isinstance(run.strategy, SpaFl)]
    assert ours[1] > ours[0] + 0.02
    assert play(KEYS | {"mask.density": 0.5}).bits() == play(KEYS).bits()


def test_a_client_that_forgot_its_weights_begins_with_the_initial_ones() -> None:
    plain = play(KEYS)
    before = {c for record in plain.records[1:3] for c in record["cohort"]}
    client = next(c for c in plain.records[3]["cohort"] if c in before)
    forgetful = play(KEYS, faults={("train", 3, client): forget})
    assert forgetful.bits() != plain.bits()
    assert not forgetful.records[3]["refused"]
    assert "began anew" in forgetful.records[3]["notes"][str(client)]


@pytest.mark.parametrize("alive", [-1, 38161, 3.0, True, "many"])
def test_a_count_that_cannot_be_is_refused(alive: Any) -> None:
    client = play(KEYS).records[1]["cohort"][0]
    bad = tamper(lambda payload: Payload(payload.arrays, {**payload.metadata, "alive": alive}))
    run = play(KEYS | {"run.rounds": 1}, faults={("train", 1, client): bad})
    assert f"alive is {alive!r}; it must be a whole number from 0 to 38160" in refused(run, client)


def refused(run: Played, client: int) -> str:
    return str(run.records[1]["refused"][str(client)])


def test_thresholds_that_are_none_are_refused_at_both_ends() -> None:
    client = play(KEYS).records[1]["cohort"][0]
    bad = tamper(lambda payload: Payload({"values": payload.arrays["values"][1:]}, payload.metadata))
    run = play(KEYS | {"run.rounds": 1}, faults={("train", 1, client): bad})
    assert "values has length 121; it must be 122" in refused(run, client)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"spafl.penalty": -0.1}, "spafl.penalty is -0.1; it is a number of at least 0"),
        ({"run.fold": "median"}, "run.fold is 'median'; it is 'mean' with strategy spafl"),
        ({"stop.metric": "central"}, "stop.metric is 'central'; it is auto or personal with strategy spafl"),
    ],
)
def test_options_are_checked(keys: Flat, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        play(KEYS | keys)
