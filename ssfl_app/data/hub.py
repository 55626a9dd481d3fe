"""Data sets of the Hugging Face library ``datasets``: a folder that `save_to_disk` wrote, or a name on the hub."""

from dataclasses import replace
from pathlib import Path

from ssfl_app.data.cache import ArrayDataset, Wanted, cached
from ssfl_app.data.table import from_tables
from ssfl_app.data.unreadable import not_installed, refused, unreadable


def read_hub(path: str, root: Path, image_size: int, wanted: Wanted) -> ArrayDataset:
    """Read the parts train and test (or validation), or the only one, which is split; columns are those of a table.

    Raises
    ------
    ConfigError
        There is no such data set, or `from_tables` cannot use its columns.
    """
    try:
        import datasets
    except ImportError as error:
        raise not_installed("hf", "datasets") from error
    try:
        found = datasets.load_from_disk(str(root)) if root.is_dir() else datasets.load_dataset(path)
    except Exception as error:  # of a name that is not there, or of a broken file, there are many
        raise refused(path, "it", "it", "cannot be read as a saved folder, or a name on the hub", error) from error
    parts = {"": found} if isinstance(found, datasets.Dataset) else dict(found)
    names = [next((n for n in kind if n in parts), "") for kind in (("train",), ("test", "validation"))]
    if len(parts) > 1 and "" in names:
        raise unreadable(path, f"it has the parts {', '.join(parts)}; it has train, and test or validation")
    chosen = [parts[name] for name in names] if len(parts) > 1 else list(parts.values())
    target = chosen[0].features.get(wanted.target)
    if isinstance(target, datasets.ClassLabel):
        wanted = replace(wanted, classes=tuple(target.names))

    def read() -> ArrayDataset:
        return from_tables(path, "hf", [part.with_format("arrow")[:] for part in chosen], image_size, wanted)

    # A fingerprint is of the content and of all that was done to it.
    prints, files = (
        [part._fingerprint for part in chosen],
        [Path(f["filename"]) for p in chosen for f in p.cache_files],
    )
    return cached(("hf", str(root.resolve()), image_size, repr(wanted), *prints), files, read)
