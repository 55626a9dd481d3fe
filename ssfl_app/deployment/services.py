"""Describes the processes of a federation and starts them under a supervisor.

`ssfl federation up` has one process keep the SuperLink, its front and all nodes of this machine alive (`keep_all`);
on hosts `superlink` does that for the first two, and `node` for a node.
"""

import shlex
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from click import ClickException
from flwr.common.config import parse_config_args

from ssfl_app import locks
from ssfl_app.comm.node_config import check_name
from ssfl_app.deployment.control import register
from ssfl_app.deployment.credentials import check_host, expires, private
from ssfl_app.deployment.federation import Federation
from ssfl_app.deployment.supervisor import Service, Supervisor
from ssfl_app.options import ConfigError
from ssfl_app.privacy.keys import KEY_FILE, fingerprint, load_or_make, read_pins
from ssfl_app.simulation.processes import LOOPBACK, check_port, environment, proxies, wait_until_healthy

GIVES_UP = "Giving up reconnection"
"""What a SuperNode of Flower 1.41 says when it meets a bad certificate in a run: it stays, and does nothing more."""

REST = "SSFL_NODE_REST"
"""Environment variable of a node: seconds between two looks for a message at most, while there is nothing to do."""


def check_certificate(folder: Path) -> None:
    """Raise ConfigError if the SuperLink's certificate has expired: every node would refuse it."""
    ends = expires(folder)
    if ends <= datetime.now(UTC):
        raise ConfigError(
            f"the SuperLink's certificate ended on {ends:%Y-%m-%d %H:%M} UTC; make another one: "
            f"ssfl federation certificate --dir {shlex.quote(str(folder))}"
        )


def superlink_service(federation: Federation) -> Service:
    """Return the SuperLink: on loopback, registered nodes only, and a database that survives it.

    With TLS also there: Flower checks nodes' keys under TLS only. ConfigError: its certificate has expired.
    """
    home = private(federation.folder / "superlink")
    check_certificate(federation.folder)
    private(home / "flwr")
    command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(federation.control_port)]
    command += ["--enable-supernode-auth"]
    command += ["--ssl-ca-certfile", str(home / "ca.crt"), "--ssl-certfile", str(home / "server.pem")]
    command += ["--ssl-keyfile", str(home / "server.key"), "--database", str(home / "state.db")]
    command += ["--disable-runtime-dependency-installation"]
    # The ServerApp, a descendant, reads there which node is which client.
    variables = environment(home / "flwr", **{locks.REGISTERED: str(federation.registered)})
    return Service("superlink", command, home, variables, home / "superlink.log")


def front_service(federation: Federation, bind: str) -> Service:
    """Return the front that nodes reach on the interface `bind`."""
    home = federation.folder / "superlink"
    command = ["python", "-P", "-m", "ssfl_app", "federation", "front", "--dir", str(federation.folder)]
    return Service("front", [*command, "--bind", bind], home, environment(home / "flwr"), home / "front.log")


def node_service(
    home: Path,
    superlink: str,
    config: str,
    port: int,
    pins: Path | None = None,
    secure_only: bool = False,
    least_clients: int = 0,
    rest: float = 0.0,
) -> Service:
    """Return a SuperNode whose credentials lie in `home`; the key that it masks its answers with is made.

    `superlink` is HOST:PORT, and its certificate must name that host; `config` is Flower's ``--node-config``, which
    gets a ``state-path`` unless it has one; `port` is for the node's own processes, on the loopback interface. With
    nothing to do the node waits up to `rest` seconds, or Flower's 3, before it asks for a message again.

    Raises
    ------
    ConfigError
        The address cannot be one, or a name in `config`.
    """
    host, _, number = superlink.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    check_host(host, f"--superlink {superlink!r}: host")
    if not (number.isascii() and number.isdigit() and 0 < int(number) < 2**16):
        raise ConfigError(f"--superlink is {superlink!r}; it is HOST:PORT, the port from 1 to 65535")
    said = check_config(config)
    # Of its own: nodes that share an FLWR_HOME read each other's half-copied apps.
    private(home)
    private(home / "flwr")
    state = Path(str(said.get("state-path", home / "state")))
    if "state-path" not in said:
        config = f"{config} state-path='{state}'".strip()
    masking_key(state)
    if pins is not None:
        read_pins(pins)  # before it is needed
        config = f"{config} pins='{pins}'"
    config += " secure-only=true" * secure_only + f" least-clients={least_clients}" * bool(least_clients)
    check_config(config)  # what both say would be there twice
    command = ["python", "-P", "-m", "ssfl_app.deployment.supernode", "--superlink", superlink]
    command += ["--root-certificates", str(home / "ca.crt")]
    command += ["--auth-supernode-private-key", str(home / "key"), "--node-config", config]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # A client computes with engine.threads; libraries must not start a thread a core beside them.
    beyond = {} if host in LOOPBACK else proxies()
    variables = environment(home / "flwr", OMP_NUM_THREADS="1", **{REST: str(rest)} if rest else {}, **beyond)
    return Service(home.name, command, home, variables, home / "node.log", GIVES_UP)


def masking_key(state: Path) -> str:
    """Return the fingerprint of the key with which a node masks its answers; it is made if there is none."""
    return fingerprint(load_or_make(state / KEY_FILE).public)


def check_config(config: str) -> dict[str, Any]:
    """Return what a ``--node-config`` says; ConfigError: Flower would not read it, or no site may be called that."""
    try:
        said = parse_config_args([config])
    except (ClickException, ValueError, OSError) as error:
        raise ConfigError(f"--node-config is {config!r}; it is \"name='a' data-path='/data/a'\", say") from error
    if "name" in said:
        check_name(said["name"], "name", " in --node-config")
    return said


def keep(federation: Federation, bind: str, then: Callable[[], list[Service]]) -> None:
    """Keep the SuperLink, its front and other services of this machine alive until SIGTERM or SIGINT.

    Nodes reach the front on the interface `bind`; when both listen, `then` is called and returns what else is to run.

    Raises
    ------
    ConfigError
        Somebody does so already, the SuperLink's certificate has expired, or a port is in use.
    RunFailed
        The SuperLink or its front does not start.
    """
    first, front = superlink_service(federation), front_service(federation, check_host(bind, "--bind"))
    lock = locks.try_lock(federation.lock)
    if lock is None:
        raise ConfigError(f"--dir is {federation.folder}; its federation is up already")
    with lock, closing(Supervisor(federation.state)) as supervisor:
        check_port("127.0.0.1", federation.control_port, "the control port")
        check_port(bind, federation.port, "the port for nodes")
        authority = federation.folder / "superlink" / "ca.crt"
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)
        here = f"[{here}]" if ":" in here else here
        addresses = federation.control_address, f"{here}:{federation.port}"
        for service, address, answer in zip((first, front), addresses, (200, 404), strict=True):
            supervisor.add([service])
            if service.process is not None:
                wait_until_healthy(service.process, address, service.log, authority, answer)
        supervisor.add(then())
        supervisor.run()


def keep_all(federation: Federation) -> None:
    """Keep the SuperLink and all nodes on this machine alive, the nodes registered, until SIGTERM or SIGINT."""

    def nodes_of() -> list[Service]:
        register(federation)
        return [
            node_service(federation.folder / "nodes" / node.name, federation.address, node.config, node.port)
            for node in federation.nodes
        ]

    keep(federation, "127.0.0.1", nodes_of)


def keep_node(service: Service) -> None:
    """Keep the SuperNode of a host alive until SIGTERM or SIGINT."""
    with closing(Supervisor(service.cwd / "running.json")) as supervisor:
        supervisor.add([service])
        supervisor.run()
