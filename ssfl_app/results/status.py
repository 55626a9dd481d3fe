"""status.json of a run folder: running, finished, interrupted or failed, and why. Read by launchers without torch."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from ssfl_app import locks
from ssfl_app.files import check_regular, write_json

LET_GO = 3.0
"""Seconds that a killed process may take to let go of a run folder, which the last of its threads does."""


def read_status(folder: Path) -> dict[str, Any]:
    """Return what status.json says: status running, finished, interrupted or failed, and the message of a failure."""
    with contextlib.suppress(OSError, ValueError):
        check_regular(folder / "status.json")
        return dict(json.loads((folder / "status.json").read_bytes()))
    return {}


def write_status(folder: Path, status: str, message: str = "") -> None:
    """Record how a run stands."""
    write_json(folder / "status.json", {"status": status, "message": message})


def settle(folder: Path, status: str, message: str = "") -> None:
    """Record how a run ended, unless it did so itself: that of a process that was killed is still "running".

    A folder that another process writes to is left alone. Where nothing can be written, the reason is still told.
    """
    with contextlib.suppress(OSError):
        if not folder.is_dir() or read_status(folder).get("status", "running") != "running":
            return
        end = time.monotonic() + LET_GO
        while (lock := locks.try_lock(folder / ".lock")) is None and time.monotonic() < end:
            time.sleep(0.05)
        if lock is not None:
            with lock:
                write_status(folder, status, message)
