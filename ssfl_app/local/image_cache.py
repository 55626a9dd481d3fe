"""Encoded images to one array, and decoded data sets kept on disk for the next process.

A cached data set is a folder of .npy files under ``$SSFL_CACHE``, else ``$XDG_CACHE_HOME/ssfl``, else
``~/.cache/ssfl``; with ``SSFL_CACHE=off`` there is none. Its name is a digest of all that went into it (source, path,
image size, and the sizes and times of the files), so a changed file makes a new entry. With it go the entries of what
lay at that path before: decoded images outlive their files until the data are read again, or `clear` is called.
Folders are the account's own, mode 0700, whatever the umask.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ssfl_app.local.unreadable import check_regular, unreadable
from ssfl_app.options import PrivateError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""What an image may be, whatever its file is called: Pillow would hand PostScript to an interpreter."""

MOST_PIXELS = 89_478_485
"""An image has no more, whatever size it is brought to. Pillow's limit, from which on it warns; here it is one."""

# A new number makes every older entry unused: raise it when decoding changes.
_FORMAT = 2
_ARRAYS = ("train", "train_labels", "test", "test_labels")
_FILES = {"facts.json", *(f"{name}.npy" for name in _ARRAYS)}
_ENTRY = re.compile(r"[0-9a-f]{32}|\.draft-.+")
_PLACE = 10  # hex digits at the start of a name that say where the data lie, before 10 for the files there


@dataclass(frozen=True)
class Raw:
    """A data set as arrays.

    Attributes
    ----------
    train, test : uint8 ndarray, shape (N, C, H, W)
    train_labels, test_labels : int64 ndarray, shape (N,)
    class_names : tuple of str
    mean, std : tuple of C floats
        Of each channel, in units of pixel / 255.
    """

    train: Pixels
    train_labels: Labels
    test: Pixels
    test_labels: Labels
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Wanted:
    """What images are to be made of a site's own data, beside their size.

    Attributes
    ----------
    classes : tuple of str
        Names of all classes in order; empty: as found.
    channels : int
        1: grey, 3: colour, 0: as the first image is.
    test_only : bool
        Whether training images may be missing: for the server, whose images only test.
    """

    classes: tuple[str, ...] = ()
    channels: int = 0
    test_only: bool = False

    @property
    def key(self) -> tuple[str | int, ...]:
        """What of it decides the decoded arrays; empty for a shared data set, whose entries are older than this."""
        return (self.channels, *self.classes) if self.channels or self.classes else ()


def decode(
    path: str,
    items: Iterable[tuple[str, str, bytes | Path]],
    count: int,
    size: int,
    like: tuple[int, ...] | None,
    channels: int = 0,
) -> Pixels:
    """Decode images into one array.

    Parameters
    ----------
    path : str
        ``data.path``, for messages.
    items : iterable of (str, str, bytes or Path)
        What to call an image, here and to a server, and its file or the file's content.
    count : int
        How many there are.
    size : int
        Pixels a side to resize to (bilinear, without keeping the aspect); 0: as they are.
    like : tuple of int or None
        (C, H, W) they must have. None: that of the first image, C = 1 if it is grey (mode L), else 3.
    channels : int
        C, if `like` is None; 0: that of the first image.

    Returns
    -------
    uint8 ndarray, shape (count, C, H, W)

    Raises
    ------
    ConfigError
        An image is none of `FORMATS`, has more than `MOST_PIXELS`, is no regular file or cannot be decoded; images
        differ in size with `size` 0, or there are none.
    """
    out: Pixels | None = None
    for index, (name, public, source) in enumerate(items):
        image = _open(path, name, public, source, size, like[0] if like else channels)
        pixels = np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)
        if out is None:
            out = np.empty((count, *(like or pixels.shape)), dtype=np.uint8)
        if pixels.shape != out.shape[1:]:
            sizes = f"is {image.width}x{image.height}, the first image is {out.shape[3]}x{out.shape[2]}: give a size"
            sizes, cure = f"{sizes} above 0 to resize all images to", f"data.image-size is {size};"
            raise PrivateError(f"{cure} {name} in {path} {sizes}", f"{cure} {public} {sizes}")
        out[index] = pixels
    if out is None:
        raise unreadable(path, "it holds no images, at least one is needed")
    return out


def _open(path: str, name: str, public: str, source: bytes | Path, size: int, channels: int) -> "Image":
    """Return one image in the wanted mode (0: its own) and size."""
    from PIL import Image

    if isinstance(source, Path):
        check_regular(path, source, name, public)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:  # nothing is unfolded yet
                raise ValueError(f"it has {image.width}x{image.height} pixels, at most {MOST_PIXELS} are read")
            mode = "L" if (channels == 1 if channels else image.mode == "L") else "RGB"
            ready = image.convert(mode)
            return ready.resize((size, size), Image.Resampling.BILINEAR) if size else ready
    # The decoders of Pillow raise almost anything on broken input: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        rule = f"it is to be an image: {', '.join(FORMATS)}"
        raise unreadable(
            path,
            f"{name} cannot be decoded ({one_line(error)}), {rule}",
            f"{public} cannot be decoded ({type(error).__name__}), {rule}",
        ) from error


def measure(pixels: Pixels) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of (N, C, H, W), in units of pixel / 255.

    From exact integer counts, so that no order of summation shows. A channel of one value has std 1.
    """
    counts = np.zeros((pixels.shape[1], 256), dtype=np.int64)
    for start in range(0, len(pixels), 4096):  # bincount needs eight times the memory of its input
        for channel, row in enumerate(counts):
            row += np.bincount(pixels[start : start + 4096, channel].ravel(), minlength=256)
    values = np.arange(256) / 255
    means = counts @ values / counts.sum(axis=1)
    spread = (counts * (values - means[:, None]) ** 2).sum(axis=1) / counts.sum(axis=1)
    stds = np.where(spread > 0, np.sqrt(spread), 1.0)
    return tuple(means.tolist()), tuple(stds.tolist())


def cached(key: tuple[str | int, ...], files: Sequence[Path], read: Callable[[], Raw]) -> Raw:
    """Return what `read` makes of `files`, from the cache if it is there.

    The arrays of a cached data set are private maps of the cache's files: processes share the pages, and
    writing to an array changes neither the file nor what others see. Where the cache folder cannot be
    written, the decoded arrays are returned as they are.

    Parameters
    ----------
    key : tuple
        All that decides the result, apart from the files; first the source and where it lies.
    files : sequence of Path
        All files that `read` reads.
    read : function
        Called without arguments when there is no entry.
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

    Raises
    ------
    RuntimeError
        No folder is named, and the account has no home.
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
    """Delete what the cache wrote into a folder, and nothing else; return how many bytes that were.

    Raises
    ------
    OSError
        An entry cannot be deleted.
    """
    freed = 0
    for entry, size in entries(folder):
        shutil.rmtree(entry)
        freed += size
    return freed


def _name(key: tuple[str | int, ...], files: Sequence[Path]) -> str:
    facts = [(str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
    parts = [hashlib.sha256(repr(part).encode()).hexdigest() for part in (key[:2], facts, (_FORMAT, key))]
    return parts[0][:_PLACE] + parts[1][:10] + parts[2][:12]


def _open_entry(entry: Path) -> Raw:
    if entry.stat().st_uid != os.getuid():
        raise OSError(f"{entry} belongs to another account")
    # "c" is copy on write: torch warns about the read-only arrays of "r".
    arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="c") for name in _ARRAYS}
    facts = json.loads((entry / "facts.json").read_text(encoding="utf-8"))
    names, mean, std = (tuple(facts[name]) for name in ("class_names", "mean", "std"))
    return Raw(**arrays, class_names=names, mean=mean, std=std)


def _store(entry: Path, raw: Raw) -> None:
    """Write an entry beside its place, move it there in one step, and drop those of what the files were before."""
    with suppress(FileExistsError):
        entry.parent.parent.mkdir(parents=True, exist_ok=True)
        entry.parent.mkdir()
        entry.parent.chmod(0o700)
    draft = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".draft-"))
    try:
        for name in _ARRAYS:
            np.save(draft / f"{name}.npy", getattr(raw, name))
        facts = {"class_names": raw.class_names, "mean": raw.mean, "std": raw.std}
        (draft / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        with suppress(OSError):  # another process was first, its entry is as good
            draft.replace(entry)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for old in entry.parent.glob(entry.name[:_PLACE] + "*"):
        if old.name[: _PLACE + 10] != entry.name[: _PLACE + 10]:
            shutil.rmtree(old, ignore_errors=True)


def one_line(error: BaseException) -> str:
    """Return an error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
