"""benchmarks/images.py on digits: what is played, in which order, and how a later call goes on."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import image_masks, images
from ssfl_app.experiments import jobs
from ssfl_app.results.study_plots import SCORES
from ssfl_app.sparsity.layout import Layout
from ssfl_app.training.models import ModelOptions, outline, parameters
from ssfl_app.training.narrow import flops

TINY = {
    "data.name": "digits",
    "data.augment": "none",
    "model.width": 0.2,
    "run.clients": 3,
    "run.cohort": 3,
    "run.rounds": 6,
    "run.evaluate-every": 1,
    "local.batch-size": 128,
}


def slugs(runs: list[Any]) -> list[str]:
    return [run.slug for run in runs]


def test_the_order_of_the_study() -> None:
    entries, everything = images.plan({}), images.plan({}, everything=True)
    names, all_names = (slugs([entry.run for entry in runs]) for runs in (entries, everything))
    assert len(set(all_names)) == len(all_names) == 138
    assert all_names[:27] == names
    assert names[:6] == [
        "ten-clients-dense-s1",
        "ten-clients-ssfl-d0.05-s1",
        "ten-clients-shuffled-d0.05-s1",
        "ten-clients-random-d0.05-s1",
        "ten-clients-narrow-d0.05-s1",
        "ten-clients-ssfl-d0.05-s2",
    ]
    assert {entry.row for entry in entries if entry.density == 0.1} == set(images.CHANNELS)
    flat = entries[0].run.flat
    assert (flat["strategy"], flat["model.name"], flat["model.width"]) == ("fedavg", "conv4", 1.0)
    assert flat["local.lr"] * flat["local.lr-decay"] ** flat["run.rounds"] == pytest.approx(0.01, rel=0.01)
    larger = everything[-1].run.flat
    assert (larger["run.clients"], larger["run.cohort"]) == (100, 10)
    assert larger["local.lr"] * larger["local.lr-decay"] ** larger["run.rounds"] == pytest.approx(0.01, rel=0.01)
    passes = [run["run.rounds"] * run["run.cohort"] / run["run.clients"] for run in (flat, larger)]
    assert passes[0] == passes[1]


def test_what_is_recorded_was_played_as_the_plan_has_it(tmp_path: Path) -> None:
    record = tmp_path / "images.json"
    shutil.copy(images.RECORD, record)
    runs = images.plan({"data.path": "here"}, everything=True)
    waiting = slugs(images.Study(runs, record, tmp_path / "none").waiting())
    assert not set(waiting) & json.loads(record.read_text())["runs"].keys()
    assert record.with_suffix(".md").read_text() == images.RECORD.with_suffix(".md").read_text()


def test_the_narrow_network_is_as_large_as_what_the_masks_leave_alive() -> None:
    whole = outline(ModelOptions("conv4"), *images.INPUT)
    layout, shape = Layout.of(whole), images.INPUT[0]
    rows = {(e.row, e.density): e.run.flat for e in images.plan({}, everything=True) if e.part == "ten clients"}
    for density in (0.02, 0.05, 0.1, 0.2):
        flat, masked = rows["narrow", density], rows["ssfl", density]
        assert (flat["strategy"], masked["model.width"], masked["mask.density"]) == ("fedavg", 1.0, density)
        alive = layout.size - (1 - density) * layout.prunable_size
        size = parameters(ModelOptions("conv4", width=float(flat["model.width"])), *images.INPUT)
        assert size == pytest.approx(alive, rel=0.05)
    for density in (0.1, 0.25):
        flat, narrow = rows[images.AT_FLOPS, density], rows["narrow", density]
        assert (flat["mask.budget"], flat["mask.granularity"]) == ("flops", "channel")
        small = outline(ModelOptions("conv4", width=float(narrow["model.width"])), *images.INPUT)
        assert flat["mask.density"] * flops(whole, shape) == pytest.approx(flops(small, shape))


class Clock:
    """Stands for the module `time`: the minutes are over when the run in `home` has written three rounds."""

    sleep = staticmethod(time.sleep)

    def __init__(self, home: Path) -> None:
        self.log = home / "rounds.jsonl"

    def monotonic(self) -> float:
        return 1e9 if self.log.exists() and self.log.read_bytes().count(b"\n") > 3 else 0.0


def test_what_the_minutes_cut_goes_on_and_what_is_recorded_is_not_played_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out, runs = tmp_path / "images.json", tmp_path / "out", images.plan(TINY)[:2]
    gate, ssfl = (entry.run.slug for entry in runs)

    def play(minutes: float = 10, some: list[images.Entry] = runs) -> str:
        return images.play(some, path, out, minutes, 1)

    def recorded() -> dict[str, dict[str, Any]]:
        return json.loads(path.read_text())["runs"]

    assert play(0) == "the gate is not finished"
    assert not (out / "runs" / gate).exists()

    monkeypatch.setattr(jobs, "time", Clock(out / "runs" / gate))
    assert play() == "the gate is not finished"
    assert re.search(rf"{runs[0].run.name}: round [3-5] of 6; goes on next time", capsys.readouterr().out)
    assert recorded() == {}

    monkeypatch.setattr(jobs, "time", time)
    monkeypatch.setattr(images, "GATE", 1.01)
    assert re.fullmatch(r"the gate, .*, reached \d+.\d %, below 101.0 %: nothing else is played", play())
    assert "resuming after round" in (out / "runs" / gate / "console.log").read_text()
    assert list(recorded()) == [gate]

    monkeypatch.setattr(images, "GATE", 0.0)
    assert play() == f"2 of 2 runs are in {path}, 0 failed"
    capsys.readouterr()
    known = recorded()
    assert list(known) == [gate, ssfl]
    rounds = [json.loads(line) for line in (out / "runs" / ssfl / "rounds.jsonl").read_text().splitlines()]
    found, last = known[ssfl], rounds[-3:]
    assert found["central"] == pytest.approx(sum(entry["central_accuracy"] for entry in last) / 3)
    assert found["train_loss"] == pytest.approx(sum(entry["train_loss"] for entry in last) / 3)
    assert found["own"] == pytest.approx(sum(entry["local_accuracy_mean"] for entry in last) / 3)
    assert (found["seed"], found["density"], found["keys"]["run.rounds"]) == (1, pytest.approx(0.05, abs=0.001), 6)
    assert found["alive"] == pytest.approx(0.05 * found["prunable"], abs=1)
    assert len(found["layers"]) == 5
    assert found["down"] < known[gate]["down"]
    table = [line for line in path.with_suffix(".md").read_text().splitlines() if line.startswith("| ")]
    assert [line.strip("| ").split(" ")[0] for line in table] == ["row", "-" * len("dense"), "dense", "ssfl"]

    # The record is enough: another machine lacks the run folders.
    shutil.rmtree(out)
    monkeypatch.setattr(jobs, "play", None)
    assert play() == f"2 of 2 runs are in {path}, 0 failed"
    assert recorded() == known
    # Under other terms it is another run.
    with pytest.raises(TypeError):
        play(some=images.plan(TINY | {"local.lr": 0.2})[:2])


def run(row: str, central: float, density: float = 0.05, seed: int = 1) -> dict[str, Any]:
    return {"part": "ten clients", "row": row, "central": central, "mask_density": density, "seed": seed}


def test_the_masks_of_the_study_by_their_minibatches() -> None:
    numbers = image_masks.minibatches()
    assert sorted(numbers.values()) == [1, 2, 5, 10, 20, 40, 80, 160]
    assert set(numbers) <= {"ssfl", *images.ABLATIONS}
    known = [run("ssfl", 0.5), run("ssfl", 0.7, seed=2), run("ssfl", 0.1, 0.1), run("random", 0.9)]
    known += [run("ssfl, 8 minibatches", 0.8), run("dense", 0.9)]
    assert image_masks.accuracies(known, 0.05) == [(10, pytest.approx(0.6)), (80, 0.8)]
    error = {"error": {key: [0.5, 0.25] for key in ("mean", "low", "high")}}
    errors = {str(d): {"batches": [1, 10], "errors": {SCORES: error}} for d in image_masks.DENSITIES}
    left, right = image_masks.picture(errors, known).axes
    assert list(left.lines[0].get_ydata()) == [50.0, 25.0]
    assert [list(line.get_ydata()) for line in right.lines[:2]] == [
        pytest.approx([60.0, 80.0]),
        pytest.approx([10.0]),
    ]
