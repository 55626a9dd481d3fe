"""What people see of a run while it goes on: plain lines, or in a terminal and a notebook lines above a bar."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

ROUND = re.compile(r"round +(\d+)/(\d+)  (.*)")
"""The line of a round, `recorder.round_line`: its number, how many there are, metrics, bytes and ETA."""


@contextlib.contextmanager
def showing(quiet: bool = False) -> Iterator[None]:
    """Show what is printed inside, or nothing if `quiet`; errors go to stderr.

    A bar has what the line of the last round says, in place of these lines; console.log of the run has them all.
    """
    from rich.console import Console

    console = Console(file=sys.stdout)
    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(contextlib.redirect_stdout(_Lines(lambda _: None)))
        elif console.is_jupyter or (sys.stdout.isatty() and not console.is_dumb_terminal):
            stack.enter_context(contextlib.redirect_stdout(_Lines(_bar(console, stack))))
        yield


class _Lines(io.TextIOBase):
    """A stdout that hands on each line."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take, self._begun = take, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._take(line)
        return len(text)


def _bar(console: "Console", stack: contextlib.ExitStack) -> Callable[[str], None]:
    """Show a bar until `stack` is left; return what takes a line."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    said = TextColumn("{task.fields[said]}", markup=False, table_column=Column(no_wrap=True))
    columns = BarColumn(20), MofNCompleteColumn(), said
    # No thread draws it: this process is forked.
    progress = Progress(*columns, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    task = progress.add_task("", total=None, said="")
    if console.is_jupyter:  # where rich's own display needs ipywidgets
        from IPython.display import display

        say: Callable[[str], object] = partial(print, file=sys.stdout)
        redraw: Callable[[], object] = partial(display(progress, display_id=True).update, progress)  # type: ignore[no-untyped-call]
    else:
        stack.enter_context(progress)
        say, redraw = partial(console.print, markup=False, highlight=False, soft_wrap=True), progress.refresh

    def take(line: str) -> None:
        if found := ROUND.fullmatch(line):
            progress.update(task, completed=int(found[1]), total=int(found[2]), said=found[3])
            redraw()
        else:
            say(line)

    return take
