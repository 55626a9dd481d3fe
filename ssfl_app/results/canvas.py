"""matplotlib as everything here is drawn with it, whatever a notebook or a user's files say of it.

It looks at MPLBACKEND and MATPLOTLIBRC when it is imported, fails under a backend that is not installed here, which
every process has that a notebook starts, and draws as the file says. Only a `Figure` is used, which needs no backend.
So this module hides both from that import, and draws by matplotlib's own defaults. A program that has this one as a
library finds environment, backend and style as if it had imported matplotlib itself.

Import it where something is drawn, and nowhere earlier: matplotlib takes longer to import than a table to print.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_HIDDEN = ("MPLBACKEND", "MATPLOTLIBRC")


@contextmanager
def _hidden() -> Iterator[None]:
    """Hide the variables from the first import of matplotlib, and then have it look at them as far as it can."""
    new, log = "matplotlib" not in sys.modules, logging.getLogger("matplotlib")
    kept = {name: os.environ.pop(name) for name in _HIDDEN if new and name in os.environ}
    level = log.level
    log.setLevel(logging.ERROR)  # it works without a folder of its own, and says so in three lines
    try:
        yield
    finally:
        os.environ.update(kept)
    with contextlib.suppress(Exception):
        if "MATPLOTLIBRC" in kept:
            matplotlib.rc_file(matplotlib.matplotlib_fname())
    with contextlib.suppress(Exception):
        if "MPLBACKEND" in kept:
            matplotlib.rcParams["backend"] = kept["MPLBACKEND"]
    log.setLevel(level)


with _hidden():
    import matplotlib
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg
    from matplotlib import figure


class Figure(figure.Figure):
    """A figure that a notebook shows, whether or not somebody has imported pyplot there."""

    def _repr_png_(self) -> bytes:
        return saved(lambda: self, format="png", dpi=100)


def saved(draw: Callable[[], figure.Figure], **how: Any) -> bytes:
    """Return the file that `Figure.savefig` makes of what `draw` returns, with these arguments of it."""
    style: Any = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    style |= {"svg.hashsalt": "ssfl"}  # else the ids of an SVG file are random
    buffer = io.BytesIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name's letter; the tables have it
        draw().savefig(buffer, **how)
    return buffer.getvalue()
