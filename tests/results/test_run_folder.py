"""`ssfl run --engine inline`: the run folder, resuming, exit codes, and one line for every kind of bad input."""

import contextlib
import io
import json
import shutil
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from ssfl_app.cli.main import main
from ssfl_app.config import merge
from ssfl_app.results.checkpoint import path_of as checkpoint_of
from ssfl_app.results.recorder import Recorder
from ssfl_app.seal import read_sealed, write_sealed
from ssfl_app.simulation import in_process
from tests.in_process_grid import SMALL

Run = Callable[..., tuple[int, str, str]]

KEYS = " ".join(f"{key}={value}" for key, value in SMALL.items())
KEYS += " data.name='few-digits' run.evaluate-every=2 run.checkpoint-every=1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of a finished run, which the run chose itself, and what was said; tests change copies."""
    stands, said, before = tmp_path_factory.mktemp("whole"), io.StringIO(), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(stands)
        patch.setattr(sys, "argv", ["ssfl", "run", "--engine", "inline", "-c", KEYS])
        with contextlib.suppress(SystemExit):
            main()
    signal.signal(signal.SIGTERM, before)
    (folder,) = (stands / "runs").iterdir()
    return folder, said.getvalue()


@pytest.fixture
def ssfl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Return a function that runs the command line in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ssfl", *words])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    yield run
    signal.signal(signal.SIGTERM, before)


def summary(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "summary.json").read_text()))


def test_a_run_leaves_all_its_files_where_the_user_stands(whole: tuple[Path, str]) -> None:
    folder, out = whole
    assert folder.name.endswith("-ssfl-few-digits")
    for name in [
        "config.toml",
        "environment.json",
        "rounds.jsonl",
        "mask.safetensors",
        "model.safetensors",
        "report.html",
        "summary.json",
    ]:
        assert (folder / name).stat().st_size > 0
    assert [line.split()[0:2] for line in out.splitlines() if line.startswith("round")] == [
        ["round", f"{r}/3"] for r in (1, 2, 3)
    ]
    assert str(folder) in out
    written = summary(folder)
    assert written["engine"] == "inline"
    assert written["alive"] == int(0.2 * 151072)
    assert written["lost_replies"] == written["refused_replies"] == 0
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert written["bytes_train_down"] == sum(r.get("bytes_train_down", 0) for r in rounds)
    assert written["central_accuracy"] == rounds[-1]["central_accuracy"]
    with safe_open(folder / "mask.safetensors", framework="np") as file:
        assert sum(int(file.get_tensor(name).sum()) for name in file.keys()) == written["alive"]  # noqa: SIM118
    config = tomllib.loads((folder / "config.toml").read_text())
    assert config["local"]["batch-size"] == SMALL["local.batch-size"]
    assert config["mask"]["density"] == 0.2


def test_a_run_that_broke_off_resumes_to_the_same_bits(
    ssfl: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, str]
) -> None:
    work = in_process.InlineGrid._answer
    left = 21  # messages until the disk is full: 6 hello, 6 saliency, 4 in round 1; then round 2 has 4 + 6

    def breaking(self: in_process.InlineGrid, message: object) -> object:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        return work(self, message)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(in_process.InlineGrid, "_answer", breaking)
        code, _, err = ssfl("run", "--engine", "inline", "-c", KEYS, "--out", "broken")
    assert code == 1
    assert "No space left on device" in err
    assert "ssfl run --resume" in err
    assert json.loads((tmp_path / "broken" / "status.json").read_text())["status"] == "failed"
    assert not (tmp_path / "broken" / "summary.json").exists()
    with (tmp_path / "broken" / "rounds.jsonl").open("a") as file:
        file.write('{"round": 2, "half')  # what a kill in the middle of a line leaves
    code, out, _ = ssfl("run", "--engine", "inline", "--resume", "broken")
    assert code == 0
    assert "resuming after round 1" in out
    assert summary(tmp_path / "broken")["model_sha256"] == summary(whole[0])["model_sha256"]

    def metrics(folder: Path) -> list[tuple[object, ...]]:
        lines = (folder / "rounds.jsonl").read_text().splitlines()
        keys = ("round", "cohort", "train_loss", "central_accuracy", "local_accuracy_mean", "bytes_train_down")
        return [tuple(json.loads(line).get(key) for key in keys) for line in lines]

    assert metrics(tmp_path / "broken") == metrics(whole[0])


def test_too_few_good_replies_end_with_exit_code_1_and_an_intact_checkpoint(
    ssfl: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, str]
) -> None:
    from ssfl_app.training.trainer import LocalTrainer

    fit = LocalTrainer.fit
    calls = 0

    def failing(self: LocalTrainer, *args: object, **options: object) -> float:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise ValueError("the scanner is offline")
        return fit(self, *args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(LocalTrainer, "fit", failing)
        one_process = f"{KEYS} engine.concurrent=1"  # in which calls are counted
        code, _, err = ssfl("run", "--engine", "inline", "-c", one_process, "--out", "run")
    assert code == 1
    assert "training in round 2: 0 of 4 clients answered well" in err
    assert "raised: ValueError: the scanner is offline" in err
    assert ssfl("run", "--engine", "inline", "--resume", "run")[0] == 0
    assert summary(tmp_path / "run")["model_sha256"] == summary(whole[0])["model_sha256"]


NORM = "model.name='resnet18' model.norm='batch'"
BAD_KEYS = [
    ("mask.densty=0.1", "mask.densty is not a key; did you mean mask.density?"),
    ("run.client=3", "run.client is not a key; did you mean run.clients?"),
    ("colour=3", "colour is not a key; keys are strategy and those of run, mask, "),
    ("density=0.1", "density is not a key; did you mean mask.density?"),
    ("mask.density=1.7", "mask.density is 1.7; it is a fraction in (0, 1]"),
    ("mask.density=0", "mask.density is 0.0; it is a fraction in (0, 1]"),
    (
        "mask.min-per-layer=100000",
        "mask.min-per-layer is 100000; it reserves 120000 weights, and the density leaves 15107",
    ),
    ("strategy='local-saliency' mask.min-per-layer=100000", "mask.min-per-layer is 100000; it reserves "),
    ("strategy='random' mask.min-per-layer=1", "mask.min-per-layer is 1; it is 0 with strategy random"),
    ("mask.density='a'", "mask.density is 'a'; it is a fraction in (0, 1] (float, not str)"),
    ("run.rounds=2.5", "run.rounds is 2.5; it is a number of at least 1 (int, not float)"),
    ("run.clients=2000 run.cohort=5", "run.clients is 2000; "),
    ("run.cohort=21", "run.cohort is 21; it is at most run.clients, 20"),
    ("partition.name='pathological' partition.classes=11", "partition.classes is 11; "),
    ("data.name='parquet'", "data.path is ''; "),
    ("data.name='parquet' data.path='nowhere'", "data.path is "),
    ("data.path='images'", "data.name is digits; it reads no data.path, which is "),
    *(
        (f"{keys} mask.density=1e-6", "mask.density is 1e-06; it leaves none of 151,072 prunable weights alive")
        for keys in ("", "mask.scope='layer'", "strategy='dispfl'", "strategy='zerofl'", "strategy='topk'")
    ),
    (f"{NORM} local.batch-size=1", "local.batch-size is 1; it is at least 2: with model.norm 'batch' resnet18"),
    (f"{NORM} ssfl.saliency-batch-size=1", "ssfl.saliency-batch-size is 1; it is at least 2: with model.norm"),
    (f"{NORM} partition.name='iid' run.clients=1437", "client 0 has 1 training image(s) and trains on 1; it needs 2"),
    (
        f"{NORM} partition.name='iid' run.clients=718 strategy='fedfomo'",
        "client 1 has 2 training image(s) and trains on 1; it needs 2",
    ),
    ("data.name='mnist'", "data.name is 'mnist'; it is one of digits, "),
    ("model.name='vgg'", "model.name is 'vgg'; it is one of cnn, "),
    ("strategy='fedsgd'", "strategy is 'fedsgd'; it is one of ssfl, "),
    ("run.device='cuda'", "run.device is 'cuda'; "),
    ("run.device='tpu'", "run.device is 'tpu'; it is one of auto, cpu, cuda"),
    ("strategy=random", "strategy is random; it is a TOML value, strings in quotes: 'random'"),
    ("nonsense", "-c is 'nonsense'; it is key=value pairs"),
]


@pytest.mark.parametrize(("keys", "line"), BAD_KEYS, ids=[keys for keys, _ in BAD_KEYS])
def test_bad_keys_give_one_line_and_exit_code_2_and_write_nothing(
    ssfl: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: str, line: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = ssfl("run", "-c", keys)
    assert code == 2
    assert err.startswith(f"ssfl: {line}")
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_parquet_file_gives_one_line(ssfl: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train.parquet", "test.parquet"):
        (tmp_path / "data" / name).write_bytes(b"not parquet")
    code, _, err = ssfl("run", "-c", "data.name='parquet' data.path='data'", "--out", "run")
    assert code == 2
    assert err.startswith(f"ssfl: data.path is {str(tmp_path / 'data')!r}")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_bad_folders_and_files_give_one_line(ssfl: Run, tmp_path: Path) -> None:
    def bad(*words: str) -> str:
        code, _, err = ssfl("run", *words)
        assert (code, err.count("\n")) == (2, 1)
        return err

    assert bad("missing.toml").startswith("ssfl: CONFIG is missing.toml; it is a TOML file")
    (tmp_path / "broken.toml").write_text("run = [")
    assert bad("broken.toml").startswith("ssfl: CONFIG is broken.toml; it is a TOML file")
    assert bad("--resume", "nothing").startswith("ssfl: --resume is nothing; ")
    assert bad("--engine", "spark").startswith("ssfl: --engine is 'spark'; it is one of ray, inline")
    assert bad("--nodes", "5", "-c", "run.clients=6").startswith("ssfl: --nodes is 5; run.clients, 6, is the same")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    assert "it is a new or empty folder" in bad("--out", "full")
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["thesis.txt"]


def test_every_command_of_one_configuration_says_what_a_sweep_file_is_for(ssfl: Run, tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text('[compare]\nstrategies = ["ssfl"]\n')
    for words in (["run"], ["partition"], ["study", "masks"]):
        code, _, err = ssfl(*words, "sweep.toml")
        said = "ssfl: CONFIG is sweep.toml; this is a file for ssfl compare: ssfl compare sweep.toml\n"
        assert (code, err) == (2, said)


def test_a_run_resumes_with_its_own_configuration_only(ssfl: Run, tmp_path: Path, whole: tuple[Path, str]) -> None:
    shutil.copytree(whole[0], "run")
    code, _, err = ssfl("run", "--engine", "inline", "--resume", "run", "-c", "mask.density=0.3")
    assert code == 2
    assert "mask.density is 0.3; that run was started with 0.2" in err
    before = summary(tmp_path / "run")["model_sha256"]
    # The same keys again, and what belongs to the engine only, are no other configuration.
    assert ssfl("run", "--engine", "inline", "--resume", "run", "-c", KEYS + " engine.actors=1")[0] == 0
    assert summary(tmp_path / "run")["model_sha256"] == before


def test_a_run_of_a_version_with_fewer_keys_goes_on_as_by_default(
    ssfl: Run, tmp_path: Path, whole: tuple[Path, str]
) -> None:
    shutil.copytree(whole[0], "r1")
    before = summary(tmp_path / "r1")["model_sha256"]
    file, checkpoint = tmp_path / "r1" / "config.toml", checkpoint_of(tmp_path / "r1")
    metadata, arrays = read_sealed(checkpoint)
    del metadata["config"]["data.label-column"]
    write_sealed(checkpoint, metadata, arrays)
    line = 'label-column = "label"\n'
    whole = file.read_text()
    file.write_text(whole.replace(line, line.replace('"label"', '"fine"')))
    assert "data.label-column is 'fine'; that run was started with 'label'" in ssfl("run", "--resume", "r1")[2]
    file.write_text(whole.replace(line, ""))
    assert ssfl("run", "--resume", "r1")[0] == 0
    assert summary(tmp_path / "r1")["model_sha256"] == before


def test_a_config_file_and_nodes_set_keys_and_overrides_win(ssfl: Run, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(
        'strategy = "random"\n[run]\ncohort = 2\nrounds = 1\n[mask]\ndensity = 0.3\n[local]\nepochs = 1\n'
    )
    words = ("my.toml", "--nodes", "4", "-c", "mask.density=0.5", "--engine", "inline", "--out", "run")
    assert ssfl("run", *words)[0] == 0
    made = summary(tmp_path / "run")
    assert (made["strategy"], made["clients"], made["alive"]) == ("random", 4, 151072 // 2)


def test_report_and_partition_commands(ssfl: Run, tmp_path: Path, whole: tuple[Path, str]) -> None:
    shutil.copytree(whole[0], "ssfl")
    words = ("run", "--engine", "inline", "-c", f"{KEYS} run.rounds=1 strategy='random'", "--out", "random")
    assert ssfl(*words)[0] == 0
    code, out, _ = ssfl("report", "ssfl", "random")
    assert code == 0
    assert "random" in out
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    code, out, _ = ssfl("partition", "-c", "partition.name='pathological' run.clients=5", "--out", "p.png")
    assert code == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert ssfl("report", "nowhere")[0] == 2


def test_who_was_refused_and_why_is_said_once_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    recorder = Recorder(tmp_path / "run", merge({}), said.append)
    recorder.begin(None)
    recorder.names = {1: "site-a"}
    record = {"round": 0, "asked": 0, "seconds": 0.0, "refused": {"1": "10 images"}, "lost": {"2": "gone"}}
    for _ in range(2):
        recorder.round(dict(record))
    assert said == ["warning: client 2 was lost: gone", "warning: client site-a was refused: 10 images"]
    monkeypatch.setattr("ssfl_app.results.recorder.MOST_WARNINGS", 2)
    recorder.round({**record, "refused": {"3": "another reason"}})
    assert len(said) == 2
    recorder.close()
