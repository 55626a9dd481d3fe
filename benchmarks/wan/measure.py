"""What happened on the links: events from Flower's own logs by our clock, and the packets between them."""

import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.wan.delay import PACKET

TICK = 0.004
"""Seconds between looks at the logs: how exact events are."""

BIN = 0.01
BUSY_BYTES = 3000
"""A link is busy in those `BIN` seconds in which more than two full packets pass; 62,500 bytes would be its rate."""

Packets = npt.NDArray[Any]
Summary = dict[str, Any]

# What a SuperNode says (Flower 1.41) around the two transfers of a message.
_MARKS = {
    "Receiving:": ("down", "begin"),
    "Received successfully": ("down", "end"),
    "Sending:": ("up", "begin"),
    "Sent successfully": ("up", "end"),
}
_KIND = re.compile(r"(?:Receiving|Sending): (\S+) message")


@dataclass(frozen=True)
class Line:
    """A line that somebody added to a log, and when we saw it; `site` is None for the server's record of rounds."""

    time: float
    site: int | None
    text: str


@dataclass(frozen=True)
class Transfer:
    """A message on its way between the SuperLink and one SuperNode, as the SuperNode tells it."""

    site: int
    direction: str  # down or up
    kind: str  # train, evaluate, query.saliency, ...
    number: int  # counts transfers of this kind and direction at this site, from 1: the round of a train message
    begin: float
    end: float


@dataclass
class Watch:
    """Follows growing files and notes when each line came; a context manager."""

    files: dict[Path, int | None]
    lines: list[Line] = field(default_factory=list)

    def __enter__(self) -> "Watch":
        self._stop = threading.Event()
        self._at = {path: path.stat().st_size if path.exists() else 0 for path in self.files}
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.look()

    def _follow(self) -> None:
        while not self._stop.wait(TICK):
            self.look()

    def look(self) -> None:
        """Note the whole lines that were added since the last look."""
        for path, site in self.files.items():
            if not path.exists() or path.stat().st_size == self._at[path]:
                continue
            now = monotonic()
            with path.open("rb") as file:
                file.seek(self._at[path])
                content = file.read()
            content = content[: content.rfind(b"\n") + 1]
            self._at[path] += len(content)
            self.lines += [Line(now, site, text) for text in content.decode(errors="replace").splitlines()]


def transfers(lines: Iterable[Line]) -> Iterator[Transfer]:
    """Yield the transfers that SuperNodes tell of, each when it ended; one that never ended is left out."""
    began: dict[tuple[int, str], tuple[float, str]] = {}
    count: dict[tuple[int, str, str], int] = {}
    for line in lines:
        mark = next((mark for text, mark in _MARKS.items() if text in line.text), None)
        if mark is None or line.site is None:
            continue
        direction, what = mark
        if what == "begin":
            kind = _KIND.search(line.text)
            began[line.site, direction] = line.time, kind.group(1) if kind else "?"
        elif (line.site, direction) in began:
            begin, kind_ = began.pop((line.site, direction))
            key = (line.site, direction, kind_)
            count[key] = count.get(key, 0) + 1
            yield Transfer(line.site, direction, kind_, count[key], begin, line.time)


def round_ends(lines: Iterable[Line]) -> list[float]:
    """Return when the server recorded each round, setup (0) first."""
    return [line.time for line in lines if line.site is None]


def read_packets(log: Path, begin: int = 0) -> Packets:
    """Return the whole records of a packet log from its record `begin` on."""
    whole = log.stat().st_size // PACKET.itemsize
    with log.open("rb") as file:
        file.seek(begin * PACKET.itemsize)
        return np.fromfile(file, PACKET, max(0, whole - begin))


def between(packets: Packets, line: int, begin: float, end: float) -> Packets:
    """Return the packets of a line that came within [begin, end)."""
    times = packets["came"]
    return packets[(packets["line"] == line) & (times >= begin) & (times < end)]


def busy(times: npt.NDArray[np.float64], sizes: npt.NDArray[Any]) -> float:
    """Return the seconds in which bytes flowed: the bins of `BIN` seconds with more than `BUSY_BYTES`, added up."""
    if not len(times):
        return 0.0
    bins = ((times - times.min()) / BIN).astype(np.int64)
    return float(BIN * np.count_nonzero(np.bincount(bins, weights=sizes) > BUSY_BYTES))


def exchanges(there: Packets, back: Packets) -> int:
    """Return how often a connection was asked and answered, added over connections, as the asking side sees it.

    An exchange is a run of packets with content in one direction and then one in the other: a TLS handshake, or a
    request and its response. Each costs a round trip at least.
    """
    total = 0
    for port in np.unique(there["port"]):
        asked = there[(there["port"] == port) & (there["stream"] > 0)]["came"]
        answered = back[(back["port"] == port) & (back["stream"] > 0)]["left"]
        sides = np.concatenate([np.zeros(len(asked)), np.ones(len(answered))])
        order = sides[np.argsort(np.concatenate([asked, answered]), kind="stable")]
        total += int(np.count_nonzero(np.diff(order) == 1))
    return total


def summarise(transfer: Transfer, packets: Packets, payload: int) -> Summary:
    """Return what a transfer cost.

    Parameters
    ----------
    transfer : Transfer
    packets : array of PACKET
        Of all lines; line 2 i is what site i sends, line 2 i + 1 what it is sent.
    payload : int
        Bytes of the arrays in the message.
    """
    up_line, slack = 2 * transfer.site, 2 * TICK  # the log line may have been seen this much late
    sent = between(packets, up_line, transfer.begin - slack, transfer.end)
    got = between(packets, up_line + 1, transfer.begin - slack, transfer.end)
    main, back = (sent, got) if transfer.direction == "up" else (got, sent)
    full = main[main["stream"] > 0]
    span = float(full["left"].max() - full["came"].min()) if len(full) else 0.0
    return {
        "site": transfer.site,
        "round": transfer.number,
        "direction": transfer.direction,
        "payload": payload,
        "seconds": transfer.end - transfer.begin,
        "first_to_last_byte": span,
        "busy_seconds": busy(main["came"], main["wire"]),
        "stream_bytes": int(main["stream"].sum()),
        "wire_bytes": int(main["wire"].sum()),
        "back_stream_bytes": int(back["stream"].sum()),
        "back_wire_bytes": int(back["wire"].sum()),
        "connections": int(sent["new"].sum()),
        "exchanges": exchanges(sent, got),
    }


def timeline(transfer: Transfer, packets: Packets, step: float) -> Summary:
    """Return the bytes of a transfer in each `step` seconds, both ways, and when connections were begun."""
    sent, got = (between(packets, 2 * transfer.site + i, transfer.begin - 2 * TICK, transfer.end) for i in (0, 1))
    steps = int((transfer.end - transfer.begin) / step) + 1
    edges = transfer.begin - 2 * TICK + step * np.arange(steps + 2)
    kilobytes = {
        name: [round(float(b) / 1000, 1) for b in np.histogram(part["came"], edges, weights=part["stream"])[0]]
        for name, part in (("sent_kb", sent), ("got_kb", got))
    }
    begun = [round(float(t - transfer.begin), 3) for t in sent["came"][sent["new"] > 0]]
    return {"site": transfer.site, "step": step, "connections_at": begun, **kilobytes}


def totals(packets: Packets, sites: Sequence[str], begin: float, end: float) -> Summary:
    """Return all bytes on each site's link within [begin, end): messages, polling, heartbeats, acknowledgements."""
    return {
        name: {
            way: {
                key: int(between(packets, 2 * number + side, begin, end)[key].sum())
                for key in ("stream", "wire", "raw")
            }
            for side, way in enumerate(("up", "down"))
        }
        for number, name in enumerate(sites)
    }
