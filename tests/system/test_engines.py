"""The same bits on three engines: in one process, on Ray, and on the real nodes of one federation.

What has a way of its own to the clients is played here: masked sums, weights of a file, narrower networks, modules
of one's own. The nodes stay up between the runs, as they do for a user.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import ssfl_app
from benchmarks.drills import field
from benchmarks.drills.field import Field, ssfl
from ssfl_app.config import merge
from ssfl_app.runtime import get_runtime
from tests.system.test_own import OWN, play, summary_of

pytestmark = pytest.mark.slow

SECONDS = 400
THREE: dict[str, Any] = {"run__clients": 3, "run__cohort": 3, "run__rounds": 2, "run__evaluate_every": 2}
THREE |= {"local__epochs": 1, "run__join_timeout": 400.0, "run__round_timeout": 400.0}
CLEAR: dict[str, Any] = {"wire__up_values": "fixed32", "ssfl__score_values": "fixed32"}

Keys = Mapping[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """Bring three SuperNodes up; when they are down again no process is left."""
    with field.federation(tmp_path_factory.mktemp("place"), 3) as made:
        yield made


def inline(out: Path, keys: Keys) -> dict[str, Any]:
    """Return the summary of a run in this process."""
    summary = ssfl_app.run(config=field._keys(dict(keys)), out=out, quiet=True).summary
    assert summary is not None
    return summary


@dataclass
class Everywhere:
    """Summaries of one run: in this process, on Ray and on nodes; and the folder of the last one."""

    inline: dict[str, Any]
    ray: dict[str, Any]
    nodes: dict[str, Any]
    folder: Path

    def agree(self, *names: str, also: Mapping[str, Any] | None = None) -> None:
        for name in names:
            same = (also or self.inline)[name]
            assert [run[name] for run in (self.inline, self.ray, self.nodes)] == [same] * 3, name


@pytest.fixture
def everywhere(place: Field, tmp_path: Path) -> Callable[[Keys], Everywhere]:
    """Return a function that plays a run on all engines."""

    def play(keys: Keys) -> Everywhere:
        words = ssfl("run", "-c", field.text(field._keys(dict(keys))), "--engine", "ray", "--out")
        # Both start many processes and wait for them: at once they take little longer than one.
        with subprocess.Popen(
            [*words, str(tmp_path / "ray")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as ray:
            run = place.start(tmp_path / "nodes", **keys)
            here = inline(tmp_path / "inline", keys)
            _, errors = ray.communicate(timeout=SECONDS)
        assert ray.returncode == 0, errors.decode()
        code, said = run.end()
        assert code == 0, said
        return Everywhere(here, summary_of(tmp_path / "ray"), run.summary, run.folder)

    return play


def test_secure_aggregation_has_the_bits_of_a_clear_run_and_the_keys_that_status_shows(
    place: Field, everywhere: Callable[[Keys], Everywhere], tmp_path: Path
) -> None:
    made = everywhere(THREE | {"privacy__secure_aggregation": True})
    made.agree("model_sha256", "mask_sha256", also=inline(tmp_path / "clear", THREE | CLEAR))
    told = json.loads((made.folder / "clients.json").read_text())["clients"]
    wide = os.environ | {"COLUMNS": "300"}
    status = ssfl("federation", "status", "--dir", str(place.folder))
    shown = subprocess.run(status, capture_output=True, text=True, timeout=120, check=True, env=wide).stdout
    keys_told = {row["key"] for row in told}
    assert len(keys_told) == 3
    assert keys_told == set(re.findall(r"\b[0-9a-f]{4}(?:-[0-9a-f]{4}){7}\b", shown))
    assert "honest-but-curious" in (made.folder / "console.log").read_text()


def test_frozen_weights_of_a_file(everywhere: Callable[[Keys], Everywhere], tmp_path: Path) -> None:
    """Whose place the server names, and nodes may read."""
    start = tmp_path / "start.safetensors"
    state = get_runtime(merge({"run.seed": 5})).initial_state()
    save_file({name: tensor + 0.01 for name, tensor in state.items()}, start)
    keys = {
        "mask__dead": "frozen",
        "mask__density": 0.05,
        "ssfl__criterion": "gradient",
        "model__weights": str(start),
    }
    everywhere(THREE | keys | {"model__weights": str(start)}).agree("model_sha256", "mask_sha256")


def test_channels(everywhere: Callable[[Keys], Everywhere]) -> None:
    keys = {"mask__granularity": "channel", "mask__density": 0.2, "run__rounds": 1, "run__evaluate_every": 5}
    everywhere(THREE | keys).agree("model_sha256", "widths")


def test_nodes_get_modules_of_ones_own_with_the_app(place: Field, tmp_path: Path) -> None:
    own = Path(shutil.copytree(OWN, tmp_path / "own"))
    same = play(own, "momentum", tmp_path / "inline", "run", "--engine", "inline")
    made = play(own, "momentum", tmp_path / "run", "federation", "run", "--dir", str(place.folder), "--app", str(own))
    assert made["model_sha256"] == same["model_sha256"]
