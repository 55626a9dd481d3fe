"""Many runs as one comparison: means over seeds with 95 % intervals, and paired tests against a baseline.

A row is a strategy or variant at a density, with one run a seed; a group holds the rows that agree on all further
axes.
Accuracies are fractions in [0, 1], or values of another metric, sizes bytes. `compare_page` says how it looks.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ssfl_app.metrics import ACCURACY, Metric
from ssfl_app.options import ConfigError
from ssfl_app.results.run_folder import CENTRAL, LOCAL, PERSONAL, Run, metadata

Numbers = dict[str, float | None]
GAP = {"p": "p", "p_holm": "p_holm", "same": "same", "at": "density"}  # in JSON -> of a Difference
COMMON, OWN = "common settings", "own settings"


@dataclass(frozen=True)
class Entry:
    """One run that belongs to a comparison, finished or not."""

    config: Mapping[str, Any]  # resolved: dotted key -> value
    dense: bool  # whether its row stands at no density: its strategy does not look at mask.density
    run: Run | None  # None if it is not finished
    reason: str = ""  # why there is no run: "failed: loss is NaN", "not played"
    variant: str = ""  # the name of its row if that is not the strategy's
    settings: Mapping[str, Any] = field(default_factory=dict)  # what its row has values of its own for


class Estimate(NamedTuple):
    """A mean over `seeds` seeds and half the width of its 95 % interval, None for a single seed."""

    mean: float
    half: float | None
    seeds: int


class Difference(NamedTuple):
    """The metric on own tests minus the baseline's over their common seeds.

    `p` is that of the paired t-test, None where there is none: fewer than two common seeds, or no spread in the
    differences; `same` says that they are all 0. `density` is the mask.density of the baseline's row. `p_holm` is p
    corrected for all tests of the table.
    """

    estimate: Estimate
    p: float | None
    same: bool
    density: float | None
    p_holm: float | None = None


@dataclass
class Row:
    """A strategy or a variant of one at a density: the numbers of each seed's run, and why a seed has none.

    `wanted` is mask.density, None for a strategy that does not look at it. `settings` are the values that the row has
    of its own.
    """

    strategy: str
    wanted: float | None
    variant: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: dict[int, Numbers] = field(default_factory=dict)
    missing: dict[int, str] = field(default_factory=dict)
    difference: Difference | None = None
    metric: Metric = ACCURACY

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.variant or self.strategy

    def values(self, key: str) -> dict[int, float]:
        """Return seed -> the number `key` of its run, where that is known."""
        found = {seed: known.get(key) for seed, known in sorted(self.seeds.items())}
        return {seed: value for seed, value in found.items() if value is not None}

    def estimate(self, key: str) -> Estimate | None:
        """Return mean and interval of the number `key`, None if no run has it."""
        return estimate(self.values(key).values())

    def mean(self, key: str) -> float | None:
        """Return the mean of the number `key`, None if no run has it."""
        found = self.estimate(key)
        return None if found is None else found.mean

    @property
    def density(self) -> float:
        """What the rows are sorted by: the wanted density, else the one that was reached, else 1."""
        reached = self.mean("density")
        return self.wanted if self.wanted is not None else 1.0 if reached is None else reached


@dataclass(frozen=True)
class Group:
    """The rows that agree on `axes` (key -> value); `config` is the configuration of one of their runs.

    `terms` is `COMMON` or `OWN` where each row is also played with settings that were chosen for it, else "".
    """

    axes: dict[str, Any]
    config: Mapping[str, Any]
    rows: list[Row]
    terms: str = ""

    @property
    def metric(self) -> Metric:
        """The one of all its runs."""
        return next((row.metric for row in self.rows if row.seeds), ACCURACY)


def estimate(values: Iterable[float]) -> Estimate | None:
    """Return the mean of `values` and the half width of its 95 % interval by Student's t; None of no values."""
    from scipy import stats

    known = list(values)
    if not known:
        return None
    if len(known) == 1:
        return Estimate(known[0], None, 1)
    half = float(stats.t.ppf(0.975, len(known) - 1)) * statistics.stdev(known) / math.sqrt(len(known))
    return Estimate(statistics.fmean(known), half, len(known))


def numbers(run: Run) -> Numbers:
    """Return what a run contributes to a comparison; None where its folder does not say.

    ``own`` is the metric on the clients' own tests: of the personal models if the method has them, else of the
    global one. ``down`` and ``up`` are bytes of training, masks and discovery, without evaluation. ``hours`` is there
    with a simulated clock only.
    """
    known = metadata(run)

    def total(*keys: str) -> int:
        return sum(known.get(f"bytes_{key}") or 0 for key in keys)

    made = {
        "central": known.get(CENTRAL),
        "global": known.get(LOCAL),
        "personal": known.get(PERSONAL),
        "own": known.get(LOCAL) if known.get(PERSONAL) is None else known.get(PERSONAL),
        "down": total("train_down", "discovery_down"),
        "up": total("train_up", "discovery_up"),
        "peer": total("peer"),
        "seconds": known.get("seconds_total"),
    }
    kept = ("density", "density_all", "trained_clients", "cohort", "image_passes", "validation_passes")
    made |= {key: known.get(key) for key in kept}
    made |= {"hours": known["simulated_hours"]} if "simulated_hours" in known else {}
    return {key: None if x is None or not math.isfinite(x) else float(x) for key, x in made.items()}


def difference(row: Row, baseline: Row) -> Difference | None:
    """Return the difference of `row` to `baseline` on own tests; None if they have no seed in common."""
    from scipy import stats

    ours, theirs = row.values("own"), baseline.values("own")
    common = sorted(ours.keys() & theirs.keys())
    pairs = [ours[seed] for seed in common], [theirs[seed] for seed in common]
    apart = [a - b for a, b in zip(*pairs, strict=True)]
    mean = estimate(apart)
    if mean is None:
        return None
    spread = max(apart) - min(apart) > 1e-12  # without it t is infinite, or what rounding makes of it
    p = float(stats.ttest_rel(*pairs).pvalue) if spread else None
    return Difference(mean, p, len(common) > 1 and not any(apart), baseline.wanted)


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number: the chance that any of the tests is wrong stays at the level.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979: the
    i-th smallest of m is multiplied by m - i + 1, is never below a smaller one, and at most 1.
    """
    known = np.array(values, dtype=np.float64)
    order = np.argsort(known, kind="stable")
    made = np.empty_like(known)
    made[order] = np.maximum.accumulate(known[order] * np.arange(len(known), 0, -1)).clip(max=1.0)
    return [float(value) for value in made]


def groups(entries: Sequence[Entry], axes: Sequence[str], baseline: str, terms: str = "") -> list[Group]:
    """Return one group for each combination of values of `axes`, in the order of `entries`.

    Rows are sorted by falling density, then as they first appear. A row's difference is that to the `baseline` at the
    same density; a strategy without a density is compared with the largest one. The tests of a group are one family
    for Holm's correction.
    """
    made: dict[tuple[Any, ...], Group] = {}
    order: dict[str, int] = {}
    for entry in entries:
        values = {key: entry.config.get(key) for key in axes}
        group = made.setdefault(tuple(values.values()), Group(values, entry.config, [], terms))
        strategy, wanted = str(entry.config["strategy"]), None if entry.dense else float(entry.config["mask.density"])
        new = Row(strategy, wanted, entry.variant, entry.settings)
        order.setdefault(new.name, len(order))
        row = next((row for row in group.rows if (row.name, row.wanted) == (new.name, wanted)), None)
        if row is None:
            row = new
            group.rows.append(row)
        seed = int(entry.config["run.seed"])
        if entry.run is None:
            row.missing[seed] = entry.reason
        else:
            if any(each.seeds and each.metric != entry.run.metric for each in group.rows):
                rule = "it has that of the other runs of its table"
                raise ConfigError(f"the metric of {entry.run.folder} is {entry.run.metric.name}; {rule}")
            row.seeds[seed], row.metric = numbers(entry.run), entry.run.metric
    for group in made.values():
        group.rows.sort(key=lambda row: (-row.density, order[row.name]))
        for row in group.rows:
            other = _baseline(row, group.rows, baseline)
            row.difference = None if other is None else difference(row, other)
        tested = [(row, gap) for row in group.rows if (gap := row.difference) and gap.p is not None]
        corrected = holm([gap.p for _, gap in tested if gap.p is not None])
        for (row, gap), p in zip(tested, corrected, strict=True):
            row.difference = gap._replace(p_holm=p)
    return list(made.values())


def _baseline(row: Row, rows: Sequence[Row], baseline: str) -> Row | None:
    """Return the row that `row` is compared with; None for the baseline itself and where there is none."""
    theirs = [other for other in rows if other.name == baseline]
    if row.name == baseline or not theirs:
        return None
    if row.wanted is None or theirs[0].wanted is None:
        return theirs[0]  # rows are sorted: the largest density
    return next((other for other in theirs if other.wanted == row.wanted), None)


def as_json(made: Sequence[Group], baseline: str, environments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return all numbers of a comparison: means, intervals, tests, and those of every seed."""
    content = []
    for group in made:
        rows = []
        for row in group.rows:
            keys = next(iter(row.seeds.values()), {})
            estimates = {key: row.estimate(key) for key in keys}
            gap = row.difference
            rows.append(
                {
                    "row": row.name,
                    "strategy": row.strategy,
                    "settings": dict(row.settings),
                    "mask_density": row.wanted,
                    "metric": row.metric.metadata(),
                    "means": {key: None if found is None else _named(found) for key, found in estimates.items()},
                    "difference": gap and _named(gap.estimate) | {k: getattr(gap, a) for k, a in GAP.items()},
                    "seeds": {str(seed): row.seeds[seed] for seed in sorted(row.seeds)},
                    "missing": {str(seed): row.missing[seed] for seed in sorted(row.missing)},
                }
            )
        content.append({"axes": group.axes, "terms": group.terms, "rows": rows})
    places = [{key: value for key, value in place.items() if key != "time"} for place in environments]
    unique = [place for index, place in enumerate(places) if place not in places[:index]]
    return {"baseline": baseline, "tables": content, "environments": unique}


def _named(found: Estimate) -> dict[str, float | int | None]:
    return {"mean": found.mean, "half_width_95": found.half, "seeds": found.seeds}
