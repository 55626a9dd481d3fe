"""What people see of a run while it goes on: plain lines, or in a terminal and a notebook a bar under them."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ssfl_app.text import told_to

if TYPE_CHECKING:
    from rich.console import Console

ROUND = re.compile(r"round +(\d+)/(\d+)  (.*)")
"""The line of a round, `recorder.round_line`: its number, how many there are, metrics, bytes and ETA."""


@contextmanager
def showing(quiet: bool = False) -> Iterator[None]:
    """Show what is told inside; nothing but errors if `quiet`.

    Where there is a bar it has what the line of the last round says, in place of these lines; the run folder's
    console.log has all lines anyway.
    """
    if quiet:
        with told_to(lambda _: None):
            yield
        return
    from rich.console import Console

    console = Console()
    if console.is_jupyter or (sys.stdout.isatty() and not console.is_dumb_terminal):
        with _bar(console) as listener, told_to(listener):
            yield
    else:
        yield


@contextmanager
def _bar(console: "Console") -> Iterator[Callable[[str], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    said = TextColumn("{task.fields[said]}", markup=False, table_column=Column(no_wrap=True))
    # No thread draws it, and stdout stays what it is: this process is forked, and its forks may print.
    plain = {"auto_refresh": False, "redirect_stdout": False, "redirect_stderr": False}
    progress = Progress(BarColumn(20), MofNCompleteColumn(), said, console=console, **plain)
    task = progress.add_task("", total=None, said="")
    update = _in_notebook(progress) if console.is_jupyter else None

    def listen(text: str) -> None:
        found = ROUND.fullmatch(text)
        if found:
            progress.update(task, completed=int(found[1]), total=int(found[2]), said=found[3], refresh=update is None)
        elif update is not None:
            print(text)
        else:
            progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        if update is not None:
            update(progress)

    if update is not None:  # rich's own display in a notebook needs ipywidgets
        yield listen
        return
    with progress:
        yield listen


def _in_notebook(shown: object) -> Callable[[object], None]:
    """Display something rich in a notebook; return what displays it anew in the same place."""
    from IPython.display import display

    update: Callable[[object], None] = display(shown, display_id=True).update
    return update
