"""Images in parquet files, as the Hugging Face hub stores data sets.

One row is one image: a struct column with a field ``bytes`` (an encoded image), and a label column of integers. A
file is of the part that a word of its name says; a label means what the metadata of its own file call it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ssfl_app.data.arrays import MOST_CLASSES
from ssfl_app.data.cache import ArrayDataset, Labels, Wanted, cached
from ssfl_app.data.image_folder import hidden
from ssfl_app.data.images import decode, measure
from ssfl_app.data.unreadable import check_names, check_regular, unreadable
from ssfl_app.text import one_line

_WHAT = "a folder of parquet files, each with the word train or test (or val) in its name"
_IMAGE_COLUMNS = ("img", "image")
_ROWS = 1024  # decoded at a time
_PARTS = {
    "train": ("train", "training", "trainset"),
    "test": ("test", "testing", "testset"),
    "val": ("val", "valid", "validation", "valset"),
}
_PART_OF = {word: part for part, words in _PARTS.items() for word in words}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # "cifar10_TestSet-0" has cifar, Test, Set
_SHARD = re.compile(r"(.*?)(\d+)-of-(\d+)", re.ASCII)


@dataclass(frozen=True)
class _Shard:
    """A file: itself, what to call it to a server, its image column, its labels and their names, () without."""

    file: Path
    public: str
    images: str
    labels: Labels
    names: tuple[str, ...]


def read_parquet(path: str, root: Path, image_size: int, wanted: Wanted) -> ArrayDataset:
    """Read all parquet files of a folder by the part that each name says; mean and std are measured.

    `path` is ``data.path``, for messages, and `root` the same as a folder that exists. Images are resized to
    `image_size` pixels a side; 0: as they are. A label is a class by its name in the hub's metadata. Without names
    there, it is a position in `wanted.classes`, else each number up to the largest label is a class.

    Raises
    ------
    ConfigError
        A part or a shard is missing, a name says two parts, a file is no parquet file or lacks a column, a label is
        negative, missing or not below `MOST_CLASSES`, an image cannot be decoded, sizes differ with `image_size` 0,
        or names of classes do not fit together.
    """
    parts, notes = _parts(path, root)
    if wanted.test_only:
        parts["train"] = parts["train"] or parts["test"]
    for part in ("train", "test"):
        if not parts[part]:
            found = "".join(f"; {note}" for note in notes)
            raise unreadable(path, f"a file of the part {part} is missing, it is {_WHAT}{found}")
        _check_shards(path, part, parts[part])
        for index, file in enumerate(parts[part]):
            check_regular(path, file, file.name, f"{part} file {index}")

    def read() -> ArrayDataset:
        import pyarrow as pa

        try:
            train, test = (
                [_read_shard(path, file, f"{part} file {index}", wanted) for index, file in enumerate(parts[part])]
                for part in ("train", "test")
            )
            names = wanted.classes or _class_names(path, [*train, *test])
            source = "data.classes names" if wanted.classes else f"{train[0].file.name} names"
            labels = [
                np.concatenate([_positions(path, shard, names, source) for shard in part]) for part in (train, test)
            ]
            items = [(len(labels[0]), _items(path, train)), (len(labels[1]), _items(path, test))]
            pixels, seen = decode(path, items, image_size, wanted.channels)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(
                path,
                f"its files cannot be read ({one_line(error)}), it is {_WHAT}",
                f"its files cannot be read ({type(error).__name__}), it is {_WHAT}",
            ) from error
        return ArrayDataset(pixels[0], labels[0], pixels[1], labels[1], names, *measure(pixels[0]), (*notes, *seen))

    of_images = (image_size, wanted.channels, wanted.label_column)
    return cached(
        ("parquet", str(root.resolve()), *of_images, *wanted.classes), [*parts["train"], *parts["test"]], read
    )


def _parts(path: str, root: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the files of train and test by the words of their names, and what was left out."""
    parts: dict[str, list[Path]] = {part: [] for part in _PARTS}
    nameless = 0
    try:
        files = sorted(root / entry.name for entry in root.iterdir())
    except OSError as error:
        raise unreadable(path, f"it cannot be read ({one_line(error)})", "it cannot be read") from error
    for file in files:
        if hidden(file.name) or not file.name.lower().endswith(".parquet"):
            continue
        words = [word.lower() for word in _WORD.findall(file.name[: -len(".parquet")])]
        said = sorted({_PART_OF[word] for word in words if word in _PART_OF})
        if len(said) > 1:
            rule = f"the parts {' and '.join(said)}; a file is of one part: rename it"
            raise unreadable(path, f"the name of {file.name} says {rule}", f"the name of a file says {rule}")
        nameless += not said
        for part in said:
            parts[part].append(file)
    notes = [f"parquet files left out, whose names have no word train, test or val: {nameless}"] if nameless else []
    if parts["test"] and parts["val"]:
        notes.append(f"parquet files left out, since there are such of the part test: {len(parts['val'])} of val")
    return {"train": parts["train"], "test": parts["test"] or parts["val"]}, notes


def _check_shards(path: str, part: str, files: list[Path]) -> None:
    """Find out whether each shard is there once, where names say how many there are: train-00000-of-00002.parquet."""
    sets: dict[str, list[tuple[int, int]]] = {}
    for file in files:
        if found := _SHARD.match(file.name):
            sets.setdefault(found[1], []).append((int(found[2]), int(found[3])))
    for prefix, shards in sets.items():
        numbers, totals = sorted(number for number, _ in shards), sorted({total for _, total in shards})
        if len(totals) == 1 and numbers == list(range(totals[0])):
            continue
        lacking = next(number for number in count() if number not in numbers)
        twice = "some are there twice, or are of another set"
        what = f"number {lacking} is missing" if lacking < totals[0] else twice
        rule = f"{len(shards)} shards that are said to be {' and '.join(map(str, totals))}: {what}"
        raise unreadable(path, f"there are {prefix}*-of-*.parquet, {rule}", f"{part} has {rule}")


def _read_shard(path: str, file: Path, public: str, wanted: Wanted) -> _Shard:
    """Return a file's columns, labels and names of labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, label = pq.read_schema(file), wanted.label_column
    images = [c.name for c in schema if pa.types.is_struct(c.type) and c.type.get_field_index("bytes") >= 0]
    images = [name for name in images if len(images) == 1 or name in _IMAGE_COLUMNS]
    if len(images) != 1 or schema.names.count(label) != 1:
        needs = f"the label column {label!r}: data.label-column names another one"
        if len(images) != 1:
            needs = f"one image column, a struct with a field bytes; of several, {' or '.join(_IMAGE_COLUMNS)}"
        has = f"{file.name} has the columns {', '.join(schema.names)}"
        raise unreadable(path, f"{has}; it needs {needs}", f"{public} needs {needs}")
    if not pa.types.is_integer(kind := schema.field(label).type):
        rule = "it is an integer; data.label-column names another column"
        what = f"the label column of {public} is {kind}; {rule}"
        raise unreadable(path, f"column {label} of {file.name} is {kind}; {rule}", what)
    labels = _labels(path, file, label, public)
    names = _hub_names(schema.metadata or {}, label)
    check_names(path, f"the metadata of {file.name}", names, f"the metadata of {public}")
    highest = int(labels.max(initial=-1))
    if names and highest >= len(names):
        rule = f"has the label {highest}; its metadata name {len(names)} classes"
        raise unreadable(path, f"{file.name} {rule}", f"{public} {rule}")
    return _Shard(file, public, images[0], labels, names)


def _labels(path: str, file: Path, name: str, public: str) -> Labels:
    import pyarrow.parquet as pq

    column = pq.read_table(file, columns=[name]).column(name)
    values = np.zeros(0, np.int64) if not len(column) or column.null_count else column.to_numpy()
    # As Python has them: cast to int64, what is above 2**63 would be negative, or look small.
    extremes = map(int, (values.min(), values.max())) if len(values) else ()
    odd = [value for value in extremes if not 0 <= value < MOST_CLASSES]
    if column.null_count or odd:
        found = "missing" if column.null_count else str(odd[0])
        rule = f"is {found}, it is at least 0 and below {MOST_CLASSES}"
        if column.null_count == len(column) or (len(values) and (values == -1).all()):
            rule += ": the file has no labels"
            if public.startswith("test"):  # the hub holds test parts whose labels nobody is to know
                rule += "; take it out, and a labelled validation file (val in its name) takes its place"
        raise unreadable(path, f"a value of column {name} of {file.name} {rule}", f"a label {rule}")
    return np.asarray(values, dtype=np.int64)


def _items(path: str, shards: list[_Shard]) -> Iterator[tuple[str, str, bytes]]:
    """Yield what to call each image, here and to a server, and its encoded bytes."""
    import pyarrow.parquet as pq

    for shard in shards:
        row = 0
        for batch in pq.ParquetFile(shard.file).iter_batches(batch_size=_ROWS, columns=[f"{shard.images}.bytes"]):
            for content in batch.column(0).field("bytes").to_pylist():
                name, public = f"row {row} of {shard.file.name}", f"row {row} of {shard.public}"
                if not content:
                    rule = "has no bytes; an image is in its row, not in a file beside it"
                    raise unreadable(path, f"{name} {rule}", f"{public} {rule}")
                yield name, public, content
                row += 1


def _class_names(path: str, shards: Sequence[_Shard]) -> tuple[str, ...]:
    """Return the names in the metadata of the first file, else "0", "1", ... to the highest label."""
    first = shards[0]
    if odd := next((shard for shard in shards if bool(shard.names) != bool(first.names)), None):
        named, other = (first, odd) if first.names else (odd, first)
        rule = "has names of its labels in its metadata"
        what = f"{named.public} {rule}, {other.public} has none"
        raise unreadable(path, f"{named.file.name} {rule}, {other.file.name} has none", what)
    return first.names or tuple(map(str, range(max(int(shard.labels.max(initial=-1)) for shard in shards) + 1)))


def _positions(path: str, shard: _Shard, classes: tuple[str, ...], source: str) -> Labels:
    """Return the labels of a file as positions in `classes`, which `source` names: by their names, if it has such."""
    if not shard.names:
        highest = int(shard.labels.max(initial=-1))
        if highest >= len(classes):
            rule = f"has the label {highest} without a name, data.classes names {len(classes)} classes"
            raise unreadable(path, f"{shard.file.name} {rule}: {', '.join(classes)}", f"{shard.public} {rule}")
        return shard.labels
    positions = np.zeros(len(shard.names), dtype=np.int64)
    for label in np.unique(shard.labels):
        name = shard.names[label]
        if name not in classes:
            raise unreadable(
                path,
                f"{shard.file.name} has images of class {name!r}, {source} {', '.join(classes)}",
                f"{shard.public} has images of <class {label}>, which is none of the others' classes",
            )
        positions[label] = classes.index(name)
    return positions[shard.labels]


def _hub_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...]:
    """Return the names of the labels in the hub's metadata, none without them."""
    try:
        facts: Any = json.loads(metadata[b"huggingface"])
        return tuple(str(name) for name in facts["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()
