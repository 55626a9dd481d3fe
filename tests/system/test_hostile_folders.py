"""`ssfl report` of folders of strangers: a table, or one line that names the file; and no control character."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ssfl_app.cli.main import main
from ssfl_app.config import merge
from ssfl_app.results import report, run_folder
from ssfl_app.results.recorder import Recorder
from tests.in_process_grid import SMALL

ODD = [
    None,
    True,
    -1,
    10**30,
    2**63,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "\x1b[2J\ud800",
    "[red]$x$",
    [],
    [[]],
    {},
]
BYTES = [b"", b"\0" * 40, b"{", b"[" * 100_000, b"\xff\xfe", b'{"a": ' * 50_000, b"nan", b"[]", b'"\\ud800"']


def ssfl_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    argv, sys.argv = sys.argv, ["ssfl", "report", os.fspath(folder)]
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, terminated)
    out, err = capsys.readouterr()
    return code, out, err


def check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ssfl_report(folder, capsys)
    assert all(c.isprintable() or c == "\n" for c in out + err), (out, err)
    if code == 0:
        assert "page: " in out
        (folder / "report.html").read_text("utf-8")
    else:
        assert code == 2
        assert err.startswith("ssfl: ")
        assert err.count("\n") == 1


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small run folder with all its files."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    recorder = Recorder(folder, merge(SMALL), lambda _: None)
    recorder.begin()
    recorder.close()
    record = dict.fromkeys(run_folder.NUMBERS, 1.0) | {"cohort": [0, 1], "ok": [0], "refused": {"1": "late"}}
    record |= {run_folder.CENTRAL: 0.5, run_folder.LOCAL: 0.25, run_folder.PERSONAL: None}
    setup = {"round": 0, "bytes_discovery_down": 10, "bytes_discovery_up": 10, "asked": [0], "ok": [0]}
    lines = [setup, *({**record, "round": number} for number in (1, 2))]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"client": k, "train": [3, k], "test_images": 2, "accuracy": 0.5, "name": f"site-{k}"} for k in range(2)]
    (folder / "clients.json").write_text(json.dumps({"class_names": ["cat", "dog"], "clients": rows}))
    summary = dict.fromkeys((*run_folder.NUMBERS, *run_folder.TOTALS), 1) | {"strategy": "ssfl", "dataset": "digits"}
    (folder / "summary.json").write_text(json.dumps(summary | {"model_sha256": "ab"}))
    return folder


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, child in inner for place in places(child, (*at, key)))]


def put(value: Any, at: tuple[Any, ...], odd: Any) -> Any:
    if not at:
        return odd
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = put(value[at[0]], at[1:], odd)
    return copy


FILES = ("summary.json", "clients.json", "environment.json", "rounds.jsonl")


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_whatever_a_value_is_replaced_by(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: Any
) -> None:
    monkeypatch.setattr(report, "_figures", lambda *_: [])  # they are drawn below
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(healthy, folder)
    path = folder / data.draw(st.sampled_from(FILES))
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else None
    value = json.loads(path.read_text()) if lines is None else lines
    at = data.draw(st.sampled_from(places(value)))
    changed = put(value, at, data.draw(st.sampled_from(ODD)))
    if lines is not None and isinstance(changed, list):
        path.write_text("".join(json.dumps(line) + "\n" for line in changed))
    else:
        path.write_text(json.dumps(changed))
    check(folder, capsys)


@given(st.sampled_from((*FILES, "config.toml", "mask.safetensors")), st.sampled_from(BYTES) | st.binary(max_size=40))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@example("config.toml", b"a = " + b"[" * 9000)
@example("config.toml", b"a." * 3000 + b"b = 1")
@example("mask.safetensors", b"\xff" * 64)
def test_whatever_bytes_a_file_has(
    healthy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
) -> None:
    monkeypatch.setattr(report, "_figures", lambda *_: [])
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(healthy, folder)
    (folder / name).write_bytes(content)
    check(folder, capsys)


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "caf\udce9", "a\nb", "$x"])
def test_names_of_folders_and_classes_reach_no_terminal_as_they_are(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """With pictures: a font or a formula is no reason to have no page."""
    folder = Path(shutil.copytree(healthy, tmp_path / name))
    known = json.loads((folder / "clients.json").read_text())
    (folder / "clients.json").write_text(json.dumps(known | {"class_names": [name, "dog"]}))
    code, out, err = ssfl_report(folder, capsys)
    assert code == 0, err
    page = (folder / "report.html").read_text("utf-8")
    assert "could not be drawn" not in page
    assert page.count("<img") == 5
    assert all(c.isprintable() or c == "\n" for c in out)


def test_a_picture_that_cannot_be_drawn_says_so_on_the_page(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise TypeError("no such font")

    monkeypatch.setattr(report.plots, "accuracy_by_round", broken)
    folder = Path(shutil.copytree(healthy, tmp_path / "run"))
    assert ssfl_report(folder, capsys)[0] == 0
    page = (folder / "report.html").read_text()
    assert "Accuracy by round: could not be drawn (TypeError: no such font)" in page
    assert page.count("<img") == 4


def test_pictures_of_very_many_clients_are_a_bounded_number_of_shapes(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(healthy, tmp_path / "run"))
    rows = [{"client": k, "train": [3, k % 7], "test_images": 2, "accuracy": (k % 10) / 10} for k in range(20_000)]
    (folder / "clients.json").write_text(json.dumps({"class_names": ["cat", "dog"], "clients": rows}))
    assert ssfl_report(folder, capsys)[0] == 0
    assert (folder / "report.html").stat().st_size < 1_000_000
