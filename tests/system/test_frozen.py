"""Fine-tuning on three engines: frozen weights of a file, the same bits in one process, on Ray and on real nodes."""

import json
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import save_file

from benchmarks.drills import field
from benchmarks.drills.field import inline, ssfl
from ssfl_app.config import merge
from ssfl_app.runtime import get_runtime

pytestmark = pytest.mark.slow

THREE = {"run__clients": 3, "run__cohort": 3, "run__rounds": 2, "run__evaluate_every": 2, "local__epochs": 1}
THREE |= {"run__join_timeout": 400.0, "run__round_timeout": 400.0}
FROZEN = {"mask__dead": "frozen", "mask__density": 0.05, "ssfl__criterion": "gradient"}


def test_three_engines_have_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field, "NODES", 3)
    start = tmp_path / "start.safetensors"
    state = get_runtime(merge({"run.seed": 5})).initial_state()
    save_file({name: tensor + 0.01 for name, tensor in state.items()}, start)
    keys = THREE | FROZEN | {"model__weights": str(start)}
    made = [inline(tmp_path / "inline", **keys)]
    on_ray = ssfl("run", "-c", field.text(field._keys(keys)), "--engine", "ray", "--out", str(tmp_path / "ray"))
    subprocess.run(on_ray, check=True, capture_output=True, timeout=500)
    made.append(json.loads((tmp_path / "ray" / "summary.json").read_text()))
    with field.federation(tmp_path / "place") as place:  # whose nodes may read what the server names
        run = place.start(tmp_path / "nodes", **keys)
        code, errors = run.end()
        assert code == 0, errors
        made.append(run.summary)
    assert len({(summary["model_sha256"], summary["mask_sha256"]) for summary in made}) == 1
