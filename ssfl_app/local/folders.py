"""Which images lie under <root>/<class>/, with their classes: `ImageFolder` without importing torchvision."""

import os
from pathlib import Path

from ssfl_app.local.unreadable import check_names, unreadable

# Those of torchvision, so that a folder holds the same images for both.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

Files = list[tuple[Path, int]]


def image_folder(path: str, root: Path, classes: tuple[str, ...] = ()) -> tuple[Files, tuple[str, ...]]:
    """Return the files of <root>/<class>/, also in folders below it, with their classes, and the class names.

    Links are followed, but each real folder is entered once.

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
        There is no class folder, one without an image (with `classes` empty), one that `classes` does not name, or
        one that is another one by a link; a folder cannot be read, or its name is not printable.
    """
    what = f"it is a folder of <class>/<image> under {root.name}"
    try:
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        check_names(path, root.name, found)
        if odd := sorted(set(found) - set(classes)) if classes else []:
            raise unreadable(
                path,
                f"{root.name} has a folder {odd[0]!r}, data.classes names {', '.join(classes)}",
                f"{root.name} has {len(odd)} class folder(s) that data.classes does not name",
            )
        names = classes or tuple(found)
        if not found:
            raise unreadable(path, f"{root.name} has no class folder, {what}")
        entered = {_identity(root): root.name}
        for label, name in enumerate(names):
            if name in found:
                other = entered.setdefault(_identity(root / name), name)
                if other != name:
                    raise unreadable(
                        path,
                        f"{root.name}/{name} is a link to {other}; each class has a folder of its own",
                        f"{root.name}/<class {label}> is a link to a folder that is read already",
                    )
        files = [
            (file, label)
            for label, name in enumerate(names)
            if name in found
            for file in _images(root / name, set(entered))
        ]
    except OSError as error:
        raise unreadable(
            path,
            f"{root.name} cannot be read ({error}), {what}",
            f"a folder under {root.name} cannot be read, {what}",
        ) from error
    empty = sorted(set(found) - {names[label] for _, label in files})
    if empty and not classes:
        raise unreadable(
            path,
            f"{root.name}/{empty[0]} has no image, {what}",
            f"{root.name}/<class {names.index(empty[0])}> has no image, {what}",
        )
    return files, names


def _identity(folder: Path) -> tuple[int, int]:
    """Return what tells a folder from all others, whatever link leads to it."""
    facts = folder.stat()
    return facts.st_dev, facts.st_ino


def _images(top: Path, entered: set[tuple[int, int]]) -> list[Path]:
    """Return the images below a folder in ImageFolder's order; `entered` are folders that are not gone into again."""
    images: dict[Path, list[str]] = {}
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        images[folder] = []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = folder / entry.name
            if not entry.is_dir():
                images[folder] += [entry.name] if entry.name.lower().endswith(EXTENSIONS) else []
            elif (identity := _identity(path)) not in entered:
                entered.add(identity)
                waiting.append(path)
    return [folder / name for folder in sorted(images, key=str) for name in images[folder]]
