"""What a sweep file asks for: an ordinary configuration and a table ``[compare]``, as a list of runs.

The table has lists of strategies, seeds and densities, the name of the baseline, further keys with a list of values
each (``[compare.axes]``), and keys of single strategies (``[compare.only.<strategy>]``). ``-c`` has the last word: a
key given there has that value in all runs. A strategy that does not look at mask.density is played once, not once a
density.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssfl_app import config as configuration
from ssfl_app.config import Flat
from ssfl_app.options import ConfigError, not_a_key
from ssfl_app.strategies import REGISTRY

# Keys with a list of their own in [compare], and keys that `ssfl compare` sets itself.
_LISTS = {"strategy": "strategies", "run.seed": "seeds", "mask.density": "densities"}
OURS = ("run.out", "run.resume")
_NO_AXES = (*_LISTS, *configuration.RESUME_MAY_CHANGE)
TASK = ("data", "partition", "model", "task", "shift")  # sections: runs that differ here are never rows of one table


@dataclass(frozen=True)
class RunSpec:
    """One run: its folder's name, what it is called in a line, its configuration, whether density matters not."""

    slug: str
    name: str
    flat: Flat
    dense: bool


@dataclass(frozen=True)
class SweepSpec:
    """All runs of a comparison, the keys that tell its tables apart, and the strategy that rows are compared with."""

    runs: list[RunSpec]
    axes: list[str]
    baseline: str


def read_plan(files: Sequence[Path], overrides: Iterable[str]) -> SweepSpec:
    """Return the plan of sweep files, pooled; a run that several of them ask for is one run.

    Raises
    ------
    ConfigError
        A file is no TOML, a key or value is not allowed, or the files name different baselines.
    """
    override = configuration.read_overrides(overrides)
    for key in OURS:
        if key in override:
            raise ConfigError(f"{key} is {override[key]!r}; `ssfl compare` sets it itself, by --out")
    runs: dict[str, RunSpec] = {}
    axes: list[str] = []
    baselines: dict[str, Path] = {}
    for path in files:
        given = configuration.read_file(path, sweep=True)
        asked = {key.removeprefix("compare."): given.pop(key) for key in list(given) if key.startswith("compare.")}
        if "baseline" in asked:
            baselines.setdefault(_named("compare.baseline", asked.pop("baseline")), path)
        ours = {key.removeprefix("axes."): asked.pop(key) for key in list(asked) if key.startswith("axes.")}
        axes += [key for key in ours if key not in axes]
        for run in _runs(given, asked, ours, override):
            _pool(runs, run, path)
    if len(baselines) > 1:
        said = ", ".join(f"{name!r} in {path}" for name, path in baselines.items())
        raise ConfigError(f"compare.baseline is {said}; it is one strategy for all files")
    pooled = list(runs.values())
    return SweepSpec(pooled, _axes(pooled, axes), next(iter(baselines), "ssfl"))


def run_clash(run: RunSpec, theirs: Mapping[str, Any]) -> str | None:
    """Return, as a sentence, the first key by which `theirs` is another run; None if none is.

    Keys that this strategy does not look at are left out: options of other strategies, and mask.density if dense.
    """
    return configuration.first_clash(_matters(run), theirs, whole=True)


def _matters(run: RunSpec) -> Flat:
    read = configuration.SHARED | REGISTRY[str(run.flat["strategy"])].sections()
    unseen = ("mask.density",) if run.dense else ()
    return {k: v for k, v in run.flat.items() if k.partition(".")[0] in ("strategy", *read) and k not in unseen}


def _runs(given: Flat, asked: dict[str, Any], axes: dict[str, Any], override: Flat) -> Iterator[RunSpec]:
    """Yield the runs of one file, all strategies of a seed before the next seed."""
    base = configuration.merge(given)
    if base["run.out"]:
        raise ConfigError(f"run.out is {base['run.out']!r}; `ssfl compare` sets it itself, by --out")
    for key in axes:
        if key in _LISTS:
            raise ConfigError(f"compare.axes has {key}; its values stand in compare.{_LISTS[key]}")
        if key in _NO_AXES:
            raise ConfigError(f"compare.axes has {key}; it makes no other run")
    only: dict[str, Flat] = {}
    for key in [key for key in asked if key.startswith("only.")]:
        name, _, rest = key.removeprefix("only.").partition(".")
        if rest in ("strategy", "run.seed", *OURS):
            raise ConfigError(f"compare.only.{name} has {rest}; it is a key that may differ for one strategy")
        only.setdefault(_named("compare.only", name), {})[rest] = asked.pop(key)
    lists = [_values(f"compare.{_LISTS[key]}", asked.pop(_LISTS[key], [base[key]])) for key in _LISTS]
    strategies = [_named("compare.strategies", name) for name in lists[0]]
    if asked:
        known = [*_LISTS.values(), "baseline", "axes", "only"]
        names = [f"compare.{name}" for name in known]
        raise not_a_key(f"compare.{next(iter(asked))}", names, f"[compare] has {', '.join(known)}")
    points = itertools.product(*(_values(f"compare.axes.{key}", values) for key, values in axes.items()))
    places = [dict(zip(axes, point, strict=True)) for point in points]
    for seed, place, density, strategy in itertools.product(lists[1], places, lists[2], strategies):
        name = str(override.get("strategy", strategy))
        dense = not configuration.find_strategy(name).uses_density
        varied = {"strategy": name, "run.seed": seed} | ({} if dense else {"mask.density": density})
        flat = configuration.merge(given, place, varied, only.get(name, {}), override)
        yield planned(flat, dense, list(axes))


def planned(flat: Flat, dense: bool, axes: Sequence[str] = ()) -> RunSpec:
    """Return the run of a configuration, named after strategy, density, seed and `axes`; ConfigError: a bad value."""
    if flat["data.path"]:  # as `ssfl run` does; what is relative here is not elsewhere
        flat["data.path"] = str(Path(str(flat["data.path"])).expanduser().resolve())
    if type(flat["mask.density"]) is int:
        flat["mask.density"] = float(flat["mask.density"])
    configuration.parse(flat)
    strategy, density, seed = (flat[key] for key in ("strategy", "mask.density", "run.seed"))
    words = [str(strategy), *([] if dense else [f"density {density}"]), f"seed {seed}"]
    parts = [str(strategy), *([] if dense else [f"d{density}"]), f"s{seed}"]
    parts += [f"{key}-{flat[key]}" for key in axes]
    name = " ".join([*words, *(f"{key}={flat[key]}" for key in axes)])
    return RunSpec(re.sub(r"[^\w.+-]", "_", "-".join(parts)), name, flat, dense)


def _pool(runs: dict[str, RunSpec], run: RunSpec, path: Path) -> None:
    """Add `run` unless it is there already; another run under the same name gets the file's name added."""
    for slug in (run.slug, f"{run.slug}-{path.stem}"):
        if slug not in runs:
            runs[slug] = replace(run, slug=slug)
        clash = run_clash(run, runs[slug].flat)
        if clash is None:
            return
    raise ConfigError(f"{path}: there are two runs {run.slug}; {clash}")


def _axes(runs: Sequence[RunSpec], declared: Sequence[str]) -> list[str]:
    """Return the declared axes, and every other key that would mix different runs in a row, or tasks in a table."""
    found, seen = list(declared), [_matters(run) for run in runs]
    for key in configuration.defaults():
        if key in found or key in _NO_AXES:
            continue
        values: dict[str, set[Any]] = {}
        for flat in seen:
            if key in flat:
                group = "" if key.partition(".")[0] in TASK else str(flat["strategy"])
                values.setdefault(group, set()).add(flat[key])
        if any(len(some) > 1 for some in values.values()):
            found.append(key)
    return found


def _values(name: str, values: Any) -> list[Any]:
    if not isinstance(values, list) or not values or any(isinstance(value, list | dict) for value in values):
        raise ConfigError(f"{name} is {values!r}; it is a list of one value or more")
    return values


def _named(key: str, value: Any) -> str:
    configuration.find_strategy(value, key)
    return str(value)
