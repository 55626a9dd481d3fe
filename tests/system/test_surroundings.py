"""The world around a run: proxies, notebooks, temporary folders, locales, closed pipes, links."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

import httpx
import pytest

from ssfl_app import server_app
from ssfl_app.cli.main import main as cli
from ssfl_app.deployment.services import node_service
from ssfl_app.files import append
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.results import plots, report
from ssfl_app.results.run_folder import read_run
from ssfl_app.server_app import check_folder
from ssfl_app.simulation import processes
from ssfl_app.simulation.resolve import absolute
from ssfl_app.text import tell
from tests.results.test_report import write_run

DEAD = "http://127.0.0.1:9"
PROXIES = [n for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy") for n in (name, name.upper())]
NO_PROXIES = ("no_proxy", "NO_PROXY", "no_grpc_proxy")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set every variable that names a proxy to one that nobody listens at."""
    for name in PROXIES:
        monkeypatch.setenv(name, DEAD)
    for name in NO_PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def health() -> Iterator[str]:
    """Serve 200 on loopback; return host and port."""

    class Well(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Well)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


# ---- proxies ---------------------------------------------------------------------------------


def test_the_probe_of_a_superlink_asks_no_proxy(
    proxies: None, health: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "START_TIMEOUT", 3.0)
    (tmp_path / "log").touch()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        processes.wait_until_healthy(process, health, tmp_path / "log")
        process.kill()


@pytest.mark.parametrize("proxy", [DEAD, "socks5://127.0.0.1:9", "no proxy at all"])
def test_flowers_http_client_reaches_this_machine_in_the_environment_of_a_child(
    proxies: None, health: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    """Also where it has no package for the proxy, and fails when it is made."""
    monkeypatch.setenv("ALL_PROXY", proxy)
    made = processes.environment(tmp_path)
    for name in {*os.environ, *made}:
        monkeypatch.delenv(name, raising=False)
    for name, value in made.items():
        monkeypatch.setenv(name, value)
    with httpx.Client(timeout=3) as client:
        assert client.get(f"http://{health}/health").status_code == 200


@pytest.mark.parametrize(
    ("given", "lower", "upper", "grpc"),
    [
        ({}, "localhost,127.0.0.1,::1", "localhost,127.0.0.1,::1", "localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "a.org"}, *["a.org,localhost,127.0.0.1,::1"] * 3),
        (
            {"no_proxy": "a.org, localhost", "NO_PROXY": "b.org", "no_grpc_proxy": "c.org"},
            *(f"{hosts},127.0.0.1,::1" for hosts in ("a.org,localhost", "b.org,localhost", "c.org,localhost")),
        ),
        ({"no_proxy": "*"}, "*", "*", "*"),
    ],
)
def test_hosts_without_a_proxy_stay_so(
    proxies: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    lower: str,
    upper: str,
    grpc: str,
) -> None:
    for name, hosts in given.items():
        monkeypatch.setenv(name, hosts)
    made = processes.environment(tmp_path)
    assert [made[name] for name in NO_PROXIES] == [lower, upper, grpc]
    assert not {*PROXIES} & made.keys()


def test_only_a_node_of_another_host_keeps_the_proxy(proxies: None, tmp_path: Path) -> None:
    far = node_service(tmp_path / "a", "superlink.example.org:8000", "partition-id=0", 9094).variables
    assert {far[name] for name in PROXIES} == {DEAD}
    assert far["no_proxy"] == "localhost,127.0.0.1,::1"
    for here in ("127.0.0.1:8000", "localhost:8000", "[::1]:8000"):
        near = node_service(tmp_path / "b", here, "partition-id=0", 9094).variables
        assert not {*PROXIES} & near.keys()


# ---- notebooks -------------------------------------------------------------------------------

NOTEBOOK = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MATPLOTLIBRC": sys.executable}
DRAW = """
import hashlib, logging, os, sys
from pathlib import Path
from ssfl_app.results import plots
from ssfl_app.results.run_folder import read_run
drawn = plots.svg_bytes(lambda: plots.accuracy_by_round([read_run(Path(sys.argv[1]))]))
import matplotlib
print(hashlib.sha256(drawn).hexdigest(), os.environ.get("MPLBACKEND"), matplotlib.rcParams._get_backend_or_none(),
    matplotlib.rcParams["lines.linewidth"])
"""


def drawn(folder: Path, **variables: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MPL", "MATPLOTLIB"))}
    words = [sys.executable, "-c", DRAW, str(folder)]
    done = subprocess.run(
        words, env=kept | variables, cwd=ROOT, capture_output=True, encoding="utf-8", check=True, timeout=100
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_a_picture_is_the_same_whatever_a_notebook_says(tmp_path: Path) -> None:
    """And a program that has this package as a library keeps its variables, and its style where that can be had."""
    folder = write_run(tmp_path / "run")
    plain = drawn(folder)
    assert plain[1:3] == ["None", "None"]
    inline = drawn(folder, **NOTEBOOK, MPLCONFIGDIR=str(tmp_path / "run" / "config.toml"))
    assert inline[:2] == [plain[0], NOTEBOOK["MPLBACKEND"]]
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 7\n", encoding="utf-8")
    host = drawn(folder, MPLBACKEND="svg", MATPLOTLIBRC=str(tmp_path))
    assert host == [plain[0], "svg", "svg", "7.0"]


def test_what_cannot_be_drawn_is_a_warning_at_every_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> bytes:
        raise ValueError("no such font")

    monkeypatch.setattr(plots, "png_bytes", broken)
    monkeypatch.setattr(plots, "svg_bytes", broken)
    folder = write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.toml").write_text("[compare]\n", encoding="utf-8")
    (tmp_path / "runs" / "compare-sweep" / "runs").mkdir(parents=True)
    for words in (
        ["compare", "sweep.toml", "--report-only"],
        ["partition", "-c", "run.clients=3"],
        ["study", "clients", str(folder)],
        ["study", "masks", "-c", "run.clients=2 ssfl.saliency-batch-size=8", "--batches", "1", "--repeats", "1"],
    ):
        code, out, _ = ssfl(words, capsys, monkeypatch)
        assert code == 0
        assert "could not be drawn (ValueError: no such font)" in out
    assert json.loads((tmp_path / "runs" / "study" / "mask-error.json").read_text(encoding="utf-8"))
    assert not list(tmp_path.rglob("*.png"))
    assert ssfl(["report", str(folder)], capsys, monkeypatch)[0] == 0


@pytest.mark.filterwarnings("error")
def test_a_run_of_no_rounds_is_no_picture(tmp_path: Path) -> None:
    """Nor does it spoil those of others: an empty line has a place in the corner, and panels shrink to nothing."""
    empty, whole = write_run(tmp_path / "empty"), read_run(write_run(tmp_path / "whole"))
    (empty / "rounds.jsonl").write_text("", encoding="utf-8")
    none = read_run(empty)
    report.write_report([none], tmp_path / "none.html")
    page = (tmp_path / "none.html").read_text(encoding="utf-8")
    assert "No round was evaluated, so there is no accuracy to draw." in page
    assert "Accuracy by round" not in page
    assert len(plots.accuracy_by_round([none, whole]).axes[0].lines) == 1
    report.write_report([none, whole], tmp_path / "both.html")
    assert (tmp_path / "both.html").read_text(encoding="utf-8").count("<img") == 2


@pytest.mark.filterwarnings("error")
def test_a_letter_that_no_font_has_is_nothing_to_warn_of() -> None:
    assert plots.png_bytes(lambda: plots.class_distribution([[1, 2]], ["猫", "b"]))


# ---- temporary folders -----------------------------------------------------------------------


def test_sockets_have_room_for_their_names_however_long_tmpdir_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with socket.socket(socket.AF_UNIX) as own, pytest.raises(OSError, match="too long"):
        own.bind(str(deep / "a"))
    folder = processes.short_folder()
    assert folder in (Path("/tmp"), Path("/var/tmp"))
    longest = tempfile.mkdtemp(prefix="ssfl-", dir=folder) + processes._SOCKET[len("/ssfl-12345678") :]
    assert len(longest) <= 107
    Path(longest).parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(longest)
    for path in [Path(longest), *Path(longest).parents[:4]]:
        path.unlink() if path.is_socket() else path.rmdir()
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert processes.short_folder() == Path("/tmp")
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RunFailed, match=r"TMPDIR is .*xxx; names of sockets begin with it"):
        processes.short_folder()


def test_a_run_that_fails_before_it_has_a_folder_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(processes, "LONGEST_FOLDER", 2)
    monkeypatch.setattr(sys, "argv", ["ssfl", "run", "--engine", "ray", "--out", str(tmp_path / "r")])
    with pytest.raises(SystemExit) as ended:
        cli()
    assert ended.value.code == 2
    assert re.fullmatch(r"ssfl: TMPDIR is .*\n", capsys.readouterr().err)
    assert not (tmp_path / "r").exists()


def test_a_fork_server_starts_under_a_long_tmpdir(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from ssfl_app.experiments import workers\n"
    code += "from ssfl_app.simulation import command\n"
    code += "workers._PRELOADED = ()\n"
    code += "job = workers.start(command.Engine(), ['--nonsense'], Path(sys.argv[1]) / 'errors', {})\n"
    code += "job.join(60); print(job.exitcode)"
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"TMPDIR": str(deep)},
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=100,
    )
    assert done.stdout.split() == ["2"], done.stderr


# ---- locales ---------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-1"])
def test_nothing_that_is_said_fails_for_want_of_letters(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding=encoding))
    tell("猫: 5 … ok")
    assert terminal.getvalue() == b"\\u732b: 5 \\u2026 ok\n"


def test_a_path_that_no_text_file_can_hold_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"run\.out is 'caf\\udce9'; it is a path in the locale's encoding, utf-8"):
        absolute("run.out", "caf\udce9")


def test_a_run_under_latin_1_reads_and_writes_utf_8(tmp_path: Path) -> None:
    """Umlauts in every path, in a locale made here of the few letters that it needs."""
    locale = tmp_path / "locales" / "xx_XX.ISO-8859-1"
    locale.parent.mkdir()
    upper, lower = (";".join(f"<U{ord(letter):04X}>" for letter in row) for row in (ascii_uppercase, ascii_lowercase))
    source = f"comment_char %\nescape_char /\nLC_CTYPE\nupper {upper}\nlower {lower}\nEND LC_CTYPE\n"
    (tmp_path / "source").write_text(source, encoding="ascii")
    made = ["localedef", "-c", "-f", "ISO-8859-1", "-i", str(tmp_path / "source"), str(locale)]
    try:
        subprocess.run(made, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs localedef")
    latin = {"LOCPATH": str(locale.parent), "LC_ALL": locale.name}
    code = "import sys; from ssfl_app.cli.main import main; assert sys.getfilesystemencoding() == 'iso8859-1'; main()"
    keys = "run.clients=2 run.cohort=2 run.rounds=1 local.epochs=1 local.batch-size=64 engine.concurrent=1"
    words = ["run", "--engine", "inline", "--out", "köln", "-c", keys]
    for command in (words, ["report", "köln"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *command],
            env=os.environ | latin | {"PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "köln"
    # Each byte of a name is a letter there. They come back as they were.
    name = "köln".encode().decode("latin-1")
    for text in ("config.toml", "console.log", "report.html"):
        assert name in (folder / text).read_text(encoding="utf-8")
    assert read_run(folder).summary


# ---- closed pipes, links, pipes --------------------------------------------------------------


def ssfl(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Run the command line; return exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["ssfl", *words])
    before, code = signal.getsignal(signal.SIGTERM), 0
    try:
        cli()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--engine", "inline", "--out", "{}/new", "-c", "run.clients=2 run.cohort=2"],
        ["report", "{}/run"],
        ["partition", "-c", "run.clients=2", "--out", "{}/p.png"],
        ["study", "clients", "{}/run", "--out", "{}/study"],
        ["reproduce", "--list"],
        ["cache"],
        ["--help"],
    ],
)
def test_whoever_stops_reading_is_told_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """As in `ssfl report DIR | head`; a run can be gone on with."""
    write_run(tmp_path / "run")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        code, _, err = ssfl([word.format(tmp_path) for word in words], capsys, monkeypatch)
        os.dup2(os.open(os.devnull, os.O_WRONLY), closed.fileno())  # for what Python still holds
    assert (code, err) == (1, "")


def test_a_run_whose_reader_goes_away_is_an_interrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def closing(text: str) -> None:
        if text.startswith("round"):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(server_app, "tell", closing)
    keys = "run.clients=2 run.cohort=2 run.rounds=2 local.epochs=1 local.batch-size=64"
    words = ["run", "--engine", "inline", "--out", str(tmp_path / "run"), "-c", keys]
    code, _, err = ssfl(words, capsys, monkeypatch)
    assert (code, err) == (1, "")
    assert json.loads((tmp_path / "run" / "status.json").read_bytes())["status"] == "interrupted"


@pytest.mark.parametrize(
    "name", [".lock", "console.log", "rounds.jsonl", "flower.log", "clients", "checkpoint", "wandb"]
)
def test_nothing_is_written_through_a_link_of_a_strangers_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = write_run(tmp_path / "run")
    mine = tmp_path / "mine"
    mine.write_text("precious\n", encoding="utf-8")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(mine)
    code, _, err = ssfl(["run", "--engine", "inline", "--resume", str(folder)], capsys, monkeypatch)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert mine.read_text(encoding="utf-8") == "precious\n"
    with pytest.raises(OSError, match=r"symbolic links|regular"):
        append(folder / name)


def test_a_pipe_as_the_configuration_of_a_run_folder_is_not_waited_for(tmp_path: Path) -> None:
    """What plain `flwr run` would do, which has no launcher that looks before."""
    os.mkfifo(tmp_path / "config.toml")
    for resume in (True, False):
        with pytest.raises(ConfigError, match=r"config\.toml"):
            check_folder(tmp_path, {"run.resume": resume})


def test_a_byte_order_mark_is_no_part_of_a_configuration(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "config.toml"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_run(folder).config["strategy"] == "ssfl"
