"""What the tutorial and the how-to pages tell readers to type runs, block by block, each page in a folder of its own.

- ``python`` runs; all blocks of a page share their names. ``python FILE``, ``toml FILE`` and the like write a file.
- ``sh`` is played line by line, what begins with ``ssfl`` in this process and with `SMALL` after it: two rounds on
  every second digit tell as well whether a line works. ``ssfl federation`` and all other lines are processes.
- the keys of ``toml`` exist; what has a ``[compare]`` is a whole sweep file. ``diff`` and ``text`` show something.

A block that no test can run says so in a comment above it: ``<!-- skip: next "needs a second host" -->``.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import SkipTest

import numpy as np
import pytest
import torch
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from sybil.region import Region

from ssfl_app import config, registry, runtime
from ssfl_app.cli.main import main
from ssfl_app.data import dataset
from ssfl_app.experiments.sweep_spec import read_plan
from ssfl_app.sparsity.layout import state_of
from tests.conftest import few_digits

ROOT = Path(__file__).parents[1]
NAV = {
    title: [page for entry in entries for page in entry.values()]
    for section in tomllib.loads((ROOT / "zensical.toml").read_text("utf-8"))["project"]["nav"]
    for title, entries in section.items()
    if title in {"Tutorial", "How-to"}
}
PAGES = [page for pages in NAV.values() for page in pages]
SLOW = {"docs/tutorial/three-hospitals.md", "docs/tutorial/density.md", "docs/trackers.md", "docs/compare.md"}

SSFL = [sys.executable, "-P", "-m", "ssfl_app"]
LITTLE = ["-c", "run.rounds=2 local.epochs=1 engine.concurrent=1"]
SMALL = {
    "run": LITTLE,
    "federation run": ["-c", "run.rounds=1 local.epochs=1"],
    "compare": [*LITTLE, "-c", "run.seed=1 mask.density=0.1 run.rounds=1 run.clients=4 run.cohort=4"],
    "study masks": ["--batches", "1,4", "--repeats", "1", "-c", "run.clients=4 run.cohort=4"],
}


class Files(RawFencedCodeBlockLexer):
    """Blocks with the name of a file after their language."""

    def __init__(self) -> None:
        super().__init__(re.compile(r"(?P<language>\w+) (?P<file>\S+)$\n", re.MULTILINE))

    def __call__(self, document: Any) -> Iterator[Region]:
        for region in super().__call__(document):
            yield Region(region.start, region.end, (region.lexemes["file"], region.lexemes["source"]), write)


def write(example: Example) -> None:
    file, text = example.parsed
    Path(file).write_text(text, "utf-8")


def commands(example: Example) -> None:
    """Play the lines of a block; lines that end in a backslash go on."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            command(line, words)


def command(line: str, words: list[str]) -> None:
    if words[0] != "ssfl":
        done = subprocess.run(["bash", "-ec", line], check=False)
        assert done.returncode == 0, line
        return
    small = next((more for name, more in SMALL.items() if words[1:][: len(name.split())] == name.split()), [])
    if words[1] == "federation":
        assert subprocess.run([*SSFL, *words[1:], *small], check=False).returncode == 0, line
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*words, *small])
        with pytest.raises(SystemExit) as end:
            main()
    assert not end.value.code, line


def keys_exist(example: Example) -> None:
    Path("block.toml").write_text(example.parsed, "utf-8")
    found = config.read_file(Path("block.toml"), sweep=True)
    if any(key.startswith("compare.") for key in found):
        read_plan([Path("block.toml")], [])
    else:
        config.merge(found)


SYBIL = Sybil(
    [
        SkipParser(),
        Files(),
        PythonCodeBlockParser(),
        CodeBlockParser("sh", commands),
        CodeBlockParser("toml", keys_exist),
    ]
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand in a folder with what a clone has; modules that are made there are forgotten afterwards."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(registry.FOLDER, "")
    monkeypatch.setenv("SSFL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setitem(dataset.READERS, "digits", few_digits)
    before = set(sys.modules)
    runtime._open.cache_clear()  # it may hold all digits, and must not hold every second one afterwards
    yield tmp_path
    runtime._open.cache_clear()
    if (tmp_path / "federation" / "federation.json").exists():  # a page that failed half-way leaves it up
        subprocess.run([*SSFL, "federation", "down"], check=False)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def play(page: str) -> dict[str, Any]:
    """Run the blocks of a page where one stands, and return the names that its Python has."""
    document = SYBIL.parse(ROOT / page)
    document.namespace["__name__"] = "page"
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest as reason:
            print(f"{page}:{example.line}: skipped, {reason}")
    return document.namespace


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW)) for p in PAGES])
def test_the_blocks_of_a_page_run(page: str, place: Path) -> None:
    before, after = AROUND.get(page, (None, None))
    if before:
        before(place)
    names = play(page)
    if after:
        after(place, names)


NETS = """
from torch import nn


def mlp(input_shape, outputs, norm):
    return nn.Sequential(nn.Linear(*input_shape, 16), nn.Linear(16, outputs))


def transformer(input_shape, outputs, norm):
    return nn.Sequential(nn.Embedding(outputs, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0), nn.Linear(8, outputs))


def unet(input_shape, outputs, norm):
    return nn.Sequential(nn.Conv3d(1, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, outputs))
"""


def files_of_each_format(place: Path) -> None:
    """A table of 20 hospitals, two plays by 20 people, and scans of two classes."""
    import nibabel

    rng = np.random.default_rng(0)
    (place / "nets.py").write_text(NETS, "utf-8")
    rows = [f"{rng.integers(20, 90)},{rng.normal():.2f},{'yes' if i % 3 else 'no'},h{i % 20}" for i in range(400)]
    (place / "patients.csv").write_text("\n".join(["age,marker,ill,hospital", *rows]), "utf-8")
    (place / "plays").mkdir()
    for i in range(20):
        (place / "plays" / f"{i}.txt").write_text("to be or not to be, that is the question. " * 20, "utf-8")
    for part, count in (("train", 20), ("test", 4)):
        for name in ("ill", "well"):
            (place / "scans" / part / name).mkdir(parents=True)
            for i in range(count):
                image = nibabel.Nifti1Image(rng.normal(size=(6, 6, 6)).astype(np.float32), np.eye(4))
                nibabel.save(image, place / "scans" / part / name / f"{i}.nii.gz")


def two_runs(place: Path) -> None:
    for name in ("one", "another"):
        command("", ["ssfl", "run", "--out", f"runs/{name}"])


def recipes_agree(place: Path, names: dict[str, Any]) -> None:
    """What is predicted in Python, by the exported program and by the run itself is the same."""
    run, probabilities = names["run"], names["probabilities"]
    right = (probabilities.argmax(dim=1).numpy() == names["y"][400:]).mean()
    assert right == pytest.approx(run.summary["central_accuracy"])
    assert right > 0.9
    assert np.abs(torch.from_numpy(names["output"]).softmax(dim=1) - probabilities).max() < 1e-5
    assert all(torch.equal(names["state"][name], tensor) for name, tensor in state_of(names["model"]).items())
    assert (place / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def the_run_folder_is_described(place: Path, _: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "run-folder.md").read_text("utf-8")
    described = {
        name for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in re.findall(r"`(.+?)`", row)
    }
    assert {path.name for path in (place / "runs" / "first").iterdir()} <= described


AROUND: dict[str, tuple[Callable[[Path], None] | None, Callable[[Path, dict[str, Any]], None] | None]] = {
    "docs/data.md": (files_of_each_format, None),
    "docs/studies.md": (two_runs, None),
    "docs/python.md": (None, recipes_agree),
    "docs/tutorial/first-run.md": (None, the_run_folder_is_described),
}
"""What a page needs that is there before, and what must be true after it."""


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    opened = re.findall(r"^ *```(.*)\n(?:.*\n)*? *```$", text, re.MULTILINE)
    assert len(opened) * 2 == len(re.findall(r"^ *```", text, re.MULTILINE))
    known = re.compile(r"python|sh|toml|diff|text|\w+ [\w./-]+\.\w+")
    assert [each for each in opened if not known.fullmatch(each)] == []
    assert not re.search(r"\n\n    (?:ssfl|pip|flwr|python|pytest|make) ", text), "an indented block is not played"
    assert all(re.fullmatch(r'next "[^"]+"', each) for each in re.findall(r"<!-- skip: (.*?) -->", text))


@pytest.mark.parametrize(
    "block",
    [
        "```python\nassert 1 == 2\n```",
        '```sh\nssfl run -c "run.clint=1"\n```',
        "```sh\nfalse\n```",
        "```toml\n[run]\nclint = 1\n```",
        '```toml\n[compare]\nstrategys = ["ssfl"]\n```',
        '```toml\n[compare.tune]\nseeds = [7]\n"local.ll" = [0.1, 0.2]\n```',
        "- in a list\n\n   ```sh\n   false\n   ```",
    ],
)
def test_a_block_that_does_not_run_fails(block: str, place: Path) -> None:
    (place / "page.md").write_text(f"{block}\n", "utf-8")
    with pytest.raises((AssertionError, config.ConfigError)):
        play(str(place / "page.md"))
    (place / "page.md").write_text(f'<!-- skip: next "it is wrong" -->\n\n{block}\n', "utf-8")
    play(str(place / "page.md"))
