"""Processes of Flower: started in this very environment, waited for, and ended with all their children."""

import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from ssfl_app.guard import RunFailed
from ssfl_app.options import ConfigError

START_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0

# Without the third Flower installs torch anew for each run; the others contact the internet.
_SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def environment(flwr_home: Path, **more: str) -> dict[str, str]:
    """Return this process's environment for a Flower process with its own FLWR_HOME, with `more` variables."""
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    return os.environ | _SWITCHES | {"FLWR_HOME": str(flwr_home), "PATH": path} | more


def spawn(command: list[str], cwd: Path, variables: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """Start a command of this very environment in a session of its own; what it says is added to the file `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(Path(sys.executable).parent / command[0]), *command[1:]],
            cwd=cwd,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the launcher, which then stops the others in order
        )


@contextmanager
def running(
    command: list[str], cwd: Path, variables: dict[str, str], log: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command as `spawn` does; end it and all its descendants in the end."""
    process = spawn(command, cwd, variables, log)
    try:
        yield process
    finally:
        end(process)


def end(*processes: "subprocess.Popen[bytes]") -> None:
    """End processes and all their descendants: first asked, then killed."""
    end_families([process.pid for process in processes])
    for process in processes:
        process.wait()


def end_families(pids: list[int]) -> None:
    """End the processes with these ids and all their descendants: first asked, then killed."""
    parents, family = [], []
    for pid in pids:
        try:
            parents.append(psutil.Process(pid))
            family += [parents[-1], *parents[-1].children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    for parent in parents:
        if parent.is_running():
            parent.terminate()
    _, alive = psutil.wait_procs(family, STOP_TIMEOUT if parents else 1)
    for member in alive:
        # Flower's and Ray's children have sessions of their own and survive their parent for a while.
        member.kill()
    psutil.wait_procs(alive, STOP_TIMEOUT)


def wait_until_healthy(
    process: "subprocess.Popen[bytes]", address: str, log: Path, authority: Path | None = None, answer: int = 200
) -> None:
    """Wait until the SuperLink at host:port answers, by TLS if a certificate authority's file is given.

    `answer` is the status with which it does: a SuperLink is asked for its health (200), which its front does not
    tell (404).

    Raises
    ------
    RunFailed
        It ended, or did not answer within `START_TIMEOUT` seconds; with the end of its log.
    """
    scheme = "http" if authority is None else "https"
    context = None
    if authority is not None:
        context = ssl.create_default_context(cafile=str(authority))
        context.check_hostname = False  # it may listen at an address that nodes never see
    end_ = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end_ and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{scheme}://{address}/health", timeout=1, context=context) as said:
                status = said.status
        except urllib.error.HTTPError as error:
            status = error.code
        except OSError:
            status = 0
        if status == answer:
            return
        time.sleep(0.05)
    raise RunFailed(f"the SuperLink did not start at {address} within {START_TIMEOUT:g} s:\n  {tail(log)}")


def tail(log: Path, begin: int = 0) -> str:
    """Return the last lines of a log after its first `begin` bytes, indented."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return "\n  ".join(lines[-12:])


def check_port(host: str, port: int, key: str) -> None:
    """Find out whether a process could listen at host:port now.

    Raises
    ------
    ConfigError
        It could not; the message begins with `key`, which is what said so.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier one may linger
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"{key} is {port}; nothing can listen there on {host} ({error.strerror or error}): name another one"
        ) from error


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
