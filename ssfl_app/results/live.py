"""The live page: the report of runs on loopback, made anew when their files changed.

Any page that a browser of this machine has open can send requests to its ports. So a request must name this server
as its host, which one that came through a name of somebody else's (DNS rebinding) does not, and nothing is answered
but GET of the page, with a policy that no other page may frame or read it.
"""

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
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class _Handler(BaseHTTPRequestHandler):
    server: "LiveServer"
    timeout = 10  # seconds for a request to come; socketserver reads it
    server_version, sys_version = "ssfl", ""

    def do_GET(self) -> None:
        """Answer with the page, or 304 if the caller has it."""
        status, body, kind, tag = 404, b"", "text/html", ""
        if self.headers.get_all("Host") not in self.server.hosts:
            status = 421
        elif self.path == "/live.js":
            status, body, kind = 200, SCRIPT.encode(), "text/javascript"
        elif self.path == "/":
            body, tag = self.server.page()
            status, body = (304, b"") if self.headers.get("If-None-Match") == tag else (200, body)
        self.send_response(status)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)), "ETag": tag}
        headers |= {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        headers |= {"Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print no line a request."""


class LiveServer(ThreadingHTTPServer):
    """Serves the page on 127.0.0.1; port 0 is a free one. ConfigError: no run folder, or the port is taken."""

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], port: int) -> None:
        for folder in folders:
            if not (folder / "config.toml").is_file():
                raise ConfigError(f"{folder} is a folder without config.toml; it is one that `ssfl run` writes to")
        self._folders, self._lock, self._seen, self._made = folders, threading.Lock(), "", b""
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise ConfigError(f"--port is {port}; it is a port that is free here ({error.strerror})") from error
        self.hosts = [[f"{name}:{self.server_port}"] for name in ("127.0.0.1", "localhost")]

    def page(self) -> tuple[bytes, str]:
        """Return the page, made anew if a file has changed, and a tag of it."""
        with self._lock:
            files = [folder / name for folder in self._folders for name in READ]
            stats = [file.stat() for file in files if file.exists()]
            seen = '"' + "-".join(f"{stat.st_ino}.{stat.st_mtime_ns}.{stat.st_size}" for stat in stats) + '"'
            if seen != self._seen:
                self._made, self._seen = self._render().encode(), seen
            return self._made, seen

    def _render(self) -> str:
        try:
            made = report_page([read_run(folder) for folder in self._folders])
        except ConfigError as error:  # no round is there yet, or a file is damaged
            made = page.render({"title": "Runs", "subtitle": "", "warnings": [str(error)], "sections": []})
        made = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", made, count=1)  # a header has it
        return made.replace("</body>", '<script src="/live.js"></script>\n</body>')

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
