"""Every text file is read and written as UTF-8, whatever the locale is: the code says so at each place."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def unstated(source: str) -> list[int]:
    """Return the lines in which text is read or written in the encoding of the locale."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = {word.arg: word.value for word in call.keywords}
        if name in ("read_text", "write_text"):
            stated = "encoding" in given or len(call.args) > (name == "write_text")
        elif name == "fdopen" or (name == "open" and not opens_no_text(call)):
            # The mode is the first argument of a path's `open`, and the second of the others.
            method = isinstance(call.func, ast.Attribute) and name == "open"
            mode = given.get("mode", next(iter(call.args[0 if method else 1 :]), None))
            stated = "encoding" in given or (isinstance(mode, ast.Constant) and "b" in str(mode.value))
        else:  # subprocess
            stated = "encoding" in given or not {"text", "universal_newlines"} & given.keys()
        if not stated:
            found.append(call.lineno)
    return found


def opens_no_text(call: ast.Call) -> bool:
    """Return whether `open` is one of another thing than a text file: a descriptor, an image, a mailbag."""
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    last = owner.split(".")[-1]
    return owner in ("os", "Image", "opener") or last in ("self", "mail", "post", "_post")


def test_no_file_is_read_or_written_in_the_encoding_of_the_locale() -> None:
    files = list((ROOT / "ssfl_app").rglob("*.py"))
    found = {str(f.relative_to(ROOT)): lines for f in files if (lines := unstated(f.read_text(encoding="utf-8")))}
    assert len(files) > 100
    assert found == {}


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("path.read_text()", [1]),
        ("path.read_text('utf-8')", []),
        ("path.write_text(text)", [1]),
        ("path.write_text(text, encoding='utf-8')", []),
        ("path.open()", [1]),
        ("path.open('a')", [1]),
        ("path.open('rb')", []),
        ("open(path, 'w')", [1]),
        ("os.fdopen(handle, 'a', encoding='utf-8')", []),
        ("os.open(path, flags)", []),
        ("subprocess.run(words, text=True)", [1]),
        ("subprocess.run(words)", []),
    ],
)
def test_what_counts_as_unstated(code: str, lines: list[int]) -> None:
    assert unstated(code) == lines
