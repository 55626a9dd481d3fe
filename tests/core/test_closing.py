"""Rounds that close before their last reply, on the simulated clock and on real nodes, and replays of both."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.comm.exchange import ExchangeReport, Traffic
from ssfl_app.comm.messenger import Reply
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.aggregation import Aggregator
from ssfl_app.core.clock import TRIPS_DOWN, TRIPS_UP, Capacity, Clock, Profile
from ssfl_app.core.closing import Closing, Taken
from ssfl_app.core.options import RunOptions
from ssfl_app.options import ConfigError
from ssfl_app.testing import grid as shipped
from ssfl_app.testing.grid import SMALL, Played
from tests.in_process_grid import MEMO, DeploymentGrid, answer_error, keep_silent, play, snapshot_of

pytestmark = pytest.mark.few
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
    return {r["round"]: Taken(frozenset(r["ok"]), frozenset(map(int, r.get("busy", ())))) for r in records[1:]}


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


@pytest.mark.parametrize(
    ("keys", "said"),
    [
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


def test_a_simulation_without_a_clock_has_nobody_late(tmp_path: Path) -> None:
    import ssfl_app

    with pytest.raises(
        ConfigError, match=r"run\.close-after is 8; simulated clients are late by clock\.profile only"
    ):
        ssfl_app.run(config={"run.close-after": 8.0}, out=tmp_path / "run", quiet=True)
