"""What is installed with the package: all that it imports, by its own word, and no version that may break it."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = re.compile(r"([A-Za-z0-9_.-]+)")


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def imported():
    """Return the distributions that files of the package import, by the file that does."""
    known, found = packages_distributions(), {}
    for file in sorted((ROOT / "ssfl_app").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"ssfl_app"}:
                found.setdefault(plain(known[name][0]), file.relative_to(ROOT))
    return found


def test_what_is_imported_is_declared():
    declared = {plain(NAME.match(text)[1]) for text in PROJECT["dependencies"]}
    assert {name: str(file) for name, file in imported().items() if name not in declared} == {}


def test_what_is_declared_is_imported():
    declared = {plain(NAME.match(text)[1]) for text in PROJECT["dependencies"]}
    assert declared - set(imported()) == set()


@pytest.mark.parametrize("text", PROJECT["dependencies"])
def test_a_dependency_has_a_lowest_version_and_one_that_it_stays_below(text):
    assert re.search(r">=[\d.]+,<[\d.]+$", text), text


def test_nothing_that_runs_code_from_data_is_used():
    """No pickle, eval, shell or YAML: what arrives from clients, files and folders stays data."""
    modules, calls = r"\b(pickle|dill|cloudpickle|marshal|shelve|yaml)\b", r"(?<!\.)\b(eval|exec)\(|\btorch\.load\("
    bad = re.compile(rf"{modules}|{calls}|shell=True|allow_pickle=True")
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in sorted((ROOT / "ssfl_app").rglob("*.py"))
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if bad.search(line.partition("#")[0])
    ]
    assert found == []
