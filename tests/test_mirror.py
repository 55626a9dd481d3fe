"""Tests lie where the module lies that they are about: ``tests/<folder>/test_<module>[_<topic>].py``.

At the top, tests about a folder or a page beside the package lie as well: ``test_benchmarks_import.py``.
"""

from pathlib import Path

import pytest

from tests.conftest import LONG

ROOT = Path(__file__).resolve().parent.parent
TESTS = sorted(path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py"))

ACROSS = {"system", "apps"}
"""Folders of tests about several modules at once."""

# Tests that are about no one module of the package, or about all modules of their folder.
OTHERS = {
    "test_mirror.py",
    "callbacks/test_trackers.py",  # every tracker
    "test_supply.py",  # pyproject.toml and deploy/
    "test_wheel.py",  # what pyproject.toml makes
    "partitions/test_partitions.py",  # every way to deal
    "plugin/test_docs.py",  # docs/plugin.md
    "strategies/test_contract.py",  # every strategy
    "strategies/test_oracles.py",  # likewise
}


def has_module(test: Path) -> bool:
    """Return whether there is a module for a test: its name is the test's, or the test's up to an underscore."""
    words = test.stem.removeprefix("test_").split("_")
    names = ["_".join(words[:count]) for count in range(1, len(words) + 1)]
    beside = [ROOT / each for name in names for each in (name, f"{name.upper()}.md")] if len(test.parts) == 1 else []
    modules = [ROOT / "ssfl_app" / test.parent / f"{name}.py" for name in names]
    return any(path.exists() for path in modules + beside)


@pytest.mark.parametrize("test", map(str, TESTS))
def test_a_test_lies_where_its_module_lies(test: str) -> None:
    path = Path(test)
    assert path.parts[0] in ACROSS or test in OTHERS or has_module(path), f"ssfl_app has no module for tests/{test}"


def test_exceptions_are_there() -> None:
    assert {str(path) for path in TESTS} >= OTHERS | {*LONG}
    assert not any(has_module(Path(other)) for other in OTHERS)
