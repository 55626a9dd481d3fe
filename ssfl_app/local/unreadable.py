"""What is wrong with a data set: the whole text for whoever has it on disk, one without names for a server."""

import stat
from collections.abc import Iterable
from pathlib import Path

from ssfl_app.options import PrivateError


def unreadable(path: str | Path, what: str, public: str | None = None) -> PrivateError:
    """Return the error that a data set at ``data.path`` cannot be read.

    Parameters
    ----------
    path : str or Path
        ``data.path``.
    what : str
        What is wrong, with the names of files, folders and classes.
    public : str, optional
        The same without them; default `what`, if there are none in it.
    """
    return PrivateError(f"data.path is {str(path)!r}; {what}", f"data-path: {what if public is None else public}")


def check_regular(path: str, file: Path, name: str, public: str) -> None:
    """Find out whether a file may be opened: to open a pipe waits for ever, and a device is no data.

    Raises
    ------
    ConfigError
        It is not there, or no regular file, nor a link to one.
    """
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError) as error:
        raise unreadable(path, f"{name} cannot be read ({error})", f"{public} cannot be read") from error
    if not stat.S_ISREG(mode):
        raise unreadable(path, f"{name} is no regular file", f"{public} is no regular file")


def check_names(path: str, where: str, names: Iterable[str]) -> None:
    """Find out whether class names can be written on one line of UTF-8, as they are sent and printed.

    Raises
    ------
    ConfigError
        One of them cannot.
    """
    for name in names:
        if not name or not name.isprintable():  # surrogates, which stand for bytes that are no UTF-8, are not either
            raise unreadable(
                path,
                f"{where} has the class {name!a}; a class name is printable UTF-8",
                f"{where} has a class whose name is not printable UTF-8",
            )
