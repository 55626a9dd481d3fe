"""Locks that die with their process, and a simulation that does not outlive its launcher.

The kernel releases an flock when its process ends, however it ends: no stale locks, no process ids that were given to
somebody else meanwhile.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h; setting it also stops glibc from raising it
_LARGE_BLOCK = 4 << 20

LAUNCHER = "SSFL_LAUNCHER"
"""Environment variable: the file that the launcher of this simulation holds locked."""


def take(path: Path) -> IO[str] | None:
    """Return the open file once it is locked for this process, or None if another one holds it."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


class RunFailed(RuntimeError):
    """The run cannot go on; the message says why in one line."""


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold a file locked that nobody else has locked."""
    file = take(path)
    if file is None:
        raise RuntimeError(f"{path} is locked by another process")
    try:
        yield
    finally:
        file.close()


def return_freed_memory() -> None:
    """Have the C library return freed models to the system at once (glibc; elsewhere nothing happens).

    By default glibc keeps blocks of up to 32 MB for later once one of that size was freed, and a server that holds a
    model of 45 MB at a time is seen to hold several.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)


def end_with_launcher() -> None:
    """End this simulation and its SuperLink as soon as the launcher is gone; do nothing if there was none.

    Flower detaches the simulation from the command that asked for it. If that command is killed, the simulation
    would train on, unseen, and write to a run folder that somebody may be resuming by then.
    """
    path = os.environ.get(LAUNCHER)
    if path:
        threading.Thread(target=_watch, args=(Path(path),), daemon=True).start()


def _watch(path: Path) -> None:
    while path.exists() and take(path) is None:
        time.sleep(0.5)
    # The SuperLink and its executor were started for this run only and would wait for ever.
    for parent in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if any("flower-super" in word for word in parent.cmdline()):
                parent.kill()
    # Flower gives each simulation a process group of its own; Ray's processes are in it.
    os.killpg(os.getpgrp(), signal.SIGKILL)
