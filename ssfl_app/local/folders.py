"""Which images lie under <root>/<class>/, with their classes: `ImageFolder` without importing torchvision."""

import os
from pathlib import Path

from ssfl_app.options import ConfigError

# Those of torchvision, so that a folder holds the same images for both.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

Files = list[tuple[Path, int]]


def image_folder(path: str, root: Path, classes: tuple[str, ...] = ()) -> tuple[Files, tuple[str, ...]]:
    """Return the files of <root>/<class>/, also in folders below it, with their classes, and the class names.

    Parameters
    ----------
    path : str
        ``data.path``, for messages.
    root : Path
        A folder of folders.
    classes : tuple of str
        Names of all classes in order; one may be missing in `root`. Empty: those in `root`, sorted.

    Raises
    ------
    ConfigError
        There is no class folder, one without an image (with `classes` empty), or one that `classes` does not name.
    """
    what = f"it is a folder of <class>/<image> under {root.name}"
    try:
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    except OSError as error:
        raise ConfigError(f"data.path is {path!r}; {root.name} cannot be read ({error.strerror}), {what}") from error
    if odd := sorted(set(found) - set(classes)) if classes else []:
        raise ConfigError(
            f"data.path is {path!r}; {root.name} has a folder {odd[0]!r}, data.classes names {', '.join(classes)}"
        )
    names = classes or tuple(found)
    if not found:
        raise ConfigError(f"data.path is {path!r}; {root.name} has no class folder, {what}")
    files = [(file, label) for label, name in enumerate(names) for file in _images(root / name)]
    empty = sorted(set(found) - {names[label] for _, label in files})
    if empty and not classes:
        raise ConfigError(f"data.path is {path!r}; {root.name}/{empty[0]} has no image, {what}")
    return files, names


def _images(folder: Path) -> list[Path]:
    """Return the images below a folder in ImageFolder's order; none if there is no such folder."""
    return [
        Path(where) / name
        for where, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(EXTENSIONS)
    ]
