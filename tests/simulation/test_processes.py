"""How a launcher ends its processes, says why a run failed, and leaves status.json: without Flower or Ray."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ssfl_app import locks
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.results.status import read_status, write_status
from ssfl_app.simulation.command import telling
from ssfl_app.simulation.flower_app import judge
from ssfl_app.simulation.processes import cause_in_log, kill_families, wait_until_healthy

# What Flower 1.41 and Ray 2.55 said, shortened.
RAY_FAILS = """\
Traceback (most recent call last):
  File "ray/_private/utils.py", line 1715, in validate_socket_filepath
    raise OSError(
OSError: AF_UNIX path length cannot exceed 107 bytes: /x/plasma_store

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "flwr/server/superlink/fleet/vce/vce_api.py", line 267, in run_api
    raise RuntimeError("Simulation Runtime crashed.") from ex
RuntimeError: Simulation Runtime crashed.

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "flwr/simulation/app.py", line 337, in run_simulation_process
    simulation_result = _run_simulation(
                        ^^^^^^^^^^^^^^^^
RuntimeError: An error was encountered. Ending simulation.
\x1b[91mERROR \x1b[0m:     Exit Code: 700

An unhandled exception occurred when running the simulation.

For more information, visit: <https://flower.ai/docs/framework/1.41/en/ref-exit-codes/700.html>
"""
AN_EARLIER_ONE = """\
Traceback (most recent call last):
  File "a.py", line 1, in <module>
KeyError: 'x'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "b.py", line 1, in <module>
    import no_such_module
ModuleNotFoundError: No module named 'no_such_module'
\x1b[91mERROR \x1b[0m:     Exit Code: 607
"""
UVICORN = """\
2026-11-28T04:16:51.530Z INFO [uvicorn.error] Application startup complete.
2026-11-28T04:16:51.531Z ERROR [uvicorn.error] [Errno 98] error while attempting to bind on address
2026-11-28T04:16:51.539Z INFO [uvicorn.error] Application shutdown complete.
"""
FLOWER = "\x1b[91mERROR \x1b[0m:     no port is free\n\x1b[92mINFO \x1b[0m:      SuperLinkLifespan: stop\n"
FRAMED = """\
Using SuperLink: local (127.0.0.1:45990)
╭─ Error ───────────────────────────────────────────────────────╮
│ Connection to the SuperLink is unavailable. Please check your │
│ network connection.                                           │
╰───────────────────────────────────────────────────────────────╯
"""
SAID = {
    "Ray": (RAY_FAILS, "OSError: AF_UNIX path length cannot exceed 107 bytes: /x/plasma_store"),
    "an app that cannot be imported": (AN_EARLIER_ONE, "ModuleNotFoundError: No module named 'no_such_module'"),
    "the last of two": (RAY_FAILS + AN_EARLIER_ONE, "ModuleNotFoundError: No module named 'no_such_module'"),
    "a port in use": (UVICORN, "[Errno 98] error while attempting to bind on address"),
    "Flower's logger": (FLOWER, "no port is free"),
    "the command flwr": (
        FRAMED,
        "Connection to the SuperLink is unavailable. Please check your network connection.",
    ),
    "one line": ("Killed\n\n", "Killed"),
    "a forged line": ("\x1b[2Jgone\x07\n", "\\x1b[2Jgone\\x07"),
}


@pytest.mark.parametrize("name", SAID)
def test_a_failure_that_flower_or_ray_reports_is_said_by_its_cause(name: str, tmp_path: Path) -> None:
    said, why = SAID[name]
    log = tmp_path / "flower.log"
    log.write_text("Traceback (most recent call last):\nValueError: of an earlier session\n")
    begin = log.stat().st_size
    with log.open("a", encoding="utf-8") as file:
        file.write(said)
    with pytest.raises(RunFailed) as caught:
        judge(tmp_path, log, begin)
    assert str(caught.value) == f"{why} (the log is {log})"


def test_a_log_that_says_nothing_is_named(tmp_path: Path) -> None:
    for made in (False, True):
        if made:
            (tmp_path / "flower.log").touch()
        with pytest.raises(RunFailed, match=r"Flower ended the run without a reason .*flower\.log"):
            judge(tmp_path, tmp_path / "flower.log", 0)
    assert cause_in_log("") == ""


def test_a_superlink_that_does_not_start_says_why(tmp_path: Path) -> None:
    log = tmp_path / "superlink.log"
    log.write_text(UVICORN)
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        process.wait()
        with pytest.raises(
            RunFailed, match=r"at 127\.0\.0\.1:1 \(exit code 3\): \[Errno 98\] error while .* address$"
        ):
            wait_until_healthy(process, "127.0.0.1:1", log)


HOW_IT_ENDS = {
    "failed": (RunFailed("no client"), "failed", "no client", SystemExit),
    "full": (OSError(28, "No space left on device"), "failed", "No space left", SystemExit),
    "interrupted": (KeyboardInterrupt(), "interrupted", "", SystemExit),
    "a fault": (KeyError("x"), "failed", "KeyError: 'x'", KeyError),
}


@pytest.mark.parametrize("name", HOW_IT_ENDS)
def test_the_status_is_never_running_after_the_command(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raised, status, message, leaves = HOW_IT_ENDS[name]
    for said in ("running", None):  # the ServerApp began and was killed, or it never began
        (tmp_path / "status.json").unlink(missing_ok=True)
        if said:
            write_status(tmp_path, said)
        with pytest.raises(leaves), telling(tmp_path, "run"):
            raise raised
        assert read_status(tmp_path)["status"] == status
        assert message in read_status(tmp_path)["message"]
    for said in ("finished", "failed"):  # it said so itself
        write_status(tmp_path, said, "its own words")
        with pytest.raises(leaves), telling(tmp_path, "run"):
            raise raised
        assert read_status(tmp_path) == {"status": said, "message": "its own words"}
    assert capsys.readouterr().err.count("to go on: ") == (4 if leaves is SystemExit else 0)


def test_what_is_anothers_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_status(tmp_path, "running")
    with pytest.raises(ConfigError), telling(tmp_path, "run"):
        raise ConfigError("mask.density is 7")
    lock = locks.try_lock(tmp_path / ".lock")
    assert lock is not None
    with lock, pytest.raises(SystemExit), telling(tmp_path, "run"):
        raise RunFailed("no client")
    assert read_status(tmp_path) == {"status": "running", "message": ""}
    capsys.readouterr()


FAMILY = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
depth = int(sys.argv[2])
if depth:
    subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[1], str(depth - 1)], start_new_session=True)
print("up", flush=True)
time.sleep(600)
"""


def test_a_family_that_does_not_listen_is_gone_at_once() -> None:
    command = [sys.executable, "-c", FAMILY, FAMILY, "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "up\n"
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(family) == 3
        kill_families([process.pid, 2**22 + 1])
        gone = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        assert not [member for member in family if member.is_running() and member.status() not in gone]


def test_the_launcher_of_a_run_on_ray_imports_no_torch() -> None:
    """It waits for the whole run, and each import is seconds and hundreds of megabytes."""
    words = "import json, sys; import ssfl_app.cli.main, ssfl_app.simulation.command, ssfl_app.simulation.ray; "
    words += "print(json.dumps([m for m in ('torch', 'numpy', 'flwr', 'ray') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == []


def test_the_client_that_flower_loads_imports_no_torch_before_a_message() -> None:
    words = "import sys; from ssfl_app.lazy_client_app import app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "False\n"
