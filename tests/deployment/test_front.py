"""The front of a SuperLink: what it passes, as what, and what it refuses. Behind it is a server that takes notes."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from ssfl_app.deployment import credentials
from ssfl_app.deployment import front as federation_front
from ssfl_app.deployment.front import onwards, passes, server
from ssfl_app.simulation.processes import free_port

CALL = "/v1/fleet/push-object"


def test_of_all_calls_that_flower_has_the_fleets_pass_and_no_other() -> None:
    routes = list(PROTOBUF_REQUEST_TYPES)
    assert {path.split("/")[2] for _, path in routes} == {"fleet", "control", "runtime"}
    for method, path in routes:
        assert passes(method, path.encode(), b"") is path.startswith("/v1/fleet/"), path


TRICKY = [
    "/v1/control/start-run",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol/start-run",
    "/v1/fleet%2f..%2fcontrol/start-run",
    "/v1/fleet/../../v1/runtime/get-nodes",
    "//v1/fleet/get-run",
    "/v1//fleet/get-run",
    "/v1/fleet//get-run",
    "/v1/fleet//../control/start-run",
    "/v1/fleet/get-run/",
    "/v1/fleet/get-run/../../control/start-run",
    "/v1/fleet/get-run;/../../control/start-run",
    "/v1/fleet/.",
    "/v1/fleet/",
    "/v1/fleet",
    "/V1/fleet/get-run",
    "/v1/%66leet/get-run",
    "/v1/fleet/get%2drun",
    "/v1/fleet/get-run%00",
    "/v1/fleet/get-run%0d%0a",
    "/v1/fleet/get-run#/../../control/start-run",
    "/v1/fleet\\..\\control\\start-run",
    "/v1/fleet/get-run?x=1",
    "https://127.0.0.1/v1/control/start-run",
    "https://127.0.0.1/v1/fleet/get-run",
    "/health",
    "/docs",
    "/openapi.json",
    "/",
    "*",
]


@pytest.mark.parametrize("target", TRICKY)
def test_what_could_mean_anything_else_does_not_pass(target: str) -> None:
    path, _, query = target.encode().partition(b"?")
    assert not passes("POST", path, query)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE", "post"])
def test_nodes_have_one_method(method: str) -> None:
    assert passes("POST", CALL.encode(), b"")
    assert not passes(method, CALL.encode(), b"")


def test_headers_prove_the_node_and_say_who_asked() -> None:
    proof = [(b"flwr-public-key", b"k"), (b"flwr-signature", b"s"), (b"content-type", b"application/x-protobuf")]
    lies = [(b"x-forwarded-for", b"10.0.0.1"), (b"forwarded", b"for=10.0.0.1"), (b"host", b"other")]
    hop = [(b"connection", b"close, X-Drop"), (b"x-drop", b"1"), (b"te", b"trailers"), (b"upgrade", b"websocket")]
    length = (b"content-length", b"5")
    assert onwards([*proof, *lies, *hop, length], "10.9.8.7") == [*proof, length, (b"x-forwarded-for", b"10.9.8.7")]
    # A length beside chunks is one that two servers may read in two ways.
    assert length not in onwards([length, (b"transfer-encoding", b"chunked")], "10.9.8.7")


# ---- real sockets -------------------------------------------------------------------------------


class Notes:
    """Answers as Flower might, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[bytes, bytes], bytes]] = []
        self.done = threading.Event()  # an answer was taken whole

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":  # as Flower: what breaks off is no request
                return
            body, more = body + event.get("body", b""), event.get("more_body", False)
        self.asked.append((scope["path"], dict(scope["headers"]), body))
        await send({"type": "http.response.start", "status": 418, "headers": [(b"x-flower", b"1")]})
        for part in (body[: len(body) // 2], body[len(body) // 2 :]):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        self.done.set()


@contextmanager
def serving(made: uvicorn.Server) -> Iterator[None]:
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    while not made.started:
        assert thread.is_alive()
        thread.join(0.01)
    try:
        yield
    finally:
        made.should_exit = made.force_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("front")
    credentials.make_authority(folder)
    credentials.make_server(folder, ["localhost", "127.0.0.1"], timedelta(days=1))
    return folder / "superlink"


@pytest.fixture
def field(home: Path) -> Iterator[tuple[httpx.Client, Notes, int]]:
    """Return a client of a front, the notes of who is behind it, and the front's port."""
    notes, port, inner = Notes(), free_port(), free_port()
    files = {"ssl_certfile": home / "server.pem", "ssl_keyfile": str(home / "server.key")}
    behind = uvicorn.Server(uvicorn.Config(notes, port=inner, lifespan="off", log_level="error", **files))
    trusted = ssl.create_default_context(cafile=str(home / "ca.crt"))
    with (
        serving(behind),
        serving(server(home, "127.0.0.1", port, inner)),
        httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted, trust_env=False) as client,
    ):
        yield client, notes, port


def raw(home: Path, port: int, text: bytes) -> bytes:
    """Return all that a front says to these very bytes, until it hangs up."""
    trusted = ssl.create_default_context(cafile=str(home / "ca.crt"))
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as plain,
        trusted.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        secure.sendall(text)
        said = b""
        while part := secure.recv(65536):
            said += part
        return said


def test_bodies_headers_and_answers_go_through_as_they_are(field: tuple[httpx.Client, Notes, int]) -> None:
    client, notes, _ = field
    body = bytes(range(256)) * 20_000  # 5 MB
    answer = client.post(CALL, content=body, headers={"flwr-signature": "s"})
    assert (answer.status_code, answer.headers["x-flower"], answer.content) == (418, "1", body)
    client.post(CALL, content=iter([b"in ", b"chunks"]))
    (path, headers, whole), (_, other, chunks) = notes.asked
    assert (path, whole, chunks) == (CALL, body, b"in chunks")
    assert headers[b"content-length"] == str(len(body)).encode()
    assert b"content-length" not in other
    assert headers[b"flwr-signature"] == b"s"
    assert headers[b"x-forwarded-for"] == b"127.0.0.1"
    assert client.post(CALL, content=b"").status_code == 418


def test_what_is_refused_does_not_reach_flower(field: tuple[httpx.Client, Notes, int], home: Path) -> None:
    client, notes, port = field
    assert client.post("/v1/control/start-run", content=b"x" * 1_000_000).status_code == 404
    for target in TRICKY:
        said = raw(home, port, f"POST {target} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".encode())
        assert said.split()[1] in (b"404", b"400"), target
    hidden = b"POST /v1/control/start-run HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
    twice = b"POST %s HTTP/1.1\r\nHost: a\r\n%s\r\n0\r\n\r\n" % (
        CALL.encode(),
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n" % (5 + len(hidden)),
    )
    said = raw(home, port, twice + hidden)
    assert b"404" in said or b"400" in said
    assert b"start-run" not in b"".join(body for _, _, body in notes.asked)
    assert {path for path, _, _ in notes.asked} <= {CALL}


def test_a_body_larger_than_any_message_is_not_passed_on(
    field: tuple[httpx.Client, Notes, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, notes, _ = field
    monkeypatch.setattr(federation_front, "MOST_BODY", 1000)
    assert client.post(CALL, content=b"x" * 1000).status_code == 418
    assert client.post(CALL, content=b"x" * 1001).status_code == 408
    assert [len(body) for _, _, body in notes.asked] == [1000]


@pytest.mark.parametrize(
    "text", [b"", b"POST /v1/fl", b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc"]
)
def test_who_falls_silent_is_cut_off(
    text: bytes, field: tuple[httpx.Client, Notes, int], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federation_front, "PATIENCE", 0.2)
    said = raw(home, field[2], text)  # returns at all
    assert said[:12] in (b"", b"HTTP/1.1 408")
    assert not field[1].asked


def test_who_does_not_read_is_cut_off(
    field: tuple[httpx.Client, Notes, int], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federation_front, "PATIENCE", 0.5)
    body = bytes(30_000_000)  # more than all buffers on the way
    trusted = ssl.create_default_context(cafile=str(home / "ca.crt"))
    with socket.socket() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.settimeout(20)
        plain.connect(("127.0.0.1", field[2]))
        with trusted.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
            secure.sendall(b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (CALL.encode(), len(body)))
            secure.sendall(body)
            assert field[1].done.wait(10)  # Flower is rid of it
            said = 0
            with suppress(OSError):  # reset, or TLS without an end
                while part := secure.recv(65536):
                    said += len(part)
    assert 0 < said < len(body)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_strangers_do_not_fill_the_log(
    field: tuple[httpx.Client, Notes, int],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(federation_front.log, "propagate", True)
    for _ in range(5):
        assert field[0].post("/v1/control/start-run").status_code == 404
        assert b" 400 " in raw(home, field[2], b"what\r\n\r\n")
    assert [line.split()[0] for line in warnings(caplog)] == ["refused", "Invalid"]
    monkeypatch.setattr(federation_front, "QUIET", 0.0)
    assert field[0].get("/").status_code == 404
    assert warnings(caplog)[-1] == "refused GET b'/' from 127.0.0.1 (and 4 more like it before)"


def test_nodes_try_again_while_flower_is_away(home: Path) -> None:
    port = free_port()
    trusted = ssl.create_default_context(cafile=str(home / "ca.crt"))
    with (
        serving(server(home, "127.0.0.1", port, free_port())),
        httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted, trust_env=False) as client,
    ):
        assert client.post(CALL, content=b"x").status_code == 502
