"""A stranger's strategy, in a folder of his own: the contract test plays it by the command that the manual gives."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own-strategy.md").read_text("utf-8")
FORGETFUL = '''
"""It steps less and less far, and after an interruption far again."""

from ssfl_app.core.aggregation import Aggregator

from mine import Mine


class Forgetful(Mine):
    finished = 0

    def aggregator(self, round_):
        kept, old = super().aggregator(round_), self.state

        def finish():
            kept.finish()
            self.finished += 1
            self.state = {n: old[n] + (t - old[n]) / self.finished**0.1 for n, t in self.state.items()}

        return Aggregator(kept.add, finish)
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the strategy of the page; beside it lies what an installation tells pytest."""
    own, told = tmp_path / "own", tmp_path / "installed" / "ssfl_app_testing-0.dist-info"
    for path in (own, told):
        path.mkdir(parents=True)
    (example,) = re.findall(r"^```python mine\.py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (own / "mine.py").write_text(example, "utf-8")
    (own / "forgetful.py").write_text(FORGETFUL, "utf-8")
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
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTEST_ADDOPTS": "",
        "CI": "true",
    }  # cuts nothing short
    command = ["-P", "-m", "pytest", "--pyargs", "ssfl_app.testing", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_strategy_of_a_folder_passes_and_its_options_are_its_own(folder: Path) -> None:
    code, said = contract(folder, "--strategy", "mine:Mine", "--strategy-keys", "mine.step=0.8")
    assert code == 0, said
    assert " skipped" not in said
    assert " passed" in said


def test_one_that_forgets_something_fails(folder: Path) -> None:
    code, said = contract(folder, "--strategy", "forgetful:Forgetful", "-k", "snapshot")
    assert code == 1, said
    assert "FAILED" in said
    assert max(map(len, said.splitlines())) < 1000  # what differs is told by tensors
    assert "1 failed" in said


def test_without_a_strategy_nothing_is_played(folder: Path) -> None:
    code, said = contract(folder)
    assert (code, "--strategy is missing; it names what is played" in said) == (4, True), said
