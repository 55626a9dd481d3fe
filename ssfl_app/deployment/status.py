"""Reports how a federation on this machine stands, and ends it."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import psutil

from ssfl_app.deployment.control import is_up, node_id, nodes
from ssfl_app.deployment.federation import SERVICES, Federation
from ssfl_app.locks import RunFailed
from ssfl_app.privacy.keys import KEY_FILE, fingerprint, load_or_make
from ssfl_app.results.table import NONE, Table
from ssfl_app.simulation.processes import STOP_TIMEOUT, end_families, families, words_of


def services(federation: Federation) -> dict[str, dict[str, Any]]:
    """Return what the supervisor says of each service: its process id, None while it is down, and its restarts."""
    try:
        return dict(json.loads(federation.state.read_bytes())["services"])
    except (OSError, ValueError, KeyError):
        return {}


def overview(federation: Federation) -> tuple[str, Table, bool | None]:
    """Return a title, a table of processes and nodes, and whether all are well; None: nothing is running."""
    up, known = is_up(federation), services(federation)
    online: dict[str, str] = {}
    if up:
        try:
            online = {node["node-id"]: node["status"] for node in nodes(federation)}
        except RunFailed as error:
            online = {"": str(error)}
    stands, rows = [], []
    for name, config in [*((name, "") for name in SERVICES), *((n.name, n.config) for n in federation.nodes)]:
        service = known.get(name, {}) if up else {}
        seen = "" if name in SERVICES else online.get(node_id(federation, name), "unknown")
        if seen and not up:
            seen = "not running"
        elif seen not in ("", "online"):
            seen = ": ".join(filter(None, [seen, complaint(federation.folder / "nodes" / name / "node.log")]))
        stands.append(seen == "online" or (name in SERVICES and bool(service.get("pid"))))
        key = "" if name in SERVICES else masking_key(federation.folder / "nodes" / name / "state")
        rows.append([name, str(service.get("pid") or NONE), str(service.get("restarts", NONE)), seen, key, config])
    title = f"{federation.folder}: {'up' if up else 'not running'}, SuperLink at {federation.address}"
    table = Table(["service", "process", "restarts", "as the SuperLink sees it", "masking key", "node-config"], rows)
    return title, table, all(stands) if up else None


def masking_key(state: Path) -> str:
    """Return the fingerprint of the key with which a node masks its answers, "" if there is none yet."""
    path = state / KEY_FILE
    return fingerprint(load_or_make(path).public) if path.exists() else ""


def complaint(log: Path) -> str:
    """Return the last line of a node's log that says why it is not let in, "" if there is none."""
    if not log.exists():
        return ""
    why = re.compile(r"\[code: |CERTIFICATE|Connection attempt failed")
    found = [line.strip() for line in words_of(log).splitlines()[-200:] if why.search(line)]
    return found[-1][:160] if found else ""


def stop(federation: Federation) -> int:
    """End the supervisor and all it started, and what a killed one left; return how many processes that were."""
    before = _members(federation)
    supervisors = [p for p in before if "keep" in _words(p)]
    for supervisor in supervisors:
        supervisor.terminate()
    psutil.wait_procs(supervisors, 2 * STOP_TIMEOUT)
    # All other processes' command lines name a file of this folder, or descend from one that does.
    end_families([process.pid for process in _members(federation)])
    end = time.monotonic() + STOP_TIMEOUT
    while is_up(federation) and time.monotonic() < end:
        time.sleep(0.1)
    federation.state.unlink(missing_ok=True)
    return len(before)


def _members(federation: Federation) -> list[psutil.Process]:
    """Return the processes of this federation: those of Flower and of the supervisor, and their descendants."""
    found: dict[int, psutil.Process] = {}
    home = str(federation.folder)
    for process in psutil.process_iter():
        words = _words(process)
        ours = any(word == home or word.startswith(home + os.sep) for word in words)
        supervisor = "ssfl_app" in words and not {"keep", "front"}.isdisjoint(words)
        known = supervisor or "ssfl_app.deployment.supernode" in words
        known = known or any(Path(word).name == "flower-superlink" for word in words[:2])
        if ours and known and process.pid != os.getpid():
            found |= {member.pid: member for member in families([process.pid])}
    return list(found.values())


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
