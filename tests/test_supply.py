"""What is installed with the package: all that it imports, by its own word, and no version that may break it."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ssfl_app import callbacks

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
NAME = re.compile(r"([A-Za-z0-9_.-]+)")


SHARED = {"google": "protobuf"}
"""Packages of which several distributions bring parts, and the one that is imported here."""


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(files=None):
    """Return the distributions that files of the package import, by the file that does.

    Of all files; or of these, while they are imported themselves.
    """
    known, found = metadata.packages_distributions(), {}
    for file in sorted((ROOT / "ssfl_app").rglob("*.py") if files is None else files):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree) if files is None else tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"ssfl_app"}:
                # Several packages may bring one top-level name, "google": the declared one is meant.
                brought = [plain(package) for package in known.get(name, [name])]
                found.setdefault(next((p for p in brought if p in BY_NAME), brought[0]), file.relative_to(ROOT))
    return found


CORE = PROJECT["dependencies"]
APP = PROJECT["optional-dependencies"]["app"]
DATA = PROJECT["optional-dependencies"]["volumes"] + PROJECT["optional-dependencies"]["hf"]
EXPORT = PROJECT["optional-dependencies"]["export"]
PRIVACY = PROJECT["optional-dependencies"]["privacy"]
TESTING = PROJECT["optional-dependencies"]["testing"]
EXTRAS = PROJECT["optional-dependencies"]
TRACKERS = [text for name in callbacks.REGISTRY for text in EXTRAS[name]]  # an extra each
# A table is a DataFrame; who calls from a notebook has it; the extra app has that Ray which flwr[simulation] wants;
# torch for CUDA brings its Triton.
USED_IF_THERE = {"pandas", "ipython", "ray", "triton"}
BY_NAME = {plain(NAME.match(text)[1]): text for text in CORE + APP + DATA + PRIVACY + TESTING + TRACKERS}


def test_what_is_imported_is_declared():
    declared = BY_NAME.keys() | USED_IF_THERE
    assert {name: str(file) for name, file in imported().items() if name not in declared} == {}


def test_what_is_declared_is_imported():
    by_name = {"opacus", "dp-accounting"}  # by `needed`
    assert set(BY_NAME) - set(imported()) == {"tensorboard"} | by_name  # through torch.utils.tensorboard


@pytest.mark.parametrize(
    "text", CORE + APP + DATA + PRIVACY + TESTING + TRACKERS + EXPORT + PROJECT["optional-dependencies"]["foreign"]
)
def test_a_dependency_has_a_lowest_version_and_one_that_it_stays_below(text):
    assert re.search(r">=[\d.]+,<[\d.]+$", text), text


def test_flower_installs_for_the_app_what_the_app_needs():
    """Its `uv sync` knows dependencies and the default groups of an app, but no extras."""
    assert PYPROJECT["tool"]["uv"]["default-groups"] == ["app"]
    assert PYPROJECT["dependency-groups"]["app"] == ["ssfl-app[app]"]
    extras = "app,privacy,export,foreign,volumes,hf,tensorboard,mlflow,wandb,docs"
    assert f"ssfl-app[{extras}]" in PROJECT["optional-dependencies"]["dev"]


# ---- in somebody else's project: `pip install ssfl-app`, without the extra -----------------------------------------


def brought_by(texts):
    """Return the distributions, by name, that `pip install` of these requirements brings."""
    found = {}

    def add(text):
        requirement = Requirement(text)
        name = plain(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found[name] = metadata.distribution(name)
            for needed in found[name].requires or []:
                add(needed)

    for text in texts:
        add(text)
    return found


@pytest.fixture(scope="module")
def plain_install(tmp_path_factory):
    """Return a folder that holds what `pip install ssfl-app` brings, and nothing else of this environment: links."""
    folder = tmp_path_factory.mktemp("plain")
    for distribution in brought_by(CORE).values():
        for top in {file.parts[0] for file in distribution.files} - {".."}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    (folder / "ssfl_app").symlink_to(ROOT / "ssfl_app")
    info = folder / f"ssfl_app-{PROJECT['version']}.dist-info"
    info.mkdir()
    needs = [*CORE, *(f'{text} ; extra == "app"' for text in APP)]
    lines = ["Metadata-Version: 2.1", "Name: ssfl-app", f"Version: {PROJECT['version']}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {need}" for need in needs)]))
    return folder


def run(folder, code, *words):
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


PLUG_IN = """
import sys
from importlib.util import find_spec
for name in ("ray", "matplotlib", "torchvision", "sklearn", "scipy", "PIL", "pyarrow"):
    assert find_spec(name) is None, name
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from ssfl_app import SSFL, SparseMod, mask_gradients, sparse_mod, sparse_numpy_mod
print(*(module.__file__ for name, module in sys.modules.items() if name.startswith("ssfl_app")))
from ssfl_app.simulation.in_process import InlineGrid

app = ClientApp(mods=[sparse_mod])

@app.train()
def train(message, context):
    net = torch.nn.Linear(4, 3)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    net(torch.ones(5, 4)).square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    records = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": 5})}
    return Message(RecordDict(records), reply_to=message)

strategy = SSFL(density=0.5, fraction_evaluate=0.0)
initial = ArrayRecord(torch.nn.Linear(4, 3).state_dict())
strategy.start(grid=InlineGrid(app, {}, {1000: 0, 1001: 1}), initial_arrays=initial, num_rounds=1)
assert strategy.mask.count == 6
"""


def test_the_plug_in_needs_no_more_than_a_plain_installation(plain_install):
    """A whole round, in a process that can import nothing else; and what the plug-in imports is the core's."""
    done = run(plain_install, PLUG_IN)
    assert done.returncode == 0, done.stderr
    files = [Path(file).resolve() for file in done.stdout.split()]
    assert ROOT / "ssfl_app" / "plugin" / "strategy.py" in files
    core = {plain(NAME.match(text)[1]) for text in CORE}
    assert {name: str(file) for name, file in imported(files).items() if name not in core} == {}


def test_without_the_extra_the_command_says_in_one_line_what_to_install(plain_install):
    door = "from ssfl_app.cli.main import main; main()"
    for words in (["run"], ["--help"], ["report", "."]):
        done = run(plain_install, door, *words)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("ssfl: matplotlib, pillow, pyarrow, scikit-learn, scipy, torchvision not")
        assert done.stderr.endswith('not installed: pip install "ssfl-app[app]"\n')
        assert done.stdout == ""


def test_without_the_extra_a_run_in_python_says_the_same(plain_install):
    done = run(plain_install, "import ssfl_app; ssfl_app.run()")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "ssfl_app.options.ConfigError: matplotlib, pillow, pyarrow, scikit-learn, scipy, torchvision"
    )
    assert last.endswith('not installed: pip install "ssfl-app[app]"')


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
