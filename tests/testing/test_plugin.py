"""A stranger's strategy, in a folder of his own: the contract test plays it by the command that the manual gives."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MINE = '''
"""The server goes only a part of the way to the mean, and remembers in which round it was."""

from dataclasses import dataclass

import numpy as np

from ssfl_app.core.aggregation import Aggregator
from ssfl_app.core.algorithm import SparseStrategy
from ssfl_app.core.options import FromSettings, Section, fraction


@dataclass(frozen=True)
class MineOptions(Section):
    section = "mine"
    step: float = fraction(0.9, "share of the way to the mean")


class Mine(SparseStrategy):
    name = "mine"
    options = FromSettings(MineOptions)
    uses_density = False
    finished = 0

    def aggregator(self, round_):
        mean, old = super().aggregator(round_), self.state

        def finish():
            mean.finish()
            self.finished += 1
            step = self.options.step / self.finished**0.1
            self.state = {n: old[n] + step * (t - old[n]) for n, t in self.state.items()}

        return Aggregator(mean.add, finish)

    def state_dict(self):
        return super().state_dict() | {"finished": np.array([self.finished])}

    def load_state_dict(self, round_, arrays):
        super().load_state_dict(round_, arrays)
        self.finished = int(arrays["finished"][0])


class Forgetful(Mine):
    """It does not say after an interruption where it was."""

    def load_state_dict(self, round_, arrays):
        super().load_state_dict(round_, arrays)
        self.finished = 0
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a strategy; beside it lies what an installation of this package tells pytest."""
    own, told = tmp_path / "own", tmp_path / "installed" / "ssfl_app_testing-0.dist-info"
    for path in (own, told):
        path.mkdir(parents=True)
    (own / "mine.py").write_text(MINE, "utf-8")
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]["pytest11"]
    lines = [f"{name} = {target}" for name, target in entries.items()]
    (told / "entry_points.txt").write_text("\n".join(["[pytest11]", *lines]), "utf-8")
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: ssfl-app-testing\nVersion: 0\n", "utf-8")
    return own


def contract(folder: Path, *arguments: str) -> tuple[int, str]:
    """Play it in the folder, where the repository's tests are not importable."""
    paths = [str(folder.parent / "installed"), str(folder.parent / "package")]
    (folder.parent / "package").mkdir(exist_ok=True)
    if not (folder.parent / "package" / "ssfl_app").exists():
        (folder.parent / "package" / "ssfl_app").symlink_to(ROOT / "ssfl_app")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTEST_ADDOPTS": ""}
    command = ["-P", "-m", "pytest", "--pyargs", "ssfl_app.testing", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_a_strategy_of_a_folder_passes_and_its_options_are_its_own(folder: Path) -> None:
    code, said = contract(folder, "--strategy", "mine:Mine", "--strategy-keys", "mine.step=0.8")
    assert code == 0, said
    assert " skipped" not in said
    assert " passed" in said


def test_one_that_forgets_something_fails(folder: Path) -> None:
    code, said = contract(folder, "--strategy", "mine:Forgetful", "-k", "snapshot")
    assert code == 1, said
    assert "FAILED" in said
    assert "1 failed" in said


def test_without_a_strategy_nothing_is_played(folder: Path) -> None:
    code, said = contract(folder)
    assert (code, "--strategy is missing; it names what is played" in said) == (4, True), said
