"""What the documentation names exists: files, modules, classes, functions; and tables list what is registered."""

import ast
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

from ssfl_app import partitions
from ssfl_app.config import BUILTIN, NAMED, defaults
from ssfl_app.core.robust import FOLDS
from ssfl_app.data.readers import READERS
from ssfl_app.sparsity.values import SUMMED_TYPES, VALUE_TYPES
from ssfl_app.strategies import REGISTRY
from ssfl_app.training import models
from ssfl_app.training.step import PRECISIONS

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *(page for f in ("docs", "deploy", "examples") for page in sorted((ROOT / f).rglob("*.md"))),
]
FOLDERS = ("ssfl_app", "tests", "benchmarks", "configs", "deploy", "docs", "examples")
FILES = [
    file.relative_to(ROOT).as_posix()
    for file in [*ROOT.glob("*.*"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))]
    if file.is_file() and "__pycache__" not in file.parts
]


def code_of(page: Path) -> list[str]:
    """What stands between backticks, outside of blocks of code."""
    return re.findall(r"`([^`\n]+)`", prose_of(page))


def prose_of(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


class Source:
    """Names that the package's source defines."""

    def __init__(self) -> None:
        self.modules: dict[str, set[str]] = defaultdict(set)  # last part of a module's name -> what it defines
        self.classes: dict[str, set[str]] = defaultdict(set)  # class -> its attributes
        self.bases: dict[str, set[str]] = defaultdict(set)
        self.words: set[str] = set()
        self.strings: set[str] = set()
        for folder in ("ssfl_app", "tests", "benchmarks", "examples"):
            for file in (ROOT / folder).rglob("*.py"):
                text = file.read_text("utf-8")
                code = re.sub(r'"""(?s:.*?)"""|#.*', "", text)  # comments and docstrings prove nothing
                self.words |= set(re.findall(r"\w+", code))
                self.strings |= set(re.findall(r'"([^"\n]+)"', code))
                if folder == "ssfl_app":
                    self._read(file, ast.parse(text))
        self.words |= set(re.findall(r"\w+", (ROOT / "pyproject.toml").read_text("utf-8")))

    def _read(self, file: Path, tree: ast.Module) -> None:
        module = file.parent.name if file.stem == "__init__" else file.stem
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                attributes = self.classes[node.name]
                self.bases[node.name] |= {
                    part.id for base in node.bases for part in ast.walk(base) if isinstance(part, ast.Name)
                }
                for part in ast.walk(node):
                    attributes |= _defined(part)
                    if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                        attributes.add(part.attr)
            self.modules[module] |= _defined(node)

    def has(self, cls: str, attribute: str) -> bool:
        return attribute in self.classes[cls] or any(
            self.has(base, attribute) for base in self.bases[cls] if base in self.classes
        )


def _defined(node: ast.AST) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


@pytest.fixture(scope="module")
def source() -> Source:
    return Source()


FEW = "few-digits"  # of tests/conftest.py

# What Flower, torch and others call their own.
FOREIGN = {
    *("PushMessages", "PushObject", "ArrayChunk", "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES", "add_messages_to_queue"),
    *("nn.TransformerEncoder", "lightning_logs", "train_test", "SparseSemiStructuredTensor"),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_names_exist(page: Path, source: Source) -> None:
    assert [name for name in code_of(page) if name not in FOREIGN and not exists(name, source)] == []


def exists(name: str, source: Source) -> bool:
    if any(f"/{file}".endswith(f"/{name}") for file in FILES):
        return True
    if re.fullmatch(r"[\w./<>-]+\.(py|toml|md|txt|c|svg|png|ya?ml|json|jsonl|html|log|safetensors)", name):
        last = name.rpartition("/")[2]
        return last in source.strings or re.match(r"\d+|<", last) is not None  # what a run writes
    if name in {registry.group for registry in NAMED.values()}:
        return True
    section, _, key = name.partition(".")
    if section in BUILTIN and re.fullmatch(r"[a-z-]+", key):
        return name in defaults()
    match = re.fullmatch(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*\))?", name)
    if match is None:
        return True
    *before, last = match[1].split(".")
    if before and before[-1] in source.classes:
        known = source.has(before[-1], last)
    elif before and before[-1] in source.modules:
        known = last in source.modules[before[-1]] | source.words
    else:
        known = last in source.words
    return known and all(part in source.words | source.modules.keys() for part in before)


def test_every_promise_names_tests_that_exist() -> None:
    """A file below tests/ and a name in it; a name without a file is in the file before it."""
    tests = {file.relative_to(ROOT / "tests").as_posix(): file for file in (ROOT / "tests").rglob("test_*.py")}
    found = re.findall(r"((?:\w+/)*test_\w+\.py)?(?:::(\w+))?", (ROOT / "docs" / "security.md").read_text("utf-8"))
    file, missing = "", []
    for named, name in found:
        file = named or file
        if (named or name) and (file not in tests or f" {name}" not in tests[file].read_text("utf-8")):
            missing.append(f"{file}::{name}")
    assert missing == []
    assert sum(bool(name) for _, name in found) > 70


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target) if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert broken == []


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_table_of_strategies_is_the_registry() -> None:
    rows = table("README.md", "Strategies")
    assert sorted(name for first, *_ in rows for name in re.findall(r"`([^`]+)`", first)) == sorted(REGISTRY)
    for first, *_ in rows:
        for page in re.findall(r"\((docs/[^)]+)\)", first):
            assert (ROOT / page).exists()


def test_the_table_of_options_has_every_key() -> None:
    listed: set[str] = set()
    for first, keys in table("docs/configuration.md", "Configuration"):
        sections = re.findall(r"`([^`]+)`", first)
        if len(sections) > 1:  # of single strategies; their pages have them
            pages = "".join(page.read_text("utf-8") for page in PAGES if page.parent.name == "strategies")
            named = set(re.findall(r"[`\s]((?:[a-z-]+)\.[a-z-]+)\b", pages))
            listed |= {key for key in defaults() if key.partition(".")[0] in sections and key in named}
        else:
            prefix = f"{sections[0]}." if sections else ""
            listed |= {prefix + key for key in re.findall(r"`([^`]+)`", keys)}
    assert listed == set(defaults())


def test_the_table_of_options_names_what_can_be_chosen() -> None:
    keys = {first.strip("`"): text for first, text in table("docs/configuration.md", "Configuration")}
    for section, key, names in (
        ("data", "name", [name for name in READERS if name != FEW]),
        ("partition", "name", partitions.REGISTRY),
        ("model", "name", models.REGISTRY),
        ("run", "fold", FOLDS),
        ("wire", "up-values", (*VALUE_TYPES, *SUMMED_TYPES)),
        ("engine", "precision", PRECISIONS),
    ):
        match = re.search(rf"`{key}` \(([^)]*)\)", keys[section])
        assert match is not None, (section, key)
        assert match[1].split(", ") == list(names)


def test_readme_is_read_to_its_end() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 250


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_rows_of_results_are_those_that_scripts_recorded(page: str) -> None:
    records = [
        ROOT / "benchmarks" / "results" / f"{name}.md"
        for name in ("digits", "digits-study-short", "digits-study-brief", "cifar10")
    ]
    recorded = {line for file in records for line in file.read_text("utf-8").splitlines()}
    rows = re.findall(r"^\| `[a-z-]+` \| [\d.]+ \| .*$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    assert len(rows) >= 4
    assert [row for row in rows if row not in recorded] == []


def test_the_distances_of_own_files_are_those_that_were_recorded() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "own.json").read_text("utf-8"))["reached"]
    rows = re.findall(
        r"^\| ([\w, ]+) \| [^|]+ \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "docs" / "own.md").read_text("utf-8"), re.M
    )
    assert {name: (dense, sparse) for name, dense, sparse in rows} == {
        name: tuple(f"{mean:.3f}" for mean in row["means"]) for name, row in record.items()
    }


def test_accuracies_against_epsilon_are_those_that_were_recorded() -> None:
    rows = (ROOT / "benchmarks" / "results" / "private.md").read_text("utf-8").splitlines()
    assert len(rows) == 2 + 9
    assert [row for row in rows if row not in (ROOT / "docs" / "privacy.md").read_text("utf-8").splitlines()] == []


def test_what_layers_cost_is_what_was_recorded() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "topics-layers.json").read_text("utf-8"))["reached"]
    means = {name: statistics.mean(row.values()) for name, row in record.items()}
    lines = (ROOT / "docs" / "own.md").read_text("utf-8").splitlines()
    assert [line for name, mean in means.items() if (line := f"| {name} | {mean:.3f} |") not in lines] == []


def table(page: str, title: str) -> list[list[str]]:
    """Return the cells of the first table below a title of a page, without its head."""
    text = (ROOT / page).read_text("utf-8")
    rows = re.search(rf"^##? {title}\n(?:(?!\|).*\n)*((?:\|.*\n)+)", text, re.MULTILINE)
    assert rows is not None
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[1].splitlines()[2:]]
