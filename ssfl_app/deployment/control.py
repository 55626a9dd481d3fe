"""Asks a federation's SuperLink to register nodes and who is online, by Flower's own command `flwr`."""

import contextlib
import json
import subprocess
import time
from collections.abc import Callable
from typing import Any

from flwr.common.config import parse_config_args

from ssfl_app import locks
from ssfl_app.deployment.federation import CONNECTION, Federation
from ssfl_app.files import write_json
from ssfl_app.locks import RunFailed
from ssfl_app.simulation.processes import environment

_COMMAND_TIMEOUT = 120.0
ASK_AGAIN = 1.0  # seconds between two questions who is online: each is a process of its own


def control(federation: Federation, *words: str) -> Any:
    """Return what a command of Flower's `flwr` says as JSON; RunFailed: it failed, with what it said."""
    command = ["flwr", *words, CONNECTION, "--format", "json"]
    where: dict[str, Any] = {"env": environment(federation.flwr_home()), "cwd": federation.folder}
    done = subprocess.run(
        command, **where, capture_output=True, encoding="utf-8", timeout=_COMMAND_TIMEOUT, check=False
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {"success": False, "error-message": (done.stdout + done.stderr).strip()}
    if not answer.get("success"):
        raise RunFailed(f"{' '.join(command)}: {answer.get('error-message', done.stdout + done.stderr)}")
    return answer


def register(federation: Federation) -> None:
    """Register the nodes' public keys with the SuperLink, unless that was done already, and write who is who.

    A node's client in a run is its name, for a site with data of its own, and its partition of a shared data set, if
    `ssfl federation up` gave it one. RunFailed: the SuperLink refuses a key, or does not answer.
    """
    names: dict[str, int] = {}
    numbers: dict[str, int] = {}
    for node in federation.nodes:
        home = federation.folder / "nodes" / node.name
        mark = home / "registered.json"
        if not mark.exists():
            write_json(mark, control(federation, "supernode", "register", str(home / "key.pub")))
        names[node.name] = int(node_id(federation, node.name))
        partition = parse_config_args([node.config]).get("partition-id")
        if partition is not None:
            numbers[str(partition)] = names[node.name]
    write_json(federation.registered, {"names": names, "numbers": numbers})


def node_id(federation: Federation, name: str) -> str:
    """Return the id that the SuperLink gave a node when it was registered, "" before."""
    try:
        return str(json.loads((federation.folder / "nodes" / name / "registered.json").read_bytes())["node-id"])
    except (OSError, ValueError, KeyError):
        return ""


def nodes(federation: Federation) -> list[dict[str, Any]]:
    """Return what the SuperLink knows of its nodes, as ``flwr supernode list`` has it."""
    return list(control(federation, "supernode", "list")["nodes"])


def is_up(federation: Federation) -> bool:
    """Return whether somebody keeps the federation's processes alive."""
    if not federation.folder.exists():
        return False
    lock = locks.try_lock(federation.lock)
    if lock is not None:
        lock.close()
    return lock is None


def wait_until_online(federation: Federation, timeout: float, say: Callable[[str], None]) -> None:
    """Wait until all nodes of this machine are online.

    RunFailed: some are not within `timeout` seconds, or nobody keeps the federation alive any more.
    """
    end, said = time.monotonic() + timeout, -1
    while True:
        if not is_up(federation):
            raise RunFailed(f"the federation ended; see {federation.folder / 'keeper.log'}")
        online = 0
        with contextlib.suppress(RunFailed):  # its SuperLink does not listen yet
            online = sum(node["status"] == "online" for node in nodes(federation))
        stand = f"{online} of {len(federation.nodes)} nodes are online"
        if online != said:
            say(stand if online >= len(federation.nodes) else f"waiting: {stand}")
            said = online
        if online >= len(federation.nodes):
            return
        if time.monotonic() > end:
            raise RunFailed(f"{stand} after {timeout:g} s; see node.log in {federation.folder / 'nodes'}")
        time.sleep(ASK_AGAIN)
