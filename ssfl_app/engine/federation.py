"""A federation of real processes: a SuperLink with TLS and node authentication, and authenticated SuperNodes.

Its folder holds the credentials (`credentials`), ``federation.json``, and a home for each process::

    superlink/  state.db superlink.log flwr/      flwr/ is FLWR_HOME
    nodes/<name>/  node.log flwr/ state/          state/: masks and personal models that outlive the process
    control/config.toml                           for `flwr ...` with FLWR_HOME=control

`federation_services` runs the processes, `federation_control` asks the SuperLink, `federation_run` plays a run on it,
`federation_status` shows how it stands.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from ssfl_app.engine.credentials import make_authority, make_node, make_server
from ssfl_app.files import write_atomically, write_json
from ssfl_app.options import ConfigError

CONNECTION = "federation"
"""Name of the SuperLink in Flower's config.toml."""


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
