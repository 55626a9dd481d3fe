"""Tables of samples, a row each: CSV and parquet files, and what else comes as columns. docs/data.md has the rules.

Inputs are in the order of the columns' names, so that sites whose files have another order agree.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ssfl_app.data.arrays import Array, from_arrays
from ssfl_app.data.cache import ArrayDataset, Wanted, cached
from ssfl_app.data.image_folder import hidden
from ssfl_app.data.images import decode
from ssfl_app.data.text import sequences
from ssfl_app.data.unreadable import check_regular, part_files, refused, unreadable
from ssfl_app.seeding import generator

_ENDINGS = (".csv", ".parquet")
_KINDS = ("integer", "floating", "boolean", "string", "large_string")


def read_table(path: str, root: Path, image_size: int, wanted: Wanted) -> ArrayDataset:
    """Read train and test (.csv or .parquet) of a folder, or one file of which `split_off` takes the test part."""
    files = [root]
    if root.is_dir():
        files = [file for file in sorted(root.iterdir()) if file.suffix in _ENDINGS and not hidden(file.name)]
        if len(files) != 1 or wanted.test_only:
            files = part_files(path, root, _ENDINGS, wanted.test_only)

    def read() -> ArrayDataset:
        tables = [_table(path, file, f"file {index}") for index, file in enumerate(files)]
        return from_tables(path, "table", tables, image_size, wanted)

    return cached(("table", str(root.resolve()), image_size, repr(wanted)), files, read)


def _table(path: str, file: Path, public: str) -> Any:
    import pyarrow as pa
    from pyarrow import csv, parquet

    check_regular(path, file, file.name, public)
    try:
        table = parquet.read_table(file) if file.suffix == ".parquet" else csv.read_csv(file)
    except (pa.ArrowException, OSError) as error:
        raise refused(path, file.name, public, f"cannot be read as {file.suffix[1:] or 'csv'}", error) from error
    if len(set(table.column_names)) < table.num_columns:
        raise refused(path, file.name, public, "has two columns of one name")
    return table


def from_tables(path: str, name: str, tables: list[Any], image_size: int, wanted: Wanted) -> ArrayDataset:
    """Return the data set of a training and a test ``pyarrow.Table``, or of one, which is split.

    Raises
    ------
    ConfigError
        A column is missing, has missing values, or is nothing that becomes numbers.
    """
    there = [column for column in tables[0].column_names if all(column in table.column_names for table in tables)]
    own = [column for column in (wanted.target, wanted.client) if column]
    inputs = list(wanted.inputs) or sorted(set(there) - set(own))
    asked = [("inputs", column) for column in inputs] + [("client", wanted.client)] * bool(wanted.client)
    for key, column in [*asked, *([("target", wanted.target)] if wanted.target or len(inputs) != 1 else [])]:
        if column not in there:
            rule = f"data.{key} is {column!r}; it names what is a column of each part"
            raise unreadable(path, f"{rule}: {', '.join(there)}", rule)
    found = [{column: _values(path, table, column) for column in (*inputs, *own)} for table in tables]
    owners = [part.get(wanted.client, np.zeros(len(part[inputs[0]]), np.int64)) for part in found]
    if len(found) == 1:
        parts = split_off(owners[0])
        found = [{column: values[part] for column, values in found[0].items()} for part in parts]
        owners = [owners[0][part] for part in parts]
    if not wanted.target:
        said: dict[str, tuple[list[str], list[str]]] = {}
        for index, part in enumerate(found):
            for owner, words in zip(owners[index], part[inputs[0]], strict=True):
                said.setdefault(str(owner), ([], []))[index].append(str(words))
        texts = [("\n".join(train), "\n".join(test)) for train, test in said.values()]
        return sequences(path, name, texts, wanted.length)
    x = _inputs(path, [{column: part[column] for column in inputs} for part in found], image_size, wanted)
    made = [(values, *(part[column] for column in own)) for values, part in zip(x, found, strict=True)]
    return from_arrays(made, name, wanted.classes)


def split_off(owners: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return sorted indices of training and test samples: a fifth of each owner's (N,), by chance, rounded down."""
    _, groups, counts = np.unique(owners, return_inverse=True, return_counts=True)
    order = generator(0, "test part").permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    test = rank >= np.repeat(counts - counts // 5, counts)
    return np.sort(order[~test]), np.sort(order[test])


def _values(path: str, table: Any, name: str) -> Array:
    """Return a column: numbers (N, ...), or words or encoded images as objects."""
    import pyarrow as pa

    column, rule = table.column(name), "is no numbers, words, lists of numbers of one shape, or images"
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if isinstance(column.type, pa.BaseExtensionType):  # arrays of the library datasets
        column = pa.chunked_array([chunk.storage for chunk in column.chunks])
    kind = leaf = column.type
    if column.null_count:
        rule = f"has {column.null_count} missing values; fill them, or take their rows out"
    elif pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return np.array([row["bytes"] or b"" for row in column.to_pylist()], dtype=object)
    elif pa.types.is_nested(kind):
        while hasattr(leaf, "value_type"):
            leaf = leaf.value_type
        try:
            values = np.array(column.to_pylist(), leaf.to_pandas_dtype())
            if values.dtype.kind in "iufb":
                return values
        except (ValueError, TypeError, NotImplementedError):  # of several lengths, or of no numbers
            pass
    elif any(getattr(pa.types, f"is_{fit}")(kind) for fit in _KINDS):
        return np.asarray(column.to_numpy())
    raise refused(path, f"column {name}, {kind},", "a column", rule)


def _inputs(path: str, parts: list[dict[str, Array]], image_size: int, wanted: Wanted) -> list[Array]:
    """Return the inputs of training and test: standardised and one-hot columns (N, F), or arrays or images of one."""
    made: list[list[Array]] = [[], []]
    for name, train in parts[0].items():
        values = [part[name] for part in parts]
        images = train.dtype.kind == "O" and isinstance(train[0], bytes)
        if (train.ndim > 1 or images) and len(parts[0]) > 1:
            raise refused(path, f"column {name}", "a column", "holds arrays; it is then the only one of data.inputs")
        if images:
            items = [((f"row {i}", f"row {i}", row) for i, row in enumerate(part)) for part in values]
            counted = [(len(part), rows) for part, rows in zip(values, items, strict=True)]
            return list(decode(path, counted, image_size, wanted.channels)[0])
        if train.ndim > 1:
            return values
        if train.dtype.kind == "O" and wanted.alone:
            rule = "holds words; with data.where 'sites' columns are numbers, since the words of sites differ"
            raise refused(path, f"column {name}", "a column", rule)
        if train.dtype.kind == "O":
            known = np.unique(train.astype(str))
            values = [part.astype(str)[:, None] == known for part in values]
        else:
            mean, std = train.mean(dtype=np.float64), train.std(dtype=np.float64)
            values = [(part.astype(np.float64) - mean)[:, None] / (std or 1.0) for part in values]
        for columns, part in zip(made, values, strict=True):
            columns.append(part.astype(np.float32))
    return [np.concatenate(columns, axis=1) for columns in made]
