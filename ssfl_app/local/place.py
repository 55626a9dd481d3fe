"""Which client a SuperNode is, and where its data and its memory lie: the keys of ``--node-config``.

| keys | what they say |
|---|---|
| ``partition-id=3`` | client 3 of a shared data set; ``data-path`` says where that set lies on this machine |
| ``name='site-a' data-path='/data/a'`` | a site with data of its own; the server numbers the sites by their names |
| ``state-path='/var/lib/ssfl'`` | with either: masks and personal models are files below it and survive a restart |

Examples
--------
>>> read_place({"name": "site-a", "data-path": "/data/a"}, "sites")
Place(number=None, name='site-a', data_path='/data/a', state_path=None)
>>> read_place({"partition-id": 3}, "sites")
Traceback (most recent call last):
...
ssfl_app.options.ConfigError: name is missing in --node-config; with data.where 'sites' a SuperNode is started with \
--node-config "name='site-a' data-path='/data/site-a'"
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ssfl_app.options import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a site may be called: the name is sorted, printed, and the same on every machine."""

_KEYS = ("partition-id", "num-partitions", "name", "data-path", "state-path")
_START = {
    "shared": '--node-config "partition-id=0", each its own number',
    "sites": "--node-config \"name='site-a' data-path='/data/site-a'\"",
}


@dataclass(frozen=True)
class Place:
    """What a SuperNode was started with.

    Attributes
    ----------
    number : int or None
        The client's number; None for a site with data of its own, which the server gives its number.
    name : str
        Of such a site, "" otherwise.
    data_path : str
        Where the data lie on this machine; "": where ``data.path`` of the run says.
    state_path : Path or None
        Below it the client keeps what must survive a restart; None: in Flower's state.
    """

    number: int | None
    name: str
    data_path: str
    state_path: Path | None

    def in_its_words(self, error: ConfigError) -> ConfigError:
        """Return an error about the data with the key that this node was started with."""
        return ConfigError(str(error).replace("data.path is", "data-path is")) if self.data_path else error


def read_place(node_config: Mapping[str, object], where: str) -> Place:
    """Return what ``--node-config`` says; keys of other apps may stand in it.

    Parameters
    ----------
    node_config : mapping
        Flower's, of this node.
    where : str
        ``data.where`` of the run.

    Raises
    ------
    ConfigError
        A key is missing, does not fit `where` or the other keys, has a bad value, or is one of ours misspelt.
    """
    for key in sorted(set(node_config) - set(_KEYS)):
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
    number = None if where == "sites" else _number(node_config["partition-id"])
    name = check_name(node_config["name"], "name", " in --node-config") if where == "sites" else ""
    return Place(number, name, data, Path(state) if state else None)


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ConfigError(f"partition-id is {value!r} in --node-config; it is a whole number of at least 0")
    return value


def check_name(value: object, key: str, where: str = "") -> str:
    """Return the name of a node or site.

    Raises
    ------
    ConfigError
        It is not one that `NAME` allows; the message begins with `key`, and says `where`.
    """
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ConfigError(
            f"{key} is {value!r}{where}; it is 1 to 64 letters, digits, '.', '_' or '-', letter or digit first: 'a-1'"
        )
    return value


def _folder(node_config: Mapping[str, object], key: str) -> str:
    """Return a folder of the node, or "": Flower starts each message's process in a folder of its own choice."""
    value = node_config.get(key, "")
    if key not in node_config:
        return ""
    if not isinstance(value, str) or not Path(value).expanduser().is_absolute():
        raise ConfigError(f"{key} is {value!r} in --node-config; it is an absolute path in quotes: '/data/site-a'")
    return str(Path(value).expanduser())
