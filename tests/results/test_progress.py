"""What is shown of a run: plain lines in a pipe, a bar in a terminal and a notebook, nothing if one asks for that."""

import io
import os
import pty
import re
import select
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from ssfl_app.results import progress
from ssfl_app.results.progress import ROUND, showing
from ssfl_app.results.recorder import round_line
from ssfl_app.text import tell

RECORD = {
    "round": 2,
    "train_loss": 0.5,
    "central_accuracy": 0.75,
    "local_accuracy_mean": None,
    "personal_accuracy_mean": None,
    "bytes_train_down": 1_500_000,
    "bytes_evaluate_down": 0,
    "bytes_mask_down": 0,
    "bytes_train_up": 1_000_000,
    "seconds": 2.0,
}
LINE = round_line(RECORD, 3, 62.0)


def play() -> None:
    for text in ("engine inline", LINE, "warning: client 1 was lost\nfor ever"):
        tell(text)


def test_a_pipe_gets_plain_lines(capfd: pytest.CaptureFixture[str]) -> None:
    with showing():
        play()
    assert capfd.readouterr().out == f"engine inline\n{LINE}\nwarning: client 1 was lost\nfor ever\n"


def test_quiet_prints_errors_only(capfd: pytest.CaptureFixture[str]) -> None:
    with showing(quiet=True):
        play()
        tell("ssfl: it failed", error=True)
    assert capfd.readouterr() == ("", "ssfl: it failed\n")
    tell("afterwards")
    assert capfd.readouterr().out == "afterwards\n"


def written(terminal: int) -> str:
    """Return all that was written to a pseudo-terminal, which hands it out in parts."""
    shown = b""
    while select.select([terminal], [], [], 0.2)[0]:
        shown += os.read(terminal, 100_000)
    return shown.decode()


def test_a_terminal_gets_a_bar_below_the_other_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        with showing():
            play()
        terminal.flush()
        shown = written(ours)
    os.close(ours)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert "engine inline\r\n" in plain
    assert re.search("warning: client 1 was lost\r\n.*\rfor ever\r\n", plain)
    assert "round 2/3" not in plain
    found = ROUND.fullmatch(LINE)
    assert found is not None
    assert found[3].startswith("loss 0.5000  central  75.00%")
    assert found[3].endswith("1.500 MB down  1.000 MB up  2.0 s  ETA 1:02")
    last = [line for line in re.split(r"[\r\n]+", plain) if line.strip()][-1]
    assert re.fullmatch(rf"━*.?━* 2/3 {re.escape(found[3])}\s*", last)


def test_a_notebook_gets_a_bar_that_is_drawn_anew_in_its_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []

    def draw(what: object) -> None:
        text = io.StringIO()
        Console(file=text, width=150, force_jupyter=False).print(what)
        shown.append(text.getvalue().strip())

    def display(what: object, display_id: bool) -> SimpleNamespace:
        draw(what)
        return SimpleNamespace(update=draw)

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert progress.sys.stdout.isatty() is False
    with showing():
        play()
    assert shown[0].endswith("0/?")
    assert " 2/3 loss 0.5000" in shown[-1]
    out = capsys.readouterr().out
    assert out == "engine inline\nwarning: client 1 was lost\nfor ever\n"
