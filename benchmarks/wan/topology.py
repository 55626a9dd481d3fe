"""Five sites and a server as network namespaces, joined by TUN devices: rate by tc, round trips by `delay`.

Each site has a device ``wan`` in its namespace and one in the server's. Whatever a site sends leaves its device
through a token bucket, is read by the relay, and is written to the server's device half a round trip later; and
back. Nothing else connects the namespaces, to each other or to the machine's network.
"""

import ctypes
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.wan.delay import FLUSH
from ssfl_app import locks

PREFIX = "ssfl-wan-"
SERVER = PREFIX + "server"
SERVER_ADDRESS = "10.77.255.1"
RATE_MBIT, BURST, QUEUE_MS = 50, 32_000, 200
LARGE_PACKET = 16_000  # bytes handed over at once; below the bucket's size, so that tc need not cut them
CONGESTION = (
    "cubic"  # Linux's default; set for each route, since a namespace may not choose what its kernel restricts
)
SLOW_START_AFTER_IDLE = 0
"""Of Linux, whose default is 1: a connection that carried nothing for a fraction of a second starts slowly again."""
ROOT = Path(__file__).resolve().parents[2]

# A refused connection takes a round trip as well, so nobody need listen.
_CONNECT = """
import socket, sys, time
times = []
for _ in range(5):
    began = time.monotonic()
    socket.socket().connect_ex((sys.argv[1], 9))
    times.append(time.monotonic() - began)
print(1000 * min(times))
"""
_NEW_NET = 0x40000000
_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
_TUN, _NO_PI, _VNET_HDR = 0x0001, 0x1000, 0x4000
_CSUM, _TSO4 = 1, 2


@dataclass(frozen=True)
class ClientContext:
    """A place with one client: its name and its round-trip time to the server in milliseconds."""

    name: str
    rtt: float

    @property
    def namespace(self) -> str:
        """Name of its network namespace."""
        return PREFIX + self.name


SITES = (
    ClientContext("n-virginia", 0.0),
    ClientContext("ohio", 12.0),
    ClientContext("oregon", 88.0),
    ClientContext("london", 76.0),
    ClientContext("frankfurt", 91.0),
)
"""Published averages between cloud regions; Ohio is estimated. The server is in N. Virginia."""


def enter(namespace: str) -> None:
    """Move this thread, and what it starts from now on, to a network namespace."""
    with Path("/run/netns", namespace).open() as file:
        _setns(file.fileno())


def inside(namespace: str, command: list[str]) -> list[str]:
    """Return the command that runs `command`, whose first word is absolute, in a namespace."""
    return ["/usr/bin/env", "ip", "netns", "exec", namespace, *command]


class WideArea:
    """The namespaces, devices and relay; a context manager that removes them all.

    Parameters
    ----------
    sites : tuple of Site
        One or more.
    log : Path
        File of the relay's packet log. Line 2 i is what site i sends, line 2 i + 1 what it is sent.
    window : int
        Packets that a new connection may send before the first acknowledgement; 0: the kernel's ten.
    """

    def __init__(self, sites: tuple[ClientContext, ...], log: Path, window: int = 0) -> None:
        self.sites, self.log = sites, log
        self._route = ["congctl", CONGESTION]
        if window:
            self._route += ["initcwnd", str(window), "initrwnd", str(window)]
        self._relay: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None

    def __enter__(self) -> "WideArea":
        self._lock = locks.try_lock(Path(tempfile.gettempdir(), "ssfl-wan.lock"))
        if self._lock is None:
            raise RuntimeError("another measurement is going on; its namespaces have the same names")
        try:
            clear()
            for name in (SERVER, *(site.namespace for site in self.sites)):
                _ip("netns", "add", name)
                _in(name, "ip", "link", "set", "lo", "up")
                _prepare(name)
            _in(SERVER, "ip", "addr", "add", f"{SERVER_ADDRESS}/32", "dev", "lo")
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        lines, descriptors = [], []
        for number, site in enumerate(self.sites):
            near, far = f"10.77.{number}.1", f"10.77.{number}.2"
            server = _tun(SERVER, device(number), near, far, self._route)
            node = _tun(site.namespace, "wan", far, near, self._route)
            _in(site.namespace, "ip", "route", "add", SERVER_ADDRESS, "via", near, "dev", "wan", *self._route)
            lines += [(node, server, site.rtt / 2000), (server, node, site.rtt / 2000)]
            descriptors += [server, node]
        command = [sys.executable, "-P", "-m", "benchmarks.wan.delay", json.dumps(lines), str(self.log)]
        self._relay = subprocess.Popen(
            command,
            cwd=ROOT,
            pass_fds=descriptors,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        for descriptor in descriptors:
            os.close(descriptor)
        time.sleep(5 * FLUSH)
        self.check()

    def check(self) -> None:
        """Raise RuntimeError if the relay has ended."""
        if self._relay is None or self._relay.poll() is not None:
            raise RuntimeError("the relay between the namespaces has ended")

    def round_trip(self, site: ClientContext) -> float:
        """Return how long a TCP connection from a site to the server takes, the least of a few, in milliseconds."""
        words = [sys.executable, "-P", "-c", _CONNECT, SERVER_ADDRESS]
        command = inside(site.namespace, words)
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def close(self) -> None:
        """End the relay, what still runs in the namespaces, and the namespaces."""
        if self._relay is not None:
            self._relay.terminate()
            self._relay.wait()
            self._relay = None
        clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def device(number: int) -> str:
    """Return the name of the server's device towards site `number`."""
    return f"site{number}"


def clear() -> None:
    """Remove our namespaces and end what runs in them, also those that a killed run left behind."""
    folder = Path("/run/netns")
    names = [path.name for path in folder.glob(PREFIX + "*")] if folder.exists() else []
    for name in names:
        said = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
        for pid in {int(word) for word in said.split()} - {os.getpid()}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", name], check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _in(namespace: str, *words: str) -> None:
    subprocess.run(inside(namespace, list(words)), check=True)


def _prepare(namespace: str) -> None:
    """Set what a host of today has, windows that grow beyond the bandwidth-delay product; and no IPv6 chatter.

    And what docs/deployment.md advises: a connection that was idle keeps its window (`SLOW_START_AFTER_IDLE`).
    """
    settings = {
        "net/ipv4/tcp_rmem": "4096 131072 33554432",
        "net/ipv4/tcp_wmem": "4096 65536 33554432",
        "net/ipv4/tcp_slow_start_after_idle": str(SLOW_START_AFTER_IDLE),
        "net/ipv6/conf/all/disable_ipv6": "1",
        "net/ipv6/conf/default/disable_ipv6": "1",
    }
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        enter(namespace)
        for name, value in settings.items():
            Path("/proc/sys", name).write_text(value)
    finally:
        _setns(before)
        os.close(before)


def _tun(namespace: str, name: str, address: str, peer: str, route: list[str]) -> int:
    """Make a TUN device with a rate limit in a namespace; return its descriptor. It lives as long as that is open."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        enter(namespace)
        descriptor = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TUN | _NO_PI | _VNET_HDR))
        fcntl.ioctl(descriptor, _TUNSETVNETHDRSZ, struct.pack("i", 10))
        fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _CSUM | _TSO4)
        _ip("addr", "add", f"{address}/32", "dev", name)
        size = str(LARGE_PACKET)
        _ip("link", "set", name, "mtu", "1500", "txqueuelen", "10000", "gso_max_size", size)
        bucket = ["rate", f"{RATE_MBIT}mbit", "burst", str(BURST), "latency", f"{QUEUE_MS}ms"]
        subprocess.run(["tc", "qdisc", "add", "dev", name, "root", "tbf", *bucket], check=True)
        _ip("link", "set", name, "up")
        _ip("route", "add", peer, "dev", name, *route)
        return descriptor
    finally:
        _setns(before)
        os.close(before)


def _setns(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _NEW_NET):
        raise OSError(ctypes.get_errno(), "setns")
