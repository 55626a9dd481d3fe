"""Every name that a benchmark imports from the product is there; none is run."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "benchmarks").rglob("*.py"))]


def imported(path: Path) -> list[tuple[str, str]]:
    """Return module and name ("" for the module itself) of each import of the product in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] == "ssfl_app"]


def is_there(module: str, name: str) -> bool:
    try:
        return not name or hasattr(import_module(module), name) or find_spec(f"{module}.{name}") is not None
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("ssfl_app"):
            raise
        return False


def test_benchmarks_use_the_product() -> None:
    assert ("ssfl_app.files", "write_json") in imported(ROOT / "benchmarks" / "inversion.py")


@pytest.mark.parametrize("file", FILES)
def test_what_a_benchmark_imports_is_there(file: str) -> None:
    missing = [f"{module}: {name}" for module, name in imported(ROOT / file) if not is_there(module, name)]
    assert not missing
