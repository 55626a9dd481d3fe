import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from ssfl_app.options import ConfigError
from ssfl_app.results.live import LiveServer
from tests.results.test_report import SETUP, one_round

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def add(folder: Path, record: dict[str, Any]) -> None:
    with (folder / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a run that goes on: its second of twenty rounds is over."""
    folder = tmp_path / "run-7"
    folder.mkdir()
    config = {"strategy": "ssfl", "run": {"rounds": 20, "clients": 3, "cohort": 2}, "data": {"name": "digits"}}
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    for record in (SETUP, one_round(1, None, None), one_round(2, None, None)):
        add(folder, record)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[LiveServer]:
    with LiveServer([folder], 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


def ask(
    server: LiveServer, path: str = "/", method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, headers=headers or {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def test_the_page_grows_with_the_run(server: LiveServer, folder: Path) -> None:
    status, page, headers = ask(server)
    assert status == 200
    assert "run-7 is unfinished: 2 of 20 rounds" in page
    assert ask(server, headers={"If-None-Match": headers["ETag"]})[:2] == (304, "")
    add(folder, one_round(3, None, None))
    status, page, _ = ask(server, headers={"If-None-Match": headers["ETag"]})
    assert status == 200
    assert "run-7 is unfinished: 3 of 20 rounds" in page


def test_a_line_that_is_being_written_is_no_error(server: LiveServer, folder: Path) -> None:
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "coh')
    assert "2 of 20 rounds" in ask(server)[1]


def test_before_the_first_round_and_with_a_damaged_file_the_page_says_so(server: LiveServer, folder: Path) -> None:
    (folder / "rounds.jsonl").write_text("no <b>JSON</b>\n")
    status, page, _ = ask(server)
    assert (status, "rounds.jsonl line 1 is not JSON" in page) == (200, True)
    (folder / "rounds.jsonl").unlink()
    assert "a folder without rounds.jsonl" in ask(server)[1]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost."])
def test_another_host_is_refused(server: LiveServer, host: str) -> None:
    assert ask(server, headers={"Host": host.format(port=server.server_port)})[:2] == (421, "")


def test_localhost_is_this_host(server: LiveServer) -> None:
    assert ask(server, headers={"Host": f"localhost:{server.server_port}"})[0] == 200


@pytest.mark.parametrize("hosts", [b"", b"Host: 127.0.0.1:%d\r\nHost: evil.example\r\n"])
def test_no_host_or_two_are_refused(server: LiveServer, hosts: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as raw:
        line = hosts % server.server_port if hosts else hosts
        raw.sendall(b"GET / HTTP/1.1\r\n" + line + b"\r\n")
        assert raw.recv(100).split()[1] == b"421"


@pytest.mark.parametrize("path", ["/config.toml", "/../config.toml", "/?x", "/rounds.jsonl"])
def test_only_the_page_is_there(server: LiveServer, path: str) -> None:
    assert ask(server, path)[:2] == (404, "")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_only_get_is_answered(server: LiveServer, method: str) -> None:
    assert ask(server, method=method)[0] == 501


def test_no_other_page_may_frame_or_read_it(server: LiveServer) -> None:
    headers = ask(server)[2]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in headers


def test_it_listens_on_loopback_only(server: LiveServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_what_is_no_run_folder_and_a_port_that_is_taken_are_refused(
    server: LiveServer, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"is a folder without config.toml"):
        LiveServer([tmp_path], 0)
    with pytest.raises(ConfigError, match=f"--port is {server.server_port}; it is a port that is free here"):
        LiveServer([folder], server.server_port)


def test_the_command_serves_until_ctrl_c(folder: Path) -> None:
    line = [sys.executable, "-m", "ssfl_app", "report", "--serve", str(folder)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        told = process.stdout.readline()
        with urllib.request.urlopen(told.split()[1], timeout=30) as answer:
            assert b"2 of 20 rounds" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stdout.read() == "ended\n"
    finally:
        process.kill()
        process.wait()


class Browser:
    """Chromium without a window, told by its DevTools what to do."""

    def __init__(self, url: str, home: Path) -> None:
        assert CHROMIUM is not None
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += ["--remote-debugging-port=0", f"--user-data-dir={home}", "--window-size=800,300"]
        self.process = subprocess.Popen([CHROMIUM, *flags, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._file, self._count = home / "DevToolsActivePort", 0

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def open(self) -> None:
        from websockets.sync.client import connect

        wait(lambda: self._file.exists() and "\n" in self._file.read_text(), "DevTools")
        port = self._file.read_text().split()[0]

        def page() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
                found = [each for each in json.load(answer) if each["type"] == "page"]
            return str(found[0]["webSocketDebuggerUrl"]) if found else ""

        self._socket = connect(wait(page, "a page"), proxy=None, max_size=2**24)

    def run(self, script: str) -> Any:
        self._count += 1
        call = {"expression": script, "returnByValue": True}
        self._socket.send(json.dumps({"id": self._count, "method": "Runtime.evaluate", "params": call}))
        while (answer := json.loads(self._socket.recv(60))).get("id") != self._count:
            pass
        assert "exceptionDetails" not in answer["result"], answer
        return answer["result"]["result"].get("value")


def wait(found: Any, what: str) -> Any:
    end = time.monotonic() + 60
    while not (value := found()):
        assert time.monotonic() < end, f"no {what}"
        time.sleep(0.1)
    return value


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_shows_the_new_round_and_stays_where_it_is(
    server: LiveServer, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("websockets")
    with Browser(f"http://127.0.0.1:{server.server_port}/", tmp_path / "profile") as browser:
        browser.open()
        text = "document.body.innerText"
        wait(lambda: "2 of 20 rounds" in browser.run(f"document.body ? {text} : ''"), "page")
        browser.run("window.mine = 1; document.querySelector('details').open = true; scrollTo(0, 120)")
        time.sleep(1.5)  # the script has looked at least once, and found nothing new
        add(folder, one_round(3, None, None))
        wait(lambda: "3 of 20 rounds" in browser.run(text), "new round")
        assert browser.run("[window.mine, document.querySelector('details').open, scrollY]") == [1, True, 120]
        assert browser.run("document.querySelector('details table').rows.length") == 4
        (folder / "rounds.jsonl").write_text("<img src=x onerror='window.mine = 2'>\n")
        wait(lambda: "is not JSON" in browser.run(text), "damaged file")
        assert browser.run("window.mine") == 1
