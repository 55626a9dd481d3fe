"""Each row of a comparison with settings of its own: the table ``[compare.tune]``, and the choice.

Every row tries as many settings as every other one, on seeds that the table does not use. What it then plays the
table's seeds with is the setting with the best mean of the headline metric on the tuning seeds.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssfl_app import config as configuration
from ssfl_app.config import Flat
from ssfl_app.experiments.run_spec import OURS, TASK, RunSpec
from ssfl_app.metrics import Metric
from ssfl_app.options import ConfigError
from ssfl_app.results.run_folder import CENTRAL, PERSONAL, Run, metadata

_FIXED = (
    "strategy",
    "run.seed",
    "run.clients",
    "run.cohort",
    "run.rounds",
    "mask.density",
    *OURS,
    *configuration.RESUME_MAY_CHANGE,
)


@dataclass(frozen=True)
class Candidate:
    """A setting that a row tries: its values, and its runs on the tuning seeds and on those of the table."""

    values: Flat
    tried: list[RunSpec]
    final: list[RunSpec]


@dataclass(frozen=True)
class Search:
    """The settings that a row tries at one density and one value of each axis, in the order of its grid."""

    candidates: list[Candidate]


@dataclass(frozen=True)
class Outcome:
    """What became of a run: the headline metric, or why there is none; both None while it is not played."""

    value: float | None = None
    metric: Metric | None = None
    failed: str = ""


@dataclass(frozen=True)
class Choice:
    """What the tuning runs of a row say: the best setting, None while some are not played or if all failed.

    `tried` has for each setting its values, the outcome of each seed and their mean, as JSON has them.
    """

    best: Candidate | None
    tried: list[dict[str, Any]]
    reason: str = ""


def at_an_end(search: Search, best: Candidate) -> Flat:
    """Return the chosen values that are the least or the greatest of three or more: a better one may lie beyond."""
    found: Flat = {}
    for key, value in best.values.items():
        tried = {each.values[key] for each in search.candidates}
        numbers = sorted(x for x in tried if isinstance(x, int | float) and not isinstance(x, bool))
        if len(numbers) >= 3 and value in (numbers[0], numbers[-1]):
            found[key] = value
    return found


def headline(run: Run) -> float | None:
    """Return what a setting is chosen by: the metric of personal models on own tests, else central; None: not finite.

    It is also None if the method has neither.
    """
    known = metadata(run)
    value = known.get(CENTRAL) if known.get(PERSONAL) is None else known[PERSONAL]
    return float(value) if value is not None and math.isfinite(value) else None


def choose(search: Search, outcome: Callable[[RunSpec], Outcome]) -> Choice:
    """Return the setting with the best mean headline over the tuning seeds; of equal ones the first.

    A setting of which a run failed is out.
    """
    best: tuple[float, Metric, Candidate] | None = None
    tried, waiting = list[dict[str, Any]](), 0
    for each in search.candidates:
        found = [outcome(run) for run in each.tried]
        seeds = {str(run.flat["run.seed"]): one.value for run, one in zip(each.tried, found, strict=True)}
        failed = [one.failed for one in found if one.failed]
        values = [one.value for one in found if one.value is not None]
        waiting += sum(one.value is None and not one.failed for one in found)
        mean = statistics.fmean(values) if len(values) == len(found) else None
        tried.append({"settings": each.values, "mean": mean, "seeds": seeds, "failed": failed})
        metric = found[0].metric
        if mean is not None and metric is not None and (best is None or metric.better(mean, best[0])):
            best = mean, metric, each
    if waiting:
        return Choice(None, tried, f"not tuned yet: {waiting} tuning runs are not played")
    if best is None:
        return Choice(None, tried, f"failed: every setting that was tried, the first one: {tried[0]['failed'][0]}")
    return Choice(best[2], tried)


def read_seeds(tune: Mapping[str, Any], taken: Sequence[Any]) -> list[int]:
    """Return the seeds of the tuning runs; ConfigError: one of them is a seed of the table."""
    seeds = _list("compare.tune.seeds", tune.get("seeds", []))
    both = [seed for seed in seeds if seed in taken]
    if both:
        raise ConfigError(f"compare.tune.seeds has {both[0]}; it is a seed that compare.seeds does not have")
    return seeds


def read_grids(
    tune: Mapping[str, Any], rows: Mapping[str, str], axes: Sequence[str], override: Flat
) -> dict[str, list[Flat]]:
    """Return the settings that each row tries: all combinations of the values in its grid.

    That is the grid in ``[compare.tune.only.<row>]``, of its strategy, or the common one in ``[compare.tune]``.

    Parameters
    ----------
    tune : mapping
        The table: dotted key -> list of values, ``seeds``, and ``only.<row>.<key>``.
    rows : mapping
        Name of a row -> its strategy.
    axes : sequence of str
        Keys that tell tables apart.
    override : mapping
        What ``-c`` says: such a key has that one value.

    Raises
    ------
    ConfigError
        A key cannot be tuned, or rows would try different numbers of settings.
    """
    common: dict[str, list[Any]] = {}
    special: dict[str, dict[str, list[Any]]] = {}
    names = sorted({*rows, *rows.values()}, key=len, reverse=True)
    for key, values in tune.items():
        if key == "seeds":
            continue
        grid, where, rest = common, "compare.tune", key
        if key.startswith("only."):
            rest = key.removeprefix("only.")
            name = next((name for name in names if rest.startswith(f"{name}.")), None)
            if name is None:
                rule = f"it is one of {', '.join(rows)}"
                raise ConfigError(f"compare.tune.only is {rest.partition('.')[0]!r}; {rule}")
            rest, where = rest.removeprefix(f"{name}."), f"compare.tune.only.{name}"
            grid = special.setdefault(name, {})
        if rest in (*_FIXED, *axes) or rest.partition(".")[0] in TASK:
            raise ConfigError(f"{where} has {rest}; it is a key that rows of one table may differ in")
        grid[rest] = _list(f"{where}.{rest}", values)
    grids = {name: special.get(name, special.get(strategy, common)) for name, strategy in rows.items()}
    sizes = {name: math.prod(map(len, grid.values())) if grid else 0 for name, grid in grids.items()}
    for name, grid in grids.items():
        for key in grid:
            if key.partition(".")[0] not in configuration.SHARED | configuration.find_strategy(rows[name]).sections():
                where = f"compare.tune.only.{name} has the grid of a strategy that does not"
                raise ConfigError(f"compare.tune has {key}; {rows[name]} does not look at it: {where}")
        first = next(iter(sizes))
        if not sizes[name] or sizes[name] != sizes[first]:
            rule = "every row tries the same number of settings, one or more"
            raise ConfigError(
                f"compare.tune has {sizes[name]} settings for {name}, {sizes[first]} for {first}; {rule}"
            )
    fixed = {
        name: {k: [override[k]] if k in override else v for k, v in grid.items()} for name, grid in grids.items()
    }
    return {
        name: [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        for name, grid in fixed.items()
    }


def _list(name: str, values: Any) -> list[Any]:
    good = isinstance(values, list) and values and not any(isinstance(value, list | dict) for value in values)
    if not good or len(set(values)) < len(values):
        raise ConfigError(f"{name} is {values!r}; it is a list of one value or more, each once")
    return list(values)
