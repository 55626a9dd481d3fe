"""The SuperNode that `ssfl federation` starts: Flower's own, which waits less, with a warm executor beside it.

``python -m ssfl_app.deployment.supernode`` takes the options of ``flower-supernode``. Under a version of Flower that
`flower_patches` does not know, or if the environment variable `PLAIN` says "1", it is that command and nothing else.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from contextlib import suppress
from logging import INFO, WARN
from pathlib import Path

from flwr.cli.install import install_from_fab
from flwr.supercore import log
from flwr.supercore.version import package_version
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.nodestate import NodeState

from ssfl_app.comm import flower_patches
from ssfl_app.deployment.services import REST
from ssfl_app.files import write_atomically

PLAIN = "SSFL_PLAIN_NODE"

SECRET = "executor.secret"
"""File with which the executor proves itself: other accounts of the host reach the port, and get no message."""

SOON, TRIES = 10.0, 3
"""An executor that ended within so many seconds, so many times in a row, is replaced by Flower's own."""


class Warm(threading.Thread):
    """Keeps an executor alive beside the SuperNode of this process.

    Its pipe ends with this process, and with its pipe the executor. If it cannot live, Flower's own one takes its
    place: it starts a process for each message.
    """

    def __init__(self, address: str, secret: Path) -> None:
        super().__init__(name="executor", daemon=True)
        self._address, self._secret = address, secret
        self._process: subprocess.Popen[bytes] | None = None
        self._told: set[int] = set()

    def command(self, ends: int) -> list[str]:
        """Return what to start after so many early ends in a row."""
        if ends < TRIES:
            words = [sys.executable, "-P", "-m", "ssfl_app.deployment.executor", self._address, str(self._secret)]
            return [*words, str(os.getpid())]
        words = [str(Path(sys.executable).parent / "flower-superexec"), "--insecure"]
        words += ["--runtime-api-address", self._address, "--superexec-auth-secret-file", str(self._secret)]
        return [*words, "--parent-pid", str(os.getpid())]

    def run(self) -> None:
        """Start it, and start it again whenever it ends."""
        ends = 0
        while True:
            began = time.monotonic()
            # From this thread, which lives as long as the process: the kernel ends the executor with it.
            self._process = subprocess.Popen(self.command(ends), stdin=subprocess.PIPE)
            code = self._process.wait()
            ends = ends + 1 if time.monotonic() - began < SOON else 0
            log(WARN, "the executor ended with %s; %s", code, "Flower's own follows" if ends >= TRIES else "again")
            time.sleep(1.0)

    def tell(self, state: NodeState, run_id: int) -> None:
        """Tell the executor that there is a message of a run, and what it needs to get ready for it."""
        line = json.dumps(self.recipe(state, run_id)).encode() + b"\n"
        with suppress(OSError):  # it has ended: the next one looks by itself
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()

    def recipe(self, state: NodeState, run_id: int) -> dict[str, object]:
        """Return what an executor must know of a run to get ready for its messages, once its app is installed."""
        run = state.get_run(run_id)
        context = None if run is None else state.get_run_series_context(run.series_id)
        if run is None or context is None:  # Flower answers by itself: it does not trust the app
            return {}
        fab = state.get_fab(run.fab_hash)
        if fab is not None and run_id not in self._told:
            try:
                install_from_fab(fab.content, skip_prompt=True)
            except Exception as error:  # the ClientApp will fail at it too, and answer with why
                log(WARN, "the app of run %s cannot be installed: %s", run_id, error)
            self._told.add(run_id)
        return {
            "run_id": run_id,
            "node_id": context.node_id,
            "fab": [run.fab_id, run.fab_version, run.fab_hash],
            "run_config": dict(context.run_config),
            "node_config": dict(context.node_config),
        }


def main() -> None:
    """Run a SuperNode until it ends."""
    plain = os.environ.get(PLAIN) == "1"
    if flower_patches.known() and not plain:
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("--host", default="127.0.0.1")
        parser.add_argument("--port", default="9094")
        words, _ = parser.parse_known_args()
        secret = Path.cwd() / SECRET
        write_atomically(secret, lambda file: file.write_bytes(secrets.token_bytes(32)), 0o600)
        warm = Warm(f"{words.host}:{words.port}", secret)
        flower_patches.pace(warm.tell, float(os.environ.get(REST, 0)))
        flower_patches.objects()
        flower_patches.keep_alive()
        warm.start()
        sys.argv += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
    else:
        why = f"{PLAIN} is 1" if plain else f"flwr {package_version} is none that is known here"
        log(INFO, "%s: waits and process starts are Flower's", why)
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
