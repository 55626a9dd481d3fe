"""The configuration: flat dotted keys -> frozen dataclasses, or one line that says what is wrong.

A key that is missing has the default of its field. Only the sections that the chosen strategy reads are checked.
"""

import functools
import re
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import Field, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import tomli_w

from ssfl_app import callbacks
from ssfl_app.callbacks.stopping import StopOptions
from ssfl_app.core.clock import ClockOptions
from ssfl_app.core.options import FailureOptions, MaskOptions, RunOptions, Settings, WireOptions
from ssfl_app.core.strategy import SparseStrategy
from ssfl_app.data.dataset import DataOptions
from ssfl_app.data.readers import READERS
from ssfl_app.options import ConfigError, Scalar, anything, at_least, build, choice, flatten, keys_of, not_a_key
from ssfl_app.partitions import REGISTRY as PARTITIONS
from ssfl_app.partitions import PartitionOptions
from ssfl_app.partitions.late import ShiftOptions
from ssfl_app.privacy.options import PrivacyOptions
from ssfl_app.registry import Registry, Unknown
from ssfl_app.sparsity.values import SUMMED_TYPES
from ssfl_app.strategies import REGISTRY
from ssfl_app.strategies.shared.fine_tuning import FineTuningClient
from ssfl_app.text import command
from ssfl_app.training.fused import KERNELS
from ssfl_app.training.models import REGISTRY as MODELS
from ssfl_app.training.models import ModelOptions
from ssfl_app.training.step import PRECISIONS
from ssfl_app.training.tasks import AUTO, TaskOptions
from ssfl_app.training.tasks import REGISTRY as TASKS
from ssfl_app.training.trainer import LocalOptions

Flat = dict[str, Scalar]


@dataclass(frozen=True)
class EngineOptions:
    """Keys of the section ``engine``: how a run is executed.

    Threads, precision and kernels change the bits of its results, the others never do.
    """

    actors: int = at_least(0, 0, "Ray actors; 0: one a core")
    concurrent: int = at_least(
        0, 0, "clients the inline engine trains at once; 0: a core each, or on a GPU the cohort up to 16"
    )
    threads: int = at_least(1, 1, "torch threads a client; more makes no two machines agree on the bits")
    precision: str = choice(*PRECISIONS, about="of a GPU; bf16: in training, tf32 in the rest; a CPU has fp32")
    kernels: str = choice(
        *KERNELS, about="of a GPU; fused: GroupNorm, addition and ReLU in one, by Triton, and channels last"
    )
    graphs: bool = anything(
        "true or false", True, "a GPU replays training steps as CUDA graphs; no effect on the CPU"
    )


SHARED: dict[str, type] = {
    "run": RunOptions,
    "mask": MaskOptions,
    "local": LocalOptions,
    "wire": WireOptions,
    "privacy": PrivacyOptions,
    "failures": FailureOptions,
    "shift": ShiftOptions,
    "stop": StopOptions,
    "clock": ClockOptions,
    "data": DataOptions,
    "partition": PartitionOptions,
    "model": ModelOptions,
    "task": TaskOptions,
    "engine": EngineOptions,
}
"""Sections that every strategy reads."""

SETTINGS = ("run", "mask", "local", "wire", "privacy", "failures", "shift", "stop", "clock")
"""Those of them that strategies and clients get, as `Settings`."""

BUILTIN = SHARED | {name: section for strategy in REGISTRY.values() for name, section in strategy.sections().items()}
"""Sections of the table in pyproject.toml."""

_FREE = tuple(
    f"{name}.{spec.name}." for name, kind in SHARED.items() for spec in fields(kind) if "free" in spec.metadata
)

NAMED: dict[str, Registry[Any]] = {
    "strategy": REGISTRY,
    "model.name": MODELS,
    "task.name": TASKS,
    "data.name": READERS,
    "partition.name": PARTITIONS,
    "run.trackers": callbacks.REGISTRY,
}
"""Keys whose values may be foreign, of run.trackers several: `ssfl_app.registry`."""

# What may differ between a run and its continuation.
RESUME_MAY_CHANGE = ("run.out", "run.resume", "run.trackers", "engine.actors", "engine.concurrent", "engine.graphs")


@dataclass(frozen=True, eq=False)
class Config:
    """A checked configuration; `flat` is what it was made from. It is equal to itself only."""

    strategy: str
    settings: Settings
    data: DataOptions
    partition: PartitionOptions
    model: ModelOptions
    task: TaskOptions
    engine: EngineOptions
    flat: Flat


def find_strategy(value: object, key: str = "strategy") -> type[SparseStrategy]:
    """Return the strategy that `key` names.

    Raises
    ------
    ConfigError
        There is none of this name.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{key} is {value!r}; it is one of {', '.join(REGISTRY)}")
    try:
        return REGISTRY[value]
    except Unknown as error:
        raise error.about(key, value) from error


def foreign_modules(flat: Mapping[str, Scalar]) -> list[str]:
    """Return the modules of all that a configuration names and this package does not bring, sorted."""
    given = {key: callbacks.names_in(str(flat.get(key, AUTO))) for key in NAMED}
    found = {NAMED[key].module_of(name) for key, names in given.items() for name in names if name != AUTO}
    return sorted(found - {""})


def parse(flat: Mapping[str, Any]) -> Config:
    """Return the checked configuration of flat dotted keys; those that are missing have their defaults.

    Raises
    ------
    ConfigError
        Unknown key, wrong type, a value out of range, or values that do not fit together.
    """
    flat = merge(flat)
    kind = find_strategy(flat["strategy"])
    own = kind.sections()
    read = SHARED | own
    tables: dict[str, dict[str, Scalar]] = {name: {} for name in read}
    for key, value in flat.items():
        name, _, rest = key.partition(".")
        if name in read:
            tables[name][rest] = value
    made: dict[str, Any] = {name: build(section, name, tables[name]) for name, section in read.items()}
    run = made["run"]
    run.check(kind.full_participation, made["failures"].min_ok_fraction)
    made["shift"].check(run.clients, run.cohort)
    made["data"].check()
    made["privacy"].check()
    if made["stop"].patience and issubclass(kind.client, FineTuningClient):
        rule = f"{flat['strategy']} fine-tunes in the last round, which a run that stops early does not reach"
        raise ConfigError(f"stop.patience is {made['stop'].patience}; it is 0 here: {rule}")
    late = {
        "run.over-select": (run.over_select, 1.0),
        "run.close-after": (run.close_after, 0.0),
        "run.deadline": (run.deadline, 0.0),
        "run.buffer": (run.buffer, 0.0),
        "run.replay": (run.replay, ""),
    }
    for key, (value, needed) in late.items():
        if value != needed and made["privacy"].level == "client":
            rule = f"it is {needed!r} with privacy.level 'client', where nobody knows who takes part"
            raise ConfigError(f"{key} is {value!r}; {rule}")
    if (early := run.closes_early) and made["privacy"].secure_aggregation:
        rule = "it is 0 with privacy.secure-aggregation: what unmasks a sum without a late answer unmasks that answer"
        raise ConfigError(f"{early}; {rule}")
    if made["clock"].profile and made["privacy"].level == "client":
        rule = "it is empty with privacy.level 'client': how long a round takes tells who is in its cohort"
        raise ConfigError(f"clock.profile is {made['clock'].profile!r}; {rule}")
    if made["data"].where == "sites" and made["shift"].round:
        raise ConfigError(f"shift.round is {made['shift'].round}; it is 0 with data.where 'sites'")
    if made["shift"].stream != "none":
        _check_stream(made)
    _fit_to_place(made, kind.has_floor)
    shared = {name: made[name] for name in SETTINGS}
    parts = {name: made[name] for name in ("data", "partition", "model", "task", "engine")}
    settings = Settings(**shared, sections={name: made[name] for name in own})
    return Config(str(flat["strategy"]), settings, **parts, flat=flat)


def _check_stream(made: Mapping[str, Any]) -> None:
    """Raise ConfigError where the images of a client may not change."""
    others = {"data.where": (made["data"].where, "sites"), "privacy.level": (made["privacy"].level, "record")}
    for key, (value, refused) in others.items():
        if value == refused:
            raise ConfigError(f"shift.stream is {made['shift'].stream!r}; it is 'none' with {key} {refused!r}")


def with_out(config: Config, folder: Path) -> Config:
    """Return the configuration with another run.out."""
    settings = replace(config.settings, run=replace(config.settings.run, out=str(folder)))
    return replace(config, settings=settings, flat=config.flat | {"run.out": str(folder)})


def _fit_to_place(made: dict[str, Any], has_floor: bool) -> None:
    """Give options that depend on where the data are their values: what a site says of itself may be false."""
    sites = made["data"].where == "sites"
    if "ssfl" in made and made["ssfl"].score_fold == "auto":
        lone = made["ssfl"].score_values in SUMMED_TYPES  # one client's scores are not seen alone
        made["ssfl"] = replace(made["ssfl"], score_fold="normalised" if sites and not lone else "mean")
    if made["mask"].min_per_layer == -1:
        made["mask"] = replace(made["mask"], min_per_layer=int(sites and has_floor))


@functools.cache
def _defaults(strategy: str) -> Flat:
    # Kept: a table of many runs merges it for each of them.
    found: dict[str, Any] = {key: spec.default for key, spec in [*keys(), *keys(strategy)]}
    return {"strategy": "ssfl", **found}


def defaults(strategy: object = "ssfl") -> Flat:
    """Return the default configuration, with the options of all built-in strategies and of this one."""
    return dict(_defaults(str(strategy)))


def complete(flat: Mapping[str, Any]) -> Flat:
    """Return a configuration with the defaults of what it lacks: one that an older version wrote has fewer keys.

    A cohort that nobody asked for is of all clients where there are fewer of them than by default, and what only its
    sum is learnt of is written as whole numbers.
    """
    found = {**defaults(flat.get("strategy", "ssfl")), **flat}
    if "run.cohort" not in flat and type(clients := found["run.clients"]) is int and clients > 0:
        found["run.cohort"] = min(clients, int(found["run.cohort"]))
    by_client = found["privacy.level"] == "client"
    if found["privacy.secure-aggregation"] is True or by_client:
        found |= {key: "fixed32" for key in ("wire.up-values", "ssfl.score-values") if key not in flat}
    if by_client:
        asked = "channels" if found["mask.granularity"] == "channel" else "densities"
        implied = {"run.weighting": "uniform", "ssfl.discovery": f"private-{asked}"}
        found |= {key: value for key, value in implied.items() if key not in flat}
    return found


def keys(strategy: str = "") -> list[tuple[str, "Field[Any]"]]:
    """Return the keys that a strategy reads, or all that are built in, with the fields that describe them."""
    sections = SHARED | find_strategy(strategy).sections() if strategy else BUILTIN
    return [pair for name, section in sections.items() for pair in keys_of(section, name)]


def table() -> str:
    """Return the table of all keys that Flower needs in ``pyproject.toml``: defaults, and what they mean."""
    lines = ["[tool.flwr.app.config]", 'strategy = "ssfl"               # one of those that README lists']
    for name, section in BUILTIN.items():
        lines += ["", f"[tool.flwr.app.config.{name}]"]
        for key, spec in keys_of(section, name):
            line = tomli_w.dumps({key.partition(".")[2]: spec.default}).strip()
            lines.append(f"{line:<31} # {meaning(spec)}".rstrip(" #"))
    return "\n".join(lines) + "\n"


def meaning(spec: "Field[Any]") -> str:
    """Return what a key means, with the values that there are."""
    return ": ".join(part for part in (" | ".join(spec.metadata["names"]), spec.metadata["about"]) if part)


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
    return overlay(read_file(file) if file else {}, read_overrides(overrides or []))


def merge(*layers: Mapping[str, Scalar]) -> Flat:
    """Return the defaults overridden by `layers`, later ones first.

    Raises
    ------
    ConfigError
        A layer names a key that does not exist.
    """
    given = overlay(*layers)
    find_strategy(given.get("strategy", "ssfl"))
    merged = complete(given)
    known = defaults(merged["strategy"])
    for key in given:
        if key not in known and not key.startswith(_FREE):
            sections = dict.fromkeys(key.partition(".")[0] for key in known if "." in key)
            own = get_close_matches(key, [free + key.rpartition(".")[2] for free in _FREE], 1, 0.8)
            raise not_a_key(key, own or known, f"keys are strategy and those of {', '.join(sections)}")
    return merged


def overlay(*layers: Mapping[str, Scalar]) -> Flat:
    """Return all keys, of later layers first; options that only a strategy reads which a later layer replaces go."""
    given: Flat = {}
    for layer in layers:
        ours, theirs, gone = given.get("strategy", "ssfl"), layer.get("strategy"), set[str]()
        if theirs not in (None, ours):
            with suppress(ConfigError):  # nobody asks for what is replaced
                gone = defaults(ours).keys() - defaults(theirs).keys()
        given = {key: value for key, value in given.items() if key not in gone}
        given |= layer
    return given


def paths(flat: Mapping[str, Scalar]) -> list[str]:
    """Return the keys whose values are paths, which are made absolute: what is relative here is not elsewhere."""
    found = [key for key in ("data.path", "model.weights", "run.replay") if flat.get(key)]
    return [*found, *(["clock.profile"] if str(flat.get("clock.profile", "")).endswith(".csv") else [])]


def nested(flat: Mapping[str, Scalar]) -> dict[str, Any]:
    """Return the keys as tables, as TOML has them."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        table = found
        for section in sections:
            table = table.setdefault(section, {})
        table[last] = value
    return found


def write_toml(flat: Mapping[str, Scalar]) -> str:
    """Return the keys as TOML with a table per section."""
    return tomli_w.dumps(nested(flat))


_BEFORE = {"prunefl": {"prunefl.scope": "the rule before version 0.2.0"}}
"""By strategy, what a recorded configuration without these keys was played by: no default of today."""


def first_clash(ours: Mapping[str, Scalar], theirs: Mapping[str, Scalar], whole: bool = False) -> str | None:
    """Return, as a sentence, the first of our keys by which this is another run than theirs; None if none is.

    If ours are the `whole` configuration, options of your own that only the other run has count too.
    """
    theirs = complete({**_BEFORE.get(str(theirs.get("strategy")), {}), **theirs})
    others = [key for key in theirs if whole and key.startswith(_FREE)]
    for key in sorted({*ours, *others}):
        if not key.startswith(RESUME_MAY_CHANGE) and ours.get(key) != theirs.get(key):
            return f"{key} is {ours.get(key)!r}; that run was started with {theirs.get(key)!r}"
    return None


def identity(flat: Mapping[str, Scalar]) -> Flat:
    """Return the keys that make a run the run that it is: all but `RESUME_MAY_CHANGE`."""
    return {key: value for key, value in sorted(flat.items()) if not key.startswith(RESUME_MAY_CHANGE)}
