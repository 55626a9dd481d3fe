"""The configuration: flat dotted keys -> frozen dataclasses, or one line that says what is wrong.

Defaults are written once, in ``[tool.flwr.app.config]`` of ``pyproject.toml``; Flower hands them to both apps
merged with the user's overrides, and the command line reads the same table.
"""

import functools
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from ssfl_app.core.options import FailureOptions, MaskOptions, RunOptions, Settings, WireOptions
from ssfl_app.data.dataset import DataOptions
from ssfl_app.files import app_folder
from ssfl_app.options import ConfigError, Scalar, anything, at_least, build, choice, flatten, not_a_key
from ssfl_app.partitions import PartitionOptions
from ssfl_app.partitions.late import ShiftOptions
from ssfl_app.strategies import REGISTRY
from ssfl_app.text import command
from ssfl_app.training.models import ModelOptions
from ssfl_app.training.step import PRECISIONS
from ssfl_app.training.trainer import LocalOptions

Flat = dict[str, Scalar]


@dataclass(frozen=True)
class EngineOptions:
    """Keys of the section ``engine``: how a run is executed.

    Threads and precision change the bits of its results, the others never do.
    """

    actors: int = at_least(0)
    concurrent: int = at_least(0)
    threads: int = at_least(1)
    precision: str = choice(*PRECISIONS)
    graphs: bool = anything("true or false")


SECTIONS: dict[str, type] = {
    "run": RunOptions,
    "mask": MaskOptions,
    "local": LocalOptions,
    "wire": WireOptions,
    "failures": FailureOptions,
    "shift": ShiftOptions,
    "data": DataOptions,
    "partition": PartitionOptions,
    "model": ModelOptions,
    "engine": EngineOptions,
} | {name: section for strategy in REGISTRY.values() for name, section in strategy.sections().items()}

# What may differ between a run and its continuation.
RESUME_MAY_CHANGE = ("run.out", "run.resume", "engine.actors", "engine.concurrent", "engine.graphs")


@dataclass(frozen=True, eq=False)
class Config:
    """A checked configuration; `flat` is what it was made from. It is equal to itself only."""

    strategy: str
    settings: Settings
    data: DataOptions
    partition: PartitionOptions
    model: ModelOptions
    engine: EngineOptions
    flat: Flat


def parse(flat: Mapping[str, Any]) -> Config:
    """Return the checked configuration of flat dotted keys.

    Raises
    ------
    ConfigError
        Unknown or missing key, wrong type, a value out of range, or values that do not fit together.
    """
    tables: dict[str, dict[str, Scalar]] = {name: {} for name in SECTIONS}
    for key, value in flat.items():
        name, _, rest = key.partition(".")
        if key == "strategy":
            continue
        if name not in tables or not rest:
            raise not_a_key(key, defaults(), f"keys are strategy and those of {', '.join(tables)}")
        tables[name][rest] = value
    strategy = flat.get("strategy")
    if not isinstance(strategy, str) or strategy not in REGISTRY:
        raise ConfigError(f"strategy is {strategy!r}; it is one of {', '.join(REGISTRY)}")
    made: dict[str, Any] = {name: build(section, name, tables[name]) for name, section in SECTIONS.items()}
    run = made["run"]
    if run.cohort > run.clients:
        raise ConfigError(
            f"run.cohort is {run.cohort}; it is at most run.clients, {run.clients}: ask for run.cohort={run.clients}"
        )
    made["shift"].check(run.clients, run.cohort)
    made["data"].check()
    if made["data"].where == "sites" and made["shift"].round:
        raise ConfigError(f"shift.round is {made['shift'].round}; it is 0 with data.where 'sites'")
    _fit_to_place(made, REGISTRY[strategy].has_floor)
    shared = {name: made[name] for name in ("run", "mask", "local", "wire", "failures", "shift")}
    sections = {name: made[name] for s in REGISTRY.values() for name in s.sections()}
    parts = {name: made[name] for name in ("data", "partition", "model", "engine")}
    return Config(strategy, Settings(**shared, sections=sections), **parts, flat=dict(flat))


def with_out(config: Config, folder: Path) -> Config:
    """Return the configuration with another run.out."""
    settings = replace(config.settings, run=replace(config.settings.run, out=str(folder)))
    return replace(config, settings=settings, flat=config.flat | {"run.out": str(folder)})


def _fit_to_place(made: dict[str, Any], has_floor: bool) -> None:
    """Give options that depend on where the data are their values: what a site says of itself may be false."""
    sites = made["data"].where == "sites"
    if made["ssfl"].score_fold == "auto":
        made["ssfl"] = replace(made["ssfl"], score_fold="normalised" if sites else "mean")
    if made["mask"].min_per_layer == -1:
        made["mask"] = replace(made["mask"], min_per_layer=int(sites and has_floor))


def defaults() -> Flat:
    """Return the default configuration, from pyproject.toml of the checkout or the installed wheel."""
    return dict(_defaults())


@functools.cache
def _defaults() -> Flat:
    # Kept: a table of many runs merges it for each of them.
    text = (app_folder() / "pyproject.toml").read_text("utf-8")
    return flatten(tomllib.loads(text)["tool"]["flwr"]["app"]["config"])


def read_file(path: Path, *, sweep: bool = False) -> Flat:
    """Return the keys of a TOML file; tables become dotted keys. A `sweep` may have a table ``[compare]``.

    A table ``[published]`` says what a paper reports of this configuration. It changes no run and is left out.

    Raises
    ------
    ConfigError
        The file is missing or no TOML, or it is one for `ssfl compare`.
    """
    found = {key: value for key, value in read_toml(path).items() if not key.startswith("published.")}
    if not sweep and any(key.partition(".")[0] == "compare" for key in found):
        raise ConfigError(f"CONFIG is {path}; this is a file for ssfl compare: {command('ssfl', 'compare', path)}")
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """Return everything that is in a TOML file; tables become dotted keys.

    Raises
    ------
    ConfigError
        The file is missing or no TOML.
    """
    try:
        return flatten(tomllib.loads(path.read_text("utf-8-sig")))  # Notepad writes a byte order mark
    except OSError as error:
        raise ConfigError(f"CONFIG is {path}; it is a TOML file ({error.strerror})") from error
    except RecursionError:
        raise ConfigError(f"CONFIG is {path}; it is a TOML file (nested too deeply)") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"CONFIG is {path}; it is a TOML file ({error})") from error


def read_overrides(texts: Iterable[str]) -> Flat:
    """Return the keys of command-line overrides such as ``"strategy='random' mask.density=0.05"``.

    Raises
    ------
    ConfigError
        A piece is not ``key=value`` with a TOML value.
    """
    flat: Flat = {}
    for text in texts:
        rest = text.strip()
        while rest:
            match = re.match(r"""([\w.-]+)\s*=\s*("[^"]*"|'[^']*'|[^\s'"]+)(\s+|$)""", rest)
            if match is None:
                raise ConfigError(f"-c is {rest!r}; it is key=value pairs, strings in quotes: \"strategy='random'\"")
            key, value = match.group(1), match.group(2)
            try:
                flat[key] = tomllib.loads(f"value = {value}")["value"]
            except tomllib.TOMLDecodeError:
                raise ConfigError(f"{key} is {value}; it is a TOML value, strings in quotes: '{value}'") from None
            rest = rest[match.end() :]
    return flat


def read_given(file: Path | None, overrides: Iterable[str] | None) -> Flat:
    """Return the keys that a command line gives: those of a file, overridden by `read_overrides`."""
    return (read_file(file) if file else {}) | read_overrides(overrides or [])


def merge(*layers: Mapping[str, Scalar]) -> Flat:
    """Return the defaults overridden by `layers`, later ones first.

    Raises
    ------
    ConfigError
        A layer names a key that does not exist.
    """
    merged = defaults()
    for layer in layers:
        for key, value in layer.items():
            if key not in merged:
                raise not_a_key(key, merged, "README lists them")
            merged[key] = value
    return merged


def write_toml(flat: Mapping[str, Scalar]) -> str:
    """Return the keys as TOML with a table per section."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, rest = key.partition(".")
        if rest:
            nested.setdefault(section, {})[rest] = value
        else:
            nested[section] = value
    return tomli_w.dumps(nested)


def first_clash(ours: Mapping[str, Scalar], theirs: Mapping[str, Scalar]) -> str | None:
    """Return, as a sentence, the first of our keys by which this is another run than theirs; None if none is."""
    for key, value in sorted(ours.items()):
        if not key.startswith(RESUME_MAY_CHANGE) and value != theirs.get(key):
            return f"{key} is {value!r}; that run was started with {theirs.get(key)!r}"
    return None


def identity(flat: Mapping[str, Scalar]) -> Flat:
    """Return the keys that make a run the run that it is: all but `RESUME_MAY_CHANGE`."""
    return {key: value for key, value in sorted(flat.items()) if not key.startswith(RESUME_MAY_CHANGE)}
