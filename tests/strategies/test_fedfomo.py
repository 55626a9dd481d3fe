"""FedFomo: the weights and the mixing by hand, who is chosen, what travels, and what a bad answer is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, RecordDict

from ssfl_app.comm.payload import ClientState, Payload
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.strategy import ServerContext
from ssfl_app.options import ConfigError
from ssfl_app.seeding import generator
from ssfl_app.sparsity.layout import Layout, load_state, state_of
from ssfl_app.strategies import REGISTRY, fedfomo
from ssfl_app.strategies.fedfomo import FedFomo, mixed, weight
from ssfl_app.strategies.shared.fine_tuning import held_out
from tests.in_process_grid import SMALL, WHOLE, Fault, Played, answer_error, play, tamper

pytestmark = pytest.mark.narrow

BASE: Flat = {"strategy": "fedfomo", "local.batch-size": 64, "run.evaluate-every": 3, "fedfomo.peers": 2}
PATHOLOGICAL: Flat = {"partition.name": "pathological", "run.clients": 10, "fedfomo.peers": 9}

SCALAR = Layout((("w", (1,)),), ("w",))


def server(**keys: Any) -> FedFomo:
    """A server that has a model of every client."""
    flat = merge(SMALL, {"strategy": "fedfomo"}, {"fedfomo." + key: value for key, value in keys.items()})
    strategy = FedFomo(ServerContext(SCALAR, parse(flat).settings))
    strategy._last = {client: vector(client) for client in range(6)}
    return strategy


def vector(*values: float) -> Any:
    return {"values": np.array(values, dtype=np.float32)}


def flat(*values: float) -> Any:
    return np.array(values, dtype=np.float32)


def sent_up(played: Played) -> dict[tuple[int, int], Payload]:
    return {(r, c): payload for (kind, r, c), payload in played.grid.got if kind == "train"}


def sent_down(played: Played) -> dict[tuple[int, int], Payload]:
    return {(r, c): payload for (kind, r, c), payload in played.grid.sent if kind == "train"}


def held(played: Played) -> list[int]:
    return [max(1, round(0.1 * len(share))) for share in played.runtime.partition.train]


class TestWeights:
    def test_by_hand(self) -> None:
        """From (0, 0) to (3, 4) it is 5; the loss falls by 0.5."""
        assert weight(flat(0, 0), 1.0, flat(3, 4), 0.5) == pytest.approx(0.1)
        assert weight(flat(0, 0), 1.0, flat(3, 4), 2.0) == pytest.approx(-0.2)

    def test_the_same_model_weighs_nothing(self) -> None:
        assert weight(flat(1, 2), 1.0, flat(1, 2), 1.0) == 0
        assert weight(flat(1, 2), 1.0, flat(1, 2), 0.5) == 0

    @pytest.mark.parametrize(("before", "after"), [(1.0, np.nan), (1.0, np.inf), (np.inf, 1.0), (np.inf, np.inf)])
    def test_a_loss_that_overflows_weighs_nothing(self, before: float, after: float) -> None:
        assert weight(flat(0), before, flat(1), after) == 0

    def test_mixing_by_hand(self) -> None:
        """From 1, towards 4 with 0.1 and -1 with 0.3, away from nothing: 1 + 0.25 * 3 + 0.75 * (-2) = 0.25."""
        assert mixed(flat(1), [flat(4), flat(-1), flat(9)], [0.1, 0.3, -5.0]) == pytest.approx(0.25)

    def test_one_good_model_is_taken_over_whole(self) -> None:
        got = mixed(flat(1, 2), [flat(9, 9), flat(3, -5)], [-0.1, 1e-9])
        assert got is not None
        assert (got == flat(3, -5)).all()

    def test_no_good_model(self) -> None:
        assert mixed(flat(1), [flat(4), flat(-1)], [-0.1, 0.0]) is None

    def test_the_model_of_the_same_task_wins(self) -> None:
        """Losses (x - a)^2 of two tasks, a = 3 and -3, from 0: the peer at 3 helps the first client only."""
        for a, expected in ((3.0, 3.0), (-3.0, -3.0)):
            peers = [flat(3), flat(-3)]
            weights = [weight(flat(0), a**2, peer, (float(peer[0]) - a) ** 2) for peer in peers]
            assert sorted(weights) == [-9, 3]
            assert mixed(flat(0), peers, weights) == pytest.approx(expected)


class TestChoice:
    def test_the_preferred_ones_are_chosen(self) -> None:
        strategy = server(peers=2, epsilon=0)
        strategy.preferences[3] = [-1, 5, 0, 99, 4, 1]  # its own entry is never looked at
        assert all(strategy.peers(round_, 3) == [1, 4] for round_ in range(2, 20))

    def test_with_epsilon_1_they_are_random(self) -> None:
        strategy = server(peers=2, epsilon=1)
        strategy.preferences[3] = [-1, 5, 0, 99, 4, 1]
        chosen = [strategy.peers(round_, 3) for round_ in range(2, 200)]
        counts = np.bincount(np.ravel(chosen), minlength=6)
        assert counts[3] == 0
        # Two of five in 198 rounds: 79 each, standard deviation 6.9.
        assert abs(np.delete(counts, 3) - 79.2).max() < 4 * 6.9

    def test_epsilon_is_how_often(self) -> None:
        strategy = server(peers=1, epsilon=0.25)
        strategy.preferences[3, 1] = 5
        greedy = [strategy.peers(round_, 3) == [1] for round_ in range(400)]
        # 0.75 + 0.25 / 5 = 0.8 of 400 rounds, standard deviation 8.
        assert abs(sum(greedy) - 320) < 4 * 8

    def test_ties_are_broken_by_chance_and_not_by_number(self) -> None:
        strategy = server(peers=1, epsilon=0)
        assert {strategy.peers(round_, 3)[0] for round_ in range(60)} == {0, 1, 2, 4, 5}

    def test_at_most_all_others_and_only_those_with_a_model(self) -> None:
        strategy = server(peers=10)
        assert strategy.peers(2, 3) == [0, 1, 2, 4, 5]
        strategy._last = {2: vector(2), 3: vector(3)}
        assert strategy.peers(2, 3) == [2]
        assert strategy.peers(2, 2) == [3]
        strategy._last = {}
        assert strategy.peers(1, 3) == []

    def test_an_array_that_many_get_is_one_object(self) -> None:
        same = server(peers=10)
        assert (
            same.train_payload(2, 0).arrays["values.4"] is same.train_payload(2, 1).arrays["values.4"]
        )  # both times client 5
        keys: Flat = {"wire.down-values": "fp16"}
        half = FedFomo(ServerContext(SCALAR, parse(merge(SMALL, {"strategy": "fedfomo"}, keys)).settings))
        half._last = {client: vector(client / 3) for client in range(6)}
        assert half.train_payload(2, 0).arrays["values.4"] is half.train_payload(2, 1).arrays["values.4"]
        assert half.train_payload(2, 0).arrays["values.4"] == np.float16(5 / 3)


class TestRun:
    def test_peers_models_are_those_of_the_round_before_and_not_ones_own(self) -> None:
        played = play(BASE)
        up, down = sent_up(played), sent_down(played)
        for client in range(6):
            assert not down[1, client].arrays
            for round_ in (2, 3):
                owners = {up[round_ - 1, j].arrays["values"].tobytes(): j for j in range(6) if j != client}
                whose = [owners[down[round_, client].arrays[f"values.{i}"].tobytes()] for i in (0, 1)]
                assert len(down[round_, client].arrays) == 2
                assert len(set(whose)) == 2

    def test_bytes(self) -> None:
        played = play(BASE)
        model = 4 * played.layout.size
        for record in played.records[1:]:
            peers = 0 if record["round"] == 1 else 2
            assert record["bytes_train_down"] == record["bytes_peer"] == 6 * peers * model
            assert record["bytes_train_up"] == 6 * (model + 4 * peers)
            assert record["bytes_evaluate_down"] == record["bytes_mask_down"] == 0

    def test_validation_images_are_looked_at_and_never_trained_on(self) -> None:
        """Of the model before, the trained one and each peer's."""
        played = play(BASE)
        images = sum(len(share) for share in played.runtime.partition.train)
        for record in played.records[1:]:
            assert record["image_passes"] == images - sum(held(played))
            assert record["validation_passes"] == (2 if record["round"] == 1 else 4) * sum(held(played))

    def test_the_share_of_validation_images_is_an_option(self) -> None:
        played = play(BASE | {"fedfomo.validation": 0.5, "run.rounds": 1, "run.evaluate-every": 1})
        sizes = [len(share) for share in played.runtime.partition.train]
        assert played.records[1]["image_passes"] == sum(n - round(0.5 * n) for n in sizes)

    def test_personal_accuracy_is_that_of_the_model_that_went_up_and_there_is_no_other(self) -> None:
        played = play(BASE)
        shop, up = played.runtime, sent_up(played)
        assert played.strategy.accuracy == {}
        for client, known in played.strategy.personal_accuracy.items():
            load_state(shop.model, shop.layout.unflatten(up[3, client].arrays["values"]))
            test = shop.data.test.take(shop.partition.test[client])
            assert shop.trainer.evaluate(shop.model, test)[1] == known
        everybody = np.mean([up[3, client].arrays["values"].astype(np.float64) for client in range(6)], axis=0)
        assert np.allclose(played.layout.flatten(played.strategy.state), everybody, rtol=0, atol=1e-7)

    def test_preferences_are_the_sums_of_the_weights_that_came_up(self) -> None:
        played = play(BASE)
        up, down, expected = sent_up(played), sent_down(played), np.zeros((6, 6))
        for round_ in (2, 3):
            owners = {up[round_ - 1, j].arrays["values"].tobytes(): j for j in range(6)}
            for client in range(6):
                for i, w in enumerate(up[round_, client].arrays["preference"]):
                    expected[client, owners[down[round_, client].arrays[f"values.{i}"].tobytes()]] += w
        assert isinstance(played.strategy, FedFomo)
        assert (played.strategy.preferences == expected).all()
        assert np.count_nonzero(expected) > 6

    def test_what_a_client_returns_is_what_the_paper_writes(self) -> None:
        """Written again, for a client that some peer helps: local training, the weights, and the mixing."""
        played = play(BASE | PATHOLOGICAL | WHOLE)
        up, shop, settings = sent_up(played), played.runtime, played.strategy.settings
        best = {client: payload.arrays["preference"].max() for (r, client), payload in up.items() if r == 3}
        client = max(best, key=lambda c: best[c])
        assert best[client] > 0
        context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
        training, validation = held_out(shop.rule(client, ClientState(context, client)), 0.1)

        def loss(model: Any) -> float:
            load_state(shop.model, shop.layout.unflatten(model))
            return shop.trainer.evaluate(shop.model, validation)[0]

        start = up[2, client].arrays["values"]
        before = loss(start)
        rng = generator(settings.run.seed, "train", 3, client)
        shop.trainer.fit(shop.model, training, rng, lr=settings.local.rate(3))
        down = sent_down(played)[3, client].arrays
        models = [shop.layout.flatten(state_of(shop.model)), *(down[f"values.{i}"] for i in range(9))]
        slopes = np.array([(before - loss(m)) / np.sqrt(((m.astype(np.float64) - start) ** 2).sum()) for m in models])
        assert up[3, client].arrays["preference"] == pytest.approx(slopes[1:], rel=1e-4)
        shares = np.maximum(slopes, 0) / np.maximum(slopes, 0).sum()
        assert 0 < shares[1:].sum() < 1
        expected = start + sum(
            share * (m.astype(np.float64) - start) for share, m in zip(shares, models, strict=True)
        )
        assert np.allclose(up[3, client].arrays["values"], expected, rtol=0, atol=1e-5)

    def test_a_client_prefers_those_who_share_a_class_with_it(self) -> None:
        played = play(BASE | PATHOLOGICAL)
        labels = played.runtime.data.train.labels.numpy()
        classes = [set(labels[share].tolist()) for share in played.runtime.partition.train]
        pairs = [(i, j) for i in range(10) for j in range(10) if i != j]
        shared = np.array([bool(classes[i] & classes[j]) for i, j in pairs])
        assert isinstance(played.strategy, FedFomo)
        weights = np.array([played.strategy.preferences[pair] for pair in pairs])
        assert 5 < shared.sum() < 45
        assert weights[shared].mean() > weights[~shared].mean()

    def test_if_no_model_helps_local_training_is_kept_or_lost_as_published(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys: Flat = BASE | {"run.rounds": 2, "run.evaluate-every": 2}
        monkeypatch.setattr(fedfomo, "weight", lambda *_: -1.0)
        kept, lost = play(keys), play(keys | {"fedfomo.keep-local": False})
        w0 = lost.layout.flatten(lost.runtime.initial_state())
        for client in range(6):
            assert (sent_up(lost)[2, client].arrays["values"] == w0).all()
            models = [sent_up(kept)[round_, client].arrays["values"] for round_ in (1, 2)]
            assert (models[0] != w0).any()
            assert (models[1] != models[0]).any()

    def test_a_lossy_wire_is_lossy_for_peers_only(self) -> None:
        played = play(BASE | {"wire.up-values": "int8", "wire.down-values": "fp16", "run.rounds": 2})
        size = played.layout.size
        assert played.records[2]["bytes_train_down"] == 6 * 2 * 2 * size
        assert played.records[2]["bytes_train_up"] == 6 * (size + 4 * -(-size // 1024) + 4 * 2)
        assert {p.arrays["values.0"].dtype for (r, _), p in sent_down(played).items() if r == 2} == {np.dtype("f2")}
        both = play(BASE | {"wire.up-values": "int8", "wire.down-values": "int8", "run.rounds": 2})
        assert both.records[2]["bytes_train_down"] == 6 * 2 * (size + 4 * -(-size // 1024))
        for name in ("values", "scales"):  # handed on as they came
            up = {p.arrays[name].tobytes() for (r, _), p in sent_up(both).items() if r == 1}
            down = {p.arrays[f"{name}.1"].tobytes() for (r, _), p in sent_down(both).items() if r == 2}
            assert down <= up


class TestFaults:
    def test_malformed_weights_are_refused_by_name_and_others_go_on(self) -> None:
        bad: dict[int, tuple[Callable[[Any], Any], str]] = {
            0: (lambda p: {"preference": p[:-1]}, "preference has length 1; it must be 2"),
            1: (lambda p: {"preference": p.astype(np.float16)}, "preference is float16"),
            2: (lambda p: {}, "no array 'preference'"),
            3: (lambda p: {"preference": p + np.float32(np.nan)}, "preference must be finite"),
            4: (lambda p: {"preference": p + np.float32(np.inf)}, "preference must be finite"),
        }

        def spoilt(change: Callable[[Any], Any]) -> Fault:
            def changed(payload: Payload) -> Payload:
                return Payload(
                    {"values": payload.arrays["values"], **change(payload.arrays["preference"])}, payload.metadata
                )

            return tamper(changed)

        faults = {("train", 2, client): spoilt(change) for client, (change, _) in bad.items()}
        played = play(BASE | {"failures.min-ok-fraction": 0.1}, faults=faults, until=2)
        assert all(reason in played.records[2]["refused"][str(client)] for client, (_, reason) in bad.items())
        assert played.records[2]["ok"] == [5]
        assert isinstance(played.strategy, FedFomo)
        assert not played.strategy.preferences[:5].any()
        assert played.strategy.preferences[5].any()

    def test_a_malformed_model_is_refused_and_the_last_one_goes_to_peers(self) -> None:
        spoil = tamper(lambda p: Payload({**p.arrays, "values": p.arrays["values"][:-1]}, p.metadata))
        played = play(BASE | {"fedfomo.peers": 5}, faults={("train", 2, 4): spoil})
        assert "values has length" in played.records[2]["refused"]["4"]
        up, down = sent_up(played), sent_down(played)
        assert (down[3, 5].arrays["values.4"] == up[1, 4].arrays["values"]).all()

    def test_a_client_that_was_never_heard_of_is_nobodys_peer(self) -> None:
        played = play(BASE | {"fedfomo.peers": 5}, faults={("train", 1, 4): answer_error(5)}, until=2)
        counts = [len(sent_down(played)[2, client].arrays) for client in range(6)]
        assert counts == [4, 4, 4, 4, 5, 4]


def test_a_snapshot_has_models_and_preferences(tmp_path: Path) -> None:
    keys: Flat = BASE | {"run.checkpoint-every": 1, "fedfomo.epsilon": 0.2, "run.rounds": 4, "run.evaluate-every": 4}
    whole = play(keys)
    half = play(keys, folder=tmp_path, until=2)
    arrays = {name: array.copy() for name, array in half.strategy.state_dict().items()}
    assert all(array.ndim == 1 for array in arrays.values())
    again = REGISTRY["fedfomo"](ServerContext(half.layout, half.strategy.settings, folder=tmp_path))
    again.load_state_dict(2, arrays)
    again.start(half.grid, ArrayRecord(half.runtime.initial_state()), 4)
    assert Played(again, half.runtime, half.grid).bits() == whole.bits()
    assert again.personal_accuracy == whole.strategy.personal_accuracy
    assert isinstance(again, FedFomo)
    assert isinstance(whole.strategy, FedFomo)
    assert (again.preferences == whole.strategy.preferences).all()
    assert whole.strategy.preferences.any()


@pytest.mark.parametrize(
    ("key", "value"), [("peers", 0), ("epsilon", 1.5), ("epsilon", -0.1), ("validation", 0.0), ("keep-local", 1)]
)
def test_options_are_checked(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"fedfomo\.{key} is {value}; it is"):
        server(**{key: value})
