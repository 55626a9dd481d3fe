"""Which client a SuperNode is, and where its data and its memory lie: the keys of ``--node-config``.

| keys | what they say |
|---|---|
| ``partition-id=3`` | client 3 of a shared data set; ``data-path`` says where that set lies on this machine |
| ``name='site-a' data-path='/data/a'`` | a site with data of its own; the server numbers the sites by their names |
| ``state-path='/var/lib/ssfl'`` | with either: masks and personal models are files below it and survive a restart |
| ``least-batch=64`` | with either: images that an answer of scores, gradients or a model is made of; else 32 |
| ``pins='/etc/ssfl/pins'`` | with either: fingerprints of the only nodes that it masks its answers together with |
| ``secure-only=true`` | with either: it takes part in runs with secure aggregation only |
| ``least-clients=20`` | with either: likewise, and in sums of so many clients at least |
| ``weights-path='/data/start.safetensors'`` | with either: where the file of ``model.weights`` lies on this machine |
| ``server-data-path=true`` | with the first: a shared set is read where ``data.path`` says, as is ``model.weights`` |

Loss and accuracy on the test images leave the node whatever ``least-batch`` is; so do the counts of the handshake.

The node's operator sets them, and no server can: a run and its messages come from the server, these do not.

Examples
--------
>>> read_node_config({"name": "site-a", "data-path": "/data/a"}, "sites").data_path
'/data/a'
>>> read_node_config({"partition-id": 3}, "sites")
Traceback (most recent call last):
...
ssfl_app.options.ConfigError: name is missing in --node-config; with data.where 'sites' a SuperNode is started with \
--node-config "name='site-a' data-path='/data/site-a'"
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ssfl_app.options import ConfigError, PrivateError, Scalar

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a site may be called: the name is sorted, printed, and the same on every machine."""

LEAST_BATCH = 32
"""Of so many different images are scores, gradients and trained models made at least; a node may say otherwise."""

SIMULATED = "ssfl-simulated"
"""Key of the node config of a client in this process: it is no real node."""

_KEYS = (
    "partition-id",
    "num-partitions",
    "name",
    "data-path",
    "state-path",
    "least-batch",
    "server-data-path",
    "pins",
    "secure-only",
    "least-clients",
    "weights-path",
)
_START = {
    "shared": '--node-config "partition-id=0", each its own number',
    "sites": "--node-config \"name='site-a' data-path='/data/site-a'\"",
}


@dataclass(frozen=True)
class NodeConfig:
    """What a SuperNode was started with; the keys are those of this module.

    `number` is None for a site with data of its own, which the server gives its number; `name` is "" for others.
    `data_path` is "" if nobody said it here; without a `state_path` the client keeps things in Flower's state.
    `simulated`: it is no real node, and client and server are processes of one user. `least_batch` is of scores,
    squared gradients, judgements of peers' models and trained models. Below `least_clients`, asked
    or in it, it has no part in a sum.
    """

    number: int | None
    name: str
    data_path: str
    state_path: Path | None
    simulated: bool
    least_batch: int
    server_data_path: bool
    pins: Path | None = None
    secure_only: bool = False
    least_clients: int = 0
    weights_path: str = ""

    @property
    def masked_by(self) -> str:
        """The option by which it takes part in runs with secure aggregation only; "": it takes part in others."""
        given = {"--pin": self.pins, "--secure-only": self.secure_only, "--least-clients": self.least_clients}
        return next((option for option, value in given.items() if value), "")

    def in_its_words(self, error: ConfigError) -> ConfigError:
        """Return an error about data or weights with the key that this node was started with."""

        def own(text: str) -> str:
            text = re.sub(r"\bmodel\.weights( is|:)", r"weights-path\1", text) if self.weights_path else text
            return re.sub(r"\bdata\.path( is|$|, which is)", r"data-path\1", text) if self.data_path else text

        text = own(str(error))
        return PrivateError(text, own(error.public)) if isinstance(error, PrivateError) else ConfigError(text)

    def obeyed(self, run_config: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Return the run config without the folder and file that a server names, unless this node reads such ones.

        Raises
        ------
        ConfigError
            The data set of the run lies in a folder, or its initial weights in a file, and nobody said here in which.
        """
        flat = dict(run_config)
        if self.simulated:
            return flat
        if flat.get("model.weights") and not (self.weights_path or self.server_data_path):
            raise ConfigError(
                "weights-path is missing in --node-config; the run has model.weights, and this node reads no file "
                "that a server names: say where the same one lies, or allow its path by server-data-path=true"
            )
        if flat.get("model.weights") and self.weights_path:
            flat["model.weights"] = self.weights_path
        if self.data_path:
            return flat
        if self.server_data_path:
            return flat | {"data.download": False}  # to read there is one thing, to write another
        if flat.get("data.name") != "digits":
            raise ConfigError(
                f"data-path is missing in --node-config; data.name is {flat.get('data.name')!r}, and this node reads "
                "no folder that a server names: say where the set lies, or allow data.path by server-data-path=true"
            )
        return flat | {"data.path": "", "data.download": False}


def simulated(node_config: Mapping[str, object]) -> bool:
    """Return whether a client is simulated, by what no server has a say in.

    The in-process engine marks the node configs that it makes. Flower's simulation has each client work in an actor
    of Ray; the process that a SuperNode starts for a message never joins one.
    """
    if node_config.get(SIMULATED) is True:
        return True
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def read_node_config(node_config: Mapping[str, object], where: str) -> NodeConfig:
    """Return what ``--node-config`` says where ``data.where`` is `where`; keys of other apps may stand in it.

    Raises
    ------
    ConfigError
        A key is missing, does not fit `where` or the other keys, has a bad value, or is one of ours misspelt.
    """
    for key in sorted(set(node_config) - {*_KEYS, SIMULATED}):
        if near := get_close_matches(key.replace("_", "-"), _KEYS, 1, 0.85):
            raise ConfigError(f"{key} is not a key of --node-config; did you mean {near[0]}?")
    needed, other = ("name", "partition-id") if where == "sites" else ("partition-id", "name")
    start = f"with data.where {where!r} a SuperNode is started with {_START[where]}"
    if needed in node_config and other in node_config:
        raise ConfigError(f"{other} is {node_config[other]!r} in --node-config beside {needed}; {start}")
    for key in (needed, "data-path") if where == "sites" else (needed,):
        if key not in node_config:
            raise ConfigError(f"{key} is missing in --node-config; {start}")
    state = _folder(node_config, "state-path")
    data = _folder(node_config, "data-path")
    number = None if where == "sites" else _whole(node_config["partition-id"], "partition-id", 0)
    name = check_name(node_config["name"], "name", " in --node-config") if where == "sites" else ""
    alone = simulated(node_config)
    least = 1 if alone else _whole(node_config.get("least-batch", LEAST_BATCH), "least-batch", 1)
    obeys, secure = _flag(node_config, "server-data-path"), _flag(node_config, "secure-only")
    fewest = _whole(node_config.get("least-clients", 0), "least-clients", 0)
    pins, weights = _folder(node_config, "pins"), _folder(node_config, "weights-path")
    paths = Path(state) if state else None, Path(pins) if pins else None
    return NodeConfig(number, name, data, paths[0], alone, least, obeys, paths[1], secure, fewest, weights)


def _flag(node_config: Mapping[str, object], key: str) -> bool:
    value = node_config.get(key, False)
    if type(value) is not bool:
        raise ConfigError(f"{key} is {value!r} in --node-config; it is true or false")
    return value


def _whole(value: object, key: str, least: int) -> int:
    if type(value) is not int or value < least:
        raise ConfigError(f"{key} is {value!r} in --node-config; it is a whole number of at least {least}")
    return value


def check_name(value: object, key: str, where: str = "") -> str:
    """Return the name of a node or site; ConfigError, which begins with `key`, if `NAME` does not allow it."""
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ConfigError(
            f"{key} is {value!r}{where}; it is 1 to 64 letters, digits, '.', '_' or '-', letter or digit first: 'a-1'"
        )
    return value


def _folder(node_config: Mapping[str, object], key: str) -> str:
    """Return a path of the node, or "": Flower starts each message's process in a folder of its own choice."""
    value = node_config.get(key, "")
    if key not in node_config:
        return ""
    if not isinstance(value, str) or not Path(value).expanduser().is_absolute():
        rule = "in --node-config; it is an absolute path in quotes: '/data/site-a'"
        raise PrivateError(f"{key} is {value!r} {rule}", f"{key} is something else {rule}")
    return str(Path(value).expanduser())
