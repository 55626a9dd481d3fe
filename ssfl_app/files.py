"""Files that are there whole or not at all."""

import errno
import json
import os
import stat
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TextIO
from uuid import uuid4

from safetensors import SafetensorError


def write_atomically(path: Path, write: Callable[[Path], object], mode: int = 0o666) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: readers see all or nothing.

    When this returns the file is on the disk. It has what the umask leaves of `mode`, from the beginning, whatever
    made it.

    Raises
    ------
    OSError
        It cannot be written; what was there before is unchanged, and nothing half-written stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        temporary.touch(mode, exist_ok=False)
        left = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(left)  # safetensors puts a file of mode 0600 in its place
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"{path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes atomically."""
    write_atomically(path, lambda file: file.write_bytes(content))


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def not_regular(path: Path) -> OSError:
    """Return the error of a pipe, device or folder where a file is to be; to open one may wait for ever."""
    return OSError(errno.EINVAL, "no regular file", str(path))


def check_regular(path: Path) -> None:
    """Raise OSError, before a file is opened, if it is missing or no regular file, nor a link to one."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise not_regular(path)


def append(path: Path, mode: int = 0o666) -> TextIO:
    """Open a text file to add lines to it; it is made if need be, with `mode` less the umask.

    Raises
    ------
    OSError
        It cannot be opened, or is no regular file: a link may lead to a file of somebody else's choice, and to open a
        pipe would wait for its other end.
    """
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW, mode)
    file = os.fdopen(handle, "a", encoding="utf-8")
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise not_regular(path)
    return file


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote a file atomically, in this folder or below."""
    for pattern in (".*.tmp", ".tmp??????"):  # ours, and safetensors'
        for path in folder.rglob(pattern):
            path.unlink(missing_ok=True)


def app_folder() -> Path:
    """Return the folder that holds pyproject.toml, LICENSE and README.md of this very code."""
    package = Path(str(resources.files("ssfl_app")))
    checkout = package.parent
    return checkout if (checkout / "pyproject.toml").exists() else package / "_app"
