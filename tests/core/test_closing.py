"""Rounds that close before their last reply, on the simulated clock and on real nodes, and replays of both."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.comm import exchange
from ssfl_app.comm.exchange import Closes, Deadlines, ExchangeReport, MessageExchange, Traffic
from ssfl_app.comm.messenger import Reply
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.aggregation import Aggregator
from ssfl_app.core.clock import TRIPS_DOWN, TRIPS_UP, Capacity, Clock, Profile
from ssfl_app.core.closing import Closing, Taken
from ssfl_app.core.options import FailureOptions, RunOptions
from ssfl_app.core.strategy import SparseStrategy
from ssfl_app.options import ConfigError
from ssfl_app.simulation.in_process import InlineGrid
from ssfl_app.testing import grid as shipped
from ssfl_app.testing.grid import SMALL, Played
from tests.in_process_grid import MEMO, DeploymentGrid, ScriptedGrid, answer_error, keep_silent, play, snapshot_of

pytestmark = pytest.mark.narrow
TRIPS = TRIPS_DOWN + TRIPS_UP

law = settings(deadline=None, derandomize=True, max_examples=60)


@pytest.fixture
def far(tmp_path: Path) -> str:
    """Return a profile in which client k is k seconds of round trip away, and nothing else takes time."""
    path = tmp_path / "far.csv"
    rows = [f"1e9,1e9,1e9,{1000 * client}" for client in range(6)]
    path.write_text("\n".join(["gflops,down_mbit,up_mbit,rtt_ms", *rows]) + "\n")
    return str(path)


def taken(records: list[dict[str, Any]]) -> dict[int, Taken]:
    """Return what a replay needs of records."""
    return {
        r["round"]: Taken(
            frozenset(r["ok"]),
            frozenset(map(int, r.get("busy", ()))),
            {int(client): age for client, age in r.get("stale", {}).items()},
        )
        for r in records[1:]
    }


def replayed(keys: Flat, records: list[dict[str, Any]], luck: int = 0) -> Played:
    return shipped.play(MEMO.images | keys, luck, replay=taken(records))


def test_the_first_replies_count_and_a_late_client_is_asked_when_it_is_ready(far: str) -> None:
    keys = {"clock.profile": far, "run.close-after": 3.0, "run.rounds": 5}
    played = play(keys)
    left = np.zeros(6)
    for record in played.records[1:]:
        busy = [client for client in record["cohort"] if left[client] > 0]
        asked = [client for client in record["cohort"] if client not in busy]
        assert list(map(int, record.get("busy", ()))) == busy
        assert record["ok"] == asked[:3]
        late = asked[3:]
        assert list(map(int, record.get("late", ()))) == late
        end = float(TRIPS) * record["ok"][-1]  # round trips of a client, of a second each
        assert record["simulated_seconds"] == pytest.approx(end, abs=0.1)
        left = np.maximum(left - record["simulated_seconds"], 0)
        for client in late:
            left[client] = record["client_seconds"][str(client)] - record["simulated_seconds"]
        assert record["messages_train_down"] == record["messages_train_up"] == len(asked)
        for client in np.flatnonzero(left):
            assert str(client) not in record["local_accuracy"]
    assert any("late" in record for record in played.records)
    assert any("busy" in record for record in played.records)


def test_a_share_of_a_larger_cohort(far: str) -> None:
    keys = {"clock.profile": far, "run.over-select": 1.25, "run.close-after": 0.8, "run.rounds": 1}
    (record,) = play(keys).records[1:]
    assert len(record["cohort"]) == 5
    assert record["ok"] == record["cohort"][:4]
    assert play({"run.over-select": 99.0, "run.rounds": 1}).records[1]["cohort"] == list(range(6))


@pytest.mark.parametrize("strategy", ["ssfl", "ditto", "dispfl", "topk", "scaffold"])
def test_a_late_client_is_to_the_model_what_a_lost_one_is(strategy: str, far: str) -> None:
    """It trained, and what it remembers of that it forgets: the server did not take it."""
    keys = {"strategy": strategy, "clock.profile": far, "run.close-after": 3.0, "failures.min-ok-fraction": 0.2}
    late = play(keys)
    out = [(r["round"], int(c)) for r in late.records for kind in ("late", "busy") for c in r.get(kind, ())]
    assert len(out) >= 3
    gone = answer_error(5, "node gone")
    keys |= {"clock.profile": "", "run.close-after": 0.0}
    lost = play(keys, faults={("train", round_, client): gone for round_, client in out})
    assert lost.bits() == late.bits()
    for name in ("local_accuracy", "personal_accuracy"):
        for a, b in zip(late.records[1:], lost.records[1:], strict=True):
            known = a.get(name, {})
            assert known == {client: value for client, value in b.get(name, {}).items() if client in known}


@pytest.mark.parametrize(
    "more", [{}, {"wire.up-values": "fixed32"}, {"run.fold": "median"}, {"failures.norm-factor": 1.1}]
)
def test_a_replay_and_a_resumption_and_any_order_have_the_same_bits(more: Flat, tmp_path: Path) -> None:
    keys: Flat = {"clock.profile": "mobile", "run.close-after": 3.0, "run.rounds": 4, **more}
    keys["failures.min-ok-fraction"] = 0.25
    whole, kept = play(keys), dict[str, np.ndarray]()
    assert any(record.get("late") for record in whole.records)
    assert any(record["refused"] for record in whole.records) == ("failures.norm-factor" in more)
    assert play(keys, luck=9).metrics() == whole.metrics()
    again = replayed(keys | {"clock.profile": "", "run.close-after": 0.0}, whole.records, luck=3)
    assert again.bits() == whole.bits()
    for name in ("ok", "cohort", "train_loss", "central_accuracy"):
        assert [record.get(name) for record in again.records] == [record.get(name) for record in whole.records]
    play(keys, folder=tmp_path, until=2, prepare=snapshot_of(2, kept))
    rest = play(keys, folder=tmp_path, prepare=lambda strategy: strategy.load_state_dict(2, kept))
    for after, before in zip(rest.metrics(), whole.metrics()[3:], strict=True):
        assert after.pop("bytes_mask_down") >= before.pop("bytes_mask_down")  # clients are new, and no slower for it
        assert after == before


def test_the_folder_of_a_run_is_what_it_is_replayed_from(tmp_path: Path) -> None:
    import ssfl_app

    keys = {**SMALL, **MEMO.images, "clock.profile": "mobile", "run.close-after": 3.0}
    first = ssfl_app.run(config=keys, out=tmp_path / "first", quiet=True)
    again = ssfl_app.run(config=keys | {"run.replay": str(tmp_path / "first")}, out=tmp_path / "again", quiet=True)
    assert again.summary["model_sha256"] == first.summary["model_sha256"]
    assert (
        again.summary["late_replies"]
        == first.summary["late_replies"]
        == sum(
            len(json.loads(line).get("late", ()))
            for line in (tmp_path / "first" / "rounds.jsonl").read_text().splitlines()
        )
    )
    with pytest.raises(
        ConfigError, match=r"run\.replay is .*first; local\.lr is 0\.2; that run was started with 0\.1"
    ):
        ssfl_app.run(
            config=keys | {"run.replay": str(tmp_path / "first"), "local.lr": 0.2}, out=tmp_path / "no", quiet=True
        )


def test_real_nodes_are_late_when_they_are_and_a_replay_is_told() -> None:
    keys = {"run.close-after": 3.0, "strategy": "fedavg"}
    silent = play({"strategy": "fedavg"}).records[1]["cohort"][1]
    grid = DeploymentGrid(merge(SMALL, MEMO.images | keys), luck=4, faults={("train", 1, silent): keep_silent})
    played = play(keys, grid=grid)
    first, *later = played.records[1:]
    assert len(first["ok"]) == 3
    assert first["late"] == {str(silent): "3 good replies closed the round"}
    assert str(silent) not in first["local_accuracy"]
    for record in later:  # its message lives for run.round-timeout, and it never answers
        assert (silent in record["cohort"]) == (str(silent) in record.get("busy", {}))
        assert len(record["ok"]) == 3
    assert played.bits() == replayed({"strategy": "fedavg"}, played.records).bits()


def test_a_node_that_answers_late_is_asked_again() -> None:
    keys = {"run.close-after": 2.0, "run.cohort": 6, "strategy": "fedavg", "run.rounds": 4}
    keys |= {"failures.min-ok-fraction": 0.1}
    played = play(keys, grid=DeploymentGrid(merge(SMALL, MEMO.images | keys), luck=1))
    late = {(record["round"], client) for record in played.records for client in record.get("late", ())}
    assert any(int(client) in record["ok"] for round_, client in late for record in played.records[round_ + 1 :])
    assert all(len(record["ok"]) == 2 for record in played.records[1:])
    assert played.bits() == replayed(keys | {"run.close-after": 0.0}, played.records).bits()


class Lone:
    """What an aggregator is given, of a strategy that has only a report."""

    def __init__(self, report: ExchangeReport) -> None:
        self.messenger = type("Messenger", (), {"report": report})()
        self.settings = type("Settings", (), {"failures": FailureOptions()})()
        self.update_norms = dict.fromkeys(report.ok, 1.0)


@law
@given(
    st.dictionaries(st.integers(0, 19), st.floats(0, 1e6), min_size=1, max_size=20),
    st.floats(0.01, 0.99) | st.integers(1, 20).map(float),
    st.randoms(),
)
def test_whoever_is_late_the_rest_is_added_in_one_order(
    seconds: Mapping[int, float], close_after: float, luck: Any
) -> None:
    rows = tuple(Capacity(1.0, 1.0, 1.0, seconds.get(client, 0.0) / TRIPS) for client in range(20))
    report, added, ended = ExchangeReport(), list[tuple[int, int]](), list[bool]()
    closing = Closing(RunOptions(clients=20, close_after=close_after), Clock(Profile(rows), 1, lambda: 0), None)
    arrived = list(seconds)
    luck.shuffle(arrived)
    for client in arrived:
        report.accept(client, {})
        report.traffic[client] = Traffic(messages_down=1, messages_up=1)
    report.asked = len(seconds)
    inner = Aggregator(
        lambda reply: added.append((reply.client, int(reply.arrays["x"][0]))), lambda: ended.append(True)
    )
    strategy = Lone(report)
    outer = closing.on_time(strategy, inner, 1)  # type: ignore[arg-type]
    for client in arrived:
        outer.add(Reply({"x": np.array([client], dtype=np.int32)}, {}, client=client, samples=1))
    assert added == []
    outer.finish()
    times = {client: TRIPS * rows[client].rtt for client in seconds}
    wanted = sorted(sorted(seconds, key=lambda c: (times[c], c))[: closing._run.closes_at(len(seconds))])
    assert added == [(client, client) for client in wanted]
    assert ended == [True]
    assert set(report.ok) == set(wanted) == set(strategy.update_norms)
    assert set(report.late) == set(seconds) - set(wanted)
    end = max(times[client] for client in wanted)
    assert [closing.left[client] for client in sorted(report.late)] == [times[c] - end for c in sorted(report.late)]


class Busier(Clock):
    """Tells the time of clients whose work is another one from some call on: `grown` is by client, (call, times)."""

    def __init__(self, seconds: Mapping[int, float], grown: Mapping[int, tuple[int, float]]) -> None:
        self._rounds, self._usual, self._grown = 0, seconds, grown

    def client_seconds(self, report: ExchangeReport) -> dict[int, float]:
        times = {c: times for c, (call, times) in self._grown.items() if self._rounds >= call}
        return {client: self._usual[client] * times.get(client, 1) for client in report.examples}

    def seconds(self, report: ExchangeReport) -> float:
        self._rounds += report.seconds is not None
        return super().seconds(report)

    def begin(self, strategy: SparseStrategy) -> None:
        strategy.clock = strategy._closing._clock = self  # type: ignore[union-attr]


GROWN: Flat = {"clock.profile": "lan", "run.deadline": 2.0, "run.cohort": 6, "run.rounds": 8, "strategy": "fedavg"}


def test_who_takes_longer_than_it_usually_does_is_not_waited_for_until_that_is_what_it_usually_takes() -> None:
    slow = Busier(dict.fromkeys(range(6), 10.0) | {5: 30.0}, {2: (3, 9.0)})
    played = play(GROWN, prepare=slow.begin)
    lengths = [record["simulated_seconds"] for record in played.records[1:]]
    # Twice 10 s are over in a round that waits 30 s for client 5 anyway, and 90 s are not.
    assert lengths[:4] == [30.0] * 4
    told = {r["round"]: r.get("late", {}) for r in played.records[1:]}
    assert told[4] == {"2": "90 s; not there after 20 s, run.deadline 2 times its usual 10 s"}
    late = [round_ for round_, who in told.items() if "2" in who]
    busy = [r["round"] for r in played.records[1:] if "2" in r.get("busy", {})]
    # It works for 60 s after round 4. Its third answer of 90 s is the middle one of five.
    assert (late[0], busy[:2]) == (4, [5, 6])
    whole = play(GROWN | {"run.rounds": 16}, prepare=Busier(slow._usual, slow._grown).begin)
    late = [r["round"] for r in whole.records[1:] if "2" in r.get("late", {})]
    assert len(late) == 3
    after = [r for r in whole.records[1:] if r["round"] > late[-1] and 2 in r["ok"]]
    assert after
    assert all(r["simulated_seconds"] == 90 for r in after)


def test_a_deadline_does_not_close_a_round_that_lacks_answers() -> None:
    grown = dict.fromkeys((0, 1, 2, 3), (3, 10.0))
    played = play(GROWN | {"run.rounds": 4}, prepare=Busier(dict.fromkeys(range(6), 1.0), grown).begin)
    last = played.records[-1]
    assert last["simulated_seconds"] == 10
    assert "late" not in last
    played = play(
        GROWN | {"run.rounds": 4, "failures.min-ok-fraction": 1 / 3},
        prepare=Busier(dict.fromkeys(range(6), 1.0), grown).begin,
    )
    last = played.records[-1]
    assert (last["simulated_seconds"], last["ok"]) == (2, [4, 5])
    assert list(last["late"]) == ["0", "1", "2", "3"]


def test_a_run_with_deadlines_is_replayed_and_resumed_to_its_bits(tmp_path: Path) -> None:
    def slow() -> Busier:
        return Busier(dict.fromkeys(range(6), 10.0) | {5: 30.0}, {2: (3, 9.0)})

    whole, kept = play(GROWN, prepare=slow().begin), dict[str, np.ndarray]()
    assert any(record.get("late") for record in whole.records)
    assert play(GROWN, luck=5, grid=None, prepare=slow().begin).metrics() == whole.metrics()
    assert replayed(GROWN | {"clock.profile": "", "run.deadline": 0.0}, whole.records).bits() == whole.bits()
    begun, keep = slow(), snapshot_of(4, kept)
    play(GROWN, folder=tmp_path, until=4, prepare=lambda strategy: (begun.begin(strategy), keep(strategy))[1])
    rest = play(
        GROWN,
        folder=tmp_path,
        prepare=lambda strategy: (begun.begin(strategy), strategy.load_state_dict(4, kept))[1],
    )
    assert rest.metrics() == whole.metrics()[5:]


class Answering(InlineGrid):
    """Real nodes that answer at stated times of a clock that moves while somebody waits."""

    in_process = False

    def __init__(self, times: Mapping[int, float]) -> None:
        def answer(message: Message, context: Any) -> Message:
            return Message(RecordDict(), reply_to=message)

        super().__init__(answer, {}, {node: node for node in times})
        self.now, self._times = 0.0, times

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds

    sleep = wait

    def pull_messages(self, message_ids: Any) -> Any:
        asked = {i: self._waiting[i].metadata.dst_node_id for i in message_ids if i in self._waiting}
        return super().pull_messages([i for i, node in asked.items() if self.now >= self._times[node]])


def test_a_real_exchange_ends_when_nobody_is_left_who_may_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines = Deadlines(2.0, 4)

    def exchanged(times: Mapping[int, float], closes: Closes) -> tuple[MessageExchange, Answering]:
        nodes = Answering(times)
        monkeypatch.setattr(exchange, "time", nodes)
        sent = MessageExchange(nodes, 100.0, closes=closes)
        sent.report.asked = 4
        sent.send({node: Message(RecordDict(), node, "train") for node in times})
        for client, _ in sent.replies():
            sent.report.accept(client, {})
        return sent, nodes

    closes, usual = Closes(deadlines=deadlines, share=0.5), {0: 1.0, 1: 2.0, 2: 2.0, 3: 4.0}
    for _ in range(3):
        sent, _ = exchanged(usual, closes)
        assert (sorted(sent.report.ok), sent.report.late) == ([0, 1, 2, 3], {})
    assert [deadlines.usual(client) for client in range(4)] == [1, 2, 2, 4]
    # Client 0 is there after more than twice its second, while client 3 is waited for; client 2 is not.
    sent, nodes = exchanged({0: 3.0, 1: 2.0, 2: 30.0, 3: 6.0}, closes)
    assert (sorted(sent.report.ok), nodes.now) == ([0, 1, 3], 6)
    assert sent.report.late == {2: "not there after 4 s, run.deadline 2 times its usual 2 s"}
    assert sent.still_at_work() == [2]
    nodes.now = 31.0
    assert sent.still_at_work() == []
    assert deadlines.seconds[2][0] == 31
    # One of four is not half of them.
    sent, nodes = exchanged({0: 1.0, 1: 70.0, 2: 90.0, 3: 300.0}, closes)
    assert (sorted(sent.report.ok), list(sent.report.late), nodes.now) == ([0, 1], [2, 3], 70)
    assert sent.still_at_work() == [2, 3]
    nodes.now = 100.0
    assert sent.still_at_work() == []


def test_a_buffer_of_the_whole_cohort_is_the_synchronous_run() -> None:
    keys = {"clock.profile": "mobile", "strategy": "ssfl", "wire.down-values": "fp16"}
    assert play(keys | {"run.buffer": 4.0}).metrics() == play(keys).metrics()
    assert play(keys | {"run.buffer": 4.0}).bits() == play(keys).bits()


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_an_old_update_counts_when_it_comes_the_less_the_older_it_is(far: str, weighting: str) -> None:
    """The formula of FedBuff in plain NumPy, of what went over the wire; client k is k seconds of round trip away."""
    keys: Flat = {"clock.profile": far, "run.buffer": 2.0, "strategy": "fedavg", "run.rounds": 6}
    played = play(keys | {"run.weighting": weighting}, grid=ScriptedGrid(merge(SMALL, MEMO.images | keys)))
    sent = {where: payload for where, payload in played.grid.sent if where[0] == "train"}
    got = {where: payload for where, payload in played.grid.got if where[0] == "train"}
    flat, due = played.layout.flatten, dict[int, tuple[float, int]]()
    ages = list[int]()
    for record, before, after in zip(played.records[1:], played.states, played.states[1:], strict=False):
        round_ = record["round"]
        assert list(map(int, record.get("busy", ()))) == sorted(due)
        assert len(record["cohort"]) == 4 - len(due)
        due |= {client: (record["client_seconds"][str(client)], round_) for client in record["cohort"]}
        first = sorted(due, key=lambda client: (due[client][0], client))[:2]
        end = due[first[-1]][0]
        assert record["simulated_seconds"] == pytest.approx(end)
        assert sorted(record["ok"]) == sorted(first)
        assert record.get("stale", {}) == {str(c): round_ - due[c][1] for c in sorted(first) if due[c][1] < round_}
        total, weights = np.zeros(played.layout.size), 0.0
        for client in first:
            _, began = due.pop(client)
            reply, model = got["train", began, client], sent["train", began, client]
            weight = reply.metadata["samples"] if weighting == "samples" else 1
            change = np.subtract(reply.arrays["values"], model.arrays["values"], dtype=np.float64)
            total, weights = total + weight * change / np.sqrt(1 + round_ - began), weights + weight
            ages.append(round_ - began)
        np.testing.assert_allclose(flat(after), flat(before) + total / weights, atol=1e-6)
        due = {client: (seconds - end, began) for client, (seconds, began) in due.items()}
    assert {0, 1, 2} <= set(ages)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"strategy": "fedavg", "wire.up-values": "fp16", "wire.down-values": "int8"},
        {"run.fold": "median", "run.buffer": 3.0},
        {"failures.norm-factor": 1.05, "failures.min-ok-fraction": 0.25},
    ],
)
def test_a_buffered_run_is_replayed_resumed_and_played_in_any_order_to_its_bits(more: Flat, tmp_path: Path) -> None:
    keys: Flat = {"clock.profile": "mobile", "run.buffer": 0.5, "run.rounds": 5, **more}
    whole, kept = play(keys), dict[str, np.ndarray]()
    assert any(record.get("stale") for record in whole.records)
    assert any(record["refused"] for record in whole.records) == ("failures.norm-factor" in more)
    assert play(keys, luck=9).metrics() == whole.metrics()
    again = replayed(keys | {"clock.profile": ""}, whole.records, luck=3)
    assert again.bits() == whole.bits()
    for name in ("ok", "cohort", "busy", "stale", "train_loss", "central_accuracy"):
        assert [record.get(name) for record in again.records] == [record.get(name) for record in whole.records]
    play(keys, folder=tmp_path, until=2, prepare=snapshot_of(2, kept))
    assert kept["late-changes"].size
    rest = play(keys, folder=tmp_path, prepare=lambda strategy: strategy.load_state_dict(2, kept))
    for after, before in zip(rest.metrics(), whole.metrics()[3:], strict=True):
        assert after.pop("bytes_mask_down") >= before.pop("bytes_mask_down")  # clients are new, and no slower for it
        assert after == before


@pytest.mark.parametrize("real", [False, True])
def test_an_update_under_a_mask_that_was_replaced_is_refused_by_name(real: bool, far: str) -> None:
    keys: Flat = {"run.buffer": 2.0, "ssfl.warmup-rounds": 2, "run.rounds": 6, "failures.min-ok-fraction": 0.1}
    keys |= {} if real else {"clock.profile": far}
    grid = DeploymentGrid(merge(SMALL, MEMO.images | keys), luck=2) if real else None
    played = play(keys, grid=grid)
    refused = [(r["round"], why) for r in played.records for why in r["refused"].values()]
    assert refused
    assert all(round_ > 2 for round_, _ in refused)
    assert all(why == "it is an update under an older mask" for _, why in refused)


def test_late_replies_of_real_nodes_count_in_the_round_in_which_they_come() -> None:
    keys: Flat = {"run.buffer": 2.0, "strategy": "fedavg", "run.rounds": 6, "wire.down-values": "bf16"}
    played = play(keys, grid=DeploymentGrid(merge(SMALL, MEMO.images | keys), luck=3))
    ages = [age for record in played.records for age in record.get("stale", {}).values()]
    assert max(ages) >= 2
    assert all(len(record["ok"]) == 2 for record in played.records[1:])
    assert all(len(record["cohort"]) + len(record.get("busy", ())) == 4 for record in played.records[1:])
    total = sum(record["image_passes"] for record in played.records)
    assert total > 0
    assert replayed(keys, played.records).bits() == played.bits()


def test_who_dies_while_it_is_late_is_a_number_in_a_later_round() -> None:
    keys: Flat = {"run.buffer": 2.0, "strategy": "fedavg", "run.rounds": 6}
    alive = play(keys, grid=DeploymentGrid(merge(SMALL, MEMO.images | keys), luck=3))
    late = [(r["round"], int(client)) for r in alive.records for client in r.get("late", {})]
    (first, gone), (_, silent) = late[:2]
    faults = {("train", first, gone): answer_error(5, "node gone"), ("train", first, silent): keep_silent}
    played = play(keys, grid=DeploymentGrid(merge(SMALL, MEMO.images | keys), luck=3, faults=faults))
    lost = [(r["round"], client) for r in played.records[1:] for client in r["lost"]]
    assert [client for _, client in lost] == [str(gone)]
    assert lost[0][0] > first
    assert all(str(silent) in r["busy"] for r in played.records[1:] if r["round"] > first)
    assert any(gone in r["cohort"] for r in played.records[1:] if r["round"] > lost[0][0])
    assert replayed(keys, played.records).bits() == played.bits()


def test_an_exchange_that_goes_on_hears_who_was_late(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Answering({0: 1.0, 1: 40.0, 2: 60.0, 3: 1e9})
    monkeypatch.setattr(exchange, "time", nodes)
    closes = Closes(1, keeps=True)
    sent = MessageExchange(nodes, 100.0, closes=closes)

    def play_round(*asked: int) -> ExchangeReport:
        sent.send({node: Message(RecordDict(), node, "train") for node in asked})
        for client, _ in sent.replies():
            sent.report.accept(client, {})
        return sent.report

    first = play_round(0, 1, 3)
    assert (first.ok, sorted(first.late), sent.waiting()) == ([0], [1, 3], [1, 3])
    sent.reopen(closes)
    sent.report.busy = dict.fromkeys((1, 3), "")
    second = play_round(2)
    assert (second.ok, second.late, second.sent, nodes.now) == ([1], {2: "1 good replies closed the round"}, 1, 40)
    sent.reopen(Closes(2, keeps=True))
    third = play_round()
    # The message of client 3 lived for 100 s from the first round.
    assert (third.ok, list(third.lost), nodes.now) == ([2], [3], 100)
    assert sent.waiting() == []


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"run.buffer": 11.0}, r"run\.buffer is 11; a round asks 10 clients"),
        ({"run.buffer": 3.0, "run.close-after": 8.0}, r"run\.buffer is 3; it is 0 where run\.close-after is 8"),
        ({"run.buffer": 3.0, "run.deadline": 2.0}, r"run\.buffer is 3; it is 0 where run\.deadline is 2"),
        (
            {"run.buffer": 3.0, "privacy.secure-aggregation": True, "strategy": "fedavg"},
            r"run\.buffer is 3; it is 0 with privacy\.secure-aggregation",
        ),
        ({"run.deadline": 0.5}, r"run\.deadline is 0\.5; it is 0 or a number of at least 1"),
        (
            {"run.deadline": 2.0, "privacy.secure-aggregation": True, "strategy": "fedavg"},
            r"run\.deadline is 2; it is 0 with privacy\.secure-aggregation",
        ),
        ({"run.close-after": 2.5}, r"run\.close-after is 2\.5; it is 0, a share below 1, or a whole number"),
        ({"run.close-after": 11.0}, r"run\.close-after is 11; a round asks 10 clients"),
        ({"run.close-after": 4.0}, r"run\.close-after is 4; .* failures\.min-ok-fraction is 0\.5, of 10 .* asked 5"),
        ({"run.over-select": 0.9}, r"run\.over-select is 0\.9; it is a number of at least 1"),
        (
            {"run.over-select": 1.5, "strategy": "dispfl"},
            r"run\.over-select is 1\.5; it is 1 where all clients train",
        ),
        (
            {"run.close-after": 8.0, "privacy.secure-aggregation": True, "strategy": "fedavg"},
            r"run\.close-after is 8; it is 0 with privacy\.secure-aggregation",
        ),
        (
            {"run.over-select": 1.5, "privacy.level": "client", "privacy.epsilon": 8.0, "strategy": "random"},
            r"run\.over-select is 1\.5; it is 1\.0 with privacy\.level 'client'",
        ),
    ],
)
def test_rounds_that_cannot_close_are_refused_by_name(keys: Flat, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(keys)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"strategy": "topk"}, r"run\.buffer is 3; it is 0 with strategy topk"),
        ({"strategy": "ditto"}, r"run\.buffer is 3; it is 0 with strategy ditto"),
        ({"strategy": "fedavg", "wire.up-values": "fixed32"}, r"wire\.up-values is 'fixed32'; it is 'fp32' or"),
        (
            {"wire.error-feedback": True, "wire.down-values": "fp16"},
            r"wire\.error-feedback is True; it is False with",
        ),
    ],
)
def test_a_buffer_needs_updates_that_can_be_added_later(keys: Flat, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        play({"run.buffer": 3.0, "clock.profile": "mobile", **keys})


def test_the_table_of_what_waiting_costs_is_that_of_its_record() -> None:
    from benchmarks import slow_sites

    assert slow_sites.page_table(json.loads(slow_sites.RECORD.read_text())) in slow_sites.PAGE.read_text()


def test_a_simulation_without_a_clock_has_nobody_late(tmp_path: Path) -> None:
    import ssfl_app

    with pytest.raises(
        ConfigError, match=r"run\.close-after is 8; simulated clients are late by clock\.profile only"
    ):
        ssfl_app.run(config={"run.close-after": 8.0}, out=tmp_path / "run", quiet=True)
