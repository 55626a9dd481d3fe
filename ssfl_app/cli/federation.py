"""`ssfl federation`: real SuperNodes, all on one machine for trying, or one process a host."""

import os
import shlex
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from ssfl_app.cli.arguments import ConfigFile, Out, Override, Resume
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.registry import import_from
from ssfl_app.text import tell

if TYPE_CHECKING:
    from ssfl_app.deployment.federation import Federation

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _folder(path: Path, key: str = "--dir") -> Path:
    """Return the folder of a federation or node, absolute; it will stand in Flower's --node-config."""
    home = path.expanduser().resolve()
    if not _quotable(home):
        raise ConfigError(f"{key} is {str(home)!r}; it is a folder without {_UNQUOTABLE}")
    return home


def _quotable(path: Path) -> bool:
    return "'" not in str(path) and str(path).isprintable()


def _read(folder: Path) -> "Federation":
    from ssfl_app.deployment.federation import read

    return read(_folder(folder))


_UNQUOTABLE = "a quote or a control character in its path"


Folder = Annotated[Path, Option("--dir", help="Folder of the federation: credentials, database, logs.")]
Port = Annotated[int, Option(help="Of the SuperLink, for nodes.", min=1, max=65535)]
ControlPort = Annotated[int, Option(help="Of Flower itself, on 127.0.0.1 only.", min=1, max=65535)]
DEFAULT = Path("federation")
ONLINE_TIMEOUT = 150.0  # seconds; Flower refuses a node for a minute after it ended without signing off
Days = Annotated[
    int | None, Option(help="How long the SuperLink's certificate is valid.", show_default="365", min=1, max=36500)
]
Sites = Annotated[
    list[str] | None, Option(help="A node with its own data, NAME=FOLDER; once a node, instead of --nodes.")
]


@app.callback()
def private(context: typer.Context) -> None:
    """Whatever these commands and the processes they start write is their account's alone."""
    before = os.umask(0o077)
    context.call_on_close(lambda: os.umask(before))


@app.command()
def up(
    nodes: Annotated[
        int | None, Option(help="SuperNodes; node i holds partition i of the data set.", show_default="5", min=1)
    ] = None,
    site: Sites = None,
    port: Annotated[int, Option(help="For nodes, on 127.0.0.1. 0: a free one.", min=0, max=65535)] = 0,
    folder: Folder = DEFAULT,
    days: Days = None,
) -> None:
    """Start a SuperLink and authenticated SuperNodes on this machine, and keep them alive in the background."""
    from ssfl_app.deployment.control import is_up, wait_until_online
    from ssfl_app.deployment.credentials import expires
    from ssfl_app.deployment.federation import create
    from ssfl_app.deployment.services import check_certificate
    from ssfl_app.simulation.processes import check_port, free_port, spawn

    home = _folder(folder)
    if site and nodes is not None:
        raise ConfigError(f"--nodes is {nodes}; beside --site there is none: each --site is a node")
    # Whoever starts runs here is who started these nodes: they may read the data set where the run says it lies.
    parts = f"num-partitions={nodes or 5} server-data-path=true"
    names = _sites(site) if site else {f"node-{i}": f"partition-id={i} {parts}" for i in range(nodes or 5)}
    there = _read(folder) if (home / "federation.json").exists() else None
    if there is not None:
        known = {node.name: node.config for node in there.nodes}
        if known != names:
            has = f"its federation has the nodes {', '.join(known)}"
            raise ConfigError(f"--dir is {home}; {has}: ask for those, or name another folder")
        if is_up(there):
            raise ConfigError(f"--dir is {home}; its federation is up already")
        if days is None:
            check_certificate(home)
        port = port or there.port
    if port:
        check_port("127.0.0.1", port, "--port")
    # All but that one are chosen anew each time: those of last time may be another's by now.
    ports = [free_port() for _ in names]
    federation = create(home, "127.0.0.1", (port or free_port(), free_port()), names, ports, _valid(days))
    keep = ["python", "-P", "-m", "ssfl_app", "federation", "keep", "--dir", str(home)]
    process = spawn(keep, home, dict(os.environ), home / "keeper.log")
    while not is_up(federation) and process.poll() is None:
        time.sleep(0.1)
    try:
        wait_until_online(federation, ONLINE_TIMEOUT, typer.echo)
    except RunFailed as error:
        print(f"ssfl: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    typer.echo(f"up: SuperLink at {federation.address}, its certificate ends on {expires(home):%Y-%m-%d}")
    where = "" if folder == DEFAULT else f" --dir {shlex.quote(str(folder))}"
    typer.echo(f"next: ssfl federation run{where}")


def _valid(days: int | None) -> timedelta | None:
    return None if days is None else timedelta(days=days)


def _sites(words: list[str]) -> dict[str, str]:
    from ssfl_app.comm.node_config import check_name

    sites: dict[str, str] = {}
    for word in words:
        name, _, path = word.partition("=")
        if not path:
            raise ConfigError(f"--site is {word!r}; it is NAME=FOLDER")
        check_name(name, f"--site is {word!r}; its name")
        data = Path(path).expanduser().resolve()
        if not _quotable(data) or not data.is_dir():
            rule = f"it is a folder that is there, without {_UNQUOTABLE}"
            raise ConfigError(f"--site is {word!r}; its folder is {str(data)!r}; {rule}")
        if name in sites:
            raise ConfigError(f"--site is {word!r}; another one has that name already")
        sites[name] = f"name='{name}' data-path='{data}'"
    return sites


@app.command()
def run(
    config: ConfigFile = None,
    override: Override = None,
    out: Out = None,
    resume: Resume = None,
    folder: Folder = DEFAULT,
    modules: Annotated[
        Path, typer.Option("--app", help="Folder of modules that the keys name; nodes get them.")
    ] = Path(),
) -> None:
    """Run a strategy on the nodes, as `ssfl run` does in simulation. Exit code: 0 finished, 1 failed, 2 bad input."""
    from ssfl_app.deployment.run import run_on
    from ssfl_app.simulation.command import Engine, RunArgs

    import_from(modules.resolve())
    run_on(_read(folder), RunArgs(config, override or [], None, Engine("deployment"), out, resume))


@app.command()
def status(folder: Folder = DEFAULT) -> None:
    """Show processes and nodes. Exit code: 0 all nodes online, 1 not all, 2 bad input, 3 nothing is running."""
    from ssfl_app.deployment.status import overview

    title, table, well = overview(_read(folder))
    tell(title)
    table.print()
    raise typer.Exit(3 if well is None else int(not well))  # as systemctl has it


@app.command()
def down(folder: Folder = DEFAULT) -> None:
    """Stop everything that `up` started; credentials, registrations and results stay."""
    from ssfl_app.deployment.status import stop

    typer.echo(f"ended {stop(_read(folder))} processes")


@app.command(hidden=True)
def keep(folder: Folder = DEFAULT) -> None:
    """Keep the processes alive, in the foreground; `up` starts this."""
    from ssfl_app.deployment.services import keep_all

    keep_all(_read(folder))


@app.command(hidden=True)
def front(bind: Annotated[str, Option()], folder: Folder = DEFAULT) -> None:
    """Serve nodes in the foreground; the supervisor starts this beside the SuperLink."""
    from ssfl_app.deployment.front import serve

    federation = _read(folder)
    serve(federation.folder / "superlink", bind, federation.port, federation.control_port)


@app.command()
def init(
    host: Annotated[str, Option(help="Name or address under which nodes reach the SuperLink.")],
    name: Annotated[list[str], Option(help="Of a node; once for each.")],
    port: Port = 8000,
    control_port: ControlPort = 8001,
    folder: Folder = DEFAULT,
    days: Days = None,
) -> None:
    """Make the credentials for real hosts: a CA, the SuperLink's certificate, a key for each node."""
    from ssfl_app.deployment.federation import create

    home, names = _folder(folder), dict.fromkeys(name, "")
    if len(names) < len(name):
        twice = next(one for one in name if name.count(one) > 1)
        raise ConfigError(f"--name is {twice!r} more than once; each node has its own")
    if port == control_port:
        raise ConfigError(f"--control-port is {control_port}; it is another one than --port")
    create(home, host, (port, control_port), names, [9094] * len(names), _valid(days))
    typer.echo(
        f"SuperLink's host: copy {home} without ca/ca.key and nodes/*/key\n"
        f"nodes: copy {home / 'nodes'}/<name> to each; its file key is for it alone\n"
        f"keep {home / 'ca' / 'ca.key'} where only you can read it"
    )


@app.command()
def certificate(folder: Folder = DEFAULT, days: Days = None) -> None:
    """Make a new certificate for the SuperLink, for the same hosts; nodes need nothing new. Restart it afterwards."""
    from ssfl_app.deployment.credentials import expires, hosts_of, make_server
    from ssfl_app.deployment.federation import VALID

    home = _read(folder).folder
    if not (home / "ca" / "ca.key").is_file():
        raise ConfigError(f"--dir is {home}; it is a folder with ca/ca.key, which signs the certificate")
    make_server(home, hosts_of(home), _valid(days) or VALID)
    typer.echo(f"{home / 'superlink' / 'server.pem'} ends on {expires(home):%Y-%m-%d}: restart the SuperLink")


@app.command()
def superlink(
    bind: Annotated[str, Option(help="Interface on which nodes reach it.")] = "0.0.0.0", folder: Folder = DEFAULT
) -> None:
    """Run the SuperLink of this host in the foreground; it is started again when it ends."""
    from ssfl_app.deployment import services

    services.keep(_read(folder), bind, list)


@app.command()
def register(folder: Folder = DEFAULT) -> None:
    """Register the nodes' public keys with the running SuperLink; those registered already are left alone."""
    from ssfl_app.deployment.control import register

    federation = _read(folder)
    register(federation)
    typer.echo(f"registered: {', '.join(node.name for node in federation.nodes)}")


@app.command()
def node(
    home: Annotated[Path, Argument(metavar="DIR", help="The node's folder: ca.crt and key.")],
    superlink: Annotated[str, Option(help="HOST:PORT of the SuperLink.")],
    config: Annotated[str, Option("--node-config", help="\"name='a' data-path='/data/a'\" or partition-id=0.")],
    port: Annotated[int, Option(help="For the node's own processes, on 127.0.0.1.", min=1, max=65535)] = 9094,
    pin: Annotated[
        Path | None, Option(help="Fingerprints, a line each, of the only nodes that it masks its answers with.")
    ] = None,
    secure_only: Annotated[bool, Option("--secure-only", help="Take part in masked runs only.")] = False,
    least_clients: Annotated[int, Option(help="Likewise, and in sums of so many clients at least.", min=0)] = 0,
    rest: Annotated[
        float, Option(help="Seconds between two looks for work, at most, while there is none.", min=3, max=600)
    ] = 3.0,
) -> None:
    """Run the SuperNode of this host in the foreground; it is started again when it ends."""
    from ssfl_app.deployment.services import check_config, keep_node, masking_key, node_service

    folder = _folder(home, "DIR")
    if not (folder / "key").is_file() or not (folder / "ca.crt").is_file():
        raise ConfigError(f"DIR is {folder}; it is a folder with ca.crt and key, as `ssfl federation init` makes it")
    pins = None if pin is None else _folder(pin, "--pin")
    service = node_service(folder, superlink, config, port, pins, secure_only, least_clients, rest)
    state = check_config(config).get("state-path", folder / "state")
    typer.echo(f"fingerprint of this node's masking key: {masking_key(Path(str(state)))}")
    keep_node(service)
