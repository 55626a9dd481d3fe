"""The live page: the report of runs on loopback, made anew when their files changed.

Any page that a browser of this machine has open can send requests to its ports. So a request must name this server
as its host, which one that came through a name of somebody else's (DNS rebinding) does not, and nothing is answered
but GET of the page, with a policy that no other page may frame or read it.
"""

import hashlib
import re
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ssfl_app.options import ConfigError
from ssfl_app.results import page
from ssfl_app.results.report import report_page
from ssfl_app.results.run_folder import read_run

READ = ("config.toml", "rounds.jsonl", "summary.json", "clients.json", "mask.safetensors")
"""Files of a run folder that the page is made of."""

# It replaces what is shown and leaves the place in the page, and open tables, as they are.
SCRIPT = """
let tag = "";
async function look() {
  try {
    const answer = await fetch("/", { headers: { "If-None-Match": tag }, cache: "no-store" });
    if (answer.status === 200) {
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const open = [...document.querySelectorAll("details")].map((each) => each.open);
      page.querySelectorAll("details").forEach((each, i) => { each.open = open[i] || false; });
      const [x, y] = [scrollX, scrollY];
      if (tag) document.querySelector("main").replaceWith(document.adoptNode(page.querySelector("main")));
      tag = answer.headers.get("ETag");
      scrollTo(x, y);
    }
  } catch { /* the server has ended, or the machine sleeps */ }
  setTimeout(look, 1000);
}
look();
"""


class LivePage:
    """The page of some run folders, as bytes."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._lock, self._seen, self._made = threading.Lock(), object(), b""

    def get(self) -> bytes:
        """Return the page, made anew if a file has changed."""
        with self._lock:
            seen = [_stamp(folder / name) for folder in self._folders for name in READ]
            if seen != self._seen:
                self._made, self._seen = self._render().encode(), seen
            return self._made

    def _render(self) -> str:
        try:
            made = report_page([read_run(folder) for folder in self._folders])
        except ConfigError as error:  # no round is there yet, or a file is being replaced
            title = ", ".join(folder.resolve().name for folder in self._folders)
            made = page.render({"title": title, "subtitle": "", "warnings": [str(error)], "sections": []})
        made = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", made, count=1)  # a header has it
        return made.replace("</body>", '<script src="/live.js"></script>\n</body>')


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class _Handler(BaseHTTPRequestHandler):
    server: "LiveServer"
    timeout = 10  # seconds for a request to come; socketserver reads it

    def do_GET(self) -> None:
        """Answer with the page, or 304 if the caller has it."""
        if self.headers.get_all("Host") not in self.server.hosts:
            self._answer(421, b"")
        elif self.path == "/live.js":
            self._answer(200, SCRIPT.encode(), "text/javascript")
        elif self.path == "/":
            body = self.server.page.get()
            tag = f'"{hashlib.sha256(body).hexdigest()}"'
            known = self.headers.get("If-None-Match") == tag
            self._answer(304 if known else 200, b"" if known else body, "text/html", tag)
        else:
            self._answer(404, b"")

    def _answer(self, status: int, body: bytes, kind: str = "text/plain", tag: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)), "ETag": tag}
        headers |= {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        headers |= {"Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin"}
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        """Say nothing of the server's version."""
        return "ssfl"

    def log_message(self, format: str, *args: object) -> None:
        """Print no line a request."""


class LiveServer(ThreadingHTTPServer):
    """Serves the page on 127.0.0.1; port 0 is a free one.

    Raises
    ------
    ConfigError
        A folder is none of a run, or the port is taken.
    """

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], port: int) -> None:
        for folder in folders:
            if not (folder / "config.toml").is_file():
                raise ConfigError(f"{folder} is a folder without config.toml; it is one that `ssfl run` writes to")
        self.page = LivePage(folders)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise ConfigError(f"--port is {port}; it is a port that is free here ({error.strerror})") from error
        self.hosts = [[f"{name}:{self.server_port}"] for name in ("127.0.0.1", "localhost")]
        self.hosts += [["127.0.0.1"], ["localhost"]] if self.server_port == 80 else []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what is a fault of this code, not that a browser went away."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def serve(folders: Sequence[Path], port: int, say: Callable[[str], None]) -> None:
    """Serve the page of these run folders until Ctrl-C; ConfigError as `LiveServer`."""
    with LiveServer(folders, port) as server:
        say(f"page: http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("ended")
