"""The command line itself: its version, its help, and what a shell completes."""

import sys
from collections.abc import Iterator

import click
import pytest
from typer.main import get_command

import ssfl_app
from ssfl_app.cli.main import app, main


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["ssfl", "--version"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().out == f"ssfl {ssfl_app.__version__}\n"


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("ssfl re", ["report", "reproduce"]),
        ("ssfl federation d", ["down"]),
        ("ssfl run --eng", ["--engine"]),
        ("ssfl --ver", ["--version"]),
    ],
)
def test_a_shell_completes_commands_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, completed: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ssfl"])
    monkeypatch.setenv("_SSFL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert sorted(capsys.readouterr().out.split()) == completed


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda: (shell, f"/bin/{shell}"))
    monkeypatch.setattr(sys, "argv", ["ssfl", "--show-completion"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "_SSFL_COMPLETE=complete_" in capsys.readouterr().out


def texts(command: click.Command) -> Iterator[str]:
    """Yield what help pages say, of a command and those below it."""
    yield command.help or ""
    yield from (getattr(each, "help", None) or "" for each in command.params)
    for each in getattr(command, "commands", {}).values():
        yield from texts(each)


def test_no_word_of_a_help_page_is_lost(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What stands in brackets is markup to rich, which leaves it out; defaults are the option's `show_default`."""
    found = list(texts(get_command(app)))
    assert len(found) > 50
    assert [text for text in found if "[" in text] == []
    monkeypatch.setattr(sys, "argv", ["ssfl", "compare", "--help"])
    with pytest.raises(SystemExit):
        main()
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "[default: (runs/compare-<name of the file>)]" in shown
    assert 'SWEEP.toml is a configuration with a table "compare"' in shown
