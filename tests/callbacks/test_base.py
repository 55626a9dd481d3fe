"""Callbacks in whole runs: stopping, the best model, resuming, failing; and code of one's own."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from ssfl_app import RunCallback, callbacks, client_app, server_app
from ssfl_app.config import Flat, foreign_modules, merge, parse
from ssfl_app.metrics import ACCURACY
from ssfl_app.options import ConfigError
from ssfl_app.results.plots import accuracy_by_round
from ssfl_app.results.recorder import Recorder
from ssfl_app.results.rows import compare_table, round_table, summary_table
from ssfl_app.results.run_folder import read_run
from ssfl_app.results.table import in_metric
from ssfl_app.simulation.in_process import run_inline
from tests.in_process_grid import FEW, SMALL

pytestmark = pytest.mark.narrow

KEYS: Flat = SMALL | FEW | {"engine.concurrent": 1, "run.rounds": 6}
STOP: Flat = {"stop.patience": 2, "stop.min-delta": 0.9, "stop.keep-best": True, "run.checkpoint-every": 2}


class Seen(RunCallback):
    """Keeps what it was told, and does what a test wants it to do after a round."""

    told: ClassVar[list[Any]] = []
    after: Callable[[int], str | None] = staticmethod(lambda round_: None)

    def begin(self, run: Any) -> None:
        self.told.append(("begin", run.next_round))

    def met(self, sites: Any) -> None:
        self.told.append(("met", len(sites)))

    def round(self, record: Any, strategy: Any) -> str | None:
        self.told.append(record["round"])
        return type(self).after(record["round"])

    def end(self, status: str, summary: Any) -> None:
        self.told.append((status, summary.get("rounds")))


ME = f"{__name__}:Seen"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Seen, "told", [])


def play(folder: Path, keys: Flat) -> dict[str, Any]:
    run_inline(server_app.app, client_app.app, parse(merge(KEYS, keys, {"run.out": str(folder)})))
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    return folder, play(folder, STOP)


def test_a_run_stops_and_says_why(stopped: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = stopped
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    assert summary["rounds"] == rounds(folder)[-1]["round"] == 3
    assert summary["stopped"] == "no better accuracy in 2 evaluated rounds"
    shown = dict(summary_table(summary).rows)
    assert shown["stopped"] == "after round 3: no better accuracy in 2 evaluated rounds"
    assert shown["accuracy, best round"].endswith(f" %, round {summary['best_round']}")
    said = (folder / "console.log").read_text()
    assert "stopped after round 3: no better accuracy in 2 evaluated rounds" in said
    assert f"best: round {summary['best_round']}, accuracy {100 * summary['best_value']:.4g} %: best.safet" in said


def test_the_best_model_is_that_of_its_round(stopped: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, summary = stopped
    best = summary["best_round"]
    assert summary["best_value"] == max(record["central_accuracy"] for record in rounds(folder)[1:])
    assert rounds(folder)[best]["central_accuracy"] == summary["best_value"]
    play(tmp_path / "short", {"run.rounds": best})
    kept, model = load_file(folder / "best.safetensors"), load_file(tmp_path / "short" / "model.safetensors")
    assert all((kept[name] == model[name]).all() for name in model)
    with safe_open(folder / "best-mask.safetensors", "pt") as file:
        assert set(file.keys()) == set(load_file(folder / "mask.safetensors"))


@pytest.mark.parametrize("killed", [1, 2, 3])
def test_resumes_to_the_same_end(
    stopped: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int
) -> None:
    """It is killed between a round's line and its checkpoint, or before the best model is written."""
    folder, run = stopped[0], tmp_path / "run"
    with monkeypatch.context() as patch:

        def die(self: Recorder, *arguments: Any) -> None:
            if self.records[-1]["round"] == killed:
                raise KeyboardInterrupt
            original(self, *arguments)

        name = "model" if killed == stopped[1]["best_round"] else "checkpoint"
        original = getattr(Recorder, name)
        patch.setattr(Recorder, name, die)
        with pytest.raises(KeyboardInterrupt):
            play(run, STOP)
    again = play(run, STOP | {"run.resume": True})
    # A server that starts anew sends masks once more.
    sent = ("seconds_total", "seconds_rounds", "bytes_mask_down", "bytes_discovery_down")
    ours, theirs = ({k: v for k, v in x.items() if k not in sent} for x in (again, stopped[1]))
    assert ours == theirs
    assert (run / "best.safetensors").read_bytes() == (folder / "best.safetensors").read_bytes()


def test_a_run_that_stopped_is_over_when_it_is_resumed(stopped: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = stopped
    before = (folder / "rounds.jsonl").read_bytes()
    assert play(folder, STOP | {"run.resume": True})["model_sha256"] == summary["model_sha256"]
    assert (folder / "rounds.jsonl").read_bytes() == before


def test_without_a_global_model_personal_ones_say_which_round_is_best(tmp_path: Path) -> None:
    """And the tables show that there is no central accuracy."""
    folder = tmp_path / "run"
    summary = play(folder, {"strategy": "dispfl", "stop.keep-best": True, "run.rounds": 2})
    found = [record["personal_accuracy_mean"] for record in rounds(folder)[1:]]
    assert summary["best_value"] == max(found)
    # A mean that nobody uses is no best model.
    assert list(folder.glob("best*")) == []
    best = f"best: round {summary['best_round']}, accuracy {100 * max(found):.4g} %"
    said = (folder / "console.log").read_text()
    assert f"{best}; no best.safetensors: dispfl has no global model\n" in said
    assert (summary["central_accuracy"], summary["local_accuracy_mean"]) == (None, None)
    assert "central    -" in said
    run = read_run(folder)
    assert summary_table(summary).rows[0] == ["accuracy, central test set", "-"]
    (row,) = compare_table([run]).rows
    assert row[6:9] == ["-", "-", in_metric(found[-1], ACCURACY)]
    assert [cells[7:10] for cells in round_table(run).rows] == [["-", "-", in_metric(x, ACCURACY)] for x in found]
    titles = [axes.get_title("left") for axes in accuracy_by_round([run]).axes]
    assert titles == ["Clients' own test samples, mean: personal models"]


def test_rounds_without_evaluation_do_not_count(tmp_path: Path) -> None:
    summary = play(tmp_path / "run", STOP | {"run.evaluate-every": 2, "run.rounds": 7})
    assert summary["rounds"] == 6
    assert summary["best_round"] in {2, 4, 6}


def test_one_of_ones_own_sees_the_run_and_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Seen, "after", staticmethod(lambda round_: "enough" if round_ != 1 else None))
    summary = play(tmp_path / "run", {"run.trackers": ME})
    assert Seen.told == [("begin", 0), ("met", 6), 0, 1, 2, ("finished", 2)]
    assert (summary["stopped"], summary["rounds"]) == ("enough", 2)
    assert "best_round" not in summary


def test_one_that_fails_is_a_warning_and_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(round_: int) -> None:
        if round_ == 1:
            raise RuntimeError("disk full")

    monkeypatch.setattr(Seen, "after", staticmethod(fail))
    failing = play(tmp_path / "failing", {"run.trackers": ME, "run.rounds": 2})
    assert Seen.told == [("begin", 0), ("met", 6), 0, 1]
    assert failing["failed_trackers"] == {ME: "RuntimeError: disk full"}
    assert rounds(tmp_path / "failing")[1]["failed_trackers"] == failing["failed_trackers"]
    said = (tmp_path / "failing" / "console.log").read_text()
    assert f"warning: {ME} of run.trackers gets nothing more: RuntimeError: disk full\n" in said
    assert play(tmp_path / "plain", {"run.rounds": 2})["model_sha256"] == failing["model_sha256"]


def test_one_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Seen, "__init__", lambda self, needed: None)
    with pytest.raises(ConfigError, match="one of them cannot be made: TypeError"):
        play(tmp_path / "run", {"run.trackers": ME})
    assert not (tmp_path / "run").exists()


def test_its_module_is_one_that_the_run_names() -> None:
    flat = merge({"run.trackers": f"tensorboard, {ME},json:dumps"})
    assert foreign_modules(flat) == ["json", __name__]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("tensorbord", "did you mean tensorboard?"),
        ("mlflow,mlflow", "names with commas between them, none of them twice"),
        ("mlflow,,wandb", "it is one of tensorboard, mlflow, wandb"),
        ("json:dumps", "it is a subclass of ssfl_app.RunCallback"),
        ("no_such_module:X", "there is no module no_such_module"),
    ],
)
def test_what_is_no_callback_is_refused(value: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"run.trackers is '{value}'; .*{why.replace('?', '[?]')}"):
        parse({"run.trackers": value})


def test_a_missing_library_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks.REGISTRY["mlflow"], "library", "mlflow_is_not_here")
    with pytest.raises(ConfigError, match=r'not installed here: pip install "ssfl-app\[mlflow\]"'):
        play(tmp_path / "run", {"run.trackers": "tensorboard,mlflow"})
    assert not (tmp_path / "run").exists()
    (tmp_path / "mlflow_is_not_here").mkdir()  # a folder of this name is no library
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with pytest.raises(ConfigError, match="not installed here"):
        callbacks.find("mlflow")
