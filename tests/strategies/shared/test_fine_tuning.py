"""FedAvg-FT and Ditto: what the personal models are, and what they cost."""

from pathlib import Path

import pytest
import torch

from ssfl_app.comm.payload import ClientState
from ssfl_app.config import Flat
from ssfl_app.options import ConfigError
from ssfl_app.strategies.shared.fine_tuning import held_out
from ssfl_app.training.anchor import Pull
from tests.in_process_grid import WHOLE, Played, answer_error, play

pytestmark = pytest.mark.narrow

DITTO: Flat = {"strategy": "ditto", "ditto.global-epochs": 1, "ditto.personal-epochs": 1}


def images(played: Played, clients: list[int]) -> int:
    return sum(len(played.runtime.partition.train[client]) for client in clients)


class TestFedAvgFt:
    def test_the_global_model_is_fedavgs(self) -> None:
        tuned, plain = play({"strategy": "fedavg-ft"}), play({"strategy": "fedavg"})
        assert tuned.bits() == plain.bits()
        assert tuned.strategy.accuracy == plain.strategy.accuracy

    def test_it_fine_tunes_every_client_after_the_last_round_only(self) -> None:
        tuned, plain = play({"strategy": "fedavg-ft"}), play({"strategy": "fedavg"})
        assert [r["personal_accuracy_mean"] for r in tuned.records[1:3]] == [None, None]
        assert sorted(tuned.strategy.personal_accuracy) == list(range(6))
        extra = [a["image_passes"] - b["image_passes"] for a, b in zip(tuned.records, plain.records, strict=True)]
        assert extra == [0, 0, 0, images(tuned, list(range(6)))]

    def test_it_costs_no_bytes(self) -> None:
        tuned, plain = play({"strategy": "fedavg-ft"}), play({"strategy": "fedavg"})
        for key in ("bytes_train_down", "bytes_train_up", "bytes_evaluate_down"):
            assert [r.get(key) for r in tuned.records] == [r.get(key) for r in plain.records]

    def test_epochs_and_rate_are_options(self) -> None:
        keys: Flat = {"strategy": "fedavg-ft", "local.lr-decay": 0.02, **WHOLE}  # a test image less is under 0.02
        base, more, late = play(keys), play(keys | {"finetune.epochs": 3}), play(keys | {"finetune.lr": "scheduled"})
        assert more.records[-1]["image_passes"] - base.records[-1]["image_passes"] == 2 * images(base, list(range(6)))
        # The rate of round 4 is 8 millionths of the first: that fine-tuning hardly moves the model.
        assert late.strategy.personal_accuracy == pytest.approx(late.strategy.accuracy, abs=0.02)
        assert base.strategy.personal_accuracy != pytest.approx(base.strategy.accuracy, abs=0.02)

    def test_it_helps_clients_with_few_classes(self) -> None:
        keys: Flat = {"partition.name": "pathological", "run.rounds": 6, "run.evaluate-every": 6}
        tuned = play({"strategy": "fedavg-ft", **keys})
        last = tuned.records[-1]
        assert last["personal_accuracy_mean"] > last["local_accuracy_mean"] + 0.03


class TestDitto:
    def test_the_global_model_is_fedavgs_of_its_global_epochs(self) -> None:
        ditto = play(DITTO | {"ditto.global-epochs": 2})
        assert ditto.bits() == play({"strategy": "fedavg", "local.epochs": 2}).bits()

    def test_it_trains_two_models_and_pays_for_one(self) -> None:
        ditto = play(DITTO | {"ditto.global-epochs": 2, "ditto.personal-epochs": 3})
        for record in ditto.records[1:]:
            assert record["image_passes"] == 5 * images(ditto, record["cohort"])
            assert record["bytes_train_down"] == record["bytes_train_up"] == 4 * 4 * ditto.layout.size

    def test_the_pull_by_hand(self) -> None:
        # v - lr * lambda * (v - w) = 3 - 0.1 * 0.5 * (3 - 1) = 2.9
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(model.weight, 3.0)
        Pull([torch.tensor([[1.0]])], 0.1 * 0.5)(model)
        assert model.weight.item() == pytest.approx(2.9)

    def test_a_strong_pull_makes_the_personal_model_the_one_that_came_down(self, tmp_path: Path) -> None:
        """lr * lambda = 1 replaces v by w after every step, w being what came down in that round: w0 in round 1."""
        ditto = play(DITTO | {"ditto.pull": 10.0, "run.rounds": 1}, folder=tmp_path)
        w0 = ditto.layout.flatten(ditto.runtime.initial_state())
        for client in ditto.records[1]["cohort"]:
            own = ClientState(ditto.grid.context_of(client), client, tmp_path).load(1)
            assert own is not None
            assert abs(own["model"] - w0).max() < 1e-6

    def test_without_a_pull_it_is_local_training(self) -> None:
        free, pulled = play(DITTO | {"ditto.pull": 0.0}), play(DITTO | {"ditto.pull": 10.0})
        assert free.bits() == pulled.bits()
        assert free.strategy.personal_accuracy != pulled.strategy.personal_accuracy

    def test_who_was_never_sampled_still_has_the_initial_model(self) -> None:
        ditto = play(DITTO | {"run.rounds": 1, "run.cohort": 1})
        (sampled,) = ditto.records[1]["cohort"]
        shop = ditto.runtime
        from ssfl_app.sparsity.layout import load_state

        for client in set(range(6)) - {sampled}:
            load_state(shop.model, shop.initial_state())
            _, accuracy = shop.trainer.evaluate(shop.model, shop.data.test.take(shop.partition.test[client]))
            assert ditto.strategy.personal_accuracy[client] == accuracy

    def test_a_lost_reply_never_happened(self) -> None:
        """Whether the message or only its answer was lost, the personal model is the same."""
        client = play(DITTO).records[2]["cohort"][0]
        where = ("train", 2, client)

        def lose_answer(grid, message):  # type: ignore[no-untyped-def]
            grid.work(message)
            return answer_error(5)(grid, message)

        lost = play(DITTO, faults={where: lose_answer})
        never = play(DITTO, faults={where: answer_error(5)})
        assert lost.strategy.personal_accuracy == never.strategy.personal_accuracy

    def test_dynamic_lambda_trains_three_candidates_on_nine_tenths(self) -> None:
        ditto = play(DITTO | {"ditto.dynamic": True})
        for record in ditto.records[1:]:
            sizes = [len(ditto.runtime.partition.train[client]) for client in record["cohort"]]
            held = [max(1, round(0.1 * n)) for n in sizes]
            assert record["image_passes"] == sum(n + 3 * (n - h) for n, h in zip(sizes, held, strict=True))
            assert record["validation_passes"] == 3 * sum(held)


def test_held_out_images_are_disjoint_from_the_others_and_the_same_every_time() -> None:
    shop = play(DITTO | {"run.rounds": 1}).runtime
    from flwr.app import Context, RecordDict

    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    rule = shop.rule(3, ClientState(context, 3))
    training, validation = held_out(rule, 0.1)
    total = len(shop.partition.train[3])
    assert len(validation) == round(0.1 * total)
    assert len(training) + len(validation) == total
    assert torch.equal(held_out(rule, 0.1)[1].inputs, validation.inputs)
    flat = {bytes(p.numpy().tobytes()) for p in validation.inputs}
    assert not flat & {bytes(p.numpy().tobytes()) for p in training.inputs}


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"ditto\.pull is -1"):
        play(DITTO | {"ditto.pull": -1.0})
