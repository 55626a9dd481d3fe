"""FedPM: bits go up, a Beta posterior counts them, and no weight ever changes its size."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from ssfl_app.comm.messenger import Reply
from ssfl_app.comm.payload import Payload
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.strategy import ServerContext
from ssfl_app.options import ConfigError
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from ssfl_app.strategies.fedpm import CLAMP, FedPm, constants
from tests.in_process_grid import SMALL, Played, ScriptedGrid, aggregate, play, tamper

pytestmark = pytest.mark.few

P = 151072  # prunable weights of the small network: 288 + 18432 + 131072 + 1280
BITMAP = P // 8
QUICK: Flat = {"strategy": "fedpm", "run.rounds": 1, "local.batch-size": 64}


def played(**keys: Any) -> Played:
    return play(QUICK | {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()})


def theta(run: Played) -> np.ndarray:
    return run.layout.flatten_prunable(run.strategy.state)


def uploads(run: Played, round_: int) -> list[tuple[np.ndarray, int]]:
    """The bits that came up in a round, and the samples of who sent them."""
    return [
        (np.unpackbits(payload.arrays["mask"]).astype(np.int64), int(payload.metadata["samples"]))
        for (kind, r, _), payload in run.grid.got
        if (kind, r) == ("train", round_)
    ]


# ---- the server ----------------------------------------------------------------------------------


def four_weights(**keys: Any) -> FedPm:
    layout = Layout((("w", (1, 4)), ("b", (1,))), ("w",))
    flat = merge(SMALL, {"strategy": "fedpm", **{k.replace("__", "."): v for k, v in keys.items()}})
    strategy = FedPm(ServerContext(layout, parse(flat).settings))
    strategy.state = {"w": torch.tensor([[0.3, -0.1, 0.2, -0.4]]), "b": torch.tensor([0.7])}
    strategy.before_training(None)
    return strategy


def replies(*masks: tuple[Sequence[int], int]) -> list[Reply]:
    packed = [(np.packbits(np.array(bits, dtype=np.uint8)), samples) for bits, samples in masks]
    return [Reply({"mask": bitmap}, {}, client=k, samples=samples) for k, (bitmap, samples) in enumerate(packed)]


def test_theta_is_the_mode_of_a_posterior_that_starts_at_1_and_1() -> None:
    """Masks 1100 and 1010 of 1 sample and 1001 of 2: alpha - 1 is (4, 1, 1, 2) of 4."""
    strategy = four_weights()
    aggregate(strategy, 1, replies(([1, 1, 0, 0], 1), ([1, 0, 1, 0], 1), ([1, 0, 0, 1], 2)))
    assert strategy.state["w"].tolist() == [[1.0, 0.25, 0.25, 0.5]]
    strategy = four_weights(run__weighting="uniform")  # as published: (3, 1, 1, 1) of 3
    aggregate(strategy, 1, replies(([1, 0, 0, 1], 2), ([1, 1, 0, 0], 1), ([1, 0, 1, 0], 1)))
    assert strategy.state["w"].numpy() == pytest.approx(np.array([[1, 1 / 3, 1 / 3, 1 / 3]]))


@pytest.mark.parametrize(
    ("reset", "wanted"),
    [
        (1, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]),
        (2, [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0]]),
        (0, [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0]]),
    ],
)
def test_the_posterior_starts_anew_every_so_many_rounds_or_never(reset: int, wanted: list[list[float]]) -> None:
    strategy = four_weights(fedpm__reset=reset)
    for round_, expected in enumerate(wanted, 1):
        bits = [int(place == round_ - 1) for place in range(4)]
        aggregate(strategy, round_, replies((bits, 3)))
        assert strategy.state["w"].numpy()[0] == pytest.approx(np.array(expected))


def test_a_round_that_breaks_off_leaves_the_posterior_as_it_was() -> None:
    strategy = four_weights(fedpm__reset=0)
    aggregate(strategy, 1, replies(([1, 1, 0, 0], 1)))
    before = {name: array.copy() for name, array in strategy.state_dict().items()}

    def broken() -> Any:
        yield from replies(([0, 0, 1, 1], 1))
        raise RuntimeError("too few")

    with pytest.raises(RuntimeError):
        aggregate(strategy, 2, broken())
    assert all((strategy.state_dict()[name] == array).all() for name, array in before.items())


def test_a_snapshot_holds_the_posterior_the_signs_and_what_is_tested() -> None:
    strategy = four_weights(fedpm__reset=0)
    aggregate(strategy, 1, replies(([1, 1, 0, 0], 1), ([1, 0, 1, 0], 1)))
    again = four_weights(fedpm__reset=0)
    again.signs = Mask.dense(again.layout)
    again.load_state_dict(1, {name: array.copy() for name, array in strategy.state_dict().items()})
    assert again.signs == strategy.signs
    assert again.signs.alive.tolist() == [True, False, True, False]
    assert torch.equal(again.model()["w"], strategy.model()["w"])
    for one in (strategy, again):
        aggregate(one, 2, replies(([0, 1, 1, 0], 2)))
    assert again.state["w"].tolist() == strategy.state["w"].tolist() == [[0.5, 0.75, 0.75, 0.0]]


def test_the_first_scores_are_standard_normal() -> None:
    run = play(QUICK, until=0)
    scores = torch.logit(torch.from_numpy(theta(run))).numpy()
    assert abs(scores.mean()) < 5 / math.sqrt(P)
    assert scores.std() == pytest.approx(1, abs=0.01)


# ---- the network ---------------------------------------------------------------------------------


def test_weights_are_signed_constants_or_0_and_nothing_else_ever_moves() -> None:
    run = played(run__rounds=2)
    initial = run.runtime.initial_state()
    fan_in = {"0.weight": 9, "3.weight": 32 * 9, "8.weight": 64 * 16, "10.weight": 128}
    assert set(run.layout.prunable) == set(fan_in)
    for state in run.states:
        for name, tensor in state.items():
            if name in fan_in:
                size = torch.tensor(math.e / math.sqrt(fan_in[name]))
                alive = tensor != 0
                assert torch.allclose(tensor[alive], torch.sign(initial[name][alive]) * size)
                assert 0.3 < alive.float().mean() < 0.7
            else:  # norms of weight 1 and bias 0, biases of linear layers 0
                assert (tensor == (1 if name in ("1.weight", "4.weight") else 0)).all()
    networks = [run.layout.flatten(state).tobytes() for state in run.states]
    assert len(set(networks)) == 3  # the masks do move


def test_constants_by_hand() -> None:
    layout = Layout((("c", (1, 2, 1, 2)), ("n.weight", (2,)), ("n.bias", (2,))), ("c",))
    state = constants(layout, Mask(layout, np.array([True, False, False, True])))
    assert state["c"].flatten().numpy() == pytest.approx(np.array([1, -1, -1, 1]) * math.e / 2)  # fan-in 4
    assert (state["n.weight"].tolist(), state["n.bias"].tolist()) == ([1, 1], [0, 0])


@pytest.mark.parametrize("how", ["sample", "threshold"])
def test_one_network_is_tested_by_all(how: str) -> None:
    """Test images are split among the clients, so the mean of all of them is the central accuracy."""
    run = played(run__weighting="uniform", fedpm__evaluate=how)
    strategy = run.strategy
    assert isinstance(strategy, FedPm)
    sent = {p.arrays["mask"].tobytes() for (kind, _, _), p in run.grid.sent if kind == "evaluate"}
    assert sent == {strategy.network.packed().tobytes()}
    images = [len(test) for test in run.runtime.partition.test]
    mean = sum(n * strategy.accuracy[k] for k, n in enumerate(images) if n) / sum(images)
    assert mean == pytest.approx(run.records[1]["central_accuracy"])
    alive, chance = strategy.network.alive, theta(run)
    assert run.records[1]["density"] == alive.mean()
    assert alive[chance == 1].all()
    assert not alive[chance == 0].any()
    middle = alive[chance == 0.5]
    if how == "threshold":
        assert (alive == (chance > 0.5)).all()
    else:
        assert abs(middle.mean() - 0.5) < 5 * 0.5 / math.sqrt(middle.size)


# ---- the client ----------------------------------------------------------------------------------


def test_theta_after_a_round_is_the_mean_of_the_masks_that_came_up() -> None:
    run = played(run__rounds=2)
    came = uploads(run, 2)
    assert len(came) == 4
    wanted = sum(n * bits for bits, n in came) / sum(n for _, n in came)
    assert (theta(run) == wanted.astype(np.float32)).all()
    assert not np.array_equal(came[0][0], came[1][0])


def test_the_mask_that_goes_up_is_drawn_from_the_scores_which_have_an_end() -> None:
    """Scores that hardly train: of weights with theta 0 a share of CLAMP is drawn, of those with 1 all but that."""
    still = played(run__rounds=2, fedpm__lr=1e-9)
    first = played(fedpm__lr=1e-9)
    before = theta(first)
    for bits, _ in uploads(still, 2):
        for value, wanted in ((0, CLAMP), (1, 1 - CLAMP)):
            at = bits[before == value]
            assert at.size > 1000
            assert abs(at.mean() - wanted) < 5 * math.sqrt(CLAMP / at.size)


def test_adam_has_a_rate_of_its_own_and_no_decay() -> None:
    run = played()
    assert played(local__lr=0.5, local__lr_decay=0.5, local__weight_decay=0.1).bits() == run.bits()
    assert played(fedpm__lr=0.01).bits() != run.bits()


def test_it_works_without_norms_as_published() -> None:
    assert 0 < played(model__norm="none").records[1]["density"] < 1


# ---- the wire ------------------------------------------------------------------------------------


def test_a_round_costs_32_bits_a_weight_down_and_one_up_and_an_evaluation_one() -> None:
    run = played(run__rounds=2)
    for record in run.records[1:]:
        assert (record["bytes_train_down"], record["bytes_train_up"]) == (4 * 4 * P, 4 * BITMAP)
        assert (record["bytes_evaluate_down"], record["bytes_mask_down"]) == (6 * BITMAP, 0)
    assert run.records[0]["bytes_discovery_down"] == run.records[0]["bytes_discovery_up"] == 0


def test_theta_may_travel_in_16_bits() -> None:
    assert played(wire__down_values="fp16").records[1]["bytes_train_down"] == 4 * 2 * P


def other_signs(grid: ScriptedGrid, message: Message) -> Message | None:
    """The server has other initial weights than the client's torch makes."""
    message.content["facts"]["signs"] = "0123456789abcdef"
    return grid.work(message)


def test_a_client_that_makes_other_signs_says_so_and_the_others_count() -> None:
    client = played().records[1]["cohort"][0]
    run = play(QUICK, faults={("train", 1, client): other_signs, ("evaluate", 1, client): other_signs})
    for what in ("refused", "evaluate_refused"):
        assert "signs is '0123456789abcdef'; the seed makes" in run.records[1][what][str(client)]
    assert theta(run).tobytes() == without(client).tobytes()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda a: {"mask": a["mask"][:-1]}, "bytes; this layout needs 18884"),
        (lambda a: {"mask": a["mask"].astype(np.float32)}, "mask is float32"),
        (lambda a: {"values": a["mask"]}, "array values is none of this message's, which are ['mask']"),
    ],
)
def test_a_reply_that_is_no_bitmap_is_refused_and_the_others_count(change: Any, why: str) -> None:
    client = played().records[1]["cohort"][0]
    bad = tamper(lambda payload: Payload(change(payload.arrays), payload.metadata))
    run = play(QUICK, faults={("train", 1, client): bad})
    assert why in run.records[1]["refused"][str(client)]
    assert theta(run).tobytes() == without(client).tobytes()


def without(client: int) -> np.ndarray:
    """theta after round 1, had this client sent nothing."""
    came = [payload for (kind, _, k), payload in played().grid.got if kind == "train" and k != client]
    counts = [
        payload.metadata["samples"] * np.unpackbits(payload.arrays["mask"]).astype(np.int64) for payload in came
    ]
    return (sum(counts) / sum(payload.metadata["samples"] for payload in came)).astype(np.float32)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("fedpm.lr", 0.0, "fedpm.lr is 0.0; it is a number above 0"),
        ("fedpm.reset", -1, "fedpm.reset is -1; it is a number of at least 0"),
        ("fedpm.evaluate", "mean", "fedpm.evaluate is 'mean'; it is one of sample, threshold"),
        ("model.norm", "batch", "model.norm is 'batch'; with fedpm"),
    ],
)
def test_options_are_checked(key: str, value: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        play({**QUICK, key: value})
