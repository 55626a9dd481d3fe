"""Differential privacy of clients, through the round loop: noise, cohorts, what is told, and what is spent."""

import json
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from flwr.common.constant import ErrorCode

from ssfl_app.client_app import app
from ssfl_app.comm.payload import Payload, PayloadEncoder
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.strategy import SparseStrategy
from ssfl_app.core.summand import CLIP, LOSS_UNIT, NOISE, SummandWriter
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.privacy.ledger import BudgetSpent, Ledger
from ssfl_app.server_app import privacy_ledger
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.testing.grid import Played, answer_error, play, tamper

CLIENT: Flat = {
    "run.clients": 12,
    "run.cohort": 6,
    "run.rounds": 2,
    "privacy.level": "client",
    "privacy.noise-multiplier": 1.0,
    "privacy.delta": 1e-3,
}
STILL: Flat = {"local.lr": 1e-9, "local.weight-decay": 0.0}
"""Updates of next to nothing: what moves the model is noise."""


def ledger(keys: Flat, folder: Path) -> Ledger:
    made = privacy_ledger(parse(merge({"local.epochs": 1, "mask.density": 0.2}, keys)), folder)
    assert made is not None
    return made


def private(keys: Flat, folder: Path, **more: object) -> Played:
    return play(keys, ledger=ledger(keys, folder), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("secure", [False, True])
def test_the_noise_of_a_round_has_the_scale_that_is_counted(secure: bool, tmp_path: Path) -> None:
    keys = CLIENT | STILL | {"privacy.secure-aggregation": secure, "privacy.delta": 0.5, "run.rounds": 1}
    keys |= {"run.clients": 20, "run.cohort": 16, "strategy": "fedavg", "privacy.threshold": 0.5}
    played = private(keys, tmp_path)
    before, after = played.runtime.initial_state(), played.strategy.model()
    noise = played.layout.flatten(after) - played.layout.flatten(before)
    asked, answered = (sum(where[0] == "train" for where, _ in seen) for seen in (played.grid.sent, played.grid.got))
    # Shares are such that half of the cohort makes all of the noise; here everybody answered.
    more = np.sqrt(answered / np.ceil(asked / 2)) if secure else 1.0
    assert noise.std() == pytest.approx(
        1.0 * 1.0 / 16 * more, rel=0.01
    )  # multiplier times clip by the expected cohort
    assert abs(noise.mean()) < 5 * noise.std() / np.sqrt(noise.size)


def test_nobody_learns_who_took_part(tmp_path: Path) -> None:
    played = private(CLIENT, tmp_path)
    sent = [{where[2] for where, _ in played.grid.sent if where[:2] == ("train", round_)} for round_ in (1, 2)]
    again = private(CLIENT, tmp_path / "again")
    assert sent != [{where[2] for where, _ in again.grid.sent if where[:2] == ("train", r)} for r in (1, 2)]
    for record in played.records:
        assert not record["ok"]
        assert not record.get("cohort")
        assert not record["image_passes"]
        assert record.get("local_accuracy_mean") is None
        assert record.get("train_loss") is None
    for where, reply in played.grid.got:
        if where[0] == "train":
            assert "loss" not in reply.metadata
            assert reply.arrays["values"].size == int(played.masks[1].transmitted.sum())
    assert not [where for where in played.grid.log if where[0] == "evaluate"]
    assert played.records[-1]["central_accuracy"] is not None


def test_discovery_costs_a_number_a_layer_and_no_bitmap(tmp_path: Path) -> None:
    played = private(CLIENT, tmp_path)
    assert all("mask" not in payload.arrays for _, payload in played.grid.sent)
    answers = [reply.arrays["values"].size for where, reply in played.grid.got if where[0] == "query.layer_shares"]
    assert len(answers) == 12
    assert max(answers) <= len(played.layout.prunable)
    assert played.strategy.mask.count == int(0.2 * played.layout.prunable_size)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a strategy of somebody else's module."""
    source = "from ssfl_app.strategies.ssfl.strategy import Ssfl\n\nclass Mine(Ssfl):\n    name = 'mine'\n"
    (tmp_path / "of_a_stranger.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return "of_a_stranger:Mine"


def test_the_budget_pays_for_the_discovery_of_a_subclass_in_a_strangers_module(mine: str, tmp_path: Path) -> None:
    book, ours = ledger(CLIENT | {"strategy": mine}, tmp_path), ledger(CLIENT, tmp_path)
    assert book.plan == ours.plan
    assert book.plan.searches == 1
    played = play(CLIENT | {"strategy": mine}, ledger=book)
    assert book.begun == {"discovery": 1, "round": 2}
    assert played.strategy.mask.count == int(0.2 * played.layout.prunable_size)


def test_without_noise_clients_draw_the_mask_too() -> None:
    keys: Flat = {"ssfl.discovery": "private-densities", "ssfl.score-values": "fixed32"}
    one, other = play(keys), play(keys, luck=3)
    assert one.bits() == other.bits()
    assert all("mask" not in payload.arrays for _, payload in one.grid.sent)


def test_an_empty_round_is_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = CLIENT | {"run.cohort": 1, "run.clients": 40, "run.rounds": 4, "strategy": "random"}
    drawn = SparseStrategy._drawn_secretly
    monkeypatch.setattr(
        SparseStrategy, "_drawn_secretly", lambda self, round_: [] if round_ == 2 else drawn(self, round_)
    )
    played = private(keys, tmp_path)
    assert not any(where[:2] == ("train", 2) for where in played.grid.log)
    moved = [np.abs(played.layout.flatten(s)).sum() for s in played.states]
    assert len(set(moved)) == len(moved)


def test_lost_clients_end_no_round(tmp_path: Path) -> None:
    gone = {("train", 1, client): answer_error(ErrorCode.NODE_UNAVAILABLE) for client in range(12)}
    played = private(CLIENT, tmp_path, faults=gone)
    assert played.records[1]["bad_replies"] == sum(where[:2] == ("train", 1) for where in played.grid.log)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("strategy", ["random", "ssfl"])
def test_records_tell_the_expected_cohort_not_the_drawn_one(secure: bool, strategy: str, tmp_path: Path) -> None:
    keys = CLIENT | {"strategy": strategy, "privacy.secure-aggregation": secure, "privacy.delta": 0.5}
    whole = private(keys | {"run.cohort": 12, "run.rounds": 1}, tmp_path / "whole")
    record = whole.records[-1]  # all take part: expected is what was
    second = ("train", "query.unmask")
    down, up = (
        sum(message.nbytes for where, message in seen if where[0] in second and where[1] == 1)
        for seen in (whole.grid.sent, whole.grid.got)
    )
    assert record["bytes_train_down"] + record["bytes_mask_down"] == down
    assert record["bytes_train_up"] == up
    assert record["messages_train_up"] == 12


def test_records_of_other_cohorts_have_the_same_bytes(tmp_path: Path) -> None:
    def drawn(*clients: int) -> list[dict[str, object]]:
        def prepare(strategy: SparseStrategy) -> None:
            strategy._drawn_secretly = lambda round_: list(clients)  # type: ignore[method-assign]

        run = private(CLIENT | {"strategy": "random"}, tmp_path / str(len(clients)), prepare=prepare)
        assert sum(where[0] == "train" for where in run.grid.log) == 2 * len(clients)
        return [{k: v for k, v in r.items() if "bytes" in k or "messages" in k} for r in run.records]

    assert drawn(0, 1) == drawn(*range(9)) == drawn()


def test_a_vector_that_is_too_long_is_refused(tmp_path: Path) -> None:
    def liar(payload: Payload) -> Payload:
        values = payload.arrays["values"].copy()
        values[:] = 2**27
        return Payload({**payload.arrays, "values": values}, payload.metadata)

    keys = CLIENT | {"run.cohort": 12, "run.rounds": 1}
    played = private(keys, tmp_path, faults={("train", 1, 2): tamper(liar)})
    assert played.records[1]["bad_replies"] == 1


def test_one_client_more_moves_a_sum_by_the_clip_at_most() -> None:
    writer = SummandWriter(0, lambda: None, None, False, 0.5, "client")  # type: ignore[arg-type,return-value]
    facts = {"unit": 2.0**-20, "range": 0.5, "most": 9, CLIP: 0.5, NOISE: 0.0}
    rng = np.random.default_rng(7)
    for scale in (1e-3, 1.0, 1e3):
        update = (scale * rng.standard_normal(2000)).astype(np.float32)
        summand = writer.write(Payload({}, facts), update, "fixed32", 1, loss=3.0)["values"]
        assert summand.size == update.size
        whole = summand.view(np.int32).astype(np.int64)
        assert int(whole @ whole) <= (0.5 * 2**20) ** 2
    assert np.linalg.norm(whole * 2.0**-20) == pytest.approx(0.5, rel=1e-3)


def test_an_update_that_is_not_finite_counts_as_none() -> None:
    writer = SummandWriter(0, lambda: None, None, False, 0.5, "client")  # type: ignore[arg-type,return-value]
    message = Payload({}, {"unit": 2.0**-20, "range": 0.5, "most": 9, CLIP: 0.5, NOISE: 0.0})
    for odd in (np.nan, np.inf):
        assert not writer.write(message, np.array([1, odd], np.float32), "fixed32", 1)["values"].any()


def test_steps_that_swallow_an_update_are_refused_before_they_cost(tmp_path: Path) -> None:
    coarse = CLIENT | {"strategy": "fedavg", "wire.up-values": "fixed16", "privacy.noise-multiplier": 20.0}
    book = ledger(coarse, tmp_path)
    with pytest.raises(RunFailed, match="round to 0"):
        play(coarse, ledger=book)
    assert not book.begun["round"]


def test_a_checkpoint_does_not_tell_who_took_part(tmp_path: Path) -> None:
    played = private(CLIENT | {"run.rounds": 1, "run.cohort": 12, "strategy": "random"}, tmp_path)
    assert [where for where in played.grid.log if where[0] == "train"]
    assert not played.strategy.state_dict()["since"].any()


@pytest.mark.parametrize(
    ("level", "facts", "said"),
    [
        ("client", {}, "has no clip"),
        ("record", {LOSS_UNIT: 1.0}, "tells no loss"),
    ],
)
def test_a_client_is_not_asked_for_less_privacy(level: str, facts: dict[str, float], said: str) -> None:
    writer = SummandWriter(0, lambda: None, None, False, 0.5, level)  # type: ignore[arg-type,return-value]
    message = Payload({}, {"unit": 2.0**-20, "range": 0.5, "most": 9, **facts})
    with pytest.raises(PayloadError, match=said):
        writer.write(message, np.ones(3, np.float32), "fixed32", 1, loss=3.0)


def test_a_client_tells_no_accuracy_even_if_it_is_asked(tmp_path: Path) -> None:
    played = private(CLIENT | {"run.rounds": 1, "run.cohort": 12}, tmp_path)
    message = next(payload for where, payload in played.grid.sent if where == ("train", 1, 2))
    context = played.grid.context_of(2)
    node = next(n for n, c in played.grid._contexts.items() if c is context)
    with pytest.raises(PayloadError, match="tells no accuracy"):
        app(Message(PayloadEncoder().record(message), node, "evaluate"), context)


def test_what_was_spent_is_told_and_never_forgotten(tmp_path: Path) -> None:
    book = ledger(CLIENT, tmp_path)
    book.save()
    played = play(CLIENT, ledger=book)
    told = [record["epsilon"] for record in played.records if record["round"]]
    assert told[0] < told[1] == pytest.approx(book.budget.epsilon)
    again = Ledger.resume(tmp_path, book.plan, book.budget)
    assert again.begun == {"discovery": 1, "round": 2}
    with pytest.raises(BudgetSpent, match="one more discovery"):
        play(CLIENT, ledger=again)
    assert isinstance(BudgetSpent("x"), RunFailed)
    assert set(json.loads((tmp_path / "privacy.json").read_text())) == {"plan", "budget", "begun", "sha256"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"ssfl.discovery": "scores"}, "ssfl.discovery is 'scores'"),
        ({"run.weighting": "samples"}, "run.weighting is 'samples'"),
        ({"strategy": "dispfl"}, "does more with models"),
        ({"strategy": "ditto"}, "strategy is 'ditto'"),
        ({"strategy": "fedbn"}, "strategy is 'fedbn'"),
        ({"strategy": "flash"}, "'layer_densities'"),
        ({"strategy": "shuffled"}, "ssfl.discovery is 'private-densities'"),
        ({"ssfl.criterion": "grasp"}, "ssfl.criterion is 'grasp'"),
        ({"mask.scope": "layer"}, "mask.scope is 'layer'"),
        ({"stop.metric": "local"}, "stop.metric is 'local'"),
        ({"ssfl.refresh": "scheduled", "ssfl.refresh-round": 2}, "ssfl.refresh is 'scheduled'"),
        ({"privacy.epsilon": 3.0}, "privacy.epsilon is 3"),
        ({"wire.up-values": "fp32"}, "wire.up-values is 'fp32'"),
        ({"privacy.secure-aggregation": True, "run.cohort": 4}, "a round has too few clients"),
        ({"shift.round": 2, "shift.clients": 2}, "shift.round is 2"),
    ],
)
def test_what_is_not_private_is_refused_by_name(keys: Flat, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        private(CLIENT | keys, tmp_path)
