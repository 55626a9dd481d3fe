"""The front of a SuperLink: the TLS server that the network reaches. It passes what nodes say, and nothing else.

Flower 1.41 has one port for three APIs: Fleet (nodes), Control (start runs, register keys) and Runtime (processes of
a run), and its Control API lets every caller in. So Flower listens on the loopback interface only, and this front
forwards ``POST /v1/fleet/<call>`` to it: bodies as they come and go, headers as they are, since a node proves its
key in them. A path is compared as the bytes that came, before anybody decodes it, and no byte that could mean
something else to Flower is allowed in one.
"""

import asyncio
import logging
import re
import resource
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 60.0
"""Seconds that a request may take to begin, that either side may be silent in the middle of one, and that Flower may
take for its answer; nodes themselves give up after 30."""

CONNECTIONS = 2000
"""Connections at once; each has at most one more to Flower. A node keeps up to four; who comes when there are so many
is asked to come again (503)."""

KEEP_ALIVE = 130.0
"""Seconds that a node's connection may be idle: longer than nodes keep one themselves, so that none of them sends a
request on a connection that is being closed here."""

QUIET = 60.0
"""Seconds between two warnings of one kind: strangers cause them, and may not fill the disk with them."""

MOST_BODY = 2**31
"""Bytes of a request: protobuf, which all bodies are, has no larger message. Flower itself would read any number."""

_FLEET = re.compile(rb"/v1/fleet/[a-z]+(-[a-z]+)*")

_OURS = frozenset(
    # Of one connection, not of the request (RFC 9110, section 7.6.1); and who asked, which is not a caller's to say.
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding "
    b"upgrade expect host forwarded x-forwarded-for x-forwarded-host x-forwarded-proto x-real-ip".split()
)

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

log = logging.getLogger("uvicorn.error")


class _GoneError(Exception):
    """The caller went away, fell silent, or sends more than any message has."""


def passes(method: str, path: bytes, query: bytes) -> bool:
    """Return whether a request is one of a node; `path` is what came, undecoded."""
    return method == "POST" and not query and _FLEET.fullmatch(path) is not None


class Front:
    """The ASGI app; `inner` is Flower's ``https://127.0.0.1:<port>``, and `authority` signed Flower's certificate."""

    def __init__(self, inner: str, authority: Path) -> None:
        self._inner = inner
        # Environment variables do not say where it goes (trust_env): a proxy of the host is not for this.
        self._client = httpx.AsyncClient(
            verify=ssl.create_default_context(cafile=str(authority)),
            timeout=httpx.Timeout(PATIENCE, connect=5.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=CONNECTIONS, keepalive_expiry=3.0),
            trust_env=False,
        )

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if not passes(scope["method"], scope["raw_path"], scope["query_string"]):
            log.warning("refused %s %.80r from %s", scope["method"][:10], scope["raw_path"], _caller(scope))
            await _refuse(send, 404)
            return
        headers = onwards(scope["headers"], _caller(scope))
        url = self._inner + scope["raw_path"].decode("ascii")
        try:
            asked = httpx.Request("POST", url, headers=headers, content=_body(receive))
            answer = await self._client.send(asked, stream=True)
        except _GoneError:
            await _refuse(send, 408)
            return
        except httpx.TransportError as error:  # nodes try again after 502 and 504
            log.warning("Flower does not answer: %s", type(error).__name__)
            await _refuse(send, 504 if isinstance(error, httpx.TimeoutException) else 502)
            return
        try:
            back = [(name, value) for name, value in answer.headers.raw if name.lower() not in _OURS]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": back})
            async for part in answer.aiter_raw():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()


def onwards(headers: Iterable[tuple[bytes, bytes]], caller: str) -> Headers:
    """Return the headers of a request as they go on to Flower; names come in lower case."""
    given = list(headers)
    named = {word.strip().lower() for name, value in given if name == b"connection" for word in value.split(b",")}
    # A body in chunks says its own length. Two different lengths are how one request is smuggled in another.
    named |= {b"content-length"} if any(name == b"transfer-encoding" for name, _ in given) else set()
    kept = [(name, value) for name, value in given if name not in _OURS and name not in named]
    return [*kept, (b"x-forwarded-for", caller.encode())]  # Flower's log names the node, not the front


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    size, more = 0, True
    while more:
        try:
            event = await asyncio.wait_for(receive(), PATIENCE)
        except TimeoutError as error:
            raise _GoneError from error
        part = event.get("body", b"")
        size, more = size + len(part), event.get("more_body", False)
        if event["type"] == "http.disconnect" or size > MOST_BODY:
            raise _GoneError
        if part:
            yield part


def _caller(scope: Event) -> str:
    return str(scope["client"][0]) if scope.get("client") else "unknown"


async def _refuse(send: Send, status: int) -> None:
    # Closed: what else the caller sends on this connection is not read.
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


class Seldom(logging.Filter):
    """Lets one warning through in `QUIET` seconds from each line of code, with the number of those it held back."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, int], float] = {}
        self._held: dict[tuple[str, int], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is logged."""
        if record.levelno < logging.WARNING:
            return True
        kind, now = (record.pathname, record.lineno), time.monotonic()
        if kind in self._last and now - self._last[kind] < QUIET:
            self._held[kind] = self._held.get(kind, 0) + 1
            return False
        self._last[kind] = now
        if held := self._held.pop(kind, 0):
            record.msg, record.args = f"{record.getMessage()} (and {held} more like it before)", ()
        return True


class FrontProtocol(H11Protocol):
    """A connection that ends if it does not bring a whole request head, or does not take its answer, in time.

    Uvicorn would wait for ever for both.
    """

    _late: asyncio.TimerHandle
    _full: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of the head of a request, if that is what came."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._late.cancel()
        elif self._late.cancelled():
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._late.cancel()
        self._taken()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Wait for the caller to read: as much as it may was sent, and lies here."""
        super().pause_writing()
        # Not closed: that would first wait for the caller to take what lies here.
        if self._full is None or self._full.cancelled():
            self._full = self.loop.call_later(PATIENCE, self.transport.abort)

    def resume_writing(self) -> None:
        """Send on."""
        self._taken()
        super().resume_writing()

    def _wait(self) -> None:
        self._late = self.loop.call_later(PATIENCE, self.transport.close)

    def _taken(self) -> None:
        if self._full is not None:
            self._full.cancel()


def server(home: Path, bind: str, port: int, inner: int) -> uvicorn.Server:
    """Return the server that nodes reach at bind:port; its `run` serves until SIGTERM or SIGINT.

    `home` of the SuperLink has ``ca.crt``, ``server.pem`` and ``server.key``; `inner` is Flower's port on loopback.
    """
    config = uvicorn.Config(
        Front(f"https://127.0.0.1:{inner}", home / "ca.crt"),
        host=bind,
        port=port,
        ssl_certfile=home / "server.pem",
        ssl_keyfile=str(home / "server.key"),
        http=FrontProtocol,  # h11 is strict about what a request is, and bounds its head
        loop="asyncio",
        ws="none",
        lifespan="off",
        interface="asgi3",
        proxy_headers=False,
        server_header=False,
        date_header=False,
        access_log=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=int(KEEP_ALIVE),
        timeout_graceful_shutdown=5,
    )
    log.filters = [Seldom()]
    return uvicorn.Server(config)


def serve(home: Path, bind: str, port: int, inner: int) -> None:
    """Serve as `server` does, with as many open files as this account may have; exit with 1 if it cannot begin."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    made = server(home, bind, port, inner)
    made.run()
    if not made.started:
        sys.exit(1)
