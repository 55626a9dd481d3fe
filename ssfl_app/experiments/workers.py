"""Processes that play one run each, for `ssfl compare` and `ssfl reproduce`.

A run of the inline engine is forked from a process that has everything imported: torch, Flower and the rest take
longer to import than a small run to play. A run on Ray starts a SuperLink and actors of its own: a new process.
"""

import multiprocessing
import os
import pkgutil
import sys
import tempfile
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir
from pathlib import Path

from ssfl_app.simulation.command import Engine
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


def start(engine: Engine, words: list[str], errors: Path, environment: dict[str, str]) -> BaseProcess:
    """Start ``ssfl run`` with these words; what it says on stderr goes to the file `errors`.

    It has a session of its own: Ctrl-C is for the caller, who then asks it to end.
    """
    context: ForkServerContext | SpawnContext = multiprocessing.get_context("spawn")
    if engine.name == "inline":
        _shorten_sockets()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOADED))
    process = context.Process(target=_run, args=(["run", *engine.words, *words], str(errors), environment))
    process.start()
    return process


def _shorten_sockets() -> None:
    """Have multiprocessing keep its sockets where they can have their names, however long TMPDIR is."""
    usual, tempfile.tempdir = tempfile.tempdir, str(short_folder())
    try:
        get_temp_dir()  # made at the first call, and the same from then on
    finally:
        tempfile.tempdir = usual


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
