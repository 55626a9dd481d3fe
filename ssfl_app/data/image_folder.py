"""Lists the images under <root>/<class>/ with their classes: `ImageFolder` without importing torchvision."""

import os
import re
from collections import Counter
from pathlib import Path

from ssfl_app.data.unreadable import check_names, unreadable

# Those of torchvision, so that a folder holds the same images for both.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# What operating systems and network disks put beside a user's files; each "@" folder is Synology's or QNAP's.
_SYSTEM = {
    "__macosx",
    "$recycle.bin",
    "#recycle",
    "system volume information",
    "lost+found",
    "thumbs.db",
    "desktop.ini",
}
_HIDDEN, _LOOSE = "hidden or of the system", "beside the class folders"
_SAID = re.compile(r"(\.[a-z0-9]{1,4})?", re.ASCII)  # others may be a part of a name: scan.smith_john

Files = list[tuple[Path, int]]
Left = Counter[str]
"""How many files and folders were left out: by their ending, or why."""


def hidden(name: str, folder: bool = False) -> bool:
    """Return whether a file or folder is none of the user's own, by its name."""
    return name.startswith(".") or (folder and name.startswith("@")) or name.lower() in _SYSTEM


def left_out(left: Left) -> tuple[str, ...]:
    """Return what was left out as one line, none if there was nothing."""
    kinds = {kind: left[kind] for kind in (_HIDDEN, _LOOSE) if left[kind]}
    endings = sorted((ending for ending in left if ending not in kinds), key=lambda ending: (-left[ending], ending))
    said = [f"{count} {kind}" for kind, count in kinds.items()]
    if endings:
        few = ", ".join(f"{left[ending]} {ending or 'without one'}" for ending in endings[:5])
        more = f" and {len(endings) - 5} more endings" if len(endings) > 5 else ""
        said.append(f"{sum(left[ending] for ending in endings)} with endings that are no image's ({few}{more})")
    return (f"files and folders left out: {', '.join(said)}",) if said else ()


def image_folder(
    path: str,
    root: Path,
    classes: tuple[str, ...] = (),
    left: Left | None = None,
    endings: tuple[str, ...] = EXTENSIONS,
) -> tuple[Files, tuple[str, ...]]:
    """Return the files of <root>/<class>/, also in folders below it, with their classes, and the class names.

    Links are followed, but each real folder is entered once. What is hidden is left out; `left` gets it. `path` is
    ``data.path``, for messages. `classes` names all classes in order, of which some may be missing in `root`; empty:
    those in `root`, sorted. A file is an image by its ending, one of `endings`.

    Raises
    ------
    ConfigError
        There is no class folder, one without an image (with `classes` empty), one that `classes` does not name, or
        one that is another one by a link; a folder cannot be read, or its name cannot be that of a class.
    """
    left = Left() if left is None else left
    what = f"it is a folder of <class>/<image> under {root.name}"
    try:
        found = []
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            folder = entry.is_dir()
            if entry.name not in classes and hidden(entry.name, folder):
                left[_HIDDEN] += 1
            elif folder:
                found.append(entry.name)
            else:
                left[_LOOSE] += 1
        check_names(path, root.name, found, root.name)
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
            for file in _images(root / name, set(entered), left, endings)
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
            f"{root.name}/{empty[0]} has no image ({', '.join(endings)}), {what}",
            f"{root.name}/<class {names.index(empty[0])}> has no image, {what}",
        )
    return files, names


def _identity(folder: Path) -> tuple[int, int]:
    """Return what tells a folder from all others, whatever link leads to it."""
    metadata = folder.stat()
    return metadata.st_dev, metadata.st_ino


def _images(top: Path, entered: set[tuple[int, int]], left: Left, endings: tuple[str, ...]) -> list[Path]:
    """Return the images below a folder in ImageFolder's order; `entered` are folders that are not gone into again."""
    images: dict[Path, list[str]] = {}
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        images[folder] = []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path, below = folder / entry.name, entry.is_dir()
            if hidden(entry.name, below):
                left[_HIDDEN] += 1
            elif below:
                if (identity := _identity(path)) not in entered:
                    entered.add(identity)
                    waiting.append(path)
            elif entry.name.lower().endswith(endings):
                images[folder].append(entry.name)
            else:
                ending = Path(entry.name).suffix.lower()
                left[ending if _SAID.fullmatch(ending) else "other"] += 1
    return [folder / name for folder in sorted(images, key=str) for name in images[folder]]
