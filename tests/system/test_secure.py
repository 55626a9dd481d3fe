"""Secure aggregation on three engines: the bits of a clear run, and on real nodes the keys that `status` shows."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.drills import field
from benchmarks.drills.field import inline, ssfl

pytestmark = pytest.mark.slow

THREE = {"run__clients": 3, "run__cohort": 3, "run__rounds": 2, "run__evaluate_every": 2, "local__epochs": 1}
CLEAR = {"wire__up_values": "fixed32", "ssfl__score_values": "fixed32"}


def test_three_engines_have_the_bits_of_a_clear_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field, "NODES", 3)
    same = inline(tmp_path / "clear", **THREE, **CLEAR)
    made = [inline(tmp_path / "inline", **THREE, privacy__secure_aggregation=True)]
    keys = field.text(field._keys(THREE | {"privacy__secure_aggregation": True}))
    on_ray = ssfl("run", "-c", keys, "--engine", "ray", "--out", str(tmp_path / "ray"))
    subprocess.run(on_ray, check=True, capture_output=True, timeout=300)
    made.append(json.loads((tmp_path / "ray" / "summary.json").read_text()))
    with field.federation(tmp_path / "place") as place:
        run = place.start(tmp_path / "nodes", **THREE, privacy__secure_aggregation=True)
        code, errors = run.end()
        assert code == 0, errors
        made.append(run.summary)
        told = json.loads((run.folder / "clients.json").read_text())["clients"]
        wide = os.environ | {"COLUMNS": "300"}
        status = ssfl("federation", "status", "--dir", str(place.folder))
        shown = subprocess.run(status, capture_output=True, text=True, timeout=120, check=True, env=wide).stdout
    for summary in made:
        assert summary["model_sha256"] == same["model_sha256"]
        assert summary["mask_sha256"] == same["mask_sha256"]
    keys_told = {row["key"] for row in told}
    assert len(keys_told) == 3
    assert keys_told == set(re.findall(r"\b[0-9a-f]{4}(?:-[0-9a-f]{4}){7}\b", shown))
    assert "honest-but-curious" in (run.folder / "console.log").read_text()
