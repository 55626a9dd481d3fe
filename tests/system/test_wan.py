"""The wide-area benchmark without root: the relay keeps order and bytes, and the summaries keep sums."""

import io
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.wan import measure, table
from benchmarks.wan.delay import PACKET, SYN, VNET_HEADER, Line, Relay
from benchmarks.wan.delay import measure as sizes
from ssfl_app.core.clock import PROFILES

law = settings(deadline=None, derandomize=True, max_examples=60)


def packet(content: bytes, source: int = 40_000, target: int = 8443, flags: int = 24, piece: int = 0) -> bytes:
    """Return an IPv4 TCP packet with 12 bytes of options behind a virtio header."""
    header = struct.pack("<BBHHHH", 0, 1 if piece else 0, 0, piece, 0, 0)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + 32 + len(content), 0, 0, 64, 6, 0, b"\n\1\1\1", b"\n\1\1\2")
    tcp = struct.pack(">HHIIBBHHH", source, target, 0, 0, 8 << 4, flags, 0, 0, 0) + bytes(12)
    return header + ip + tcp + content


class Wires:
    """A line between two pairs of sockets that keep packets apart, and a clock that a wait moves on."""

    def __init__(self, delay: float) -> None:
        self.sender, source = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sink, self.receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (source, sink, self.receiver):
            end.setblocking(False)
        self._ends = source, sink
        self.now, self.log = 100.0, io.BytesIO()
        self.relay = Relay([Line(source.fileno(), sink.fileno(), delay)], self.log, lambda: self.now, self._wait)

    def _wait(self, sources: list[int], *rest: object) -> tuple[list[int], list[int], list[int]]:
        self.now += float(rest[-1])  # type: ignore[arg-type]
        return sources, [], []

    def received(self) -> list[bytes]:
        found = []
        while True:
            try:
                content = self.receiver.recv(1 << 17)
            except BlockingIOError:
                return found
            found.append(content)

    def close(self) -> None:
        for end in (self.sender, self.receiver, *self._ends):
            end.close()


@pytest.fixture
def wires() -> Iterator[Wires]:
    made = Wires(0.05)
    yield made
    made.close()


def test_relay_hands_packets_over_in_order_unchanged_and_not_early(wires: Wires) -> None:
    sent = [packet(os.urandom(size)) for size in (0, 1, 1448, 9000, 3)]
    for content in sent:
        wires.sender.send(content)
    wires.relay.lines[0].take(began := wires.now)
    wires.now += 0.0499
    assert wires.relay.lines[0].give(wires.now) == []
    assert wires.received() == []
    for _ in range(3):
        wires.relay.turn()
    assert wires.now - began >= 0.05
    assert wires.received() == sent
    log = np.frombuffer(wires.log.getvalue(), PACKET)
    assert (log["left"] - log["came"] >= 0.0499).all()
    assert log["stream"].tolist() == [0, 1, 1448, 9000, 3]
    assert log["raw"].tolist() == [len(content) - VNET_HEADER for content in sent]


def test_relay_waits_for_a_full_receiver_and_drops_nothing() -> None:
    wires = Wires(0.0)
    sent = [packet(bytes([number]) * 9000) for number in range(60)]
    found: list[bytes] = []
    try:
        for content in sent:  # more than a socket's buffer takes at once
            wires.sender.send(content)
            wires.relay.turn()
        assert wires.relay.lines[0].waiting
        for _ in range(len(sent)):
            found += wires.received()
            wires.relay.turn()
        found += wires.received()
    finally:
        wires.close()
    assert found == sent


def test_relay_ends_when_the_source_is_gone_and_its_packets_are_through(wires: Wires) -> None:
    wires.relay.run(lambda: True)  # told to end
    assert not wires.relay.lines[0].over
    wires.sender.send(packet(b"last"))
    wires.sender.close()
    wires.relay.run(lambda: False)
    assert len(wires.received()) == 1
    assert wires.relay.lines[0].over


@law
@given(st.integers(0, 15_000), st.integers(500, 1448))
def test_wire_bytes_are_those_of_the_packets_that_a_large_one_is_cut_into(size: int, piece: int) -> None:
    whole = packet(bytes(size), piece=piece)
    cut = [packet(bytes(min(piece, size - at))) for at in range(0, size, piece)] or [packet(b"")]
    wire = sum(len(part) - VNET_HEADER for part in cut)
    assert sizes(whole)[:4] == (40_000, len(whole) - VNET_HEADER, wire, size)


def test_what_is_no_tcp_counts_as_it_is() -> None:
    assert sizes(bytes(VNET_HEADER) + b"\x60" + bytes(50)) == (0, 51, 51, 0, 0)
    assert sizes(packet(b"", flags=SYN))[4] == SYN


# ---- summaries ---------------------------------------------------------------------------------


def packets(rows: list[tuple[float, int, int, int]], delay: float = 0.04) -> measure.Packets:
    """Return packets of (came, line, port, stream) with 52 bytes of headers each."""
    made = np.zeros(len(rows), PACKET)
    for record, (came, line, port, stream) in zip(made, rows, strict=True):
        record["came"], record["left"], record["line"], record["port"] = came, came + delay, line, port
        record["stream"], record["wire"], record["raw"] = stream, stream + 52, stream + 52
    return made


def test_transfers_are_read_from_the_log_of_each_site() -> None:
    said = [
        (1.0, 0, "INFO :  Receiving: train message (ID: a)"),
        (1.5, 1, "INFO :  Receiving: query.hello message (ID: b)"),
        (2.0, 0, "INFO :  Received successfully"),
        (2.1, None, '{"round": 0}'),
        (2.5, 1, "INFO :  Received successfully"),
        (3.0, 0, "INFO :  Sending: train message (ID: c)"),
        (4.0, 0, "INFO :  Sent successfully"),
        (5.0, 0, "INFO :  Receiving: train message (ID: d)"),
        (6.0, 0, "INFO :  Received successfully"),
        (7.0, 1, "INFO :  Sending: query.hello message (ID: e)"),
    ]
    lines = [measure.Line(*row) for row in said]
    found = [(t.site, t.direction, t.kind, t.number, t.begin, t.end) for t in measure.transfers(lines)]
    assert found == [
        (0, "down", "train", 1, 1.0, 2.0),
        (1, "down", "query.hello", 1, 1.5, 2.5),
        (0, "up", "train", 1, 3.0, 4.0),
        (0, "down", "train", 2, 5.0, 6.0),
    ]
    assert measure.round_ends(lines) == [2.1]


@law
@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 3), st.integers(0, 9000)), max_size=40), st.floats(0, 10))
def test_totals_of_two_halves_are_the_whole(rows: list[tuple[float, int, int]], cut: float) -> None:
    made = packets([(came, line, 1, stream) for came, line, stream in rows])
    whole, left, right = (measure.totals(made, ["a", "b"], *span) for span in ((0, 11), (0, cut), (cut, 11)))
    for site in whole:
        for way in ("up", "down"):
            for key in ("stream", "wire", "raw"):
                assert whole[site][way][key] == left[site][way][key] + right[site][way][key]
    assert sum(s[w]["stream"] for s in whole.values() for w in s) == sum(stream for *_, stream in rows)


@law
@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 20_000)), max_size=60))
def test_busy_time_is_at_most_the_span_and_at_most_what_the_bytes_allow(rows: list[tuple[float, int]]) -> None:
    times, bytes_ = np.array([t for t, _ in rows]), np.array([b for _, b in rows])
    found = measure.busy(times, bytes_)
    assert found <= (np.ptp(times) if len(rows) else 0) + measure.BIN * 1.001
    assert found <= measure.BIN * (bytes_.sum() / measure.BUSY_BYTES)


def test_a_summary_counts_one_site_one_window_and_each_question_once() -> None:
    up, down = 2, 3  # of site 1
    made = packets(
        [
            (9.0, up, 7, 500),  # before
            (10.0, up, 7, 300),  # a request of one connection
            (10.1, down, 7, 200),
            (10.2, up, 7, 60_000),  # a second, in two packets
            (10.21, up, 7, 40_000),
            (10.4, down, 7, 100),
            (10.2, up, 8, 900),  # another connection
            (10.5, down, 8, 100),
            (10.3, 0, 7, 9999),  # another site
            (12.0, down, 7, 100),  # after
        ]
    )
    made["new"][6] = 1
    told = measure.summarise(measure.Transfer(1, "up", "train", 2, 10.0, 11.0), made, 100_000)
    assert told["stream_bytes"] == 300 + 60_000 + 40_000 + 900
    assert told["wire_bytes"] == told["stream_bytes"] + 4 * 52
    assert told["back_stream_bytes"] == 400
    assert (told["exchanges"], told["connections"], told["seconds"]) == (3, 1, 1.0)
    assert told["first_to_last_byte"] == pytest.approx(0.25)
    assert told["busy_seconds"] == pytest.approx(0.02)


def test_a_timeline_keeps_all_bytes() -> None:
    made = packets([(10.0 + 0.01 * i, i % 2, 7, 1000) for i in range(90)])
    line = measure.timeline(measure.Transfer(0, "up", "train", 1, 10.0, 11.0), made, 0.05)
    assert sum(line["sent_kb"]) + sum(line["got_kb"]) == pytest.approx(90)


def test_the_table_is_made_of_the_record_alone(tmp_path) -> None:
    def case(strategy: str, density: float, payload: int, seconds: float) -> dict:
        def moved(way: str) -> dict:
            told = {"site": 0, "round": 2, "direction": way, "payload": payload, "seconds": seconds}
            told |= {"busy_seconds": seconds / 2, "stream_bytes": payload * 2, "wire_bytes": payload * 3}
            return told | {"connections": 1, "exchanges": 8}

        round_ = {
            "seconds": 9.0,
            "computing_seconds": [3.0],
            "transfers": [moved("up"), moved("down")],
            "bytes": {"a": {way: {"wire": payload * 4, "stream": payload * 3} for way in ("up", "down")}},
            "slowest_upload": {"site": 0, "step": 0.05, "connections_at": [0.1], "sent_kb": [1.0], "got_kb": [0.5]},
        }
        told = {"model": "resnet110", "strategy": strategy, "density": density, "date": "2026-01-01"}
        told |= {"load_before": 1.0, "load_after": 2.0, "lateness_ms": {"mean": 0.1, "p99": 0.2, "max": 0.3}}
        told |= {"environment": {"cores": 2, "cpu": "x", "flwr": "1", "torch": "2"}}
        return told | {"rounds": [round_, round_ | {"seconds": None}]}

    links = {"sites": {"a": {"rtt_ms": 90, "measured_ms": 91.0}}, "rate_mbit": 50, "kernel": "6", "delay": "relay"}
    links |= {"congestion_control": "cubic", "slow_start_after_idle": 0}
    known = {"links": links, "cases": {"1": case("fedavg", 1.0, 8_000_000, 2.0), "2": case("ssfl", 0.1, 10**6, 0.25)}}
    table.write_table(json.loads(json.dumps(known)), tmp_path / "wan.md")
    text = (tmp_path / "wan.md").read_text()
    assert "| resnet110 | 0.1 | 8.000 -> 1.000 | 8.00 x | 2.00 -> 0.25 | 8.00 x |" in text
    assert "100.0 %, NOT met" in text
    assert "gather 8.00 x, met" in text


RECORD = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "wan.json").read_text())


@pytest.mark.parametrize("name", RECORD["cases"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_the_simulated_clock_tells_measured_transfers_within_a_fifth(name: str, way: str) -> None:
    """One number of round trips each way and one overhead, for payloads from 0.2 to 45 MB."""
    case = RECORD["cases"][name]
    assert table.simulated(RECORD, case, way) == pytest.approx(table.gather(case, way=way), rel=0.2)


def test_the_profile_wan_is_the_record() -> None:
    rows = PROFILES["wan"].rows
    assert [(row.down, row.up) for row in rows] == [(site.down, site.up) for site in table.sites(RECORD)]
    assert [row.rtt for row in rows] == pytest.approx([site.rtt for site in table.sites(RECORD)], abs=1e-5)


def test_a_page_gets_the_tables_between_its_marks_and_keeps_the_rest() -> None:
    text = "before\n<!-- times -->\nold\n<!-- end times -->\nafter <!-- goals -->"
    once = table.fill(text, {"times": "new", "goals": "none", "absent": "x"})
    assert once == "before\n<!-- times -->\n\nnew\n\n<!-- end times -->\nafter <!-- goals -->"
    assert table.fill(once, {"times": "new"}) == once
