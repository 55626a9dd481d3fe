"""Says what is wrong with a data set: the whole text for whoever has it on disk, one without names for a server."""

import stat
from collections.abc import Sequence
from pathlib import Path

from ssfl_app.data.summary import CLASS_NAME, odd_name
from ssfl_app.options import ConfigError, PrivateError
from ssfl_app.text import one_line, quoted


def unreadable(path: str | Path, what: str, public: str | None = None) -> PrivateError:
    """Return the error that a data set at ``data.path`` cannot be read.

    `what` is wrong, with the names of files, folders and classes; `public` says the same without them.
    """
    return PrivateError(f"data.path is {str(path)!r}; {what}", f"data-path: {what if public is None else public}")


def check_regular(path: str, file: Path, name: str, public: str) -> None:
    """Raise ConfigError unless there is such a file: to open a pipe waits for ever, and a device is no data."""
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError) as error:
        raise unreadable(path, f"{name} cannot be read ({error})", f"{public} cannot be read") from error
    if not stat.S_ISREG(mode):
        raise unreadable(path, f"{name} is no regular file", f"{public} is no regular file")


def check_names(path: str, where: str, names: Sequence[str], public: str) -> None:
    """Raise ConfigError unless these can be names of classes, as they are sent and printed; `public`: of `where`."""
    odd = odd_name(names)
    if odd is not None:
        what = f"{where} has the class {quoted(odd)}; {CLASS_NAME}"
        raise unreadable(path, what, f"{public} has another class name; {CLASS_NAME}")


def is_folder(path: str, folder: Path, name: str) -> bool:
    """Return whether there is such a folder, called `name`; ConfigError if the account may not know."""
    try:
        return folder.is_dir()
    except (OSError, ValueError) as error:
        raise unreadable(path, f"{name} cannot be read ({one_line(error)})", f"{name} cannot be read") from error


def refused(path: str, name: str, public: str, rule: str, error: BaseException | None = None) -> PrivateError:
    """Return the error that something, by its `name` and as a server may hear of it, is as `rule` says."""
    return unreadable(path, f"{name} {rule}{f' ({one_line(error)})' if error else ''}", f"{public} {rule}")


def not_installed(name: str, package: str) -> ConfigError:
    """Return the error that a format needs a package, which comes with the extra of the format's name."""
    return ConfigError(f"data.name is {name!r}; it needs {package}: pip install 'ssfl-app[{name}]'")


def part_files(path: str, root: Path, names: Sequence[str], test_only: bool) -> list[Path]:
    """Return the files of training and test below a folder, each the one of ``{part}{ending}`` that is there.

    `names` are the endings. With `test_only` the test file stands for both if it is alone.
    """
    found = [[f for f in (root / f"{part}{name}" for name in names) if f.exists()] for part in ("train", "test")]
    if test_only:
        found[0] = found[0] or found[1]
    for part, files in zip(("train", "test"), found, strict=True):
        if len(files) != 1:
            rule = f"it has {len(files) or 'none'} of {', '.join(part + name for name in names)}; it has one of them"
            raise unreadable(path, rule)
        check_regular(path, files[0], files[0].name, files[0].name)
    return [files[0] for files in found]
