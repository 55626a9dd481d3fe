"""Faults of clients, one by one: refused or lost by name, counted, and never part of the model."""

import functools
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from ssfl_app.comm.payload import Payload
from ssfl_app.config import Flat, merge
from ssfl_app.core.strategy import SparseStrategy
from ssfl_app.locks import RunFailed
from ssfl_app.results.recorder import failure_keys
from ssfl_app.runtime import Runtime, get_runtime
from ssfl_app.server_app import misfit
from ssfl_app.strategies import REGISTRY
from tests.in_process_grid import (
    SMALL,
    WHOLE,
    Fault,
    Played,
    ScriptedGrid,
    answer_error,
    forget,
    keep_silent,
    play,
    pose,
    tamper,
)

pytestmark = pytest.mark.narrow

ONE: Flat = {"run.rounds": 1, "run.clients": 4, "run.cohort": 4}


def values(change):  # type: ignore[no-untyped-def]
    return tamper(lambda p: Payload({**p.arrays, "values": change(p.arrays["values"].copy())}, p.metadata))


def metadata(**new):  # type: ignore[no-untyped-def]
    return tamper(lambda p: Payload(p.arrays, {**p.metadata, **new}))


def spoil(array, value):  # type: ignore[no-untyped-def]
    array[3] = value
    return array


BAD: list[tuple[Fault, str]] = [
    (values(lambda v: spoil(v, np.nan)), "NaN or Inf"),
    (values(lambda v: spoil(v, -np.inf)), "NaN or Inf"),
    (values(lambda v: spoil(v, 1e6)), "at most 32768"),
    (values(lambda v: v[:-1]), "values has length"),
    (values(lambda v: v.astype(np.float16)), "values is float16"),
    (tamper(lambda p: Payload({}, p.metadata)), "no array 'values'"),
    (metadata(digest="0123456789abcdef"), "digest is '0123456789abcdef'"),
    (metadata(round=7), "round is 7; it must be 1"),
    (metadata(samples=0), "samples is 0"),
    (metadata(samples=-3), "samples is -3"),
    (metadata(samples=2**40), "samples is 1099511627776"),
    (metadata(samples=1.5), "samples is 1.5"),
    (metadata(loss=float("nan")), "loss is nan"),
    (metadata(loss="low"), "loss is 'low'"),
    (answer_error(2, "Traceback ...\nValueError: no such patient"), "raised: ValueError: no such patient"),
]


def test_bad_training_replies_are_refused_by_name() -> None:
    """All of them in one round, a client each, and two good ones."""
    keys: Flat = {"run.rounds": 1, "run.clients": 17, "run.cohort": 17, "failures.min-ok-fraction": 0.1}
    faults = {("train", 1, client): fault for client, (fault, _) in enumerate(BAD)}
    played = play(keys, faults=faults)
    record = played.records[1]
    assert record["ok"] == [15, 16]
    assert sorted(map(int, record["refused"])) == list(range(15))
    for client, (_, reason) in enumerate(BAD):
        assert reason in record["refused"][str(client)]
    lost = play(keys, faults=dict.fromkeys(faults, answer_error(5)))
    assert lost.records[1]["ok"] == [15, 16]
    assert played.bits() == lost.bits()


def test_a_bad_answer_to_the_saliency_question_is_refused_and_leaves_the_mask_alone() -> None:
    def run(fault: Fault) -> Played:
        return play(ONE, faults={("query.saliency", 0, 1): fault}, until=0)

    without = run(answer_error(5))
    for fault, reason in [
        *BAD[:6],
        (metadata(samples=0), "samples is 0"),
        (metadata(samples=2**40), "samples is 1099"),
    ]:
        played = run(fault)
        assert reason in played.records[0]["refused"]["1"]
        assert played.strategy.mask == without.strategy.mask
    assert without.records[0]["lost"] == {"1": "Flower error 5: scripted"}


def test_a_bad_evaluation_is_refused_and_left_out_of_the_mean() -> None:
    good = play(ONE)
    played = play(ONE, faults={("evaluate", 1, 0): metadata(accuracy=float("nan"))})
    assert "accuracy is nan" in played.records[1]["evaluate_refused"]["0"]
    boast = play(ONE, faults={("evaluate", 1, 0): metadata(accuracy=1e9)})
    assert "accuracy is 1000000000.0" in boast.records[1]["evaluate_refused"]["0"]
    rest = [v for c, v in good.records[1]["local_accuracy"].items() if c != "0"]
    assert played.records[1]["local_accuracy_mean"] == pytest.approx(sum(rest) / 3)
    assert played.bits() == good.bits()


def test_a_silent_client_is_lost_when_the_round_times_out() -> None:
    played = play({**ONE, "run.round-timeout": 6.0}, faults={("train", 1, 3): keep_silent})
    assert played.records[1]["lost"] == {"3": "no answer within 6 s"}
    assert played.records[1]["ok"] == [0, 1, 2]


def test_a_client_without_the_mask_asks_for_it_and_gets_it_within_the_round() -> None:
    keys: Flat = {**ONE, "run.rounds": 2}
    good = play(keys)
    played = play(keys, faults={("train", 2, 1): forget})
    bitmap = -(-played.layout.prunable_size // 8)
    assert played.bits() == good.bits()
    assert played.records[2]["lost"] == played.records[2]["refused"] == {}
    assert played.records[2]["bytes_mask_down"] == bitmap
    # The model went down twice to that client: bytes are those that were really sent.
    model = good.records[2]["bytes_train_down"] // 4
    assert played.records[2]["bytes_train_down"] == 5 * model
    assert played.records[2]["messages_train_down"] == 5
    kinds = [where for where in played.grid.log if where == ("train", 2, 1)]
    assert len(kinds) == 2


def test_a_client_that_makes_other_initial_weights_from_the_seed_gets_the_servers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = play(ONE)
    assert good.records[0]["bytes_discovery_down"] == 0

    def other_torch(grid: ScriptedGrid, message: Message) -> Message:
        with monkeypatch.context() as patch:
            make = Runtime.initial_state
            patch.setattr(Runtime, "initial_state", lambda self: {n: 2 * t for n, t in make(self).items()})
            return grid.work(message)

    played = play(ONE, faults={("query.saliency", 0, 1): other_torch})
    assert played.records[0]["ok"] == [0, 1, 2, 3]
    assert played.records[0]["bytes_discovery_down"] == 4 * played.layout.size
    assert played.strategy.mask == good.strategy.mask
    assert played.bits() == good.bits()


def test_a_client_that_keeps_asking_for_the_mask_is_refused() -> None:
    ask = tamper(lambda p: Payload({}, {"need": "mask", "samples": 0, "round": 1}))
    played = play(ONE, faults={("train", 1, 1): ask})
    assert played.records[1]["refused"] == {"1": "asks for 'mask' again"}


def test_a_round_with_too_few_good_replies_ends_the_run_and_leaves_the_model() -> None:
    faults = {("train", 1, client): answer_error(5) for client in (0, 1, 2)}
    with pytest.raises(RunFailed, match=r"training in round 1: 1 of 4 clients .* failures.min-ok-fraction is 0.5"):
        play(ONE, faults=faults)
    assert play({**ONE, "failures.min-ok-fraction": 0.25}, faults=faults).records[1]["ok"] == [3]


def test_a_dead_ray_actor_ends_the_run_with_a_plain_message() -> None:
    with pytest.raises(RunFailed, match=r"a Ray actor died while it worked for client 2 .*engine.actors"):
        play(ONE, faults={("train", 1, 2): answer_error(0, "<class ActorDiedError>:<'The actor died'>")})


MISFIT = [
    ({"code": "another"}, "runs other code ('another') than the server"),
    ({"classes": None}, "classes is None"),
    ({"classes": "\n".join("012345678x")}, "client 2 and the server have different classes"),
    ({"shape": "3,8,8"}, "images of different shapes"),
    ({"counts": ",".join("1" * 10)}, "its data set is another one"),
]


@pytest.mark.parametrize(("changed", "words"), MISFIT, ids=[words for _, words in MISFIT])
def test_a_client_with_other_code_or_images_is_set_aside_and_the_run_goes_on(
    changed: dict[str, Any], words: str
) -> None:
    said: list[str] = []
    keys: Flat = {**ONE, **WHOLE}  # nodes that are no simulation read no other set

    def prepare(strategy: SparseStrategy) -> None:
        strategy.messenger.registry.misfit = functools.partial(misfit, get_runtime(merge(SMALL, keys)))
        strategy.messenger.registry.say = said.append

    five: list[Flat] = [{"partition-id": i} for i in range(5)]
    played = play(keys, faults={("query.hello", 0, 4): pose(2, **changed)}, node_configs=five, prepare=prepare)
    assert played.records[1]["ok"] == [0, 1, 2, 3]
    assert all(words in line for line in said)  # none if it answered last
    with pytest.raises(RunFailed, match=r"3 of 4 clients joined; missing: 2") as why:
        play(keys, faults={("query.hello", 0, 2): pose(2, **changed)}, prepare=prepare)
    assert words in str(why.value)
    assert len(said) >= 1


def test_too_few_simulated_nodes_are_a_plain_message_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssfl_app.comm.membership.SIMULATED_NODES_APPEAR", 0.2)
    monkeypatch.setattr(ScriptedGrid, "get_node_ids", lambda self: list(self._contexts)[:3])
    with pytest.raises(
        RunFailed, match=r"Flower simulates 3 SuperNodes and run.clients is 4: set num-supernodes to 4"
    ):
        play(ONE)


def test_a_place_that_nobody_has_since_two_claim_another_is_named() -> None:
    with pytest.raises(RunFailed, match=r"missing: 1 .*says that it is client 0, which node"):
        play(ONE, faults={("query.hello", 0, 1): metadata(client=0)})


def test_clients_that_never_join_are_named() -> None:
    with pytest.raises(RunFailed, match=r"3 of 4 clients joined within run.join-timeout 1 s; missing: 2"):
        play({**ONE, "run.join-timeout": 1.0}, faults={("query.hello", 0, 2): answer_error(5)})


def held(played: Played, client: int, part: int = 0) -> int:
    return len(played.runtime.share(client)[part])


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_no_client_counts_more_images_than_it_said_it_holds(name: str) -> None:
    """Whatever the strategy and the exchange: questions, training, evaluation."""
    keys: Flat = {**ONE, "strategy": name, "prunefl.checks": 1, "prunefl.every": 1, "flash.stage-clients": 1.0}
    keys["failures.min-ok-fraction"] = 0.1  # of prunefl's question, which one client is asked
    kinds = [("train", 1, 2), ("evaluate", 1, 2)]
    kinds += [(f"query.{question}", 0, 2) for question in REGISTRY[name].client.query_types if name != "prunefl"]
    played = play(keys, faults=dict.fromkeys(kinds, metadata(samples=10**6)))
    lies = [where for where in played.grid.log if where in kinds]
    assert ("train", 1, 2) in lies
    assert ("evaluate", 1, 2) in lies
    refused = [r for each in played.records for key in failure_keys("refused") for r in each.get(key, {}).values()]
    assert sorted(refused) == sorted(
        f"samples is 1000000; this client holds {held(played, 2, 1 if kind == 'evaluate' else 0)}"
        for kind, _, _ in lies
    )


def test_what_the_server_deals_counts_more_than_what_a_client_says_of_itself() -> None:
    boast = tamper(lambda p: Payload(p.arrays, {**p.metadata, "counts": ",".join(["9999"] * 10), "samples": 99990}))
    good = play(ONE)
    keys = {("query.hello", 0, 1): boast, ("train", 1, 1): metadata(samples=99990)}

    def deal(strategy: SparseStrategy) -> None:
        strategy.messenger.dealt = good.runtime.holding

    assert play(ONE, faults=keys).records[1]["ok"] == [0, 1, 2, 3]  # a site is believed; a share that is dealt is not
    assert play(ONE, faults=keys, prepare=deal).records[1]["refused"] == {
        "1": f"samples is 99990; this client holds {held(good, 1)}"
    }


def test_work_and_loss_have_sane_limits() -> None:
    good = play(ONE)
    most = good.strategy.client.work(good.strategy.settings, held(good, 1))
    assert good.records[1]["image_passes"] <= sum(
        good.strategy.client.work(good.strategy.settings, held(good, client)) for client in range(4)
    )
    for lie, reason in (
        ({"passes": most + 1}, f"passes is {most + 1}; it must be a whole number from 0 to {most}"),
        ({"looks": 2**40}, "looks is 1099511627776; it must be a whole number"),
        ({"loss": 3e38}, "loss is 3e+38; it must be a finite number, at most 1.04858e+06"),
    ):
        played = play(ONE, faults={("train", 1, 1): metadata(**lie)})
        assert reason in played.records[1]["refused"]["1"]
