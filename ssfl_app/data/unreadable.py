"""Says what is wrong with a data set: the whole text for whoever has it on disk, one without names for a server."""

import stat
from collections.abc import Sequence
from pathlib import Path

from ssfl_app.data.summary import CLASS_NAME, odd_name
from ssfl_app.options import PrivateError
from ssfl_app.text import quoted


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


def one_line(error: BaseException) -> str:
    """Return an error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
