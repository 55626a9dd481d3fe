"""Reads data sets: one reader a source, each giving the same arrays.

A reader is a function ``(path, download, image_size) -> ArrayDataset``, named in `READERS`. A user's own files are
read by `read_files`. All raise ConfigError.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ssfl_app.data.arrays import read_arrays
from ssfl_app.data.cache import ArrayDataset, Wanted, cached
from ssfl_app.data.hub import read_hub
from ssfl_app.data.image_folder import Files, Left, hidden, image_folder, left_out
from ssfl_app.data.images import decode, measure
from ssfl_app.data.parquet import read_parquet
from ssfl_app.data.table import read_table
from ssfl_app.data.text import read_text
from ssfl_app.data.unreadable import check_regular, is_folder, unreadable
from ssfl_app.data.volumes import read_volumes
from ssfl_app.options import ConfigError, PrivateError
from ssfl_app.registry import Registry
from ssfl_app.text import one_line

# Mean and std of each channel as the published training scripts have them (DisPFL, SSFL).
_CIFAR_MOMENTS = {
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_TINY = "tiny-imagenet-200"
_TINY_URL = f"http://cs231n.stanford.edu/{_TINY}.zip"
_TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

# What the folder of a source of a user's own files is, for messages.
_SHAPES = {
    "parquet": "a folder of parquet files",
    "folder": "a folder with train/<class>/* and test/<class>/* (or val)",
    "arrays": "an .npz file, or a folder with train.npz and test.npz",
    "table": "a .csv or .parquet file, or a folder with train and test of these",
    "volumes": "a folder with train and test, of <class>/*.nii.gz, or of images/*.nii.gz and masks/*.nii.gz",
    "text": "a folder of text files, or the file of a play",
    "hf": "a folder that save_to_disk of datasets wrote; or, with data.download true, a name on the hub",
}
FILES = tuple(_SHAPES)
"""Sources that are a user's own files: a data set that is dealt, or what a site holds."""

OWN = FILES[:5]
"""Those of them that a site may hold; texts of sites would have other vocabularies."""

_ONE_FILE = ("arrays", "table", "text")


def _folder(path: str, create: bool, what: str) -> Path:
    """Return `path` as a folder that exists; `what` completes "it is ..."."""
    if not path:
        raise unreadable(path, f"it is {what}")
    folder = Path(path).expanduser()
    if not is_folder(path, folder, "it") and folder.exists():
        raise unreadable(path, f"this is a file; it is {what}")
    if not create and not is_folder(path, folder, "it"):
        raise unreadable(path, f"there is no such {'file' if folder.suffix else 'folder'}, it is {what}")
    return folder


def _cure(root: Path, column: str = "") -> str:
    """Return how to come to a data set that is not in a folder; `column`: that of its labels, if not label."""
    with suppress(OSError):
        if any(file.name.lower().endswith(".parquet") and not hidden(file.name) for file in root.iterdir()):
            named = f" data.label-column='{column}'" if column else ""
            return f"there are parquet files, which data.name='parquet'{named} reads"
    return "set data.download to true to get it"


def _own_size(name: str, image_size: int) -> None:
    if image_size:
        raise ConfigError(f"data.image-size is {image_size}; {name} is used as it is, with 0")


def digits(path: str, download: bool, image_size: int) -> ArrayDataset:
    """Read scikit-learn's digits, (1, 8, 8), split 80/20 with equal class shares; nothing is downloaded."""
    _own_size("digits", image_size)
    if path:  # or a forgotten data.name would train on these unnoticed
        rule = "data.name is digits; it reads no data.path"
        raise PrivateError(f"{rule}, which is {path!r}", rule)
    # Through the cache: to import scikit-learn takes a second, and a real SuperNode starts a process a message.
    versions = [metadata.version(name) for name in ("scikit-learn", "numpy")]
    return cached(("digits", *versions), [], _digits)


def _digits() -> ArrayDataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    names = tuple(str(name) for name in bunch.target_names)
    return ArrayDataset(pixels[train], labels[train], pixels[test], labels[test], names, *measure(pixels[train]))


def _cifar(kind: str, path: str, download: bool, image_size: int) -> ArrayDataset:
    """Read torchvision's CIFAR10 or CIFAR100, (3, 32, 32), with the published mean and std."""
    from torchvision import datasets

    _own_size(kind.lower(), image_size)
    root = _folder(path, download, f"the folder that holds torchvision's {kind}, or gets it")
    try:
        parts = [getattr(datasets, kind)(root, train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        hint = "the download failed" if download else _cure(root, "fine_label" if kind == "CIFAR100" else "")
        what = f"{kind} is not there ({one_line(error)}): {hint}"
        raise unreadable(path, what, f"{kind} is not there: {hint}") from error
    train, test = (np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)) for part in parts)
    labels = (np.array(part.targets, dtype=np.int64) for part in parts)
    return ArrayDataset(train, next(labels), test, next(labels), tuple(parts[0].classes), *_CIFAR_MOMENTS[kind])


def _read_files(
    key: str, path: str, size: int, parts: Sequence[Files], names: tuple[str, ...], channels: int = 0
) -> ArrayDataset:
    """Return the images of (file, class) lists for training and test, through the cache."""

    def read() -> ArrayDataset:
        root = Path(path).expanduser()
        called = [(len(part), _called(root, name, part)) for name, part in zip(("train", "test"), parts, strict=True)]
        (train, test), notes = decode(path, called, size, channels)
        labels = [np.array([label for _, label in part], dtype=np.int64) for part in parts]
        return ArrayDataset(train, labels[0], test, labels[1], names, *measure(train), notes)

    files = [file for part in parts for file, _ in part]
    return cached((key, str(Path(path).resolve()), size, channels, *names), files, read)


def _called(root: Path, name: str, part: Files) -> Iterator[tuple[str, str, Path]]:
    """Yield what to call each file below `root`, here and to a server, and the file."""
    counts = Counter[int]()
    for file, label in part:
        counts[label] += 1
        yield str(file.relative_to(root)), f"image {counts[label]} of {name}/<class {label}>", file


def _own_folder(path: str, root: Path, image_size: int, wanted: Wanted) -> ArrayDataset:
    what = _SHAPES["folder"]
    tests = [root / name for name in ("test", "val") if is_folder(path, root / name, name)]
    trains = [root / "train"] if is_folder(path, root / "train", "train") else tests[:1] if wanted.test_only else []
    if not tests or not trains:
        raise unreadable(path, f"{'test' if trains else 'train'} is missing, it is {what}")
    left = Left()
    train, names = image_folder(path, trains[0], wanted.classes, left)
    test, test_names = image_folder(path, tests[0], wanted.classes, left)
    if odd := sorted(set(names) ^ set(test_names)):
        rule = f"is only in one of train and {tests[0].name}, it is to be in both"
        raise unreadable(path, f"class {odd[0]} {rule}", f"a class {rule}")
    raw = _read_files("folder", path, image_size, (train, test), names, wanted.channels)
    return replace(raw, notes=(*left_out(left), *raw.notes))


def read_files(name: str, path: str, image_size: int, wanted: Wanted, download: bool = False) -> ArrayDataset:
    """Read a user's own files, in one of the formats `FILES`; mean and std are measured.

    parquet: see `ssfl_app.data.parquet`. folder: <path>/train/<class>/* and <path>/test/<class>/* (or val). The
    others: see the modules of their names.
    """
    root = Path(path).expanduser()
    there = bool(path) and not is_folder(path, root, "it") and root.exists()
    if not (there and name in _ONE_FILE) and not (download and path and name == "hf"):
        root = _folder(path, False, _SHAPES[name])
    if name in ("arrays", "text", "volumes"):
        _own_size(name, image_size)
    readers = (read_parquet, _own_folder, read_arrays, read_table, read_volumes, read_text, read_hub)
    return dict(zip(FILES, readers, strict=True))[name](path, root, image_size, wanted)


def unseen(classes: tuple[str, ...], channels: int, image_size: int) -> ArrayDataset:
    """Return a data set without images, of which only classes and shape are known: a ConfigError if they are not."""
    for key, value in (("classes", ",".join(classes)), ("channels", channels), ("image-size", image_size)):
        if not value:
            raise ConfigError(
                f"data.{key} is {value!r}; with data.where 'sites' and no data.path the server builds the model from "
                "data.classes, data.channels and data.image-size: give all three"
            )
    pixels, labels = np.empty((0, channels, image_size, image_size), np.uint8), np.empty(0, np.int64)
    return ArrayDataset(pixels, labels, pixels, labels, classes, (0.0,) * channels, (1.0,) * channels)


def tiny_imagenet(path: str, download: bool, image_size: int) -> ArrayDataset:
    """Read Tiny-ImageNet (200 classes, (3, 64, 64)); its labelled val images are the test images.

    Mean and std are 0.5, as in the published training scripts.
    """
    where = _folder(path, download, f"the folder that holds {_TINY}, or gets it")
    root = where / _TINY
    if not is_folder(path, root, _TINY):
        if not download:
            raise unreadable(path, f"{_TINY} is not in it: {_cure(where)}")
        _download_tiny(path, where)
    train, wnids = image_folder(path, root / "train")
    test = _tiny_test(path, root / "val", wnids)
    raw = _read_files("tiny-imagenet", path, image_size, (train, test), wnids)
    half = (0.5,) * raw.train.shape[1]
    return replace(raw, mean=half, std=half)


def _download_tiny(path: str, where: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        download_and_extract_archive(_TINY_URL, str(where), md5=_TINY_MD5, remove_finished=True)
    except (OSError, RuntimeError) as error:
        failed = f"the download of {_TINY_URL} failed"
        raise unreadable(path, f"{failed} ({one_line(error)})", failed) from error


def _tiny_test(path: str, root: Path, wnids: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Return the validation files with their classes: one line of annotations is file, wnid, box."""
    what = f"val/val_annotations.txt of {_TINY}"
    check_regular(path, root / "val_annotations.txt", what, what)
    try:
        lines = (root / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
        rows = [line.split("\t")[:2] for line in lines if line]
        return [(root / "images" / file, wnids.index(wnid)) for file, wnid in rows]
    except (OSError, ValueError) as error:
        raise unreadable(path, f"{what} cannot be used ({one_line(error)})", f"{what} cannot be used") from error


READERS: Registry[Callable[..., Any]] = Registry(
    "ssfl.datasets",
    {
        "digits": digits,
        "cifar10": partial(_cifar, "CIFAR10"),
        "cifar100": partial(_cifar, "CIFAR100"),
        "tiny-imagenet": tiny_imagenet,
        **dict.fromkeys(FILES, read_files),
    },
    "a function (path, **options) that returns training and test data",
    callable,
)
