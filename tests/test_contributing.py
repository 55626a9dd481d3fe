"""The recipes of CONTRIBUTING, carried out in a copy of the project: the tests that they name pass."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
RECIPES = dict(re.findall(r"^## To add (.*?)\n(.*?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = {
    name: re.findall(r"^    \.venv/bin/python -m pytest (.*)$", text, re.MULTILINE) for name, text in RECIPES.items()
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with all recipes carried out."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("ssfl_app", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, root / file)
    for recipe in RECIPES.values():
        for language, file, text in re.findall(r"^```(\w+) (\S+)\n(.*?)^```", recipe, re.MULTILINE | re.DOTALL):
            (change if language == "diff" else write)(root / file, text)
    return root


def write(path: Path, text: str) -> None:
    """Make a file; into one that exists the text goes above its registry."""
    if path.exists():
        whole = path.read_text("utf-8")
        start = re.search(r"^_?[A-Z]+: (dict|Mapping|Registry)\[", whole, re.MULTILINE)
        assert start is not None
        text = f"{whole[: start.start()]}{text}\n\n{whole[start.start() :]}"
    path.write_text(text, "utf-8")


def change(path: Path, diff: str) -> None:
    """Carry out a diff without line numbers: what is kept or goes is looked for from the last such line on."""
    lines, at = path.read_text("utf-8").splitlines(), 0
    for line in diff.splitlines():
        if line.startswith("+"):
            lines.insert(at, line[1:])
            at += 1
        else:
            at = lines.index(line[1:], at)
            if line.startswith("-"):
                del lines[at]
            else:
                at += 1
    path.write_text("\n".join(lines) + "\n", "utf-8")


def test_there_is_a_recipe_for_each_registry() -> None:
    names = ["a strategy", "a criterion of SSFL", "a partition", "a model", "a data set", "a codec"]
    assert list(RECIPES) == names
    assert [len(commands) for commands in COMMANDS.values()] == [1] * len(names)


@pytest.mark.slow
def test_the_tests_that_the_recipes_name_pass(copy: Path) -> None:
    """In one process: most of the time goes into importing torch."""
    commands = [shlex.split(command) for (command,) in COMMANDS.values()]
    options = ["-q", "-x", "-p", "no:cacheprovider"]
    code = f"import sys, pytest; sys.exit(max(pytest.main([*c, *{options}]) for c in {commands}))"
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" passed") == len(commands)


def test_recipes_are_written_as_all_code_is(copy: Path) -> None:
    files = {
        file for recipe in RECIPES.values() for _, file in re.findall(r"^```(\w+) (\S+\.py)$", recipe, re.MULTILINE)
    }
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *files], cwd=copy, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
