"""What a sweep file asks for: an ordinary configuration and a table ``[compare]``, as a list of runs.

The table has lists of strategies, seeds and densities, the name of the baseline, further keys with a list of values
each (``[compare.axes]``), keys of single strategies (``[compare.only.<strategy>]``), variants with names of their own
(``[[compare.also]]``), and settings that each row chooses from on other seeds (``[compare.tune]``, see `tuning`).
``-c`` has the last word: a key given there has that value in all runs. A strategy that does not look at mask.density
is played once, not once a density.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ssfl_app import config as configuration
from ssfl_app.config import Flat
from ssfl_app.experiments.run_spec import OURS, TASK, RunSpec, matters, planned, run_clash
from ssfl_app.experiments.tuning import Candidate, Search, read_grids, read_seeds
from ssfl_app.options import ConfigError, flatten, not_a_key
from ssfl_app.strategies import REGISTRY

# Keys with a list of their own in [compare].
_LISTS = {"strategy": "strategies", "run.seed": "seeds", "mask.density": "densities"}
_NO_AXES = (*_LISTS, *configuration.RESUME_MAY_CHANGE)
_SAME_DATA = tuple(name for name in TASK if name != "model")
"""Sections that all rows of a table have in common; a variant may have another model."""
ORDERS = ("seed", "density")


@dataclass
class Block:
    """Runs that are played before those of the next block: with common settings, then the searches."""

    runs: list[RunSpec]
    searches: list[Search]


@dataclass(frozen=True)
class SweepSpec:
    """All runs of a comparison, the keys that tell its tables apart, and the row that others are compared with."""

    blocks: list[Block]
    axes: list[str]
    baseline: str

    @property
    def runs(self) -> list[RunSpec]:
        """The runs with common settings."""
        return [run for block in self.blocks for run in block.runs]

    @property
    def searches(self) -> list[Search]:
        """What each row tries; nothing without ``[compare.tune]``."""
        return [search for block in self.blocks for search in block.searches]


class _Row(NamedTuple):
    """A strategy, or a variant of one: its name and its own values."""

    strategy: str
    variant: str
    own: Flat


class _Cell(NamedTuple):
    """Where a row stands: values of the axes, and the density."""

    place: Flat
    density: float
    row: _Row


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
    pool: dict[str, RunSpec] = {}
    blocks: list[Block] = []
    axes: list[str] = []
    baselines: dict[str, Path] = {}
    for path in files:
        given = configuration.read_file(path, sweep=True)
        asked = {key.removeprefix("compare."): given.pop(key) for key in list(given) if key.startswith("compare.")}
        if len(files) > 1 and any(key.startswith("tune.") for key in asked):
            raise ConfigError(f"compare.tune is in {path}; a file that has it is compared alone")
        if "baseline" in asked:
            baselines.setdefault(_baseline(asked.pop("baseline"), asked), path)
        ours = {key.removeprefix("axes."): asked.pop(key) for key in list(asked) if key.startswith("axes.")}
        axes += [key for key in ours if key not in axes]
        blocks += _File(given, asked, ours, override, path, pool).blocks()
    if len(baselines) > 1:
        said = ", ".join(f"{name!r} in {path}" for name, path in baselines.items())
        raise ConfigError(f"compare.baseline is {said}; it is one strategy for all files")
    if not any(block.searches for block in blocks):  # nothing has to wait for anything
        blocks = [Block([run for block in blocks for run in block.runs], [])]
    return SweepSpec(blocks, _axes(list(pool.values()), axes), next(iter(baselines), "ssfl"))


class _File:
    """One sweep file, checked; new runs go to `pool`."""

    def __init__(
        self,
        given: Flat,
        asked: dict[str, Any],
        axes: dict[str, Any],
        override: Flat,
        path: Path,
        pool: dict[str, RunSpec],
    ) -> None:
        self.given, self.override, self.path, self.pool, self.axes = given, override, path, pool, list(axes)
        base = configuration.merge(given)
        if base["run.out"]:
            raise ConfigError(f"run.out is {base['run.out']!r}; `ssfl compare` sets it itself, by --out")
        for key in axes:
            if key in _LISTS:
                raise ConfigError(f"compare.axes has {key}; its values stand in compare.{_LISTS[key]}")
            if key in _NO_AXES:
                raise ConfigError(f"compare.axes has {key}; it makes no other run")
        self.only: dict[str, Flat] = {}
        for key in [key for key in asked if key.startswith("only.")]:
            name, _, rest = key.removeprefix("only.").partition(".")
            if rest in ("strategy", "run.seed", *OURS):
                raise ConfigError(f"compare.only.{name} has {rest}; it is a key that may differ for one strategy")
            self.only.setdefault(_named("compare.only", name), {})[rest] = asked.pop(key)
        self.order = asked.pop("order", ORDERS[0])
        if self.order not in ORDERS:
            raise ConfigError(f"compare.order is {self.order!r}; it is one of {', '.join(ORDERS)}")
        variants = _variants(asked.pop("also", []), base["strategy"], self.axes)
        tune = {key.removeprefix("tune."): asked.pop(key) for key in list(asked) if key.startswith("tune.")}
        lists = [_values(f"compare.{_LISTS[key]}", asked.pop(_LISTS[key], [base[key]])) for key in _LISTS]
        if asked:
            known = [*_LISTS.values(), "baseline", "order", "axes", "only", "also", "tune"]
            names = [f"compare.{name}" for name in known]
            raise not_a_key(f"compare.{next(iter(asked))}", names, f"[compare] has {', '.join(known)}")
        rows = [*(_Row(_named("compare.strategies", name), "", {}) for name in lists[0]), *variants]
        points = itertools.product(*(_values(f"compare.axes.{key}", values) for key, values in axes.items()))
        self.seeds: list[Any] = [override["run.seed"]] if "run.seed" in override else lists[1]
        self.cells = list(_cells([dict(zip(axes, point, strict=True)) for point in points], lists[2], rows, override))
        self.tuning_seeds: list[int] = []
        self.grids: dict[str, list[Flat]] = {}
        if tune:
            self.tuning_seeds = read_seeds(tune, self.seeds)
            strategies = {row.variant or row.strategy: str(override.get("strategy", row.strategy)) for row in rows}
            self.grids = read_grids(tune, strategies, self.axes, override)

    def blocks(self) -> Iterator[Block]:
        """Yield the runs, all rows of a seed before the next seed, and what they tune; all of a density, if asked."""
        parts = [self.cells]
        if self.order == "density":
            parts = [list(part) for _, part in itertools.groupby(self.cells, lambda cell: (cell.place, cell.density))]
        for part in parts:
            asked = [(cell, self._run(cell, seed)) for seed in self.seeds for cell in part]
            new = [(cell, pooled) for cell, run in asked if (pooled := _pool(self.pool, run, self.path)) is not None]
            searches = []
            for cell in part if self.grids else ():
                if any(cell is each for each, _ in new):  # what is dense is searched at one density
                    searches.append(self._search(cell, [run for each, run in asked if each is cell]))
            yield Block([run for _, run in new], searches)

    def _run(self, cell: _Cell, seed: int, setting: Flat | None = None) -> RunSpec:
        row, tried = cell.row, setting or {}
        name = str(self.override.get("strategy", row.strategy))
        dense = not configuration.find_strategy(name).uses_density
        varied = {"strategy": name} | ({} if dense else {"mask.density": cell.density})
        own = self.only.get(name, {}) | row.own | tried
        layers = self.given, cell.place, varied, own, self.override, {"run.seed": seed}
        settings = [key for key in own if key == "mask.density" or key not in self.override]
        return planned(configuration.merge(*layers), dense, [*self.axes, *tried], row.variant, settings)

    def _search(self, cell: _Cell, common: Sequence[RunSpec]) -> Search:
        """Return what a row tries; a run of the table that is its `common` one of that seed has that one's name."""
        candidates: dict[str, Candidate] = {}
        for setting in self.grids[cell.row.variant or cell.row.strategy]:
            tried = [self._run(cell, seed, setting) for seed in self.tuning_seeds]
            if tried[0].slug in candidates:  # -c has the same value for both
                continue
            final = [self._run(cell, seed, setting) for seed in self.seeds]
            same = [run_clash(run, old.flat) is None for run, old in zip(final, common, strict=True)]
            named = zip(final, common, same, strict=True)
            final = [replace(run, slug=old.slug, name=old.name) if is_it else run for run, old, is_it in named]
            candidates[tried[0].slug] = Candidate(setting, tried, final)
        return Search(list(candidates.values()))


def _cells(
    places: Sequence[Flat], densities: Sequence[float], rows: Sequence[_Row], override: Flat
) -> Iterator[_Cell]:
    """Yield where each row stands: a variant with a mask.density at that alone, the others at all densities."""
    key = "mask.density"
    common = [override[key]] if key in override else densities
    own = [] if key in override else [row.own[key] for row in rows if key in row.own]
    for place, density in itertools.product(places, dict.fromkeys([*common, *own])):
        for row in rows:
            if row.own[key] == density if key in row.own else density in common:
                yield _Cell(place, density, row)


def _baseline(name: Any, asked: Mapping[str, Any]) -> str:
    """Return the baseline of a file: a strategy, or one of its variants."""
    tables = asked.get("also", [])
    variants = [table.get("name") for table in tables if isinstance(table, dict)] if isinstance(tables, list) else []
    return str(name) if name in variants else _named("compare.baseline", name)


def _variants(tables: Any, strategy: Any, axes: Sequence[str]) -> list[_Row]:
    """Return the rows of ``[[compare.also]]``."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"compare.also is {tables!r}; it is tables [[compare.also]], one for each variant")
    rows: list[_Row] = []
    for table in tables:
        own = flatten(table)
        name = own.pop("name", "")
        taken = [*REGISTRY, *(row.variant for row in rows)]
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name) or name in taken:
            rule = "it is a name of letters, digits and . + - _ that no strategy and no other variant has"
            raise ConfigError(f"compare.also has the name {name!r}; {rule}")
        kind = _named(f"strategy of {name} in compare.also", own.pop("strategy", strategy))
        for key in own:
            if key in ("run.seed", "run.clients", "run.cohort", *OURS, *axes) or key.partition(".")[0] in _SAME_DATA:
                raise ConfigError(
                    f"compare.also has {key} for {name}; it is a key that rows of one table may differ in"
                )
        rows.append(_Row(kind, name, own))
    return rows


def _pool(runs: dict[str, RunSpec], run: RunSpec, path: Path) -> RunSpec | None:
    """Add `run` and return it, None if it is there already; another run of its name gets the file's name added."""
    for slug in (run.slug, f"{run.slug}-{path.stem}"):
        if slug not in runs:
            runs[slug] = replace(run, slug=slug)
            return runs[slug]
        clash = run_clash(run, runs[slug].flat)
        if clash is None:
            return None
    raise ConfigError(f"{path}: there are two runs {run.slug}; {clash}")


def _axes(runs: Sequence[RunSpec], declared: Sequence[str]) -> list[str]:
    """Return the declared axes, and every other key that would mix different runs in a row, or tasks in a table.

    What variants have of their own is no axis: they are rows beside the others. Nor is a cohort that is everywhere as
    large as by default: it follows from the number of clients.
    """
    found = list(declared)
    seen = [(run, matters(run)) for run in runs]
    cohorts = {(flat["run.clients"], flat["run.cohort"]) for _, flat in seen}
    follows = all(configuration.complete({"run.clients": n})["run.cohort"] == cohort for n, cohort in cohorts)
    for key in configuration.defaults():
        if key in found or key in _NO_AXES or (key == "run.cohort" and follows):
            continue
        values: dict[str, set[Any]] = {}
        for run, flat in seen:
            if key in flat and not (run.variant and key in run.settings):
                group = "" if key.partition(".")[0] in TASK else run.variant or str(flat["strategy"])
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
