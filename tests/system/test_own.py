"""Models, data, tasks and strategies of one's own: the files of ``examples/own``, from a folder of their own.

What they reach ``benchmarks/own.py`` plays; here they run, learn, and give the same bits on Ray. `test_engines` has
them on real nodes, `test_examples` with ``flwr run``.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.drills.field import ssfl

SECONDS = 300
OWN = Path(__file__).parents[2] / "examples" / "own"
SMALL = {
    "topics": "run.clients=3 run.cohort=3 run.rounds=1 local.epochs=1 model.options.depth=1",
    "tumours": "run.rounds=2 run.clients=3 run.cohort=3",
    "progression": "run.rounds=2 run.clients=3 run.cohort=3",
    "speakers": "run.rounds=1 run.clients=3 run.cohort=3 data.options.per-speaker=10",
    "lesions": "run.rounds=1 run.clients=3 run.cohort=3 data.options.train=12 data.options.test=4",
    "momentum": "run.rounds=1 run.clients=3 run.cohort=3 data.name='tumours:tumours' model.name='tumours:mlp'",
}


PLAYED = """
import json, sys
from ssfl_app.cli.main import app
for name, keys in json.loads(sys.argv[1]).items():
    app(["run", f"{name}.toml", "-c", keys, "--out", f"out/{name}"], standalone_mode=False)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files, and the runs of all of them in one process below ``out``."""
    folder = Path(shutil.copytree(OWN, tmp_path_factory.mktemp("place") / "own"))
    line = [sys.executable, "-c", PLAYED, json.dumps(SMALL)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def summary_of(folder: Path) -> dict[str, object]:
    summary: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return summary


def play(own: Path, name: str, out: Path, *words: str) -> dict[str, object]:
    line = [*ssfl(*words), f"{name}.toml", "-c", SMALL[name], "--out", str(out)]
    done = subprocess.run(line, cwd=own, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return summary_of(out)


@pytest.mark.parametrize("name", SMALL)
def test_each_example_runs_in_a_folder_of_its_own(own: Path, name: str) -> None:
    summary = summary_of(own / "out" / name)
    assert f"run.rounds={summary['rounds']}" in SMALL[name]
    assert summary["refused_replies"] == summary["lost_replies"] == 0
    assert 0 < float(str(summary["density"])) < 0.21
    lines = (own / "out" / name / "rounds.jsonl").read_text().splitlines()
    losses = [loss for loss in (json.loads(line).get("train_loss") for line in lines) if loss is not None]
    assert len(losses) == summary["rounds"]
    assert all(0 < loss < 10 for loss in losses)


def test_each_file_has_at_most_sixty_lines_and_a_configuration() -> None:
    files = sorted(OWN.glob("*.py"))
    assert {file.stem for file in files} == set(SMALL) == {file.stem for file in OWN.glob("*.toml")} - {"pyproject"}
    assert max(len(file.read_text().splitlines()) for file in files) <= 60


@pytest.mark.slow
def test_ray_gives_the_bits_of_one_process(own: Path, tmp_path: Path) -> None:
    ray = play(own, "topics", tmp_path / "ray", "run", "--engine", "ray")
    assert ray["model_sha256"] == summary_of(own / "out" / "topics")["model_sha256"]
