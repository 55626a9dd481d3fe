"""Processes that play one run each, for `ssfl compare`.

A run of the inline engine is forked from a process that has everything imported: torch, Flower and the rest take
longer to import than a small run to play. A run on Ray starts a SuperLink and actors of its own: a new process.
"""

import multiprocessing
import os
import pkgutil
import subprocess
import sys
import tempfile
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Protocol

from ssfl_app.simulation.processes import short_folder

COMMAND = "ssfl_app.cli.main:main"
"""What a worker starts, as pyproject.toml names it: the command `ssfl`, which is in a higher folder."""

_PRELOADED = (
    "ssfl_app.cli.main",
    "ssfl_app.server_app",
    "ssfl_app.client_app",
    "ssfl_app.simulation.command",
    "ssfl_app.simulation.resolve",
    "ssfl_app.simulation.in_process",
    "sklearn.datasets",
    "rich.table",
    "ssfl_app.results.canvas",
)


class Worker(Protocol):
    """A process that was started."""

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""

    def wait(self, timeout: float) -> bool:
        """Wait for the end; return whether it came."""


def start(engine: str, words: list[str], errors: Path, environment: dict[str, str]) -> Worker:
    """Start ``ssfl run`` with these words; what it says on stderr goes to the file `errors`.

    It has a session of its own: Ctrl-C is for the caller, who then asks it to end.
    """
    command = ["run", "--engine", engine, *words]
    return _Forked(command, errors, environment) if engine == "inline" else _Spawned(command, errors, environment)


class _Spawned:
    def __init__(self, command: list[str], errors: Path, environment: dict[str, str]) -> None:
        with errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"import pkgutil; pkgutil.resolve_name('{COMMAND}')()", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # console.log in the run folder has it
                stderr=stderr,
                start_new_session=True,
                env=os.environ | environment,
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float) -> bool:
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True


def _shorten_sockets() -> None:
    """Have multiprocessing keep its sockets where they can have their names, however long TMPDIR is."""
    usual, tempfile.tempdir = tempfile.tempdir, str(short_folder())
    try:
        get_temp_dir()  # made at the first call, and the same from then on
    finally:
        tempfile.tempdir = usual


class _Forked:
    def __init__(self, command: list[str], errors: Path, environment: dict[str, str]) -> None:
        _shorten_sockets()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOADED))
        self._process = context.Process(target=_run, args=(command, str(errors), environment))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float) -> bool:
        self._process.join(timeout)
        return self._process.exitcode is not None


def _run(command: list[str], errors: str, environment: dict[str, str]) -> None:
    os.setsid()
    for number, target in ((0, os.devnull), (1, os.devnull), (2, errors)):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        opened = os.open(target, flags, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.update(environment)
    sys.argv = ["ssfl", *command]
    pkgutil.resolve_name(COMMAND)()
