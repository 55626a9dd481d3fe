"""SuperNodes that have no business in the federation, and what they and the SuperLink say of it."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.drills.faults import other_clock
from benchmarks.drills.field import Field
from ssfl_app.deployment import credentials
from ssfl_app.simulation.processes import environment, free_port

SECONDS = 30.0


@dataclass
class Refusal:
    """A row of the second table."""

    who: str
    exit_code: int | None
    node_says: str
    superlink_says: str


def refusals(place: Field, work: Path) -> list[Refusal]:
    """Try to join a federation that is up, in five wrong ways."""
    stranger, other = work / "stranger", work / "other"
    credentials.make_authority(other)
    home = credentials.make_node(stranger, "stranger")
    authority = str(place.folder / "superlink" / "ca.crt")
    registered = place.folder / "nodes" / "node-1" / "key"
    tls, key = ["--root-certificates", authority], ["--auth-supernode-private-key", str(home / "key")]
    wrong = ["--root-certificates", str(other / "ca" / "ca.crt")]
    ours = ["--auth-supernode-private-key", str(registered)]
    return [
        _try(place, work, "a key that is not registered", [*tls, *key]),
        _try(place, work, "no key", tls),
        _try(place, work, "another certificate authority", [*wrong, *key]),
        _try(place, work, "no TLS", ["--insecure", "--max-retries", "3"]),
        _try(place, work, "a registered key, the clock ten minutes ahead", [*tls, *ours], other_clock(work, 600)),
    ]


def _try(place: Field, work: Path, who: str, words: list[str], more: dict[str, str] | None = None) -> Refusal:
    home = work / re.sub(r"\W+", "-", who)
    shutil.rmtree(home, ignore_errors=True)
    (home / "flwr").mkdir(parents=True)
    before = len(place.log("superlink"))
    command = [str(Path(sys.executable).parent / "flower-supernode"), "--superlink", place.federation.address]
    command += ["--host", "127.0.0.1", "--port", str(free_port()), *words]
    with (home / "log").open("wb") as log:
        variables = environment(home / "flwr") | (more or {})
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables)
    try:
        code: int | None = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        code = None
        for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            member.kill()
        process.wait()
    return Refusal(who, code, reason((home / "log").read_text()), reason(place.log("superlink")[before:]))


def reason(log: str) -> str:
    """Return the lines of a log that say what went wrong, without colours and keys."""
    plain = re.sub(r"\x1b\[\d+m", "", log)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    telling = r"\[code: |CERTIFICATE|Invalid HTTP|ApiError|refused|retr|Failed to init|40[13]|authentication"
    wanted = [line for line in lines if re.search(telling, line)]
    short = [re.sub(r"b'-----BEGIN.*?-----\\n'", "(key)", line) for line in wanted]
    return " / ".join(dict.fromkeys(re.sub(r"^(ERROR|WARNING|INFO) *: *", "", line)[:240] for line in short[-3:]))
