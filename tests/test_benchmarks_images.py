"""The CIFAR-10 study on a CPU: a run that failed stands in its tables with the reason, and is tried again."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import images
from benchmarks.images import Study, cells, entries, play, tables

TERMS = """
[run]
clients = 4
cohort = 2
rounds = 1
[local]
epochs = 1
clip = 0.0
"""


def test_a_run_that_failed_is_a_row_with_its_reason_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "terms.toml").write_text(TERMS)
    monkeypatch.setattr(images, "TERMS", tmp_path / "terms.toml")
    monkeypatch.setattr(images, "GATE", 0.0)
    rows = {**images.DENSE, "random": "strategy='random' local.lr=1e38"}
    runs = list(entries({}, "a part", rows, [0.05], [1]))
    record = tmp_path / "images.json"

    assert play(runs, record, tmp_path / "out", 5, 2) == f"1 of 2 runs are in {record}, 1 failed"
    assert "a part, random, d0.05, s1: failed: the run failed: training in round 1" in capsys.readouterr().out
    known = json.loads(record.read_text())["runs"]
    lost, whole = known["a-part-random-d0.05-s1"], known["a-part-dense-s1"]
    assert {key: lost[key] for key in ("row", "mask_density", "seed")} == {
        "row": "random",
        "mask_density": 0.05,
        "seed": 1,
    }
    page = record.with_suffix(".md").read_text()
    found = [line.split("|")[1:5] for line in page.splitlines() if line.startswith(("| dense", "| random"))]
    assert [[cell.strip().replace("\u2013", "-") for cell in row] for row in found] == [
        ["dense", "1", "1", f"{100 * whole['central']:.1f}"],
        ["random", "0.05", "-", "failed"],
    ]
    assert f"- random, density 0.05, seed 1: {lost['failed']}.\n" in page

    again = Study(runs, record, tmp_path / "elsewhere")  # without the run folders, as in a clone
    assert [run.slug for run in again.waiting()] == ["a-part-random-d0.05-s1"]
    assert record.with_suffix(".md").read_text() == page
    there = Study(runs, tmp_path / "other.json", tmp_path / "out" / "runs")  # of the run folders alone
    assert lost["failed"].endswith(there.known["a-part-random-d0.05-s1"]["failed"].removeprefix("failed: "))


def test_a_gate_that_failed_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "terms.toml").write_text(f"{TERMS}lr = 1e38\n")
    monkeypatch.setattr(images, "TERMS", tmp_path / "terms.toml")
    runs = list(entries({}, "a part", images.DENSE, [0.05], [1]))
    said = play(runs, tmp_path / "images.json", tmp_path / "out", 5, 1)
    assert said.startswith("the gate failed: the run failed: training in round 1")


def known(seed: int, **more: Any) -> dict[str, Any]:
    """Return a record of a run."""
    run = {"part": "a part", "row": "random", "mask_density": 0.1, "seed": seed, "central": 0.5, "own": 0.6}
    run |= {"train_loss": 1.5, "density_all": 0.1, "parameters": 1000, "down": 10**6, "up": 10**6}
    run |= {"image_passes": 1234.0, "seconds": 120.0, "keys": {"model.name": "conv4"}}
    return run | {"environment": {"cores": 2, "cpu": "x", "time": "2026-01-02T03"}} | more


def test_means_are_over_the_seeds_that_did_not_fail_and_over_what_is_known() -> None:
    lost = {**{key: known(2)[key] for key in ("part", "row", "mask_density", "seed")}, "failed": "failed: NaN"}
    made = cells("random", 0.1, [known(1), lost])
    assert made == ["random", "0.1", "1 (of 2)", "50.0", "60.0", "1.500", "100", "25.4", "2.00", "1,234", "2"]
    nothing = dict.fromkeys(("central", "own", "train_loss", "density_all", "image_passes", "seconds"))
    assert cells("random", 0.1, [known(1, **nothing)]) == ["random", "0.1", "1", *["-"] * 4, "25.4", "2.00", "-", "-"]
    small = known(1, widths={"0": 16, "4": 32, "8": 64, "12": 64})
    assert cells("random, channels", 0.1, [small])[7] == "6.8"  # as a conv4 of half the width
    assert tables([lost]).splitlines()[-2:] == ["- random, density 0.1, seed 2: failed: NaN.", ""]
    assert "2 cores of x, no GPU, 2026-01-02 to 2026-01-02." in tables([known(1), lost])
