"""The command line itself: its version, and what a shell completes."""

import sys

import pytest

import ssfl_app
from ssfl_app.cli.main import main


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
