"""Images in parquet files, as the Hugging Face hub stores data sets.

One row is one image: a struct column with a field ``bytes`` (an encoded image), and an integer label column.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ssfl_app.local.image_cache import Labels, Pixels, Raw, Wanted, cached, decode, measure, one_line
from ssfl_app.local.unreadable import check_names, check_regular, unreadable

_WHAT = "a folder with *train*.parquet and *test*.parquet (or *val*.parquet)"
_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label", "coarse_label")
_ROWS = 1024  # decoded at a time

MOST_CLASSES = 100_000
"""Labels are below it. Without names each number up to the largest label is a class, and one odd value would fill
the memory with them."""


def read_parquet(path: str, root: Path, image_size: int, wanted: Wanted | None = None) -> Raw:
    """Read all shards of <root>/*train*.parquet and <root>/*test*.parquet; mean and std are measured.

    Parameters
    ----------
    path : str
        ``data.path``, for messages.
    root : Path
        The same, as a folder that exists.
    image_size : int
        Pixels a side to resize to; 0: as they are.
    wanted : Wanted, optional
        Of a site's own data. A label is a class of `wanted.classes` by its name in the hub's metadata; without
        names there it is a position in `wanted.classes`.

    Raises
    ------
    ConfigError
        A part is missing, a file is no parquet file or lacks a column, a label is negative, missing or not below
        `MOST_CLASSES`, an image cannot be decoded, sizes differ with `image_size` 0, or `wanted.classes` lacks a
        class.
    """
    wanted = wanted or Wanted()
    train = sorted(root.glob("*train*.parquet"))
    test = sorted(root.glob("*test*.parquet")) or sorted(root.glob("*val*.parquet"))
    if wanted.test_only:
        train = train or test
    for part, files in (("train", train), ("test", test)):
        if not files:
            raise unreadable(path, f"*{part}*.parquet is missing, it is {_WHAT}")
        for index, file in enumerate(files):
            check_regular(path, file, file.name, f"{part} file {index}")

    def read() -> Raw:
        train_pixels, train_labels = _part(path, "train", train, image_size, None, wanted.channels)
        test_pixels, test_labels = _part(path, "test", test, image_size, train_pixels.shape[1:], 0)
        if wanted.classes:
            train_labels = _renamed(path, train, train_labels, wanted.classes)
            test_labels = _renamed(path, test, test_labels, wanted.classes)
        highest = int(max(train_labels.max(), test_labels.max()))
        names = wanted.classes or _class_names(train[0], highest)
        check_names(path, "the metadata", names)
        return Raw(train_pixels, train_labels, test_pixels, test_labels, names, *measure(train_pixels))

    return cached(("parquet", str(root.resolve()), image_size, *wanted.key), [*train, *test], read)


def _part(
    path: str, part: str, files: list[Path], size: int, like: tuple[int, ...] | None, channels: int
) -> tuple[Pixels, Labels]:
    """Return the images and labels of all shards."""
    import pyarrow as pa

    try:
        labels = np.concatenate([_labels(path, file) for file in files])
        return decode(path, _items(path, part, files), len(labels), size, like, channels), labels
    except (pa.ArrowException, OSError) as error:
        raise unreadable(
            path,
            f"its files cannot be read ({one_line(error)}), it is {_WHAT}",
            f"its files cannot be read ({type(error).__name__}), it is {_WHAT}",
        ) from error


def _columns(path: str, file: Path) -> tuple[str, str]:
    """Return the names of the image and the label column of a file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(file)
    images = [c.name for c in schema if pa.types.is_struct(c.type) and c.type.get_field_index("bytes") >= 0]
    numbers = [c.name for c in schema if pa.types.is_integer(c.type)]
    image = next((name for name in (*_IMAGE_COLUMNS, *images) if name in images), None)
    label = next((name for name in _LABEL_COLUMNS if name in numbers), None)
    if label is None and len(numbers) == 1:
        label = numbers[0]
    needs = "an image column: a struct with a field bytes"
    if image is not None:
        needs = f"an integer label column: {', '.join(_LABEL_COLUMNS)}, or only one of any name"
    if image is None or label is None:
        has = f"{file.name} has the columns {', '.join(schema.names)}, it needs {needs}"
        raise unreadable(path, has, f"a file needs {needs}")
    return str(image), str(label)


def _labels(path: str, file: Path) -> Labels:
    import pyarrow.parquet as pq

    name = _columns(path, file)[1]
    column = pq.read_table(file, columns=[name]).column(name)
    values = np.zeros(0, np.int64) if not len(column) or column.null_count else column.to_numpy()
    # As Python has them: cast to int64, what is above 2**63 would be negative, or look small.
    odd = (
        [value for value in map(int, (values.min(), values.max())) if not 0 <= value < MOST_CLASSES]
        if len(values)
        else []
    )
    if column.null_count or odd:
        found = "missing" if column.null_count else str(odd[0])
        rule = f"is {found}, it is at least 0 and below {MOST_CLASSES}"
        raise unreadable(path, f"a value of column {name} of {file.name} {rule}", f"a label {rule}")
    return np.asarray(values, dtype=np.int64)


def _items(path: str, part: str, files: list[Path]) -> Iterator[tuple[str, str, bytes]]:
    """Yield what to call each image, here and to a server, and its encoded bytes."""
    import pyarrow.parquet as pq

    for index, file in enumerate(files):
        name = _columns(path, file)[0]
        row = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=_ROWS, columns=[f"{name}.bytes"]):
            for content in batch.column(0).field("bytes").to_pylist():
                yield f"row {row} of {file.name}", f"row {row} of {part} file {index}", content or b""
                row += 1


def _renamed(path: str, files: list[Path], labels: Labels, classes: tuple[str, ...]) -> Labels:
    """Return the labels as positions in `classes`."""
    highest = int(labels.max())
    names = _hub_names(files[0])
    if len(names) <= highest:  # no names: the labels are positions already
        if highest >= len(classes):
            rule = f"without a name, data.classes names {len(classes)} classes: {', '.join(classes)}"
            has = f"the label {highest} {rule}"
            raise unreadable(path, f"{files[0].name} has {has}", f"a file has {has}")
        return labels
    positions = np.zeros(len(names), dtype=np.int64)
    for label in np.unique(labels):
        if names[label] not in classes:
            raise unreadable(
                path,
                f"{files[0].name} has images of class {names[label]!r}, data.classes names {', '.join(classes)}",
                f"a file has images of <class {label}>, which data.classes does not name",
            )
        positions[label] = classes.index(names[label])
    return positions[labels]


def _class_names(file: Path, highest: int) -> tuple[str, ...]:
    """Return the names in the hub's metadata if they cover all labels, else "0", "1", ... to `highest`."""
    names = _hub_names(file)
    return names if len(names) > highest else tuple(str(index) for index in range(highest + 1))


def _hub_names(file: Path) -> tuple[str, ...]:
    """Return the names of the labels in the hub's metadata, none without them."""
    import pyarrow.parquet as pq

    label = _columns(str(file), file)[1]
    try:
        facts: Any = json.loads(pq.read_schema(file).metadata[b"huggingface"])
        return tuple(str(name) for name in facts["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()
