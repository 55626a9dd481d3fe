"""The simulated clock: by hand on two clients, the same on every engine, and no part of the bits."""

from pathlib import Path

import numpy as np
import pytest

from ssfl_app.comm.exchange import ExchangeReport, Traffic
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.clock import (
    FORWARD_PASSES,
    HEADERS,
    PROFILES,
    TRIPS_DOWN,
    TRIPS_UP,
    Clock,
    Profile,
    find_profile,
)
from ssfl_app.options import ConfigError
from ssfl_app.server_app import server_context
from ssfl_app.training.narrow import uses_of_weights
from tests.in_process_grid import DeploymentGrid, answer_error, play, snapshot_of

pytestmark = pytest.mark.narrow

TWO = "gflops,down_mbit,up_mbit,rtt_ms\n1,8,4,100\n0.5,80,80,0\n"


@pytest.fixture
def two(tmp_path: Path) -> Profile:
    path = tmp_path / "two.csv"
    path.write_text(TWO)
    return find_profile(str(path))


def test_two_clients_by_hand(two: Profile) -> None:
    report = ExchangeReport()
    report.accept(0, {"passes": 10, "looks": 5})
    report.accept(1, {"passes": 100})
    report.traffic[0] = Traffic(bytes_down=10**6, messages_down=1, bytes_up=5 * 10**5, messages_up=1)
    report.traffic[1] = Traffic(bytes_down=10**7, messages_down=2, bytes_up=10**6, messages_up=2)
    report.traffic[2] = Traffic(bytes_down=10**9, messages_down=1)  # it never answered
    found = Clock(two, 1, lambda: 10**6).client_seconds(report)
    # 35 forward passes of 1 MFLOP at 1 GFLOP/s; 8 Mbit at 8 and 4 Mbit at 4 Mbit/s, with 4 % of headers; 8 trips.
    assert found[0] == pytest.approx(0.035 + 1.04 + 1.04 + 8 * 0.1)
    # 300 of them at half the speed; 88 Mbit at 80 Mbit/s; no round trip takes time.
    assert found[1] == pytest.approx(0.6 + 1.04 * 88 / 80)
    assert list(found) == [0, 1]
    assert Clock(two, 1, lambda: 10**6).seconds(report) == found[0] == max(found.values())


def test_an_exchange_that_belongs_to_another_comes_after_it(two: Profile) -> None:
    first, second = ExchangeReport(), ExchangeReport()
    for report, client in ((first, 0), (second, 1)):
        report.accept(client, {"passes": 1000})
        report.traffic[client] = Traffic()
    first.further.append(second)
    assert Clock(two, 1, lambda: 10**6).seconds(first) == pytest.approx(3 + 6)
    assert Clock(two, 1, lambda: 10**6).seconds(ExchangeReport()) == 0


def test_rows_repeat_and_draws_are_of_seed_and_client() -> None:
    wan, mobile = PROFILES["wan"], PROFILES["mobile"]
    assert [wan.capacity(seed, 7) for seed in (1, 2)] == [wan.rows[2]] * 2
    assert mobile.capacity(1, 3) == mobile.capacity(1, 3)
    assert len({mobile.capacity(seed, client) for seed in (1, 2) for client in (0, 1)}) == 4
    (row,), many = mobile.rows, [mobile.capacity(1, client) for client in range(4000)]
    for name in ("speed", "down"):
        ratios = np.array([getattr(each, name) for each in many]) / getattr(row, name)
        within = np.mean((ratios > 10**-0.5) & (ratios < 10**0.5))
        assert within == pytest.approx(0.9, abs=0.02)
        assert np.median(ratios) == pytest.approx(1, rel=0.05)
    assert all(each.down / each.up == pytest.approx(row.down / row.up) for each in many[:9])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "with no row; its columns are gflops, down_mbit, up_mbit, rtt_ms"),
        ("gflops,down_mbit\n1,2\n", "with gflops, down_mbit; its columns are"),
        ("gflops,down_mbit,up_mbit,rtt_ms\n1,0,4,100\n", "down_mbit in line 2 is '0': it is a number above 0"),
        ("gflops,down_mbit,up_mbit,rtt_ms\n1,8,4,-1\n", "rtt_ms in line 2 is '-1': it is a number of at least 0"),
        (TWO + "fast,8,4,0\n", "gflops in line 4 is 'fast': it is a number above 0"),
        (TWO + "1,8\n", "up_mbit in line 4 is None"),
        (TWO + "inf,8,4,0\n", "gflops in line 4 is 'inf'"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "clients.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"clock\.profile is ") as error:
        find_profile(str(path))
    assert said in str(error.value)


def test_what_has_no_such_clock_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clock\.profile is 'moon'; it is lan, hospital, mobile, wan, a CSV file"):
        parse({"clock.profile": "moon"})
    with pytest.raises(ConfigError, match=r"clock\.profile is '.*none\.csv'; it is a CSV file that can be read"):
        play({"clock.profile": str(tmp_path / "none.csv")})
    private = {"privacy.level": "client", "privacy.epsilon": 8.0, "strategy": "random"}
    with pytest.raises(ConfigError, match=r"clock\.profile is 'lan'; it is empty with privacy.level 'client'"):
        parse(private | {"clock.profile": "lan"})


def test_a_run_takes_what_its_bytes_and_passes_say_and_keeps_its_bits() -> None:
    timed, plain = play({"clock.profile": "wan"}), play({})
    assert timed.bits() == plain.bits()
    seconds = {"simulated_seconds", "client_seconds"}
    assert [{k: v for k, v in record.items() if k not in seconds} for record in timed.metrics()] == plain.metrics()
    strategy, runtime = timed.strategy, timed.runtime
    sizes = strategy.layout.prunable_sizes
    uses = uses_of_weights(runtime.model, strategy.layout, runtime.data.shape)
    flops = 2 * sum(size * uses[name] for name, size in sizes.items())  # a multiplication and an addition
    assert strategy.forward_flops() == flops
    record = timed.records[2]  # nobody is sent the mask any more
    assert record["bytes_mask_down"] == 0
    each_way = record["bytes_train_down"] // 4, record["bytes_train_up"] // 4
    for client in record["cohort"]:
        row, samples = PROFILES["wan"].rows[client % 5], sum(runtime.holding(client).counts)
        wanted = FORWARD_PASSES * samples * flops / row.speed + 8 * HEADERS * sum(each_way) / row.up
        wanted += (TRIPS_DOWN + TRIPS_UP) * row.rtt
        assert record["client_seconds"][str(client)] == pytest.approx(wanted)
    assert record["simulated_seconds"] == max(record["client_seconds"].values())
    # A question takes its time before round 1.
    assert timed.records[0]["simulated_seconds"] > (TRIPS_DOWN + TRIPS_UP) * max(r.rtt for r in PROFILES["wan"].rows)


@pytest.mark.parametrize(
    "more",
    [{}, {"ssfl.refresh": "continuous", "ssfl.refresh-every": 1, "run.evaluate-every": 3}],
    ids=["one mask", "a mask that moved before the snapshot, which no client knows yet"],
)
def test_the_order_of_replies_and_a_resumption_change_no_time(more: Flat, tmp_path: Path) -> None:
    keys = {"clock.profile": "mobile", **more}
    whole, kept = play(keys), dict[str, np.ndarray]()
    assert play(keys, luck=5).metrics() == whole.metrics()
    play(keys, folder=tmp_path, until=1, prepare=snapshot_of(1, kept))
    rest = play(keys, folder=tmp_path, prepare=lambda strategy: strategy.load_state_dict(1, kept))
    for again, before in zip(rest.metrics(), whole.metrics()[2:], strict=True):
        assert again.pop("bytes_mask_down") >= before.pop("bytes_mask_down")  # clients are new, and no slower for it
        assert again == before


def test_a_lost_client_takes_no_time_and_a_mask_sent_later_does() -> None:
    keys = {"clock.profile": "wan"}
    whole = play(keys)
    slowest = max(whole.records[2]["client_seconds"], key=whole.records[2]["client_seconds"].__getitem__)
    lost = play(keys, faults={("train", 2, int(slowest)): answer_error(5, "node gone")})
    assert slowest not in lost.records[2]["client_seconds"]
    assert lost.records[2]["simulated_seconds"] < whole.records[2]["simulated_seconds"]


def test_a_narrower_network_takes_less_and_dead_weights_do_not() -> None:
    keys = {"clock.profile": "lan", "strategy": "random", "run.rounds": 1}
    masked, dense = play(keys | {"mask.density": 0.3}), play(keys | {"mask.density": 1.0})
    assert masked.strategy.forward_flops() == dense.strategy.forward_flops()
    narrow = play(keys | {"mask.density": 0.3, "mask.granularity": "channel"})
    assert narrow.strategy.forward_flops() < 0.5 * dense.strategy.forward_flops()


def test_sums_take_their_second_exchange() -> None:
    keys = {"clock.profile": "wan", "strategy": "fedavg", "run.rounds": 1, "wire.up-values": "fixed32"}
    clear, masked = play(keys), play(keys | {"privacy.secure-aggregation": True})
    assert masked.bits() == clear.bits()
    more = masked.records[1]["simulated_seconds"] - clear.records[1]["simulated_seconds"]
    slowest = max(PROFILES["wan"].rows[client % 5].rtt for client in masked.records[1]["cohort"])
    assert more > (TRIPS_DOWN + TRIPS_UP) * slowest


def test_real_nodes_have_a_clock_of_their_own(tmp_path: Path) -> None:
    played = play({"clock.profile": "lan"})
    grid = DeploymentGrid(merge({"run.clients": 2, "run.cohort": 2}))
    callback = type("Callback", (), {"recorder": type("Recorder", (), {"folder": tmp_path, "metric": None})})
    with pytest.raises(ConfigError, match=r"clock\.profile is 'lan'; it is empty on real nodes"):
        server_context(grid, played.runtime, callback(), None)  # type: ignore[arg-type]
