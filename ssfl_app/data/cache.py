"""Decoded data sets kept on disk for the next process.

A cached data set is a folder of .npy files under ``$SSFL_CACHE``, else ``$XDG_CACHE_HOME/ssfl``, else
``~/.cache/ssfl``; with ``SSFL_CACHE=off`` there is none. Its name is a digest of all that went into it (source, path,
image size, and the sizes and times of the files), so a changed file makes a new entry. With it go the entries of what
lay at that path before: decoded images outlive their files until the data are read again, or `clear` is called.
Folders are the account's own, mode 0700, whatever the umask.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]

# A new number makes every older entry unused: raise it when decoding changes.
_FORMAT = 4
_ARRAYS = ("train", "train_labels", "test", "test_labels")
_OWNERS = ("train_owners", "test_owners")
_FACTS = ("class_names", "mean", "std", "notes", "outputs", "task")
_FILES = {"facts.json", *(f"{name}.npy" for name in (*_ARRAYS, *_OWNERS))}
_ENTRY = re.compile(r"[0-9a-f]{32}|\.draft-.+")
_PLACE = 10  # hex digits at the start of a name that say where the data lie, before 10 for the files there


@dataclass(frozen=True)
class ArrayDataset:
    """A data set as arrays.

    Attributes
    ----------
    train, test : ndarray, shape (N, ...)
        Images are uint8, (N, C, H, W).
    train_labels, test_labels : ndarray, shape (N, ...)
        The targets; classes are int64, (N,).
    class_names : tuple of str
    mean, std : tuple of C floats
        Of each channel of images, in units of pixel / 255; empty: inputs are no images.
    notes : tuple of str
        What a user should know of how the files were read, a line each, without the name of a file.
    outputs, task, train_owners, test_owners
        See `ssfl_app.data.dataset.DataSet`.
    """

    train: npt.NDArray[Any]
    train_labels: npt.NDArray[Any]
    test: npt.NDArray[Any]
    test_labels: npt.NDArray[Any]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()
    outputs: int = 0
    task: str = "classification"
    train_owners: Labels | None = None
    test_owners: Labels | None = None


@dataclass(frozen=True)
class Wanted:
    """What is to be made of a user's own files, beside the size of images.

    Attributes
    ----------
    label_column : str
        Of parquet files.
    classes : tuple of str
        Names of all classes in order; empty: as found.
    channels : int
        1: grey, 3: colour, 0: as found.
    test_only : bool
        Whether training samples may be missing: for the server, whose samples only test.
    target, inputs, client : str, tuple of str, str
        Columns; "" or (): none, all others, none.
    length : int
        Characters of a sequence.
    alone : bool
        Whether nobody else sees these files: what is made of them must not depend on what happens to be there.
    """

    label_column: str
    classes: tuple[str, ...] = ()
    channels: int = 0
    test_only: bool = False
    target: str = ""
    inputs: tuple[str, ...] = ()
    client: str = ""
    length: int = 80
    alone: bool = False


def cached(key: tuple[str | int, ...], files: Sequence[Path], read: Callable[[], ArrayDataset]) -> ArrayDataset:
    """Return what `read` makes of `files`, from the cache if it is there.

    The arrays of a cached data set are private maps of the cache's files: processes share the pages, and
    writing to an array changes neither the file nor what others see. Where the cache folder cannot be
    written, the decoded arrays are returned as they are. `key` is all that decides the result, apart from the files:
    first the source and where it lies.
    """
    try:
        root = cache_folder()
        if root is None:
            return read()
        entry = root / _name(key, files)
    except (OSError, RuntimeError):  # no home folder, or a file is gone: reading tells which
        return read()
    try:
        return _open_entry(entry)
    except (OSError, ValueError, KeyError, TypeError):  # no entry, or a damaged one
        shutil.rmtree(entry, ignore_errors=True)
    raw = read()
    try:
        _store(entry, raw)
        return _open_entry(entry)
    except OSError:
        return raw


def cache_folder() -> Path | None:
    """Return the folder of decoded images, which need not be there; None: they are not kept.

    A RuntimeError says that no folder is named, and that the account has no home.
    """
    if own := os.environ.get("SSFL_CACHE"):
        return None if own == "off" else Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "ssfl"


def entries(folder: Path) -> list[tuple[Path, int]]:
    """Return what the cache wrote into a folder, and how many bytes each entry has."""
    found = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if _ENTRY.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            files = list(entry.iterdir())
            if {file.name for file in files} <= _FILES:  # else it is somebody's own
                found.append((entry, sum(file.lstat().st_size for file in files)))
    return found


def clear(folder: Path) -> int:
    """Delete what the cache wrote into a folder, nothing else; return how many bytes that were, or raise OSError."""
    freed = 0
    for entry, size in entries(folder):
        shutil.rmtree(entry)
        freed += size
    return freed


def _name(key: tuple[str | int, ...], files: Sequence[Path]) -> str:
    metadata = [(str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
    parts = [hashlib.sha256(repr(part).encode()).hexdigest() for part in (key[:2], metadata, (_FORMAT, key))]
    return parts[0][:_PLACE] + parts[1][:10] + parts[2][:12]


def _open_entry(entry: Path) -> ArrayDataset:
    if entry.stat().st_uid != os.getuid():
        raise OSError(f"{entry} belongs to another account")
    # "c" is copy on write: torch warns about the read-only arrays of "r".
    there = [*_ARRAYS, *(name for name in _OWNERS if (entry / f"{name}.npy").exists())]
    arrays: dict[str, Any] = {name: np.load(entry / f"{name}.npy", mmap_mode="c") for name in there}
    metadata = json.loads((entry / "facts.json").read_text(encoding="utf-8"))
    facts: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in metadata.items()
    }
    return ArrayDataset(**arrays, **{name: facts[name] for name in _FACTS})


def _store(entry: Path, raw: ArrayDataset) -> None:
    """Write an entry beside its place, move it there in one step, and drop those of what the files were before."""
    with suppress(FileExistsError):
        entry.parent.parent.mkdir(parents=True, exist_ok=True)
        entry.parent.mkdir()
        entry.parent.chmod(0o700)
    draft = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".draft-"))
    try:
        for name in (*_ARRAYS, *_OWNERS):
            if (array := getattr(raw, name)) is not None:
                np.save(draft / f"{name}.npy", array)
        metadata = {name: getattr(raw, name) for name in _FACTS}
        (draft / "facts.json").write_text(json.dumps(metadata), encoding="utf-8")
        with suppress(OSError):  # another process was first, its entry is as good
            draft.replace(entry)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for old in entry.parent.glob(entry.name[:_PLACE] + "*"):
        if old.name[: _PLACE + 10] != entry.name[: _PLACE + 10]:
            shutil.rmtree(old, ignore_errors=True)
