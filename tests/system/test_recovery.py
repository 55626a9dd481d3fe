"""Going on after an interruption: damaged folders are named and left alone, what clients keep heals or says so."""

import faulthandler
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from safetensors import safe_open
from safetensors.numpy import save_file

from ssfl_app import locks
from ssfl_app.cli.main import main
from ssfl_app.comm.payload import ClientState
from ssfl_app.config import merge
from ssfl_app.core.strategy import ServerContext
from ssfl_app.options import ConfigError
from ssfl_app.results import checkpoint, report
from ssfl_app.results.recorder import Recorder
from ssfl_app.seal import read_sealed, write_sealed
from ssfl_app.server_app import run_token
from ssfl_app.simulation import ray as launch
from ssfl_app.strategies import REGISTRY
from ssfl_app.text import command, printable
from tests.in_process_grid import SMALL, play

TINY = merge(SMALL, {"run.clients": 2, "run.cohort": 2, "run.rounds": 2, "local.batch-size": 128})
KEYS = "run.clients=2 run.cohort=2 run.rounds=2 run.checkpoint-every=1 local.epochs=1 local.batch-size=128"
CHECKPOINT = "checkpoint/latest.safetensors"


def ssfl(*words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["ssfl", *words])
        patch.setattr("signal.signal", lambda *_: None)
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of Ditto."""
    folder = tmp_path_factory.mktemp("recovery") / "run"
    words = ("run", "--engine", "inline", "-c", f"{KEYS} strategy='ditto'", "--out", str(folder))
    with pytest.MonkeyPatch.context() as patch:
        assert ssfl(*words, monkeypatch=patch) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def reseal(**metadata: object) -> Callable[[Path], None]:
    """Forge a checkpoint whose digest is right."""

    def damage(folder: Path) -> None:
        told, arrays = read_sealed(folder / CHECKPOINT)
        write_sealed(folder / CHECKPOINT, told | metadata, arrays)

    return damage


def without_digest(folder: Path) -> None:
    """Write the checkpoint as older versions did."""
    metadata, arrays = read_sealed(folder / CHECKPOINT)
    kept = {name: metadata[name] for name in ("round", "seconds", "records")}
    save_file(arrays, folder / CHECKPOINT, metadata={"ssfl": json.dumps(kept)})


def flip(content: bytes) -> bytes:
    return content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:]


DAMAGES = {
    "checkpoint cut": (edit(CHECKPOINT, lambda c: c[:-20]), CHECKPOINT),
    "checkpoint empty": (edit(CHECKPOINT, lambda _: b""), CHECKPOINT),
    "checkpoint of zeros": (edit(CHECKPOINT, lambda c: bytes(len(c))), CHECKPOINT),
    "checkpoint with one bit flipped": (edit(CHECKPOINT, flip), CHECKPOINT),
    "checkpoint without a digest": (without_digest, "has no digest"),
    "round 99": (reseal(round=99), "is of round 99"),
    "round -5": (reseal(round=-5), "is of round -5"),
    "round that is none": (reseal(round="2"), "is of round '2'"),
    "checkpoint that is a folder": (lambda f: ((f / CHECKPOINT).unlink(), (f / CHECKPOINT).mkdir()), CHECKPOINT),
    "last record gone": (edit("rounds.jsonl", lambda c: c[: c[:-1].rindex(b"\n") + 1]), "rounds.jsonl"),
    "last record cut": (edit("rounds.jsonl", lambda c: c[:-20]), "rounds.jsonl"),
    "no records": (edit("rounds.jsonl", lambda _: b""), "rounds.jsonl"),
    "records missing": (lambda f: (f / "rounds.jsonl").unlink(), "rounds.jsonl"),
    "a record changed": (edit("rounds.jsonl", lambda c: c.replace(b'"seconds": ', b'"seconds": 1')), "rounds.jsonl"),
    "garbage before the records": (edit("rounds.jsonl", lambda c: b"{{{\n" + c), "rounds.jsonl"),
    "another learning rate": (
        edit("config.toml", lambda c: c.replace(b"lr = 0.1", b"lr = 0.2")),
        "lr is 0.2; that run was started with 0.1. Put that back",
    ),
    "configuration that is none": (reseal(config="0123"), "is damaged"),
    "more rounds": (
        edit("config.toml", lambda c: c.replace(b"rounds = 2", b"rounds = 3")),
        "run.rounds is 3; that run",
    ),
    "deep TOML": (edit("config.toml", lambda c: c + b"\n[x]\na = " + b"[" * 9000), "config.toml"),
    "config that is no UTF-8": (edit("config.toml", lambda c: c + b"\n# \xff"), "config.toml"),
}


def no_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the launcher of a run on Ray start something else."""
    monkeypatch.setattr(launch, "spawn", lambda *_: subprocess.Popen(["sleep", "60"]))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_one_line_that_names_the_file_and_nothing_changes(
    name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, named = DAMAGES[name]
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    damage(folder)
    before = contents(folder)
    for engine in ("inline", "ray"):  # the second one finds out while Flower starts
        no_flower(monkeypatch)
        code = ssfl("run", "--engine", engine, "--resume", str(folder), monkeypatch=monkeypatch)
        err = capsys.readouterr().err
        assert (code, err.count("\n")) == (2, 1), err
        assert named in err
    assert contents(folder) == before


@pytest.mark.parametrize("name", [".lock", CHECKPOINT, "rounds.jsonl", "console.log", "status.json"])
def test_a_pipe_in_a_folder_is_one_line_and_nobody_waits_for_its_other_end(
    name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    pipe = folder / name
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    before = contents(folder)
    for engine in ("inline", "ray"):
        no_flower(monkeypatch)
        with no_longer_than(20):
            code = ssfl("run", "--engine", engine, "--resume", str(folder), monkeypatch=monkeypatch)
        err = capsys.readouterr().err
        assert (code, err.count("\n")) == (2, 1), err
        assert name in err
    assert contents(folder) == before


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Break off a system call that waits; where no Python can run meanwhile, end the tests and say where."""

    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(2 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_what_is_held_for_oneself_is_a_regular_file(tmp_path: Path) -> None:
    pipe = tmp_path / "checkpoint" / "token"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # with a reader the pipe can be opened
    with pytest.raises(OSError, match="no regular file"):
        locks.try_lock(pipe)
    os.close(reader)
    with no_longer_than(20):
        assert run_token(tmp_path) != run_token(tmp_path)  # drawn, as there is none that can be read
    pipe.unlink()
    pipe.write_text("0123456789abcdef\n")
    assert run_token(tmp_path) == "0123456789abcdef"


STRATEGIES = ("ssfl", "dispfl", "dpsgd", "fedpm", "fedfomo", "lotteryfl", "subfedavg", "spafl")


@pytest.mark.parametrize("name", STRATEGIES)
def test_arrays_that_are_missing_or_of_another_shape_do_not_fit(name: str, tmp_path: Path) -> None:
    played = play(TINY | {"strategy": name, "run.rounds": 1})
    flat = merge(TINY, {"strategy": name, "run.rounds": 1})
    arrays = played.strategy.state_dict()
    (tmp_path / "rounds.jsonl").write_text("{}\n")

    def resume(kept: dict[str, np.ndarray]) -> None:
        fresh = REGISTRY[name](ServerContext(played.layout, played.strategy.settings))
        checkpoint.save(tmp_path, flat, 1, 1.0, 1, hashlib.sha256(b"{}\n").hexdigest(), kept)
        assert checkpoint.resume(fresh, tmp_path, flat) is not None

    resume(arrays)
    for array in arrays:
        if array == "refresh/history":  # may have any length
            continue
        for bad in (None, arrays[array][:-1], arrays[array].astype(np.float64)):
            changed = {n: a for n, a in arrays.items() if n != array} | ({} if bad is None else {array: bad})
            if (
                bad is None and array.startswith("model/") and name in ("dpsgd", "fedfomo")
            ):  # who was not heard of has none
                continue
            if bad is not None and bad.dtype == arrays[array].dtype and not bad.size < arrays[array].size:
                continue  # float64 already
            with pytest.raises(ConfigError, match=r"latest\.safetensors does not fit this run"):
                resume(changed)


def context() -> Context:
    return Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})


class TestPersonalFiles:
    @pytest.fixture
    def memory(self, tmp_path: Path) -> ClientState:
        memory = ClientState(context(), 3, tmp_path)
        for round_ in (2, 4):
            memory.save(round_, {"model": np.full(300, round_, np.float32)}, back_to=0)
        return memory

    @pytest.mark.parametrize(
        "damage", [flip, lambda c: c[:-5], lambda c: b"", lambda c: bytes(len(c)), lambda c: c[:9]]
    )
    def test_a_damaged_one_falls_back_to_the_version_before_and_says_so(
        self, memory: ClientState, tmp_path: Path, damage: Callable[[bytes], bytes]
    ) -> None:
        edit("client-00003/000004.safetensors", damage)(tmp_path)
        kept = memory.load(4)
        assert kept is not None
        assert kept["model"][0] == 2
        (note,) = memory.notes
        assert note.startswith("its personal state of round 4 ")
        assert note.endswith("; it went on from that of round 2")

    def test_a_missing_one_is_named(self, memory: ClientState, tmp_path: Path) -> None:
        shutil.rmtree(tmp_path / "client-00003")
        assert memory.load(4) is None
        assert memory.notes == ["its personal state of round 4 is missing; it began anew"]

    def test_nothing_is_said_where_nothing_is_wrong(self, memory: ClientState) -> None:
        assert memory.load(4) is not None
        assert ClientState(context(), 5).load(0) is None
        assert memory.notes == []

    def test_files_of_other_names_are_nobodys(self, memory: ClientState, tmp_path: Path) -> None:
        own = tmp_path / "client-00003"
        for name in ("notes.safetensors", "0000005.safetensors", "\u00b2.safetensors", ".000009.safetensors.x.tmp"):
            (own / name).write_bytes(b"")
        (own / "000003.safetensors").mkdir()
        assert memory.load(4) is not None
        assert memory.notes == []


@pytest.mark.parametrize(
    "damage", [lambda c: bytes([c[0] ^ 1]) + c[1:], lambda c: c[:-1], lambda c: bytes(len(c)), lambda c: b""]
)
def test_a_damaged_mask_is_asked_for_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    played = play(TINY)
    for number, memory in enumerate(
        (ClientState(context(), 0, tmp_path / "a"), ClientState(context(), 0, tmp_path / "b", True))
    ):
        site, mask = played.runtime.rule(0, memory).context, played.strategy.mask
        memory.keep(mask.digest, mask.packed())
        assert site.mask(mask.digest) == mask
        (file,) = [path for path in (tmp_path / "ab"[number]).rglob("*") if path.is_file()]
        digest = file.read_bytes()[: 64 * number]
        file.write_bytes(digest + damage(mask.packed().tobytes()))
        site.masks.clear()
        assert site.mask(mask.digest) is None
        memory.keep(mask.digest, mask.packed())
        assert site.mask(mask.digest) == mask


def test_lost_personal_models_are_named_in_the_records_and_to_the_user(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of round 1, as after an interruption, without what client 1 kept."""
    folder = tmp_path / "run"
    words = ("run", "--engine", "inline", "-c", f"{KEYS} strategy='ditto'", "--out", str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "checkpoint", stop_after(1))
        assert ssfl(*words, monkeypatch=monkeypatch) == 1
    shutil.rmtree(folder / "clients" / "client-00001")
    assert ssfl("run", "--engine", "inline", "--resume", str(folder), monkeypatch=monkeypatch) == 0
    line = "client 1: its personal state of round 1 is missing; it began anew"
    assert capsys.readouterr().out.count(f"warning: {line}") == 1
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert records[2]["notes"] == {"1": line.removeprefix("client 1: ")}
    assert "began anew" in (folder / "report.html").read_text()


def stop_after(round_: int) -> Callable[..., None]:
    real = Recorder.checkpoint

    def checkpoint(self: Recorder, at: int, arrays: dict[str, np.ndarray]) -> None:
        real(self, at, arrays)
        if at == round_:
            raise OSError(28, "No space left on device")

    return checkpoint


def test_a_run_that_is_going_on_is_left_alone(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    running = Recorder(folder, merge(TINY), print)
    before = contents(folder)
    for engine in ("inline", "ray"):
        no_flower(monkeypatch)
        assert ssfl("run", "--engine", engine, "--resume", str(folder), monkeypatch=monkeypatch) == 2
        assert "no other process is writing to" in capsys.readouterr().err
    assert contents(folder) == before
    running.close()


def test_a_report_that_cannot_be_made_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise TypeError("set_text() takes a string")

    monkeypatch.setattr(report.page, "render", broken)
    folder = tmp_path / "a b"
    keys = f"{KEYS} strategy='fedavg' run.rounds=1"
    assert ssfl("run", "--engine", "inline", "-c", keys, "--out", str(folder), monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "warning: report.html could not be made (TypeError: set_text() takes a string)" in out
    assert f"ssfl report '{folder}'" in out
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    assert (folder / "summary.json").exists()


def test_what_a_start_left_that_came_to_nothing_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoint").mkdir(parents=True)
    for name in (".lock", "status.json", "flower.log"):
        (folder / name).write_text("")
    keys = f"{KEYS} strategy='fedavg' run.rounds=1"
    words = ("run", "--engine", "inline", "-c", keys, "--out", str(folder))
    assert ssfl(*words, monkeypatch=monkeypatch) == 0
    assert ssfl(*words, monkeypatch=monkeypatch) == 2
    assert "it is a new or empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x" * 300, "file/below", "a\0b"])
def test_a_folder_that_cannot_be_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    words = ("run", "--engine", "inline", "-c", f"{KEYS} run.out={json.dumps(str(tmp_path / name))}")
    assert ssfl(*words, monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_all_files_of_a_run_folder_have_the_mode_of_the_umask(finished: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    modes = {path: path.stat().st_mode & 0o777 for path in finished.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_models_are_what_safetensors_reads(finished: Path) -> None:
    for path in (finished / "clients" / "client-00000" / "000002.safetensors", finished / CHECKPOINT):
        with safe_open(path, framework="numpy") as file:
            assert file.keys()


def test_commands_can_be_pasted() -> None:
    assert command("ssfl", "run", "--resume", Path("a b")) == "ssfl run --resume 'a b'"
    assert command("ssfl", Path("it's")) == """ssfl 'it'"'"'s'"""
    assert command("x", "caf\udce9\x1b'\n") == r"x $'caf\xe9\x1b\x27\x0a'"
    assert printable("a\x1b[2J\ud800\tb\n", keep="\n") == "a\\x1b[2J\\ud800\\tb\n"
