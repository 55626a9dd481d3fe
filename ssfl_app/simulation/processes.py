"""Processes of Flower: started in this very environment, waited for, and ended with all their children."""

import contextlib
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.text import in_a_line

START_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine, as its own processes call it."""

_SOCKET = "/ssfl-12345678/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
LONGEST_FOLDER = (107 if sys.platform == "linux" else 103) - len(_SOCKET)
"""Bytes that the name of a folder may have for the sockets of a run on Ray, which have the longest names, to fit."""

# What Flower's HTTP client (httpx), urllib, requests and gRPC read, in lower case.
_PROXIES = {"http_proxy", "https_proxy", "all_proxy", "grpc_proxy"}
# The last line of a traceback, which Flower may have logged behind a prefix of its own.
_EXCEPTION = re.compile(
    r"^[ \t]*Traceback \(most recent call last\):\n(?:[ \t]+.*\n|\n)*([\w.]+(?::.*)?)$", re.MULTILINE
)
_FROM = "The above exception was the direct cause of the following exception:"
# Flower's logger, uvicorn's, and the frame that `flwr` draws around an error.
_ERROR = re.compile(r"^(?:\S+Z )?(?:ERROR|Error)\s*(?::|\[[\w.]+\])\s*")
_FRAME = re.compile(r"^\u256d\u2500 Error .*\n((?:\u2502.*\n?)+)", re.MULTILINE)

# Without the third Flower installs torch anew for each run; the others contact the internet.
_SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONIOENCODING": "utf-8:backslashreplace",  # of their logs, and of what this package reads of them
}


def environment(flwr_home: Path, **more: str) -> dict[str, str]:
    """Return this process's environment for a Flower process with its own FLWR_HOME, with `more` variables.

    Loopback never goes through a proxy, and without `proxies` among `more` nothing does: httpx cannot even be set up
    under a SOCKS proxy that it has no package for, whatever no_proxy says.
    """
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    kept = {name: value for name, value in os.environ.items() if name.lower() not in _PROXIES}
    return kept | _SWITCHES | {"FLWR_HOME": str(flwr_home), "PATH": path} | _direct() | more


def proxies() -> dict[str, str]:
    """Return the variables that name proxies, for a process that talks to a host beyond this machine."""
    return {name: value for name, value in os.environ.items() if name.lower() in _PROXIES}


def _direct() -> dict[str, str]:
    """Return the variables that name the hosts no proxy is asked for, with this machine among them."""
    lower, upper, grpc = (os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"))
    # Each program reads one of them, some the other one where that is missing.
    given = {"no_proxy": lower or upper, "NO_PROXY": upper or lower, "no_grpc_proxy": grpc or lower or upper}
    return {name: _with_loopback(hosts) for name, hosts in given.items()}


def _with_loopback(hosts: str) -> str:
    if hosts.strip() == "*":  # all hosts, but only where it stands alone
        return hosts
    return ",".join(dict.fromkeys([*filter(None, map(str.strip, hosts.split(","))), *LOOPBACK]))


def short_folder() -> Path:
    """Return a folder for temporary files below which the sockets of Ray and multiprocessing can have their names.

    That is the usual one, which TMPDIR names, but /tmp where it is too long: the name of a socket has 107 bytes.
    RunFailed: there is none.
    """
    usual = tempfile.gettempdir()
    for folder in (usual, "/tmp", "/var/tmp"):
        if len(os.fsencode(folder)) <= LONGEST_FOLDER and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    raise RunFailed(
        f"TMPDIR is {usual}; names of sockets begin with it, so it has at most {LONGEST_FOLDER} bytes where "
        "/tmp cannot be written to"
    )


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
    family = families(pids)
    for member in family:
        if member.pid in pids and member.is_running():
            member.terminate()
    alive = _wait(family, STOP_TIMEOUT if any(member.pid in pids for member in family) else 1)
    for member in alive:
        # Flower's and Ray's children have sessions of their own and survive their parent for a while.
        member.kill()
    _wait(alive, STOP_TIMEOUT)


def kill_families(pids: list[int]) -> None:
    """Kill the processes with these ids and all their descendants, at once, and wait until they are gone."""
    family: set[psutil.Process] = set()
    while found := set(families(pids)) - family:
        family |= found
        for member in found:  # one that is stopped starts no other, so no child is missed
            with contextlib.suppress(psutil.NoSuchProcess):
                member.suspend()
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    _wait(list(family), STOP_TIMEOUT)


def families(pids: list[int]) -> list[psutil.Process]:
    """Return the processes with these ids that are there, each with all its descendants."""
    family = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(pid)
            family += [parent, *parent.children(recursive=True)]
    return family


def _wait(family: list[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Wait until processes are gone, and return those that are not."""
    end_ = time.monotonic() + timeout
    alive = [member for member in family if _alive(member)]
    while alive and time.monotonic() < end_:
        time.sleep(0.02)
        alive = [member for member in alive if _alive(member)]
    return alive


def _alive(process: psutil.Process) -> bool:
    # What has ended stays in the table until its parent asks for it; a container's first process may never do so.
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_healthy(
    process: "subprocess.Popen[bytes]", address: str, log: Path, authority: Path | None = None, answer: int = 200
) -> None:
    """Wait until the SuperLink at host:port answers, by TLS if a certificate authority's file is given.

    It is on this machine, so no proxy is asked. `answer` is the status with which it does: a SuperLink is asked for
    its health (200), which its front does not tell (404).

    Raises
    ------
    RunFailed
        It ended, or did not answer within `START_TIMEOUT` seconds; with the cause by its log.
    """
    scheme, context = ("http", None) if authority is None else ("https", ssl.create_default_context(cafile=authority))
    if context is not None:
        context.check_hostname = False  # it may listen at an address that nodes never see
    handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    opener = urllib.request.build_opener(*handlers)
    end_ = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end_ and process.poll() is None:
        try:
            with opener.open(f"{scheme}://{address}/health", timeout=1) as said:
                status = said.status
        except urllib.error.HTTPError as error:
            status = error.code
        except OSError:
            status = 0
        if status == answer:
            return
        time.sleep(0.05)
    how = f"within {START_TIMEOUT:g} s" if process.poll() is None else f"(exit code {process.poll()})"
    raise RunFailed(
        f"the SuperLink did not start at {address} {how}: {cause_in_log(words_of(log)) or 'it said nothing'}"
    )


def words_of(log: Path, begin: int = 0) -> str:
    """Return what a log says after its first `begin` bytes, without colours."""
    with log.open("rb") as file:
        file.seek(begin)
        return re.sub(r"\x1b\[[\d;]*m", "", file.read().decode(errors="replace"))


def cause_in_log(text: str) -> str:
    """Return why a process failed, in one line, by what it said: the exception that began the last traceback.

    An exception that was raised from another one is that other one's wrapper. Without a traceback it is the last line
    that was logged as an error, else the last line; "" if nothing was said.
    """
    said = list(_EXCEPTION.finditer(text))
    while len(said) > 1 and _FROM in text[said[-2].end() : said[-1].start()]:
        said.pop()
    if said:
        return in_a_line(said[-1].group(1).strip())
    if framed := _FRAME.findall(text):
        return in_a_line(" ".join(framed[-1].replace("\u2502", " ").split()))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line) and "Exit Code" not in line]
    return in_a_line(_ERROR.sub("", (errors or lines or [""])[-1]))


def check_port(host: str, port: int, key: str) -> None:
    """Raise ConfigError if no process could listen at host:port now; it begins with `key`, which is what said so."""
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
