"""Locks that die with their process, and a simulation that does not outlive its launcher.

The kernel releases an flock when its process ends, however it ends: no stale locks, no process ids that were given to
somebody else meanwhile.
"""

import contextlib
import fcntl
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

from ssfl_app.files import append

# Without torch's statistics and its advice to all of its users.
_MEMORY = re.compile(
    r"(out of memory|OutOfMemory|MemoryError|can't allocate memory|Unable to allocate|ALLOC_FAILED)"
    r"((?!Including non-PyTorch|Of the allocated)[^\n'])*"
)

LAUNCHER = "SSFL_LAUNCHER"
"""Environment variable: the file that the launcher of this simulation holds locked."""

LATER = "SSFL_LATER"
"""Environment variable: a JSON file of further ones, which the launcher did not know yet when it started Flower."""

REGISTERED = "SSFL_REGISTERED"
"""Environment variable of a SuperLink: the file that says which node is which client in a run."""


def try_lock(path: Path) -> IO[str] | None:
    """Return the open file, locked for this process, or None if another one holds it; OSError as `append` raises."""
    file = append(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


class RunFailed(RuntimeError):
    """The run cannot go on; the message says why in one line."""


def memory_ran_out(reason: str) -> str:
    """Return what an error says that a process or a GPU without memory raised; "" if it is another one.

    `reason` is its name and message: errors of torch, cuBLAS, cuDNN, numpy and Python have no class in common.
    """
    found = _MEMORY.search(reason)
    if found is None:
        return ""
    # Its line by hand: a pattern that begins with any characters takes hours for a long line of a peer's.
    line = reason[reason.rfind("\n", 0, found.start()) + 1 :].partition("\n")[0]
    end = [match.end() for match in _MEMORY.finditer(line)][-1]
    return f"memory ran out ({' '.join(line[:end].split())[:200]})"


@contextmanager
def naming_memory(cure: str) -> Iterator[None]:
    """Turn an error inside for want of memory into RunFailed, which says how much was wanted, and the cure."""
    try:
        yield
    except RunFailed:
        raise
    except Exception as error:
        what = memory_ran_out(f"{type(error).__name__}: {error}")
        if not what:
            raise
        raise RunFailed(f"{what}: {cure}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file locked that nobody else has locked."""
    file = try_lock(path)
    if file is None:
        raise RuntimeError(f"{path} is locked by another process")
    try:
        yield
    finally:
        file.close()


@contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """Let nobody else be in here with the same file, which need not exist: whoever comes later waits.

    For a file that is read and then written by what was in it. The lock is a file of its own beside it, since the
    other one is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with append(path.with_name(f".{path.name}.lock"), 0o600) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def exit_with_parent() -> None:
    """End this simulation and its SuperLink as soon as the launcher is gone; do nothing if there was none.

    Flower detaches the simulation from the command that asked for it. If that command is killed, the simulation
    would train on, unseen, and write to a run folder that somebody may be resuming by then.
    """
    path = os.environ.get(LAUNCHER)
    if path:
        threading.Thread(target=_watch, args=(Path(path),), daemon=True).start()


def _watch(path: Path) -> None:
    while path.exists() and try_lock(path) is None:
        time.sleep(0.5)
    # The SuperLink and its executor were started for this run only and would wait for ever.
    for parent in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if any("flower-super" in word for word in parent.cmdline()):
                parent.kill()
    # Flower gives each simulation a process group of its own; Ray's processes are in it.
    os.killpg(os.getpgrp(), signal.SIGKILL)
