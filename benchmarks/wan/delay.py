"""The wide area between TUN devices: every IP packet is handed over a fixed time after it came, in order, none lost.

What netem would do in the kernel, for kernels without it. TCP at both ends sees the delay as a long wire: handshakes,
slow start and acknowledgements take the round trips they would take. The rate limit is not made here but by tc on the
two devices, before a packet comes.

`topology.WideArea` starts this file as a process of its own; what passed goes into a binary log of `PACKET` records.
"""

import gc
import json
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

VNET_HEADER = 10  # struct virtio_net_hdr, before each packet of a device that was opened with IFF_VNET_HDR
LARGEST = 1 << 17
FLUSH = 0.1  # seconds after which the log is on disk
SYN = 2
TCP = 6

PACKET = np.dtype(
    [
        ("came", "<f8"),  # monotonic clock: read from the sender's device, that is after its rate limit
        ("left", "<f8"),  # written to the receiver's device
        ("line", "<u2"),  # which of the lines, in the order they were given
        ("port", "<u2"),  # the larger of the two ports: the node's, which names the connection
        ("raw", "<u4"),  # bytes as the device counts them: a large packet is counted with one header
        ("wire", "<u4"),  # bytes of IP packets on a real wire: a large packet would be cut, a header for each part
        ("stream", "<u4"),  # bytes that TCP carries in it: TLS records and handshakes, again if sent again
        ("flags", "u1"),  # of TCP
        ("new", "u1"),  # whether this is a SYN without ACK
        ("spare", "<u2"),
    ]
)


def measure(packet: bytes) -> tuple[int, int, int, int, int]:
    """Return (port, raw, wire, stream, flags) of an IPv4 packet behind its virtio header; zeros if it is not TCP."""
    raw = len(packet) - VNET_HEADER
    first = packet[VNET_HEADER]
    if first >> 4 != 4 or packet[VNET_HEADER + 9] != TCP:
        return 0, raw, raw, 0, 0
    tcp = VNET_HEADER + 4 * (first & 15)
    headers = tcp - VNET_HEADER + 4 * (packet[tcp + 12] >> 4)
    stream = int.from_bytes(packet[VNET_HEADER + 2 : VNET_HEADER + 4], "big") - headers
    piece = int.from_bytes(packet[4:6], "little") if packet[1] else 0  # gso_size: the kernel left the cutting to us
    parts = max(1, -(-stream // piece)) if piece else 1
    ports = int.from_bytes(packet[tcp : tcp + 2], "big"), int.from_bytes(packet[tcp + 2 : tcp + 4], "big")
    return max(ports), raw, raw + (parts - 1) * headers, stream, packet[tcp + 13]


@dataclass
class Line:
    """One direction of one link: packets read from `source` are written to `sink` after `delay` seconds."""

    source: int
    sink: int
    delay: float
    waiting: "deque[tuple[float, bytes]]" = field(default_factory=deque)
    open: bool = True

    def take(self, now: float) -> None:
        """Read all packets that are there."""
        while True:
            try:
                packet = os.read(self.source, LARGEST)
            except BlockingIOError:
                return
            except OSError:  # the device is gone
                packet = b""
            if not packet:
                self.open = False
                return
            self.waiting.append((now, packet))

    @property
    def due(self) -> float:
        """When the next packet is to be handed over; infinite if none waits."""
        return self.waiting[0][0] + self.delay if self.waiting else float("inf")

    def give(self, now: float) -> list[tuple[float, bytes]]:
        """Write the packets whose time has come; return them with the times they came."""
        given = []
        while self.due <= now:
            came, packet = self.waiting[0]
            try:
                os.write(self.sink, packet)
            except BlockingIOError:
                break  # tried again in the next turn: nothing is dropped
            except OSError:
                self.open = False
                self.waiting.clear()
                break
            self.waiting.popleft()
            given.append((came, packet))
        return given

    @property
    def over(self) -> bool:
        """Whether the source has ended and all that came from it was handed over."""
        return not self.open and not self.waiting


class Relay:
    """Serves many lines in one thread.

    Parameters
    ----------
    lines : sequence of Line
        Descriptors that do not block.
    log : file
        Takes a `PACKET` for each packet handed over.
    clock, wait : callable
        Seconds; and ``select.select``, or something that behaves like it.
    """

    def __init__(
        self,
        lines: Sequence[Line],
        log: BinaryIO,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[..., tuple[list[int], list[int], list[int]]] = select.select,
    ) -> None:
        self.lines, self._log, self._clock, self._wait = lines, log, clock, wait
        self._flushed = clock()

    def turn(self) -> None:
        """Wait until a packet comes or is due, and deal with all that are."""
        sources = {line.source: line for line in self.lines if line.open}
        nap = min(line.due for line in self.lines) - self._clock()
        ready, _, _ = self._wait(list(sources), [], [], max(0.0, min(nap, FLUSH)))
        now = self._clock()
        for source in ready:
            sources[source].take(now)
        for number, line in enumerate(self.lines):
            for came, packet in line.give(self._clock()):
                self._note(number, came, packet)
        if now - self._flushed > FLUSH:
            self._log.flush()
            self._flushed = now

    def run(self, stopping: Callable[[], bool]) -> None:
        """Serve until told to stop or until all lines are over."""
        while not stopping() and not all(line.over for line in self.lines):
            self.turn()
        self._log.flush()

    def _note(self, number: int, came: float, packet: bytes) -> None:
        port, raw, wire, stream, flags = measure(packet)
        new = flags & SYN and not flags & 16
        record = (came, self._clock(), number, port, raw, wire, stream, flags, bool(new), 0)
        self._log.write(np.array(record, PACKET).tobytes())


def main() -> None:
    """Run as ``python -m benchmarks.wan.delay '[[source, sink, delay], ...]' LOG`` with open descriptors."""
    lines = [Line(int(source), int(sink), float(delay)) for source, sink, delay in json.loads(sys.argv[1])]
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this
    with suppress(OSError):  # before the training of five clients, as a wire would be
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    for line in lines:
        os.set_blocking(line.source, False)
    gc.disable()  # nothing here makes cycles; a collection would hold packets up
    with open(sys.argv[2], "wb", buffering=1 << 16) as log:  # noqa: PTH123
        Relay(lines, log).run(lambda: bool(stop))


if __name__ == "__main__":
    main()
