"""The folder of a federation without its processes: who may read it, what may be written in it, who is who."""

import json
import os
import socket
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import parse_config_args

from ssfl_app import locks
from ssfl_app.cli.main import main
from ssfl_app.comm.node_config import read_node_config
from ssfl_app.deployment import control as federation_control
from ssfl_app.deployment import federation as house
from ssfl_app.deployment.control import register
from ssfl_app.deployment.credentials import check_host, expires, hosts_of
from ssfl_app.deployment.services import REST, front_service, node_service, superlink_service
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.server_app import bound_places
from ssfl_app.simulation.processes import free_port

Ssfl = Callable[..., tuple[int, str]]


@pytest.fixture
def ssfl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ssfl:
    """Return a function that runs `ssfl federation ...`; it returns the exit code and what was said."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ssfl", "federation", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out + err

    return run


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def made(tmp_path: Path, ssfl: Ssfl) -> house.Federation:
    """Return a federation of the nodes a and b, as for hosts."""
    folder = tmp_path / "made"
    assert ssfl("init", "--host", "hub.example", "--name", "a", "--name", "b", "--dir", str(folder))[0] == 0
    return house.read(folder)


# ---- who may read it ----------------------------------------------------------------------------


def test_a_federation_is_its_accounts_alone_whatever_the_umask_is(
    open_umask: None, tmp_path: Path, ssfl: Ssfl, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "made"
    monkeypatch.setattr(federation_control, "control", lambda federation, *words: {"node-id": "7"})
    assert ssfl("init", "--host", "hub.example", "--name", "a", "--dir", str(folder))[0] == 0
    assert ssfl("certificate", "--dir", str(folder))[0] == 0
    assert ssfl("register", "--dir", str(folder))[0] == 0
    federation = house.read(folder)
    superlink_service(federation)
    node_service(folder / "nodes" / "a", federation.address, "name='a' data-path='/a'", 9094)
    found = [folder, *folder.rglob("*")]
    assert {path.name for path in found} >= {"ca.key", "server.key", "key", "registered.json", "flwr"}
    # Before a process is started; the supervisor's are its children and have its umask, 077.
    for path in found:
        if path.is_dir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
        else:
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert os.umask(0) == 0  # and the shell's umask is as it was


def test_what_the_supervisor_starts_writes_for_its_account_alone(
    open_umask: None, made: house.Federation, ssfl: Ssfl, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for command, name in (("keep", "keep_all"), ("superlink", "keep")):
        monkeypatch.setattr(f"ssfl_app.deployment.services.{name}", lambda *words: seen.append(os.umask(0o077)))
        assert ssfl(command, "--dir", str(made.folder))[0] == 0
    node = str(made.folder / "nodes" / "a")
    monkeypatch.setattr("ssfl_app.deployment.services.keep_node", lambda *words: seen.append(os.umask(0o077)))
    assert ssfl("node", node, "--superlink", "hub.example:8000", "--node-config", "partition-id=0")[0] == 0
    assert seen == [0o077] * 3


# ---- names, hosts, paths ------------------------------------------------------------------------

NAMES = [
    "../x",
    "../../../traversed",
    "",
    ".",
    "..",
    "a/b",
    "a b",
    "a'b",
    'a"b',
    "a\nb",
    "-a",
    "x" * 65,
    "é",
    "front",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_none_is_refused_at_every_door(name: str, tmp_path: Path, ssfl: Ssfl) -> None:
    folder = tmp_path / "deep" / "down" / "made"
    code, said = ssfl("init", "--host", "hub.example", "--name", "a", f"--name={name}", "--dir", str(folder))
    assert (code, f"{name!r}; " in said) == (2, True)
    data = tmp_path / "data"
    data.mkdir()
    assert ssfl("up", f"--site={name}={data}", "--dir", str(folder))[0] == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["data"]  # nothing was written, here or above

    assert ssfl("init", "--host", "hub.example", "--name", "a", "--dir", str(folder))[0] == 0
    path = folder / "federation.json"
    written = json.loads(path.read_text())
    written["nodes"][0]["name"] = name
    path.write_text(json.dumps(written))
    for command in ("register", "status", "run", "superlink", "keep"):
        code, said = ssfl(command, "--dir", str(folder))
        assert (code, f"name in {path} is" in said) == (2, True)

    if name not in ("", "front", "a\nb", "a'b", 'a"b'):  # these are no --node-config, or another one
        words = ["node", str(folder / "nodes" / "a"), "--superlink", "hub.example:8000"]
        code, said = ssfl(*words, "--node-config", f"name='{name}' data-path='/a'")
        assert (code, f"name is {name!r} in --node-config" in said) == (2, True)


@pytest.mark.parametrize(
    "host", ["evil host;rm", "", "a..b", "-a", "a_b", "1.2.3", "1.2.3.999", "a\nb", "x" * 64, "::1%"]
)
def test_a_host_that_is_none_is_refused_at_every_door(host: str, made: house.Federation, ssfl: Ssfl) -> None:
    folder = made.folder.parent / "other"
    code, said = ssfl("init", f"--host={host}", "--name", "a", "--dir", str(folder))
    assert (code, f"--host is {host!r}; it is a host name" in said) == (2, True)
    assert not folder.exists()
    assert ssfl("superlink", f"--bind={host}", "--dir", str(made.folder))[0] == 2
    words = ["node", str(made.folder / "nodes" / "a"), "--node-config", "partition-id=0"]
    assert ssfl(*words, f"--superlink={host}:8000")[0] == 2
    for port in ("", ":", ":0", ":65536", ":8000x"):
        assert ssfl(*words, f"--superlink=hub.example{port}")[0] == 2


def test_a_name_is_given_once_and_what_is_wrong_with_a_site_is_said(tmp_path: Path, ssfl: Ssfl) -> None:
    there = ("--dir", str(tmp_path / "made"))
    said = ssfl("init", "--host", "a", "--name", "x", "--name", "y", "--name", "x", *there)
    assert said == (2, "ssfl: --name is 'x' more than once; each node has its own\n")
    for word, why in (
        (f"../x={tmp_path}", "its name is '../x'; it is 1 to 64 letters"),
        (f"x={tmp_path / 'nowhere'}", "its folder is "),
        ("x", "it is NAME=FOLDER"),
    ):
        code, said = ssfl("up", f"--site={word}", *there)
        assert (code, f"--site is {word!r}; {why}" in said) == (2, True)
    code, said = ssfl("up", f"--site=x={tmp_path}", "--nodes", "2", *there)
    assert (code, "--nodes is 2; beside --site there is none" in said) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "host", ["localhost", "superlink.example.org", "a.b.", "10.0.0.1", "::1", "2001:db8::1", "x1"]
)
def test_hosts_are_names_and_addresses(host: str) -> None:
    assert check_host(host, "--host") == host


@pytest.mark.parametrize(
    "port", [["--port", "0"], ["--port", "65536"], ["--control-port", "8000"], ["--port", "8001"]]
)
def test_ports_are_ports_and_differ(port: list[str], tmp_path: Path, ssfl: Ssfl) -> None:
    assert ssfl("init", "--host", "a", "--name", "a", "--dir", str(tmp_path / "made"), *port)[0] == 2
    assert not (tmp_path / "made").exists()


def test_a_folder_with_any_other_letter_is_written_as_it_is(tmp_path: Path, ssfl: Ssfl) -> None:
    folder = tmp_path / 'a"b\\n #] = ü'
    assert ssfl("init", "--host", "::1", "--name", "a", "--dir", str(folder))[0] == 0
    federation = house.read(folder)
    assert federation.address == "[::1]:8000"
    assert "::1" in hosts_of(folder)
    written = tomllib.loads((federation.flwr_home() / "config.toml").read_text())
    here = {"address": "127.0.0.1:8001", "root-certificates": str(folder / "superlink" / "ca.crt")}
    assert written == {"superlink": {"default": "federation", "federation": here}}
    command = node_service(folder / "nodes" / "a", federation.address, "partition-id=3", 9094).command
    told = parse_config_args([command[command.index("--node-config") + 1]])
    assert told == {"partition-id": 3, "state-path": str(folder / "nodes" / "a" / "state")}


@pytest.mark.parametrize("letter", ["'", "\n", "\x1b", "\udcff"])
def test_a_folder_that_cannot_be_quoted_is_refused(letter: str, tmp_path: Path, ssfl: Ssfl) -> None:
    folder = tmp_path / f"a{letter}b"
    for words in (["init", "--host", "a", "--name", "a"], ["up"], ["status"], ["down"], ["keep"]):
        code, said = ssfl(*words, "--dir", str(folder))
        assert (code, "--dir is" in said, said.count("\n")) == (2, True, 1)
    code, said = ssfl("node", str(folder), "--superlink", "a:1", "--node-config", "partition-id=0")
    assert (code, "DIR is" in said, said.count("\n")) == (2, True, 1)
    assert not folder.exists()


# ---- made again, with other values --------------------------------------------------------------

LONG = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_corrected_values_take_effect_and_the_same_ones_change_nothing(made: house.Federation, ssfl: Ssfl) -> None:
    folder = made.folder
    before, names = contents(folder), ("--name", "a", "--name", "b", "--dir", str(folder))
    assert ssfl("init", "--host", "hub.example", *names)[0] == 0
    assert contents(folder) == before
    assert ssfl("init", "--host", LONG, "--port", "81", *names)[0] == 0
    assert hosts_of(folder) == [LONG, "localhost", "127.0.0.1", "::1"]
    assert house.read(folder).address == f"{LONG}:81"
    after = contents(folder)
    changed = {"federation.json", "superlink/server.key", "superlink/server.pem"}
    assert {name for name in after if after[name] != before[name]} == changed  # nodes need nothing new
    for days, another in ((None, False), (365, False), (30, True), (30, False), (None, False)):
        words, old = [] if days is None else ["--days", str(days)], expires(folder)
        assert ssfl("init", "--host", LONG, *names, *words)[0] == 0
        assert (expires(folder) != old) is another
    (folder / "ca" / "ca.key").unlink()  # it is kept elsewhere, as it ought to be
    before = contents(folder)
    assert ssfl("init", "--host", LONG, *names)[0] == 0
    code, said = ssfl("init", "--host", "hub.example", *names)
    assert (code, "ca.key is not there; it is the key of ca.crt beside it" in said) == (2, True)
    assert contents(folder) == before


def test_a_federation_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, ssfl: Ssfl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*words: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(house, "make_node", full)
    code, said = ssfl("init", "--host", "hub.example", "--name", "a", "--dir", str(tmp_path / "made"))
    assert (code, "No space left" in said) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_up_names_a_port_in_use_and_takes_another_one(
    tmp_path: Path, ssfl: Ssfl, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, started = tmp_path / "made", []

    class Ended:
        def __init__(self, *words: object, **options: object) -> None:
            started.append(house.read(folder).port)

        def poll(self) -> int:
            return 1

    monkeypatch.setattr(subprocess, "Popen", Ended)
    words = ("up", "--nodes", "1", "--dir", str(folder))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, said = ssfl(*words, "--port", str(port))
        assert (code, said.startswith(f"ssfl: --port is {port}; nothing can listen there on 127.0.0.1")) == (2, True)
        assert not folder.exists()
    free = [free_port() for _ in range(2)]
    for choice in (["--port", str(free[0])], [], ["--port", str(free[1])], []):
        code, said = ssfl(*words, *choice)
        assert (code, "the federation ended" in said) == (1, True)  # its supervisor is the one above
    assert started == [free[0], free[0], free[1], free[1]]
    with socket.create_server(("127.0.0.1", free[1])):
        assert ssfl(*words)[0] == 2
    assert len(started) == 4


def test_a_federation_that_is_down_is_not_running_whatever_old_logs_say(made: house.Federation, ssfl: Ssfl) -> None:
    (made.folder / "nodes" / "a" / "node.log").write_text("ERROR: [code: 203] Connection attempt failed\n")
    code, said = ssfl("status", "--dir", str(made.folder))
    assert (code, said.count(" not running "), "code: 203" in said) == (3, 2, False)


def test_a_node_config_is_shown_as_it_is(made: house.Federation, ssfl: Ssfl) -> None:
    """`status` read square brackets as markup, and broke what did not fit into 80 columns."""
    path = made.folder / "federation.json"
    known = json.loads(path.read_text())
    odd = "data-path='/data/[red]/" + "x" * 20 + "'"
    known["nodes"][0]["config"] = odd
    path.write_text(json.dumps(known))
    assert odd in ssfl("status", "--dir", str(made.folder))[1]


# ---- where it listens, who is who ---------------------------------------------------------------


def test_flower_listens_on_loopback_and_the_front_where_nodes_are(made: house.Federation) -> None:
    command = superlink_service(made).command
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == "8001"
    assert "--enable-supernode-auth" in command
    assert "--insecure" not in command
    assert front_service(made, "0.0.0.0").command[-2:] == ["--bind", "0.0.0.0"]
    assert (made.address, made.control_address) == ("hub.example:8000", "127.0.0.1:8001")


def test_an_older_folder_is_told_what_it_lacks(made: house.Federation, ssfl: Ssfl) -> None:
    path = made.folder / "federation.json"
    path.write_text(json.dumps({key: v for key, v in json.loads(path.read_text()).items() if key != "control_port"}))
    code, said = ssfl("register", "--dir", str(made.folder))
    assert (code, f"{path} has no 'control_port'" in said) == (2, True)


def test_places_are_bound_to_the_keys_that_were_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []

    def control(federation: house.Federation, *words: str) -> dict[str, Any]:
        assert words[:2] == ("supernode", "register")
        keys.append(words[2])
        return {"node-id": str(2**63 + len(keys))}

    monkeypatch.setattr(federation_control, "control", control)
    monkeypatch.delenv(locks.REGISTERED, raising=False)
    nodes = {"node-0": "partition-id=0 num-partitions=2", "node-1": "partition-id=1 num-partitions=2", "clinic": ""}
    federation = house.create(tmp_path, "127.0.0.1", (1, 2), nodes, [3, 4, 5], house.timedelta(days=1))
    assert bound_places(own=True) == {}  # outside a federation
    monkeypatch.setenv(locks.REGISTERED, superlink_service(federation).variables[locks.REGISTERED])
    assert bound_places(own=True) == {}  # nobody is registered yet
    register(federation)
    register(federation)  # again: they keep their ids
    assert keys == [str(tmp_path / "nodes" / name / "key.pub") for name in nodes]
    assert bound_places(own=False) == {0: 2**63 + 1, 1: 2**63 + 2}
    assert bound_places(own=True) == {"node-0": 2**63 + 1, "node-1": 2**63 + 2, "clinic": 2**63 + 3}
    for damaged in ("", "[]", '{"names": 3}', '{"names": {"a": "x"}}'):
        federation.registered.write_text(damaged)
        with pytest.raises(RunFailed, match=r"registered\.json is damaged"):
            bound_places(own=True)


def test_a_node_config_that_flower_cannot_read_is_one_line(made: house.Federation) -> None:
    with pytest.raises(ConfigError, match="--node-config is"):
        node_service(made.folder / "nodes" / "a", made.address, "name=site-a data-path=/x", 9094)


def test_what_a_node_demands_reaches_its_client(made: house.Federation) -> None:
    home = made.folder / "nodes" / "a"
    with pytest.raises(ConfigError, match="--node-config is"):
        node_service(home, made.address, "partition-id=3 secure-only=true", 9094, secure_only=True)
    told = node_service(home, made.address, "partition-id=3", 9094, secure_only=True, least_clients=20).command
    place = read_node_config(parse_config_args([told[told.index("--node-config") + 1]]), "shared")
    assert (place.secure_only, place.least_clients, place.masked_by) == (True, 20, "--secure-only")
    for key, value in (("secure-only", 1), ("least-clients", -1), ("least-clients", True)):
        with pytest.raises(ConfigError, match=f"{key} is {value} in --node-config"):
            read_node_config({"partition-id": 3, key: value}, "shared")


def test_how_long_a_node_rests_reaches_its_process(made: house.Federation) -> None:
    home = made.folder / "nodes" / "a"
    assert REST not in node_service(home, made.address, "partition-id=3", 9094).variables
    assert node_service(home, made.address, "partition-id=3", 9094, rest=60.0).variables[REST] == "60.0"


def test_a_folder_that_is_called_like_a_key_is_none(made: house.Federation) -> None:
    config = "name='a' data-path='/x/state-path=/y'"
    command = node_service(made.folder / "nodes" / "a", made.address, config, 9094).command
    told = parse_config_args([command[command.index("--node-config") + 1]])
    assert told["state-path"] == str(made.folder / "nodes" / "a" / "state")
