"""Checked options: a frozen dataclass per section of the configuration, each field with what it allows.

A field has a type, what is allowed, its default and what it means, and nothing else has them. The table
``[tool.flwr.app.config]`` of ``pyproject.toml``, which Flower needs, is made of the fields: ``ssfl keys --toml``.

Examples
--------
>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class MaskOptions:
...     density: float = option("a fraction in (0, 1]", lambda x: 0 < x <= 1, 0.1)
>>> build(MaskOptions, "mask", {"density": 1.7})
Traceback (most recent call last):
...
ssfl_app.options.ConfigError: mask.density is 1.7; it is a fraction in (0, 1]
"""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

T = TypeVar("T")
Scalar = bool | int | float | str


class ConfigError(ValueError):
    """The configuration cannot be run; the message names the key, its value and what is allowed."""


class PrivateError(ConfigError):
    """Its text names files or folders of a site, which no server may see; `public` says the same without them."""

    def __init__(self, text: str, public: str) -> None:
        super().__init__(text, public)  # both: an exception that crosses to another process is made anew of these

    def __str__(self) -> str:
        """Return the whole text."""
        return str(self.args[0])

    def about(self, key: str, value: object) -> "PrivateError":
        """Return the error whose texts begin with the key that has this value."""
        return PrivateError(*(f"{key} is {value!r}; {text}" for text in self.args))

    @property
    def public(self) -> str:
        """The text that a server may get."""
        return str(self.args[1])


def option(
    allowed: str, check: Callable[[Any], object], default: Any = MISSING, about: str = "", names: Sequence[str] = ()
) -> Any:
    """Return a dataclass field of the configuration.

    Parameters
    ----------
    allowed : str
        Completes "it is ...".
    check : callable
        Whether a value is allowed; it may say why not by a ConfigError whose text completes "it is ...".
    default : optional
        Where there is none the key must be given.
    about : str
        What the key means, for `ssfl keys` and the table in ``pyproject.toml``.
    names : sequence of str
        The values that there are, if they can be listed.
    """
    metadata = {"allowed": allowed, "check": check, "about": about, "names": tuple(names)}
    return field(default=default, metadata=metadata)


def at_least(low: float, default: Any = MISSING, about: str = "") -> Any:
    """Return a field for a finite number >= `low`."""
    return option(f"a number of at least {low}", lambda value: low <= value < math.inf, default, about)


def above(low: float, default: Any = MISSING, about: str = "") -> Any:
    """Return a field for a finite number > `low`."""
    return option(f"a number above {low}", lambda value: low < value < math.inf, default, about)


def fraction(default: Any = MISSING, about: str = "") -> Any:
    """Return a field for a number in (0, 1]."""
    return option("a fraction in (0, 1]", lambda value: 0 < value <= 1, default, about)


def choice(*names: str, about: str = "") -> Any:
    """Return a field for one of `names`; the first is the default."""
    return option("one of " + ", ".join(names), lambda value: value in names, names[0], about, names)


def anything(what: str, default: Any = MISSING, about: str = "") -> Any:
    """Return a field whose type is the only thing checked."""
    return option(what, lambda _: True, default, about)


def free(about: str = "") -> Any:
    """Return a field for further keys of a section, ``model.options.width``, that somebody else's code reads."""
    metadata = {"allowed": "keys of your own", "free": True, "about": about, "names": ()}
    return field(default_factory=dict, metadata=metadata)


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables, as TOML has them, as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def not_a_key(key: str, known: Collection[str], rule: str) -> ConfigError:
    """Return the error about a key that there is not, with the one that was meant, or else with `rule`.

    Examples
    --------
    >>> print(not_a_key("run.client", ["run.clients", "mask.density"], "README lists them"))
    run.client is not a key; did you mean run.clients?
    >>> print(not_a_key("density", ["run.clients", "mask.density"], "README lists them"))
    density is not a key; did you mean mask.density?
    """
    last = {name.rpartition(".")[2]: name for name in reversed(list(known))}  # of equal last words the first one
    word = key.rpartition(".")[2]
    section = key.rpartition(".")[0]
    near = get_close_matches(key, [name for name in known if name.rpartition(".")[0] == section], 1, 0.9)
    near = near or ([last[word]] if word in last else get_close_matches(key, known, 1, 0.75))
    near = near or [last[found] for found in get_close_matches(word, last, 1, 0.75)]
    return ConfigError(f"{key} is not a key; {f'did you mean {near[0]}?' if near else rule}")


@functools.cache
def _types(section: type) -> dict[str, Any]:
    return get_type_hints(section)  # kept: a sweep builds its sections thousands of times


def build(section: type[T], name: str, values: Mapping[str, Scalar]) -> T:
    """Return the options of one section from its keys, or say what is wrong with the first bad one.

    Parameters
    ----------
    section : type
        A frozen dataclass whose fields were made by the functions above.
    name : str
        The section's name in the configuration, e.g. ``"mask"``; "" for the top level.
    values : mapping
        Kebab-case keys without the section's name.

    Raises
    ------
    ConfigError
        Unknown or missing key, wrong type, or a value out of range.
    """
    prefix = f"{name}." if name else ""
    known = {f.name.replace("_", "-"): f for f in fields(section)}  # type: ignore[arg-type]
    inner = {key: {} for key, spec in known.items() if "free" in spec.metadata}  # type: dict[str, dict[str, Scalar]]
    for key in values:
        first, _, rest = key.partition(".")
        if first in inner and rest:
            inner[first][rest] = values[key]
        elif key not in known or key in inner:
            names = [prefix + option for option in known]
            raise not_a_key(prefix + key, names, f"{name or 'the top level'} has {', '.join(known)}")
    for key, table in inner.items():
        for word, given in table.items():
            if not word.replace("-", "_").isidentifier() or type(given) not in (bool, int, float, str):
                rule = "a key of your own is one word, its value a number, text, true or false"
                raise ConfigError(f"{prefix}{key}.{word} is {given!r}; {rule}")
    types = _types(section)  # type: ignore[arg-type]
    made: dict[str, Any] = {spec.name: inner[key] for key, spec in known.items() if key in inner}
    for key in [key for key in known if key not in inner]:
        spec, allowed = known[key], known[key].metadata["allowed"]
        value: Any = values.get(key, spec.default)
        if value is MISSING:
            raise ConfigError(f"{prefix}{key} is missing; it is {allowed}")
        kind = str if get_origin(types[spec.name]) is Literal else types[spec.name]
        if kind is float and type(value) is int and abs(value) <= 2**53:
            value = float(value)
        if type(value) is not kind:
            types_ = f"{kind.__name__}, not {type(value).__name__}"
            raise ConfigError(f"{prefix}{key} is {value!r}; it is {allowed} ({types_})")
        try:
            well = spec.metadata["check"](value)
        except PrivateError as error:
            raise error.about(f"{prefix}{key}", value) from error
        if not well:
            raise ConfigError(f"{prefix}{key} is {value!r}; it is {allowed}")
        made[spec.name] = value
    return section(**made)


def keys_of(section: type, name: str) -> Iterator[tuple[str, "Field[Any]"]]:
    """Yield the keys of a section, dotted, with their fields; not those that are free."""
    for spec in fields(section):
        if "free" not in spec.metadata:
            yield f"{name}.{spec.name}".replace("_", "-"), spec
