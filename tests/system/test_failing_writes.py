"""Each write of a run fails: it ends in one line that says how to go on, and then has the bits it would have had.

The library that lets writes fail lies beside this repository (``../shared/tools/failing_writes``, or what
SSFL_TOOLS names); without it, or without gcc, nothing is tried. All writes take many minutes, SSFL_ALL_WRITES=1;
otherwise it is one in so many of them.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = Path(os.environ.get("SSFL_TOOLS", ROOT.parent / "shared" / "tools")) / "failing_writes" / "nth.c"
KEYS = (
    "run.clients=2 run.cohort=2 run.rounds=2 run.checkpoint-every=1 run.evaluate-every=2 local.epochs=1 "
    "local.batch-size=64 mask.density=0.2 ditto.global-epochs=1 ditto.personal-epochs=1 engine.concurrent=1"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gcc = shutil.which("gcc")
    if gcc is None or not SOURCE.is_file():
        pytest.skip(f"needs gcc and {SOURCE}")
    made = tmp_path_factory.mktemp("nth") / "libnth.so"
    subprocess.run([gcc, "-shared", "-fPIC", "-O1", "-o", made, SOURCE, "-ldl"], check=True)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "first", "stride"), [("ssfl", 3, 13), ("ditto", 1, 13)])
def test_a_run_survives_each_write_that_fails(
    library: Path, tmp_path: Path, strategy: str, first: int, stride: int
) -> None:
    if os.environ.get("SSFL_ALL_WRITES"):
        first, stride = 1, 1
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.failing_writes",
            tmp_path,
            str(first),
            str(stride),
            f"strategy='{strategy}' {KEYS}",
        ],
        cwd=ROOT,
        env=os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tried = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(tried) >= 4
    for one in tried:
        assert one["half"] == [], one
        assert one["same"], one
        assert "Traceback" not in one["said"], one
        if one["code"] == 0:  # its page is all that may be missing
            assert "warning: report.html could not be made" in one["said"], one
            continue
        *_, line, cure = one["said"].splitlines()
        assert (one["code"], one["again"]) == (1, 0), one
        assert line.startswith("ssfl: the run failed: "), one
        assert cure.startswith("to go on: "), one
        # Where nothing more can be written, status.json cannot say so.
        assert one["stays"] or one["status"] == "failed", one
