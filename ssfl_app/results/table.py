"""One value for every table that is shown, with its renderers: the terminal, HTML, Markdown."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from markupsafe import Markup

from ssfl_app.metrics import ACCURACY, Metric
from ssfl_app.results.run_folder import MB
from ssfl_app.text import printable

NONE = "-"  # what a cell shows that has no value
WIDEST = 60  # characters of a text in a line of the terminal; the first column is never broken


@dataclass(frozen=True)
class Table:
    """Cells in rows, `NONE` where there is no value: texts stand on the left, numbers on the right."""

    headers: Sequence[str]  # none: a table of names and values
    rows: Sequence[Sequence[str]]
    texts: int | None = None  # how many columns hold texts, the others hold numbers; None: all hold texts

    def _number(self, column: int) -> bool:
        return self.texts is not None and column >= self.texts

    def print(self, file: IO[str] | None = None) -> None:
        """Write the table to a terminal or file, as wide as it is: a name that is broken cannot be copied."""
        from rich import box
        from rich.console import Console
        from rich.table import Table as Grid
        from rich.text import Text

        # Cells are Text: a run named "[red]" would otherwise be read as markup.
        left = int(not self.headers)
        made = Grid(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, left), show_header=not left)
        for column in range(len(self.headers or (self.rows or [()])[0])):
            header, number = self.headers[column] if self.headers else "", self._number(column)
            whole = number or column == 0 or not self.headers
            made.add_column(
                Text(header.replace(" ", "\n") if number else header),
                justify="right" if number else "left",
                no_wrap=whole,
                max_width=None if whole else WIDEST,
                overflow="fold",
            )
        for row in self.rows:
            made.add_row(*(Text(printable(cell)) for cell in row))
        width = Console(file=file, width=10**6).measure(made).maximum
        Console(file=file, width=max(Console(file=file).width, width)).print(made)

    def text(self) -> str:
        """Return what `print` writes to a file, without spaces at the ends of lines."""
        text = io.StringIO()
        self.print(text)
        return "\n".join(line.rstrip() for line in text.getvalue().strip("\n").splitlines())

    def html(self) -> Markup:
        """Return the table for a page; all text is escaped."""

        def cell(tag: str, column: int, text: str, scope: str = "") -> Markup:
            kind = Markup(' class="number"' if self._number(column) else "")
            form = Markup("<{}{}{}>{}</{}>")
            return form.format(Markup(tag), Markup(scope), kind, printable(text, keep="\n"), Markup(tag))

        def line(row: Sequence[str]) -> Markup:
            rest = (cell("td", column, text) for column, text in enumerate(row[1:], start=1))
            return Markup("<tr>{}{}</tr>\n").format(cell("th", 0, row[0], ' scope="row"'), Markup().join(rest))

        heads = Markup().join(cell("th", column, text) for column, text in enumerate(self.headers))
        head = Markup("<thead><tr>{}</tr></thead>\n").format(heads) if self.headers else ""
        pairs = Markup("" if self.headers else ' class="pairs"')
        form = Markup('<div class="card"><table{}>\n{}<tbody>\n{}</tbody></table></div>')
        return form.format(pairs, head, Markup().join(map(line, self.rows)))

    def markdown(self) -> list[str]:
        """Return the lines of a Markdown table whose columns are aligned in plain text too."""
        rows = [["\N{EN DASH}" if cell == NONE else cell for cell in row] for row in self.rows]
        # A rule of a colon alone is no rule, and the table no table.
        widths = [max(2, *map(len, column)) for column in zip(self.headers, *rows, strict=True)]

        def line(row: Sequence[str]) -> str:
            sized = enumerate(zip(row, widths, strict=True))
            return f"| {' | '.join(c.rjust(w) if self._number(i) else c.ljust(w) for i, (c, w) in sized)} |"

        rule = ["-" * (w - 1) + ":" if self._number(i) else "-" * w for i, w in enumerate(widths)]
        return [line(self.headers), line(rule), *map(line, rows)]


def shown(value: object, form: str = "") -> str:
    """Return `value` in a format such as ",.1f", or "-" for None."""
    return NONE if value is None else format(value, form)


def percent(fraction: float | None) -> str:
    """Return a fraction in percent, without the sign."""
    return in_metric(fraction, ACCURACY)


def in_metric(value: float | None, metric: Metric, decimals: int = 2, sign: str = "") -> str:
    """Return a value of a metric, without its unit: of a share percent with so many decimals, else four digits."""
    if value is None:
        return NONE
    if metric.share:
        return f"{100 * value:{sign}.{decimals}f}"
    return format(value, f"{sign},.1f" if 999.95 <= abs(value) < 1e9 else f"{sign}#.4g")


def megabytes(size: float | None) -> str:
    """Return bytes as MB of 10**6 with about three digits."""
    if size is None:
        return NONE
    mb = size / MB
    return f"{mb:,.1f}" if mb >= 100 else f"{mb:.2f}" if mb >= 1 or mb == 0 else f"{mb:.3g}"


def hours(value: float | None) -> str:
    """Return hours with three digits."""
    return NONE if value is None else format(value, ",.0f" if value >= 999.5 else ".3g")


def ratio(dense: float | None, sent: float | None) -> str:
    """Return how many times fewer bytes `sent` is than `dense`."""
    return f"{dense / sent:.2f}" if dense and sent else NONE
