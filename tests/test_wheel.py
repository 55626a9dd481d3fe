"""The wheel and the source distribution: what is in them, and that they work where they are installed.

Nothing is downloaded: the wheel lies in an environment of its own, and what it needs are links to this environment's
libraries, of which those of an extra can be left out.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable
from hashlib import sha256
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import ssfl_app
from tests.test_supply import CORE, EXTRAS, NAME, PLUG_IN, PYPROJECT, ROOT, brought_by, plain

pytestmark = pytest.mark.slow
VERSION = PYPROJECT["project"]["version"]
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1", "SSFL_CACHE": "off"}


def call(*words: object, path: Path | None = None, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a command that sees the libraries in a folder and no checkout."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | OFFLINE
    variables |= {"PYTHONPATH": str(path)} if path else {}
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def well(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, target: Path, *kinds: str) -> None:
    well(call(sys.executable, "-m", "hatchling", "build", "-d", target, *kinds, cwd=source))


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return dist / f"ssfl_app-{VERSION}-py3-none-any.whl"


class Installed:
    """An environment that the wheel is installed in, and places that have some of the libraries."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder, self.bin = folder, folder / "venv" / "bin"
        well(call(sys.executable, "-m", "venv", "--without-pip", folder / "venv"))
        well(call(sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "--no-deps", wheel))

    def libraries(self, without: Iterable[str] = ()) -> Path:
        """Return a folder of links to this environment's libraries, but those of some distributions."""
        gone = {"ssfl-app", *without}
        target = self.folder / sha256(" ".join(sorted(gone)).encode()).hexdigest()[:8]
        if target.exists():
            return target
        target.mkdir()
        owners: dict[str, set[str]] = {}
        for package, names in ((plain(d.metadata["Name"]), d.files or []) for d in metadata.distributions()):
            for name in {file.parts[0] for file in names}:
                owners.setdefault(name, set()).add(package)
        for entry in {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}:
            for each in entry.iterdir():
                if each.suffix != ".pth" and not owners.get(each.name, {"?"}) <= gone:
                    (target / each.name).symlink_to(each)
        return target

    def ssfl(self, *words: str, without: Iterable[str] = ()) -> "subprocess.CompletedProcess[str]":
        return call(self.bin / "ssfl", *words, path=self.libraries(without), cwd=self.folder)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


@pytest.fixture(scope="module")
def run(installed: Installed) -> Path:
    """A run of one round, played by the installed command without Ray."""
    keys = "run.clients=2 run.cohort=2 run.rounds=1 local.epochs=1"
    well(installed.ssfl("run", "--out", "run", "-c", keys, without=["ray"]))
    return installed.folder / "run"


# ---- what is in them -----------------------------------------------------------------------------------------------


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"ssfl_app-{VERSION}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"ssfl_app", info}
    beside = {"py.typed", *(f"_app/{name}" for name in ("pyproject.toml", "LICENSE", "README.md"))}
    beside |= {f"_app/{file.relative_to(ROOT)}" for file in (ROOT / "configs").rglob("*.toml")}
    inside = {name.removeprefix("ssfl_app/") for name in names if name.startswith("ssfl_app/")}
    code = {file.relative_to(ROOT / "ssfl_app").as_posix() for file in (ROOT / "ssfl_app").rglob("*.py")}
    assert inside == code | beside
    ends = zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    assert "ssfl = ssfl_app.cli.main:main" in ends
    assert "ssfl_app.testing.plugin" in ends
    assert f"{info}/licenses/LICENSE" in names


def test_the_source_distribution_builds_the_same_wheel(dist: Path, wheel: Path, tmp_path: Path) -> None:
    name = f"ssfl_app-{VERSION}"
    with tarfile.open(dist / f"{name}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    tops = {each.name for each in (tmp_path / name).iterdir()}
    assert tops == {
        *("ssfl_app", "configs", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"),
        *(".gitignore", "PKG-INFO"),
    }
    build(tmp_path / name, tmp_path, "-t", "wheel")
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


def test_a_version_is_one_everywhere() -> None:
    """In pyproject.toml, where Flower wants it; whoever cites or reads what changed finds the same one."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    heading = re.search(r"^## ([\d.]+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert heading is not None
    assert (citation["version"], str(citation["date-released"])) == heading.groups()
    assert ssfl_app.__version__ == VERSION == citation["version"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["preferred-citation"]["doi"].endswith("2405.09037")


# ---- where it is installed -----------------------------------------------------------------------------------------


def test_the_installed_command_is_the_wheels(installed: Installed) -> None:
    assert well(installed.ssfl("--version")) == f"ssfl {VERSION}\n"
    code = "import ssfl_app; print(ssfl_app.__file__)"
    file = Path(
        well(call(installed.bin / "python", "-c", code, path=installed.libraries(), cwd=installed.folder)).strip()
    )
    assert file.is_relative_to(installed.folder / "venv")


def test_what_it_declares_is_satisfied_by_what_it_is_tested_with(installed: Installed) -> None:
    done = call(
        sys.executable, "-m", "pip", "--python", installed.bin / "python", "check", path=installed.libraries()
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("ssfl-app ")] == []


def test_without_ray_a_run_takes_the_other_engine(installed: Installed, run: Path) -> None:
    assert (run / "report.html").exists()
    done = installed.ssfl("run", "--engine", "ray", "--out", "other", without=["ray"])
    said = "ssfl: --engine is 'ray'; ray is not installed: pip install \"ssfl-app[app]\"\n"
    assert (done.returncode, done.stderr) == (2, said)
    assert not (installed.folder / "other").exists()


def test_without_matplotlib_a_report_says_what_to_install(installed: Installed, run: Path) -> None:
    done = installed.ssfl("report", str(run), without=["matplotlib"])
    assert (done.returncode, done.stderr) == (2, 'ssfl: matplotlib not installed: pip install "ssfl-app[app]"\n')


def of_extra(extra: str) -> list[str]:
    return [plain(NAME.match(text)[1]) for text in EXTRAS[extra]]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("export", ["export", "run", "--to", "onnx"]),
        ("volumes", ["run", "--out", "refused", "-c", "data.name='volumes' data.path='scans'"]),
        ("hf", ["run", "--out", "refused", "-c", "data.name='hf' data.path='run' data.target='label'"]),
        *(
            (name, ["run", "--out", "refused", "-c", f"run.trackers='{name}'"])
            for name in ("tensorboard", "mlflow", "wandb")
        ),
    ],
)
@pytest.mark.usefixtures("run")
def test_without_an_extra_what_needs_it_names_it_in_one_line(
    installed: Installed, extra: str, words: list[str]
) -> None:
    for part in ("train", "test"):
        (installed.folder / "scans" / part / "healthy").mkdir(parents=True, exist_ok=True)
        (installed.folder / "scans" / part / "healthy" / "1.nii").write_bytes(b"never read")
    done = installed.ssfl(*words, without=of_extra(extra))
    assert done.returncode == 2
    assert re.fullmatch(
        rf"""ssfl: .*(not installed|needs).*: pip install ["']ssfl-app\[{extra}\]["']\n""", done.stderr
    ), done.stderr
    assert not (installed.folder / "refused").exists()


def test_the_plug_in_needs_no_more_than_the_wheel_brings(installed: Installed) -> None:
    more = {plain(each.metadata["Name"]) for each in metadata.distributions()} - brought_by(CORE).keys()
    libraries = installed.libraries(more)
    well(call(installed.bin / "python", "-c", PLUG_IN, path=libraries, cwd=installed.folder))
