"""A federation of real processes: a SuperLink with TLS and node authentication, and authenticated SuperNodes.

Its folder, which is its account's alone, holds the credentials (`credentials`), ``federation.json``, and a home for
each process::

    superlink/  state.db superlink.log flwr/      flwr/ is FLWR_HOME
    superlink/  front.log                         of the front (`front`) that nodes reach
    nodes/<name>/  node.log flwr/ state/          state/: masks and personal models that outlive the process
    control/config.toml                           for `flwr ...` with FLWR_HOME=control
    registered.json                               which node is which client in a run

`services` runs the processes, `control` asks the SuperLink, `run` plays a run on it, `status` shows how it stands.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import tomli_w

from ssfl_app.comm.node_config import check_name
from ssfl_app.deployment.credentials import check_host, is_for, make_authority, make_node, make_server, private
from ssfl_app.files import write_bytes, write_json
from ssfl_app.options import ConfigError

CONNECTION = "federation"
"""Name of the SuperLink in Flower's config.toml."""

VALID = timedelta(days=365)
"""How long a SuperLink's certificate is valid unless somebody says otherwise."""

SERVICES = ("superlink", "front")
"""What the supervisor runs beside the nodes; no node is called that."""


@dataclass(frozen=True)
class Node:
    """A SuperNode on this machine: its name, Flower's ``--node-config``, and its own port."""

    name: str
    config: str
    port: int


@dataclass(frozen=True)
class Federation:
    """What ``federation.json`` says: where the SuperLink is reached, and which nodes there are.

    `port` is the front's, for nodes; `control_port` is Flower's own, which listens on 127.0.0.1 only.
    """

    folder: Path
    host: str
    port: int
    control_port: int
    nodes: tuple[Node, ...]

    @property
    def address(self) -> str:
        """Host and port under which nodes reach the SuperLink."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def control_address(self) -> str:
        """Host and port under which this machine, and no other, controls the SuperLink."""
        return f"127.0.0.1:{self.control_port}"

    @property
    def registered(self) -> Path:
        """Which node is which client in a run; `control.register` writes it, the ServerApp reads it."""
        return self.folder / "registered.json"

    @property
    def state(self) -> Path:
        """What `Supervisor` says of the processes on this machine."""
        return self.folder / "running.json"

    @property
    def lock(self) -> Path:
        """Locked while somebody keeps the processes alive."""
        return self.folder / ".lock"

    def flwr_home(self) -> Path:
        """Return an FLWR_HOME for commands that control the federation, made where the folder lies now."""
        home = private(self.folder / "control")
        authority = str(self.folder / "superlink" / "ca.crt")
        superlink = {"address": self.control_address, "root-certificates": authority}
        content = tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: superlink}}).encode()
        if not (home / "config.toml").exists() or (home / "config.toml").read_bytes() != content:
            write_bytes(home / "config.toml", content)
        return home


def create(
    folder: Path,
    host: str,
    ports: tuple[int, int],
    nodes: Mapping[str, str],
    node_ports: Iterable[int],
    valid: timedelta | None,
) -> Federation:
    """Make the folder of a federation with all credentials, or give one that is there these values.

    Parameters
    ----------
    folder : Path
        Absolute. The authority and keys of nodes that are there stay; so does the certificate if it is for this host
        and `valid`.
    ports : tuple of int
        For nodes, and Flower's own.
    nodes, node_ports : mapping of str to str, iterable of int
        Name of each node -> its ``--node-config``, and a port of this machine for each.
    valid : timedelta or None
        How long the SuperLink's certificate is valid; None: `VALID`, and one that is there for this host stays.

    Raises
    ------
    ConfigError
        A name or the host cannot be one, or the authority's key is elsewhere; nothing was written.
    """
    check_host(host, "--host")
    named = zip(nodes.items(), node_ports, strict=True)
    made = tuple(Node(_node_name(name, "the name of a node"), config, own) for (name, config), own in named)
    federation = Federation(folder, host, *ports, made)
    hosts, new = list(dict.fromkeys([host, "localhost", "127.0.0.1", "::1"])), not folder.exists()
    try:
        if not is_for(folder, hosts, valid):
            make_authority(folder)
            make_server(folder, hosts, valid or VALID)
        for node in made:
            make_node(folder, node.name)
        write(federation)
    except BaseException:
        if new:  # nothing half-made stays
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return federation


def write(federation: Federation) -> None:
    """Write ``federation.json``."""
    content = {key: getattr(federation, key) for key in ("host", "port", "control_port")}
    write_json(federation.folder / "federation.json", content | {"nodes": [vars(node) for node in federation.nodes]})


def _node_name(name: object, key: str) -> str:
    if name in SERVICES:
        raise ConfigError(f"{key} is {name!r}; {' and '.join(SERVICES)} are names of the SuperLink's own processes")
    return check_name(name, key)


def read(folder: Path) -> Federation:
    """Return the federation in a folder; ConfigError: there is none, or not one that `create` would have made."""
    path = folder / "federation.json"
    try:
        content = json.loads(path.read_bytes())
        nodes = tuple(Node(**node) for node in content["nodes"])
        found = Federation(folder, content["host"], content["port"], content["control_port"], nodes)
    except KeyError as error:
        raise ConfigError(f"{path} has no {error}; `ssfl federation up` and `init` write it") from error
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--dir is {folder}; it is a folder that `ssfl federation up` or `init` made") from error
    check_host(found.host, f"host in {path}")
    for node in nodes:
        _node_name(node.name, f"name in {path}")
    return found
