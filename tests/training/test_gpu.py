"""Training on a GPU, as far as a machine without one can tell: `tests.fake_gpu` on a fake CUDA runtime.

The runtime lies beside this repository (``../shared/tools/fakecuda``) and is built for the torch that is installed;
without it, or without a compiler, these tests are skipped. What a GPU computes, and how fast, is found out by
``benchmarks/gpu_window.py``.
"""

import functools
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from ssfl_app.training.models import NORMS, REGISTRY

ROOT = Path(__file__).parents[2]
TOOLS = ROOT.parent / "shared" / "tools" / "fakecuda"

NODES = {
    "cnn": [(58, 81), (44, 67), (42, 57)],
    "conv4": [(87, 118), (59, 90), (55, 70)],
    "resnet18": [(295, 422), (155, 282), (135, 182)],
    "resnet50": [(739, 1064), (368, 693), (314, 427)],
    "resnet20": [(304, 425), (171, 292), (152, 197)],
    "resnet32": [(472, 665)],
    "resnet44": [(641, 906)],
    "resnet56": [(809, 1146)],
    "resnet110": [(1566, 2227), (803, 1464), (692, 917)],
}
"""Most nodes of a captured step with group, batch and no norm: in float32 (fp32, tf32), and in bf16."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return a function that plays a part of `tests.fake_gpu`, once, and returns what it found."""
    if not TOOLS.is_dir() or torch.version.cuda is None:
        pytest.skip("no fake CUDA runtime here, or a torch without CUDA")
    out = tmp_path_factory.mktemp("fakecuda")
    build = [sys.executable, str(TOOLS / "build.py"), str(out)]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"the fake CUDA runtime cannot be built: {built.stderr.strip().splitlines()[-1]}")
    library = str(out / "libfakecuda.so")
    paths = os.pathsep.join([str(TOOLS), str(ROOT)])
    known = {k: v for k, v in os.environ.items() if k != "CUDA_DEVICE_MAX_CONNECTIONS"}
    variables = known | {"LD_LIBRARY_PATH": str(out), "LD_PRELOAD": library, "PYTHONPATH": paths}

    @functools.cache
    def play(part):
        command = [sys.executable, "-W", "ignore", "-m", "tests.fake_gpu", part]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return play


def test_every_model_norm_and_precision_is_captured_within_its_budget(found):
    rows = found("captures")
    # Those between resnet20 and resnet110 are made of the same blocks; tf32 is a flag of the kernels.
    wanted = {
        (name, norm, p)
        for name in REGISTRY
        if name != "transformer"
        for norm in NORMS[: len(NODES[name])]
        for p in ("fp32", "bf16")
    }
    assert {tuple(row["case"][:3]) for row in rows} == wanted | {("cnn", norm, "tf32") for norm in NORMS}
    for row in rows:
        name, norm, precision, _ = row["case"]
        most = NODES[name][NORMS.index(norm)][precision == "bf16"]
        assert 0 < row["nodes"][0] <= most, row
        assert row["nodes"] == row["nodes"][:1] * (2 if name == "cnn" else 1)  # batches of 16, and of 4


def test_a_fit_whose_graphs_are_there_waits_once_and_asleep(found):
    for row in found("captures"):
        assert row["again"] == 0, row
        assert row["launches"] == (6 if row["case"][0] == "cnn" else 2)
        # The one that sleeps, and the read of the sum, which is there by then; the rest are copies from the host.
        assert row["sleeping"] == 1
        assert row["syncs"] <= 3


def test_a_step_near_an_anchor_is_captured_with_it(found):
    most = NODES["resnet18"][0][0] + 3
    for kind, row in found("anchors").items():
        assert len(row["nodes"]) == 1, kind
        assert row["nodes"][0] <= most, (kind, row)
        assert (row["again"], row["launches"]) == (0, 2), kind
        assert row["syncs"] <= 3, kind  # of any fit


def test_a_fused_step_has_one_kernel_a_norm_each_way_and_reads_channels_last(found):
    """ResNet-18 has 20 norms and convolutions, of which the first has no gradient of its input."""
    fused = found("fused")
    for precision, most in (("tf32", 157), ("bf16", 161)):
        row = fused[precision]
        assert (row["NORM_forward"], row["NORM_backward"], row["CONV"]) == (20, 20, 59)
        assert row["not NHWC"] == []
        assert len(row["nodes"]) == 1
        assert row["nodes"][0] <= most, row["names"]
    assert fused["run"]["code"] == 0, fused["run"]["said"]
    assert fused["batch"]["code"].startswith("engine.kernels is 'fused'; it is 'torch' with model.name 'cnn', which")


def test_a_model_crosses_to_the_gpu_and_back_in_one_copy_each(found):
    """From and to memory that the GPU reads and writes itself; which coordinates are carried is there already."""
    for row in found("crossing").values():
        assert row == {"memcpyAsync H2D": 1, "memcpyAsync D2H": 1}


def test_random_masks_are_drawn_where_the_generator_is(found):
    """A pass draws once a layer; drawn on the CPU, each draw is copied to the GPU."""
    draws = found("draws")
    assert draws["cpu"] - draws["cuda"] == draws["layers"] * draws["passes"]


def test_captures_are_their_own_whatever_stream_torch_gives_to_threads(found):
    """Eight and sixteen threads on one stream, which the thirty-third thread of a process shares with the first."""
    threads = found("threads")
    assert threads["alone"] == [58, 58]
    for count, row in threads["threads"].items():
        assert row["shared"]
        assert row["nodes"] == [58] * (3 * int(count))


def test_a_stream_for_captures_is_lent_to_one_at_a_time(found):
    streams = found("streams")
    assert streams["lent"] == 32
    assert streams["shared"] == 0  # none of those that threads get
    assert streams["refused"] == "32 models have a stream of cuda for their graphs; torch has no more of them"
    assert streams["again"]  # it goes back with its holder


def test_a_clients_memory_is_estimated_from_above(found):
    for name, usual, reserved, need in found("memory"):  # near an anchor, and with a mask's places, it is more
        assert usual <= need <= 2 * usual, name
        assert reserved <= need, name


@pytest.mark.parametrize(("where", "who", "cure"), [
    ("threads", "client ", "10 clients work at once, try a lower engine.concurrent or a smaller model"),
    ("clients", "client ", "2 clients work at once, try a lower engine.concurrent or a smaller model"),
    ("server", "memory", "2 clients work at once, try a lower engine.concurrent or a smaller model"),
    ("alone", "client 0", "try a smaller model or batch"),
    ("start", "memory", "try a smaller model or data set"),
])  # fmt: skip
def test_a_gpu_without_memory_ends_the_run_and_names_bytes_and_cure(found, where, who, cure):
    end = found("out_of_memory")[where]
    first = end["said"].splitlines()[0]
    assert end["code"] == 1
    assert first.startswith(f"ssfl: the run failed: {who}")
    assert "CUDA out of memory. Tried to allocate" in first
    assert first.endswith(cure)
    assert end["rounds"] <= 1  # of round 0: no mean was taken
    if where != "start":
        assert end["status"]["status"] == "failed"
        assert end["status"]["message"] in first


def test_a_run_takes_what_there_is_room_for_and_refuses_more_than_is_safe(found):
    run = found("run")
    assert run["at_once"] == {"1": 1, "5": 5, "100": 16}
    assert run["engine.concurrent=6"]["code"].startswith("engine.concurrent is 6; on a GPU it is at most 5:")
    assert "at most 16" in run["engine.concurrent=17 run.cohort=18"]["code"]
    assert run["engine.concurrent=13 strategy='dispfl'"]["code"] == 0  # all of its clients train in a round
    assert "engine.concurrent is 5; on a GPU it is at most 4:" in run["api"]


def test_a_run_that_names_no_engine_is_in_process_on_one_gpu(found):
    run = found("run")
    assert run["engine"] == "inline"
    assert run["inline"]["code"] == 0
    assert run["inline"]["out"].startswith("engine inline: 5 client(s) at once, in threads on a GPU\n")


def test_queues_to_the_gpu_are_set_before_cuda_starts(found):
    run = found("run")
    assert (run["early"], run["started"], run["connections"]) == (None, False, "32")


def test_what_a_gpu_has_is_said_at_the_start(found):
    run = found("run")
    precision = "note: engine.precision is 'fp32' on Fake H100; engine.precision 'tf32' or 'bf16' uses its matrix"
    (inline, ray), (none, engine) = run["notes fp32"], run["notes tf32"]
    assert len(inline) == 1
    assert inline[0].startswith(precision)
    assert run["inline"]["out"].count(precision) == 1
    assert none == []
    assert ray == inline + engine
    assert engine[0].startswith("note: on one GPU the in-process engine is the fast one (--engine inline)")


# ---- the scripts for a machine with a GPU ---------------------------------------------------------


def script(name, *words):
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


PARTS = (
    "checks", "rates", "fused", "profile", "rounds", "queues-8", "queues-32", "convolutions", "grouped", "compile",
    "sweep", "two-of-four",
)  # fmt: skip


def window(folder, *words):
    """Play the window, tiny and on the CPU; return its exit code and its rows by part."""
    done = script("gpu_window.py", folder, "--device", "cpu", "--tiny", *words)
    return done, *noted(folder)


def noted(folder):
    """Return how parts of a window ended, and their rows, by part."""
    rows = [json.loads(line) for line in (folder / "gpu_window.jsonl").read_text().splitlines()]
    ended = {row["part"]: row["ended"] for row in rows if "ended" in row}
    return ended, {part: [r for r in rows if r["part"] == part and "ended" not in r] for part in [*PARTS, "machine"]}


WELL = """
import argparse, pathlib, sys
sys.path.insert(0, sys.argv[1])
import gpu_window
options = argparse.Namespace(out=pathlib.Path(sys.argv[2]), device="cpu", tiny=True, data=None)
for part in sys.argv[3:]:
    gpu_window.play(part, options)
    gpu_window.write(options.out, {"part": part, "ended": "well"})
"""
"""Plays parts of the window in one process; most of the time of a part is the import of torch."""

TWO = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import gpu_window
gpu_window.LIMITS = {part: gpu_window.LIMITS[part] for part in ("rounds", "convolutions")}
sys.exit(gpu_window.main())
"""
"""A window of two parts, each in a process of its own."""


@pytest.mark.slow
def test_the_window_answers_its_questions_and_a_part_that_fails_is_a_line(tmp_path):
    def python(code, *words):
        command = [sys.executable, "-c", code, str(ROOT / "benchmarks"), str(tmp_path), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)

    # Without images in the folder the part "rounds" fails.
    done = python(TWO, "--device", "cpu", "--tiny", "--data", str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    ended, found = noted(tmp_path)
    assert list(ended) == ["rounds", "convolutions"]
    assert found["machine"][0]["torch"] == metadata.version("torch")
    done = python(WELL, *(part for part in PARTS if part not in ended))
    assert done.returncode == 0, done.stdout + done.stderr
    ended, found = noted(tmp_path)
    assert "PrivateError: data.path is" in ended.pop("rounds")
    assert {*ended} == {*PARTS} - {"rounds"}
    assert set(ended.values()) == {"well"}, ended
    assert found["checks"]
    assert all(row["same"] for row in found["checks"])
    assert {row["concurrent"] for row in found["sweep"]} == {1, 2}
    assert [row["same"] for row in found["fused"] if "same" in row] == [True, True]
    assert [row["kernels"] for row in found["fused"] if "loss" in row] == ["torch", "fused"]
    assert all(row["images_per_second"] > 0 for part in ("rates", "queues-8", "sweep") for row in found[part])
    assert {row["kind"] for row in found["convolutions"]} == {"tf32 NCHW", "bf16 NCHW", "bf16 NHWC"}
    assert {row["compiled"] for row in found["compile"]} == {True, False}
    assert [row["refused"].partition(";")[0] for row in found["two-of-four"]] == ["there is no GPU here"]
    shown = script("gpu_window.py", tmp_path, "--show").stdout
    assert all(f"**{part}**: well" in shown for part in ended)
    assert "**rounds**: failed with 1" in shown


def test_the_window_tells_host_and_device_apart(tmp_path):
    done = script("gpu_window.py", tmp_path, "--device", "cpu", "--tiny", "--part", "rounds")
    assert done.returncode == 0, done.stderr
    (played,) = [json.loads(line) for line in (tmp_path / "gpu_window.jsonl").read_text().splitlines()]
    assert 0 < played["device_seconds"] < sum(played["round_seconds"])
    assert played["host_seconds"] == pytest.approx(sum(played["round_seconds"]) - played["device_seconds"], abs=0.5)
    assert set(played["thread_seconds"]) >= {"train", "server adds an answer", "server takes the mean"}


def test_a_window_that_is_over_says_what_it_left_out(tmp_path):
    done, ended, _ = window(tmp_path, "--minutes", 0)
    assert done.returncode == 1
    assert list(ended.items()) == [(part, "no time was left") for part in PARTS]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_the_window_says_so(tmp_path):
    done = script("gpu_window.py", tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no CUDA" in done.stderr


PAPER = """
import argparse, sys, tomllib
sys.path.insert(0, sys.argv.pop(1))
import gpu_paper
from ssfl_app import config
print(" ", *gpu_paper.SYSTEMS)
for system in gpu_paper.SYSTEMS:
    options = argparse.Namespace(precision="tf32", seed=1, data=None, tiny=True)
    recipe = config.flatten(tomllib.loads(gpu_paper.recipe(system, options)))
    assert config.parse(config.merge(recipe)).strategy == system
gpu_paper.SYSTEMS = {name: gpu_paper.SYSTEMS[name] for name in ("random", "dispfl")}
sys.exit(gpu_paper.main())
"""
"""Reads all recipes and plays two of them."""


@pytest.mark.slow
def test_the_papers_systems_are_played_and_go_on(tmp_path):
    def play():
        command = [sys.executable, "-c", PAPER, str(ROOT / "benchmarks"), str(tmp_path), "--minutes", "5", "--tiny"]
        return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)

    def accuracies():
        systems = json.loads((tmp_path / "gpu_paper.json").read_text())["systems"]
        kinds = {"random": "central_accuracy", "dispfl": "personal_accuracy_mean"}  # each by the models that it has
        return {name: found[kinds[name]] for name, found in systems.items()}

    done = play()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0].split() == ["ssfl", "fedavg", "random", "dispfl"]
    first = accuracies()
    assert list(first) == ["random", "dispfl"]
    assert all(len(values) == 3 and values[-1] is not None for values in first.values())
    (tmp_path / "random" / "status.json").write_text('{"status": "running", "message": ""}')
    again = play()
    assert [line for line in again.stdout.splitlines() if not line.startswith(" ")] == ["random: finished"]
    assert "resuming after round 3" in (tmp_path / "random.log").read_text()
    assert accuracies() == first
