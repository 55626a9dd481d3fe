"""A federation of real processes: a SuperLink with TLS and node authentication, and authenticated SuperNodes.

Its folder holds the credentials (`credentials`), ``federation.json``, and a home for each process::

    superlink/  state.db superlink.log flwr/      flwr/ is FLWR_HOME
    nodes/<name>/  node.log flwr/ state/          state/: masks and personal models that outlive the process
    control/config.toml                           for `flwr ...` with FLWR_HOME=control

`ssfl federation up` has one process keep the SuperLink and all nodes on this machine alive (`keep`); on real hosts
`superlink` and `node` do that for one of them each.
"""

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ssfl_app import guard
from ssfl_app.engine.credentials import expires, make_authority, make_node, make_server
from ssfl_app.engine.keeper import Keeper, Service
from ssfl_app.engine.processes import environment, wait_until_healthy
from ssfl_app.guard import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.results.files import write_atomically, write_json

CONNECTION = "federation"
"""Name of the SuperLink in Flower's config.toml."""

_COMMAND_TIMEOUT = 120.0
ASK_AGAIN = 1.0  # seconds between two questions who is online: each is a process of its own


@dataclass(frozen=True)
class Node:
    """A SuperNode on this machine: its name, Flower's ``--node-config``, and its own port."""

    name: str
    config: str
    port: int


@dataclass(frozen=True)
class Federation:
    """What ``federation.json`` says: where the SuperLink listens, and which nodes run on this machine."""

    folder: Path
    host: str
    port: int
    nodes: tuple[Node, ...]

    @property
    def address(self) -> str:
        """Host and port under which the SuperLink is reached."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def state(self) -> Path:
        """What `Keeper` says of the processes on this machine."""
        return self.folder / "running.json"

    @property
    def lock(self) -> Path:
        """Locked while somebody keeps the processes alive."""
        return self.folder / ".lock"

    def flwr_home(self) -> Path:
        """Return an FLWR_HOME for commands that control the federation, made where the folder lies now."""
        home = self.folder / "control"
        home.mkdir(exist_ok=True)
        content = (
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{self.address}"\n'
            f'root-certificates = "{self.folder / "superlink" / "ca.crt"}"\n'
        )
        if not (home / "config.toml").exists() or (home / "config.toml").read_text() != content:
            write_atomically(home / "config.toml", lambda file: file.write_text(content))
        return home


def create(
    folder: Path, host: str, port: int, nodes: Mapping[str, str], ports: Iterable[int], valid: timedelta
) -> Federation:
    """Make the folder of a federation with all credentials.

    Parameters
    ----------
    folder : Path
        Absolute. Credentials that are there already stay.
    host, port : str, int
        Under which nodes and users reach the SuperLink.
    nodes : mapping of str to str
        Name of each node -> its ``--node-config``.
    ports : iterable of int
        A port of this machine for each node.
    valid : timedelta
        How long the SuperLink's certificate is valid.
    """
    made = tuple(Node(name, config, own) for (name, config), own in zip(nodes.items(), ports, strict=True))
    federation = Federation(folder, host, port, made)
    make_authority(folder)
    if not (folder / "superlink" / "server.key").exists():
        make_server(folder, list(dict.fromkeys([host, "localhost", "127.0.0.1", "::1"])), valid)
    for node in made:
        make_node(folder, node.name)
    content = {"host": host, "port": port, "nodes": [vars(node) for node in made]}
    write_json(folder / "federation.json", content)
    return federation


def read(folder: Path) -> Federation:
    """Return the federation in a folder.

    Raises
    ------
    ConfigError
        There is none.
    """
    try:
        content = json.loads((folder / "federation.json").read_text())
        nodes = tuple(Node(**node) for node in content["nodes"])
        return Federation(folder, content["host"], content["port"], nodes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--dir is {folder}; it is a folder that `ssfl federation up` or `init` made") from error


# ---- what runs ---------------------------------------------------------------------------------


def superlink_service(folder: Path, bind: str, port: int) -> Service:
    """Return the SuperLink: TLS, registered nodes only, and a database that survives it.

    Raises
    ------
    ConfigError
        Its certificate has expired.
    """
    home = folder / "superlink"
    check_certificate(folder)
    (home / "flwr").mkdir(parents=True, exist_ok=True)
    command = ["flower-superlink", "--host", bind, "--port", str(port), "--enable-supernode-auth"]
    command += ["--ssl-ca-certfile", str(home / "ca.crt"), "--ssl-certfile", str(home / "server.pem")]
    command += ["--ssl-keyfile", str(home / "server.key"), "--database", str(home / "state.db")]
    command += ["--disable-runtime-dependency-installation"]
    return Service("superlink", command, home, environment(home / "flwr"), home / "superlink.log")


def node_service(home: Path, superlink: str, config: str, port: int) -> Service:
    """Return a SuperNode whose credentials lie in `home`.

    Parameters
    ----------
    superlink : str
        Host and port of the SuperLink; its certificate must name that host.
    config : str
        Flower's ``--node-config``. ``state-path`` is added unless it is there.
    port : int
        For the node's own processes, on the loopback interface.
    """
    # Of its own: nodes that share an FLWR_HOME read each other's half-copied apps.
    (home / "flwr").mkdir(parents=True, exist_ok=True)
    if "state-path=" not in config:
        config = f"{config} state-path='{home / 'state'}'".strip()
    command = ["flower-supernode", "--superlink", superlink, "--root-certificates", str(home / "ca.crt")]
    command += ["--auth-supernode-private-key", str(home / "key"), "--node-config", config]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # A client computes with engine.threads; libraries must not start a thread a core beside them.
    variables = environment(home / "flwr", OMP_NUM_THREADS="1")
    return Service(home.name, command, home, variables, home / "node.log")


def keep(federation: Federation, bind: str, then: Callable[[], list[Service]]) -> None:
    """Keep the SuperLink and other services of this machine alive until SIGTERM or SIGINT.

    Parameters
    ----------
    bind : str
        Interface on which the SuperLink listens.
    then : callable
        Called when it listens; returns what else is to run.

    Raises
    ------
    ConfigError
        Somebody does so already, or the SuperLink's certificate has expired.
    RunFailed
        The SuperLink does not start.
    """
    first = superlink_service(federation.folder, bind, federation.port)
    lock = guard.take(federation.lock)
    if lock is None:
        raise ConfigError(f"--dir is {federation.folder}; its federation is up already")
    keeper = Keeper(federation.state)
    try:
        keeper.add([first])
        if first.process is not None:
            authority = federation.folder / "superlink" / "ca.crt"
            here = "127.0.0.1" if bind == "0.0.0.0" else bind
            wait_until_healthy(first.process, f"{here}:{federation.port}", first.log, authority)
        keeper.add(then())
        keeper.run()
    finally:
        keeper.close()
        lock.close()


def keep_all(federation: Federation) -> None:
    """Keep the SuperLink and all nodes on this machine alive, the nodes registered, until SIGTERM or SIGINT."""

    def nodes_of() -> list[Service]:
        register(federation, [node.name for node in federation.nodes])
        return [
            node_service(federation.folder / "nodes" / node.name, federation.address, node.config, node.port)
            for node in federation.nodes
        ]

    keep(federation, "127.0.0.1", nodes_of)


def keep_superlink(federation: Federation, bind: str) -> None:
    """Keep the SuperLink of a host alive until SIGTERM or SIGINT; it listens on the interface `bind`."""
    keep(federation, bind, list)


def keep_node(service: Service) -> None:
    """Keep the SuperNode of a host alive until SIGTERM or SIGINT."""
    keeper = Keeper(service.cwd / "running.json")
    try:
        keeper.add([service])
        keeper.run()
    finally:
        keeper.close()


# ---- what is asked of the SuperLink --------------------------------------------------------------


def control(federation: Federation, *words: str) -> Any:
    """Return what a command of Flower's `flwr` says as JSON.

    Raises
    ------
    RunFailed
        It failed; with what it said.
    """
    command = ["flwr", *words, CONNECTION, "--format", "json"]
    done = subprocess.run(
        command,
        env=environment(federation.flwr_home()),
        capture_output=True,
        text=True,
        timeout=_COMMAND_TIMEOUT,
        check=False,
        cwd=federation.folder,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {"success": False, "error-message": (done.stdout + done.stderr).strip()}
    if not answer.get("success"):
        raise RunFailed(f"{' '.join(command)}: {answer.get('error-message', done.stdout + done.stderr)}")
    return answer


def register(federation: Federation, names: Iterable[str]) -> None:
    """Register nodes' public keys with the SuperLink, unless that was done already."""
    for name in names:
        home = federation.folder / "nodes" / name
        mark = home / "registered.json"
        if not mark.exists():
            write_json(mark, control(federation, "supernode", "register", str(home / "key.pub")))


def nodes(federation: Federation) -> list[dict[str, Any]]:
    """Return what the SuperLink knows of its nodes, as ``flwr supernode list`` has it."""
    return list(control(federation, "supernode", "list")["nodes"])


def is_up(federation: Federation) -> bool:
    """Return whether somebody keeps the federation's processes alive."""
    if not federation.folder.exists():
        return False
    lock = guard.take(federation.lock)
    if lock is not None:
        lock.close()
    return lock is None


def wait_until_online(federation: Federation, timeout: float, say: Callable[[str], None]) -> None:
    """Wait until all nodes of this machine are online.

    Raises
    ------
    RunFailed
        Some are not within `timeout` seconds, or nobody keeps the federation alive any more.
    """
    end, said = time.monotonic() + timeout, -1
    while True:
        if not is_up(federation):
            raise RunFailed(f"the federation ended; see {federation.folder / 'keeper.log'}")
        online = 0
        with contextlib.suppress(RunFailed):  # its SuperLink does not listen yet
            online = sum(node["status"] == "online" for node in nodes(federation))
        if online != said:
            say(f"{online} of {len(federation.nodes)} nodes are online")
            said = online
        if online >= len(federation.nodes):
            return
        if time.monotonic() > end:
            raise RunFailed(
                f"{online} of {len(federation.nodes)} nodes are online after {timeout:g} s; see node.log in "
                f"{federation.folder / 'nodes'}"
            )
        time.sleep(ASK_AGAIN)


def check_certificate(folder: Path) -> None:
    """Raise ConfigError if the SuperLink's certificate has expired: every node would refuse it."""
    ends = expires(folder)
    if ends <= datetime.now(UTC):
        raise ConfigError(
            f"the SuperLink's certificate ended on {ends:%Y-%m-%d %H:%M} UTC; make another one: "
            f"ssfl federation certificate --dir {folder}"
        )
