"""The processes of a federation, and who keeps them alive.

`ssfl federation up` has one process keep the SuperLink and all nodes of this machine alive (`keep_all`); on hosts
`superlink` and `node` do that for one of them each.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from ssfl_app import guard
from ssfl_app.engine.credentials import expires
from ssfl_app.engine.federation import Federation
from ssfl_app.engine.federation_control import register
from ssfl_app.engine.keeper import Keeper, Service
from ssfl_app.engine.processes import environment, wait_until_healthy
from ssfl_app.options import ConfigError

GIVES_UP = "Giving up reconnection"
"""What a SuperNode of Flower 1.41 says when it meets a bad certificate in a run: it stays, and does nothing more."""


def check_certificate(folder: Path) -> None:
    """Raise ConfigError if the SuperLink's certificate has expired: every node would refuse it."""
    ends = expires(folder)
    if ends <= datetime.now(UTC):
        raise ConfigError(
            f"the SuperLink's certificate ended on {ends:%Y-%m-%d %H:%M} UTC; make another one: "
            f"ssfl federation certificate --dir {folder}"
        )


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
    return Service(home.name, command, home, variables, home / "node.log", GIVES_UP)


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
