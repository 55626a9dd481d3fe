"""Makes a data set of arrays: what a reader of your own returns, what .npz files hold, and what other readers read.

A part, training or test, is ``(x, y)`` or ``(x, y, client)``, of arrays, tensors or lists, or a torch ``Dataset`` of
pairs. What x and y are decides what they are for:

==============================  =====================================  ==============
x                               y                                      task
==============================  =====================================  ==============
any                             whole numbers or words, shape (N,)     classification
any                             floats, (N,) or (N, k)                 regression
whole numbers, (N, ...)         whole numbers of the same shape        next-token
any                             whole numbers, (N, ...)                segmentation
==============================  =====================================  ==============

Images are x of bytes, (N, C, H, W): they are normalised as channels of their training set. Other floats become
float32, other whole numbers int64, and enter the model as they are.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, default_collate

from ssfl_app.data.cache import ArrayDataset, Wanted, cached
from ssfl_app.data.images import measure
from ssfl_app.data.summary import ALL, CLASS_NAME, odd_name
from ssfl_app.data.unreadable import check_regular, part_files, refused
from ssfl_app.options import ConfigError, PrivateError

Array = npt.NDArray[Any]

MOST_CLASSES = 100_000
"""Classes are below it: each number up to the largest is one, and one odd value would fill the memory with them."""


def read_arrays(path: str, root: Path, image_size: int, wanted: Wanted) -> ArrayDataset:
    """Read train.npz and test.npz of a folder, or one .npz file, whose arrays have the part in their names.

    The arrays of a part are x, y and perhaps client; in one file x_train, y_train, client_train, x_test, ...
    """
    one = root.is_file()
    files = [root] * 2 if one else part_files(path, root, [".npz"], wanted.test_only)

    def read() -> ArrayDataset:
        parts = []
        for part, file in zip(("train", "test"), files, strict=True):
            check_regular(path, file, file.name, f"the {part} file")
            names = [f"{name}_{part}" if one else name for name in ("x", "y", "client")]
            try:
                with np.load(file, allow_pickle=False) as found:
                    parts.append(tuple(found[name] for name in names if name in found or name != names[2]))
            except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
                rule = f"it is an .npz with the arrays {names[0]} and {names[1]} of numbers"
                raise refused(path, file.name, f"the {part} file", f"cannot be read: {rule}", error) from error
        return from_arrays(parts, "arrays", wanted.classes)

    return cached(("arrays", str(root.resolve()), *wanted.classes), files, read)


def from_arrays(found: object, name: str, classes: tuple[str, ...] = ()) -> ArrayDataset:
    """Return the data set of training and test parts, given as a pair or under "train" and "test".

    `classes` names all classes in order; numbers are positions in it. Empty: those that are found.

    Raises
    ------
    ConfigError
        They are none, do not belong together, or are not finite; `name` is that of the data set.
    """
    if isinstance(found, ArrayDataset):
        return found
    if isinstance(found, Mapping) and {"train", "test"} <= found.keys():
        found = found["train"], found["test"]
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise _wrong(
            name, f"it gave {type(found).__name__}; it gives (training, test), each (x, y) or (x, y, client)"
        )
    (x, y, owner), (test_x, test_y, test_owner) = (
        _part(part, name, what) for part, what in zip(found, _PARTS, strict=True)
    )
    if (
        x.dtype != test_x.dtype
        or x.shape[1:] != test_x.shape[1:]
        or y.dtype.kind != test_y.dtype.kind
        or y.ndim != test_y.ndim
    ):
        ours, theirs = (
            f"x {a.dtype} {a.shape[1:]} and y {b.dtype} {b.shape[1:]}" for a, b in ((x, y), (test_x, test_y))
        )
        raise _wrong(name, f"training samples have {ours}, test samples {theirs}; they are alike")
    task, names, (y, test_y), outputs = _targets(x, (y, test_y), name, classes)
    if (owner is None) != (test_owner is None):
        raise _wrong(name, "one part says which client a sample belongs to; both do, or none")
    if owner is not None and test_owner is not None:
        _, places = np.unique(np.concatenate([owner, test_owner]), return_inverse=True)
        owner, test_owner = np.split(places.astype(np.int64), [len(owner)])
    moments = measure(x) if x.dtype == np.uint8 and x.ndim == 4 else ((), ())
    if not moments[0]:
        x, test_x = (
            part.astype(np.float32 if part.dtype.kind == "f" else np.int64, copy=False) for part in (x, test_x)
        )
    return ArrayDataset(x, y, test_x, test_y, names, *moments, (), outputs, task, owner, test_owner)


_PARTS = ("training", "test")


def _wrong(name: str, why: str) -> ConfigError:
    return ConfigError(f"data.name is {name!r}; {why}")


def _part(part: object, name: str, what: str) -> tuple[Array, Array, Array | None]:
    if isinstance(part, Dataset):
        part = default_collate([part[index] for index in range(len(part))])  # type: ignore[arg-type]
    if not isinstance(part, tuple | list) or len(part) not in (2, 3):
        raise _wrong(name, f"its {what} part is {type(part).__name__}; it is (x, y) or (x, y, client)")
    arrays = [_array(values) for values in part]
    if len({len(array) for array in arrays}) > 1 or not len(arrays[0]):
        raise _wrong(
            name, f"its {what} part has {[len(array) for array in arrays]} samples; as many of each, at least one"
        )
    x, y = arrays[:2]
    if x.ndim < 2 or x.dtype.kind not in "fiub":
        raise _wrong(name, f"its {what} x is {x.dtype} of shape {x.shape}; it is numbers of shape (samples, ...)")
    for array, called in ((x, "x"), (y, "y")):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise _wrong(name, f"its {what} {called} has NaN or Inf; all numbers are finite")
    return x, y, arrays[2] if len(arrays) == 3 else None


def _array(values: object) -> Array:
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().numpy()
    return np.asarray(values)


def _targets(
    x: Array, parts: tuple[Array, Array], name: str, classes: tuple[str, ...]
) -> tuple[str, tuple[str, ...], list[Array], int]:
    """Return task, class names, targets as they are kept, and how many outputs a model has."""
    y = parts[0]
    if y.dtype.kind == "f":
        numbers = [part.reshape(len(part), -1).astype(np.float32) for part in parts]
        return "regression", ALL, numbers, numbers[0].shape[1]
    if y.ndim == 1 and y.dtype.kind in "USOb":
        names, places = np.unique(np.concatenate([part.astype(str) for part in parts]), return_inverse=True)
        if odd_name(list(map(str, names))) is not None:
            raise _wrong(name, f"one of its classes has another name; {CLASS_NAME}")
        if classes:
            if odd := [word for word in map(str, names) if word not in classes]:
                public = f"data.name is {name!r}; {len(odd)} of its classes are none of data.classes"
                raise PrivateError(f"{public}: {', '.join(odd[:8])}", public)
            places, names = np.array([classes.index(word) for word in names])[places], np.array(classes)
        cut = np.split(places.astype(np.int64), [len(y)])
        return "classification", tuple(map(str, names)), cut, 0
    whole = [part.astype(np.int64) for part in parts]
    lowest, highest = min(int(part.min()) for part in whole), max(int(part.max()) for part in whole)
    if lowest < 0:
        raise _wrong(name, f"its y has {lowest}; classes and tokens are whole numbers from 0")
    if classes and highest >= len(classes):
        raise _wrong(name, f"its y has {highest}; data.classes names {len(classes)} classes, and the first is 0")
    if y.ndim == 1 and highest >= MOST_CLASSES:
        raise _wrong(name, f"its y has {highest}; classes are below {MOST_CLASSES}, and what is no class is a float")
    if y.ndim == 1:
        return "classification", classes or tuple(map(str, range(highest + 1))), whole, 0
    if x.dtype.kind in "iu" and x.shape == y.shape:
        return "next-token", ALL, whole, max(highest, int(x.max())) + 1
    return "segmentation", ALL, whole, len(classes) or highest + 1
