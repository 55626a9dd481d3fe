"""The drills. Each breaks something and returns what came of it."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.drills.field import KEYS, NODES, Field, Run, federation, ssfl, until
from ssfl_app.deployment import credentials
from ssfl_app.deployment import federation as house
from ssfl_app.deployment.control import is_up, nodes
from ssfl_app.deployment.services import node_service
from ssfl_app.deployment.status import stop
from ssfl_app.locks import RunFailed
from ssfl_app.simulation.processes import end

VICTIM = "node-1"
SLACK = 90.0  # seconds that anything may wait beyond the round timeout
UPLOAD_SLACK = 5.0  # likewise, where nothing but an upload is slow


@dataclass
class Result:
    """A row of the table."""

    what: str
    end: str
    lost: list[str]
    refused: list[str]
    longest: float
    timeout: float
    accuracy: float | None
    same_bits: bool | None
    masks_again: int
    slack: float = SLACK

    @property
    def waited_too_long(self) -> bool:
        return self.longest > self.timeout + self.slack


def told(run: Run, what: str, ends: str, reference: dict[str, Any], timeout: float) -> Result:
    """Read the end of a run."""
    records = run.records
    failures: dict[str, list[str]] = {}
    for kind in ("lost", "refused"):
        failures[kind] = [
            f"{'discovery' if not r['round'] else 'round ' + str(r['round'])}, client {client}: {why}"
            for r in records
            for name in (kind, f"evaluate_{kind}")
            for client, why in r.get(name, {}).items()
        ]
    summary = run.summary  # empty if the run never got to its end
    masks = [r.get("bytes_mask_down", 0) for r in records]
    return Result(
        what,
        ends,
        failures["lost"],
        failures["refused"],
        max((r["seconds"] for r in records), default=0.0),
        timeout,
        summary.get("central_accuracy"),
        summary.get("model_sha256") == reference["model_sha256"],
        masks_again=sum(1 for later in masks[2:] if later),
    )


def finished(run: Run) -> str:
    code, errors = run.end()
    return "finished" if code == 0 else f"failed: {_first(errors)}"


def kill_in_discovery(work: Path, reference: dict[str, Any]) -> Result:
    """A SuperNode is killed (-9) while it scores weights."""
    with federation(work) as place:
        run = place.start(work / "run")
        run.wait_for("parameters")  # all have been greeted
        place.client_app(VICTIM)
        place.service(VICTIM).kill()
        return told(run, kill_in_discovery.__doc__ or "", finished(run), reference, KEYS["run.round-timeout"])


def kill_in_round(work: Path, reference: dict[str, Any]) -> Result:
    """A SuperNode is killed (-9) while it trains; it is started again at once."""
    with federation(work) as place:
        run = place.start(work / "run")
        run.wait_for("round 1/")
        place.client_app(VICTIM)
        place.service(VICTIM).kill()
        return told(run, kill_in_round.__doc__ or "", finished(run), reference, KEYS["run.round-timeout"])


def restart(work: Path, reference: dict[str, Any]) -> Result:
    """A SuperNode is stopped and started again in a round, and its memory is deleted: the mask is gone."""
    with federation(work) as place:
        run = place.start(work / "run")
        run.wait_for("round 1/")
        place.client_app(VICTIM)
        place.service(VICTIM).terminate()
        shutil.rmtree(place.folder / "nodes" / VICTIM / "state", ignore_errors=True)
        return told(run, restart.__doc__ or "", finished(run), reference, KEYS["run.round-timeout"])


def kill_client_app(work: Path, reference: dict[str, Any]) -> Result:
    """The ClientApp's process is killed (-9) while it trains."""
    with federation(work) as place:
        run = place.start(work / "run")
        run.wait_for("round 1/")
        place.client_app(VICTIM).kill()
        return told(run, kill_client_app.__doc__ or "", finished(run), reference, KEYS["run.round-timeout"])


def too_slow(work: Path, reference: dict[str, Any]) -> Result:
    """A client is slower than the round timeout of 40 s: its process stands still for 60 s."""
    with federation(work) as place:
        run = place.start(work / "run", run__round_timeout=40.0)
        run.wait_for("round 1/")
        client = place.client_app(VICTIM)
        client.suspend()
        time.sleep(60)
        client.resume()
        return told(run, too_slow.__doc__ or "", finished(run), reference, 40.0)


def upload_never_comes(work: Path, reference: dict[str, Any]) -> Result:
    """A node announces its reply and uploads nothing of it; round timeout 40 s."""
    return _slow_upload(work, reference, upload_never_comes.__doc__ or "", 1e9)


def upload_trickles(work: Path, reference: dict[str, Any]) -> Result:
    """A node uploads an object of its reply every 100 s; round timeout 40 s."""
    return _slow_upload(work, reference, upload_trickles.__doc__ or "", 100.0)


def _slow_upload(work: Path, reference: dict[str, Any], what: str, seconds: float) -> Result:
    pace, hook = work / "pace", str(Path(__file__).parent / "upload")
    path = os.pathsep.join(filter(None, (hook, os.environ.get("PYTHONPATH"))))
    with federation(work, DRILL_UPLOAD=str(pace), DRILL_VICTIM=VICTIM, PYTHONPATH=path) as place:
        run = place.start(work / "run", run__round_timeout=40.0)
        run.wait_for("round 1/")
        pace.write_text(str(seconds))
        run.wait_for("round 2/")
        pace.unlink()
        result = told(run, what, finished(run), reference, 40.0)
        # The round in which it is stuck: others hold an evaluation too, which has a timeout of its own.
        result.longest, result.slack = run.records[2]["seconds"], UPLOAD_SLACK
        return result


def superlink_killed(work: Path, reference: dict[str, Any]) -> Result:
    """The SuperLink is killed (-9) in a round and started again; the run is resumed."""
    with federation(work) as place:
        run = place.start(work / "run")
        run.wait_for("round 2/")
        place.client_app(VICTIM)
        began = time.monotonic()
        place.service("superlink").kill()
        code, errors = run.end()
        noticed = time.monotonic() - began
        place.nodes_online()
        again = place.resume(work / "run")
        ends = f"failed after {noticed:.0f} s ({_first(errors)}); resumed: {finished(again)}"
        if code != 1:
            ends = f"exit code {code} where 1 is due; {ends}"
        return told(again, superlink_killed.__doc__ or "", ends, reference, KEYS["run.round-timeout"])


def disk_full(work: Path, reference: dict[str, Any]) -> Result:
    """The disk is full when a checkpoint is written; the run is resumed when there is room again."""
    disk = work / "disk"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    try:
        with federation(work) as place:
            run = place.start(disk / "run")
            run.wait_for("round 2/")
            filler = disk / "filler"
            with filler.open("wb") as file:
                free = shutil.disk_usage(disk).free
                os.posix_fallocate(file.fileno(), 0, free - free % 4096)
            code, errors = run.end()
            filler.unlink()
            again = place.resume(disk / "run")
            ends = f"failed ({_first(errors)}); resumed: {finished(again)}"
            if code != 1:
                ends = f"exit code {code} where 1 is due; {ends}"
            return told(again, disk_full.__doc__ or "", ends, reference, KEYS["run.round-timeout"])
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def certificate_expires(work: Path, reference: dict[str, Any]) -> Result:
    """The SuperLink's certificate has expired; a new one is made, and the run is resumed."""
    with federation(work) as place:
        run = place.start(work / "run")
        run.wait_for("round 2/")
        # As after a restart of the host on the day after: the SuperLink comes back with what is now too old.
        credentials.make_server(place.folder, ["127.0.0.1", "localhost"], timedelta(hours=-1))
        place.service("superlink").kill()
        code, _ = run.end()
        until("the node says why", lambda: "expired" in place.log(VICTIM))
        said = next(line for line in place.log(VICTIM).splitlines() if "expired" in line).partition("[SSL")[2]
        credentials.make_server(place.folder, ["127.0.0.1", "localhost"], timedelta(days=365))
        place.service("superlink").terminate()
        until("all nodes are back", lambda: _online(place))
        again = place.resume(work / "run")
        ends = f"failed, exit code {code}; nodes: [SSL{said}; resumed: {finished(again)}"
        return told(again, certificate_expires.__doc__ or "", ends, reference, KEYS["run.round-timeout"])


def _online(place: Field, count: int = NODES) -> bool:
    try:
        return sum(node["status"] == "online" for node in nodes(place.federation)) == count
    except RunFailed:
        return False


def clock_off(work: Path, reference: dict[str, Any]) -> Result:
    """A node's clock is four minutes ahead; Flower allows five when it lets a node in."""
    with federation(work) as place, _with_clock(place, 240):
        run = place.start(work / "run")
        return told(run, clock_off.__doc__ or "", finished(run), reference, KEYS["run.round-timeout"])


@contextmanager
def _with_clock(place: Field, offset: int) -> Iterator[None]:
    """Start the federation again without the victim, and the victim beside it with another clock."""
    stop(place.federation)
    known = place.federation
    victim = next(node for node in known.nodes if node.name == VICTIM)
    rest = tuple(node for node in known.nodes if node != victim)
    house.write(replace(known, nodes=rest))
    place.federation = house.read(place.folder)
    keeper = subprocess.Popen(ssfl("federation", "keep", "--dir", str(place.folder)), stdout=subprocess.DEVNULL)
    until("the federation is up", lambda: is_up(place.federation))
    service = node_service(place.folder / "nodes" / VICTIM, known.address, victim.config, victim.port)
    service.variables |= other_clock(place.folder, offset)
    try:
        service.start()
        until("all nodes are online", lambda: _online(place, len(known.nodes)))
        yield
    finally:
        if service.process is not None:
            end(service.process)
        keeper.terminate()
        keeper.wait()


def other_clock(work: Path, seconds: int) -> dict[str, str]:
    """Return environment variables under which a process sees another time of day."""
    library = work / "clock.so"
    work.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(seconds)}


def _first(errors: str) -> str:
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[0].removeprefix("ssfl: ")[:300] if lines else "nothing said"


RUNS = (
    kill_in_discovery,
    kill_in_round,
    restart,
    kill_client_app,
    too_slow,
    upload_never_comes,
    upload_trickles,
    superlink_killed,
    disk_full,
    certificate_expires,
    clock_off,
)
