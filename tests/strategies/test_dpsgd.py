"""D-PSGD: the mixing by hand, what every client gets, what it costs, and what a lost answer means."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from ssfl_app.comm.messenger import Reply
from ssfl_app.comm.payload import Payload
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.strategy import ServerContext
from ssfl_app.sparsity.layout import Layout, load_state
from ssfl_app.strategies import REGISTRY
from ssfl_app.strategies.dpsgd import Dpsgd
from ssfl_app.strategies.shared.gossip import neighbours
from tests.in_process_grid import SMALL, Fault, Played, Where, aggregate, answer_error, play, tamper

pytestmark = pytest.mark.narrow

BASE: Flat = {"strategy": "dpsgd", "local.batch-size": 64, "run.evaluate-every": 3}
RING: Flat = BASE | {"gossip.topology": "ring"}
FULL: Flat = BASE | {"gossip.topology": "full", "strategy": "dpsgd-ft"}
EVERYBODY: Flat = BASE | {"run.cohort": 6, "run.weighting": "uniform", "strategy": "fedavg-ft"}
# Clients of unequal size: means that were weighted by samples would show.
FEW: Flat = BASE | {"gossip.neighbours": 2, "run.evaluate-every": 2, "partition.name": "dirichlet-class"}

SCALAR = Layout((("w", (1,)),), ("w",))


def peers(values: list[float], topology: str) -> Dpsgd:
    """Clients whose models are one number each."""
    keys: Flat = {"run.clients": len(values), "run.cohort": 1, "gossip.topology": topology}
    strategy = Dpsgd(ServerContext(SCALAR, parse(merge(SMALL, {"strategy": "dpsgd"}, keys)).settings))
    strategy.state = {"w": torch.zeros(1)}
    strategy.before_training(lambda *_: iter(()))
    aggregate(strategy, 1, [reply(client, value) for client, value in enumerate(values)])
    return strategy


def reply(client: int, value: float) -> Reply:
    return Reply({"values": np.array([value], dtype=np.float32)}, {}, client=client, samples=1)


def mixed(strategy: Dpsgd, round_: int = 2) -> list[float]:
    return [
        float(strategy.train_payload(round_, client).arrays["values"][0])
        for client in range(strategy.settings.run.clients)
    ]


def models(played: Played) -> dict[tuple[int, int], np.ndarray[Any, Any]]:
    """(round, client) -> the model it sent up."""
    return {(r, c): payload.arrays["values"] for (kind, r, c), payload in played.grid.got if kind == "train"}


def came_down(played: Played, kind: str = "train") -> dict[tuple[int, int], np.ndarray[Any, Any]]:
    return {(r, c): payload.arrays["values"] for (k, r, c), payload in played.grid.sent if k == kind}


def mean(vectors: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return np.mean(np.array(vectors, dtype=np.float64), axis=0).astype(np.float32)


def accuracy(played: Played, model: np.ndarray[Any, Any], client: int) -> float:
    shop = played.runtime
    load_state(shop.model, shop.layout.unflatten(model))
    return shop.trainer.evaluate(shop.model, shop.data.test.take(shop.partition.test[client]))[1]


class TestMixing:
    def test_a_ring_of_four_numbers_by_hand(self) -> None:
        """(0, 0, 0, 12): each takes the mean of three, so (4, 0, 4, 4). The mean stays 3, and the distance from it
        falls from sqrt(108) to sqrt(12): to a third, the second eigenvalue of a ring of four."""
        strategy = peers([0, 0, 0, 12], "ring")
        assert mixed(strategy) == [4, 0, 4, 4]
        assert float(strategy.state["w"]) == 3

    def test_mixing_alone_reaches_the_consensus(self) -> None:
        values = [0.0, 0.0, 0.0, 12.0]
        for _ in range(12):
            values = mixed(peers(values, "ring"))
        assert values == pytest.approx([3, 3, 3, 3], abs=12 / 3**11)

    def test_full_reaches_it_at_once(self) -> None:
        strategy = peers([0, 2, 4, 6], "full")
        assert mixed(strategy) == [3, 3, 3, 3]

    def test_full_is_computed_once_and_sent_as_one_array(self) -> None:
        strategy, calls = peers([0, 2, 4, 6], "full"), []
        compute = strategy.mean
        strategy.mean = lambda clients: calls.append(clients) or compute(clients)  # type: ignore[method-assign]
        sent = [strategy.train_payload(2, client).arrays["values"] for client in range(4)]
        assert len(calls) == 1
        assert all(array is sent[0] for array in sent)

    def test_the_consensus_does_not_depend_on_the_order_of_answers(self) -> None:
        values = [1e-4, 3e4, -3e4, 1 / 3, 0.1, 7e-8]
        forth, back = peers(values, "ring"), peers(values, "ring")
        aggregate(back, 2, [reply(client, value) for client, value in reversed(list(enumerate(values)))])
        aggregate(forth, 2, [reply(client, value) for client, value in enumerate(values)])
        assert float(forth.state["w"]) == float(back.state["w"])
        assert mixed(forth, 3) == mixed(back, 3)


def test_each_client_gets_the_mean_of_its_own_and_its_neighbours_models_of_the_round_before() -> None:
    played = play(FEW)
    w0, sent, down = played.layout.flatten(played.runtime.initial_state()), models(played), came_down(played)
    settings = played.strategy.settings
    for client in range(6):
        assert (down[1, client] == w0).all()
        for round_ in (2, 3):
            group = sorted([client, *neighbours(settings, round_, client)])
            assert len(group) == 3
            assert np.allclose(down[round_, client], mean([sent[round_ - 1, j] for j in group]), rtol=0, atol=1e-7)
    assert len({array.tobytes() for (round_, _), array in down.items() if round_ == 2}) > 1


def test_accuracy_is_the_consensus_and_personal_accuracy_the_clients_own_model() -> None:
    played = play(FEW)
    sent = models(played)
    consensus = mean([sent[3, client] for client in range(6)])
    assert np.allclose(played.layout.flatten(played.strategy.state), consensus, rtol=0, atol=1e-7)
    for client, down in ((c, came_down(played, "evaluate")[3, c]) for c in range(6)):
        assert (down == played.layout.flatten(played.strategy.state)).all()
        assert played.strategy.accuracy[client] == accuracy(played, down, client)
        assert played.strategy.personal_accuracy[client] == accuracy(played, sent[3, client], client)
    assert played.strategy.accuracy != played.strategy.personal_accuracy


@pytest.mark.parametrize(("keys", "taken"), [(RING, 2), (FULL, 5), (FEW, 2)], ids=["ring", "full", "random"])
def test_the_wire_carries_one_model_each_way_and_peers_would_carry_their_neighbours(keys: Flat, taken: int) -> None:
    played = play(keys)
    model = 4 * played.layout.size
    for record in played.records[1:]:
        assert record["bytes_train_down"] == record["bytes_train_up"] == 6 * model
        assert record["bytes_evaluate_down"] == (6 * model if record["local_accuracy_mean"] else 0)
        assert record["bytes_peer"] == 6 * taken * model
        assert record["bytes_mask_down"] == 0


def test_peers_would_pay_for_the_values_as_clients_send_them() -> None:
    exact, half = play(RING), play(RING | {"wire.up-values": "fp16", "run.rounds": 2})
    for long, short in zip(exact.records[1:3], half.records[1:], strict=True):
        assert 2 * short["bytes_peer"] == long["bytes_peer"]
        assert short["bytes_train_down"] == long["bytes_train_down"]


def test_a_client_whose_answer_was_lost_or_refused_keeps_its_last_model() -> None:
    spoil = tamper(lambda p: Payload({"values": np.full_like(p.arrays["values"], np.inf)}, p.metadata))
    played = play(RING, faults={("train", 2, 4): answer_error(5), ("train", 2, 0): spoil})
    sent, down = models(played), came_down(played)
    assert list(played.records[2]["lost"]) == ["4"]
    assert list(played.records[2]["refused"]) == ["0"]
    last = [sent[1 if client in (0, 4) else 2, client] for client in range(6)]
    for client in range(6):  # what each takes in round 3
        group = [last[j % 6] for j in (client - 1, client, client + 1)]
        assert np.allclose(down[3, client], mean(group), rtol=0, atol=1e-7)
    assert np.allclose(played.layout.flatten(played.states[2]), mean(last), rtol=0, atol=1e-7)


def test_a_client_that_was_never_heard_of_counts_with_the_initial_model() -> None:
    played = play(RING | {"run.rounds": 2}, faults={("train", 1, 4): answer_error(5)})
    w0, sent = played.layout.flatten(played.runtime.initial_state()), models(played)
    assert np.allclose(came_down(played)[2, 3], mean([sent[1, 2], sent[1, 3], w0]), rtol=0, atol=1e-7)


def test_malformed_models_are_refused_by_name_and_others_go_on() -> None:
    bad: dict[int, tuple[Callable[[Any], Any], str]] = {
        0: (lambda values: {"values": values[:-1]}, "values has length"),
        1: (lambda values: {"values": values.astype(np.float16)}, "values is float16"),
        2: (lambda values: {"model": values}, "array model is none of this message's, which are ['values']"),
        3: (lambda values: {"values": values + np.float32(1e9)}, "at most 32768"),
    }

    def spoilt(change: Callable[[Any], Any]) -> Fault:
        return tamper(lambda p: Payload(change(p.arrays["values"]), p.metadata))

    faults = {("train", 1, client): spoilt(change) for client, (change, _) in bad.items()}
    played = play(RING | {"run.rounds": 2, "failures.min-ok-fraction": 0.2}, faults=faults)
    assert all(reason in played.records[1]["refused"][str(client)] for client, (_, reason) in bad.items())
    assert played.records[1]["ok"] == [4, 5]
    assert played.records[2]["ok"] == list(range(6))


def test_what_comes_beside_a_model_is_refused() -> None:
    more = tamper(lambda p: Payload({**p.arrays, "junk": np.zeros(10_000, np.float32)}, p.metadata))
    played, lost = play(RING, faults={("train", 1, 1): more}), play(RING, faults={("train", 1, 1): answer_error(5)})
    assert played.records[1]["refused"] == {"1": "array junk is none of this message's, which are ['values']"}
    assert played.bits() == lost.bits()


def test_a_snapshot_has_the_models_that_later_rounds_need(tmp_path: Path) -> None:
    """With two random neighbours, two arrays a model, and a client that was not heard of when it was taken."""
    keys: Flat = FEW | {"run.checkpoint-every": 1, "wire.up-values": "int8"}
    faults: dict[Where, Fault] = {("train", 1, 0): answer_error(5)}
    whole = play(keys, faults=faults)
    half = play(keys, faults=faults, folder=tmp_path, until=1)
    arrays = {name: array.copy() for name, array in half.strategy.state_dict().items()}
    assert all(array.ndim == 1 for array in arrays.values())
    again = REGISTRY["dpsgd"](ServerContext(half.layout, half.strategy.settings, folder=tmp_path))
    again.load_state_dict(1, arrays)
    again.start(half.grid, ArrayRecord(half.runtime.initial_state()), 3)
    assert Played(again, half.runtime, half.grid).bits() == whole.bits()
    assert again.personal_accuracy == whole.strategy.personal_accuracy


class TestFinetuning:
    def test_the_consensus_and_its_accuracy_are_those_of_dpsgd(self) -> None:
        tuned, plain = play(FEW | {"strategy": "dpsgd-ft"}), play(FEW)
        assert tuned.bits() == plain.bits()
        assert tuned.strategy.accuracy == plain.strategy.accuracy

    def test_before_the_last_round_the_personal_model_is_the_clients_own(self) -> None:
        tuned, plain = play(FEW | {"strategy": "dpsgd-ft"}), play(FEW)
        assert tuned.records[2]["personal_accuracy"] == plain.records[2]["personal_accuracy"]

    def test_after_the_last_round_every_client_fine_tunes_the_consensus_and_it_costs_no_bytes(self) -> None:
        tuned, plain = play(FEW | {"strategy": "dpsgd-ft"}), play(FEW)
        assert tuned.strategy.personal_accuracy != plain.strategy.personal_accuracy
        everybody = sum(len(share) for share in tuned.runtime.partition.train)
        for a, b in zip(tuned.records[1:], plain.records[1:], strict=True):
            assert a["image_passes"] - b["image_passes"] == (everybody if a["round"] == 3 else 0)
            for key in ("bytes_train_down", "bytes_train_up", "bytes_evaluate_down", "bytes_peer"):
                assert a[key] == b[key]


def test_with_full_topology_it_is_fedavg_and_fedavg_ft_of_everybody_with_equal_weights() -> None:
    """So what is fine-tuned is the consensus, and not a client's own model."""
    gossip, server = play(FULL), play(EVERYBODY)
    ours, theirs = (p.layout.flatten(p.strategy.state) for p in (gossip, server))
    assert np.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert gossip.strategy.accuracy == server.strategy.accuracy
    assert gossip.strategy.personal_accuracy == server.strategy.personal_accuracy
