"""How a comparison looks: the Markdown file with its tables and notes, and the picture of metric against costs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ssfl_app.metrics import ACCURACY, Metric, common
from ssfl_app.results.compare import Estimate, Group, Row
from ssfl_app.results.plots import PALETTE, _figure, _finish, _plain
from ssfl_app.results.run_folder import MB
from ssfl_app.results.table import NONE, Table, hours, in_metric, megabytes, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X<>"
CROWD = 24  # rows of a table that need a larger panel
COSTS = ("MB down", "MB up", "peer MB", "image passes", "seconds")
GENERAL = (
    "± is half the 95 % interval of the mean over seeds (Student's t). Own tests: each client's own test images, "
    "the plain mean over clients. MB are of all clients and rounds: training, masks and discovery; what evaluation "
    "sends is left out. Costs are plain means over seeds."
)
GAP = (
    "Δ is in {points}: the personal models if the method has them, else the global one, minus the same of "
    "`{baseline}` at the same density and seeds. p: paired t-test over these seeds; p (Holm): corrected by Holm's "
    "method for all tests of the table; “same” means that all differences are 0."
)
TASK = ("data.name", "partition.name", "model.name", "run.clients", "run.rounds")  # what the line above a table tells


def markdown(
    made: Sequence[Group],
    baseline: str,
    environments: Sequence[Mapping[str, Any]],
    title: str = "Comparison",
    picture: str = "comparison.png",
    notes: Sequence[str] = (),
) -> str:
    """Return the Markdown file: a table for each combination of axes, the picture, notes, and where it was played.

    `environments` has one for each run, `notes` come after those about columns and rows.
    """
    lines = [f"# {title}", ""]
    for group in made:
        if group.axes or group.terms:
            lines += [f"## {_axes(group)}", ""]
        own = any(row.settings for row in group.rows)
        timed = [[hours(row.mean("hours"))] if _timed(group) else [] for row in group.rows]
        table = [
            [name, settings(row), *rest, *last] if own else [name, *rest, *last]
            for row, last in zip(group.rows, timed, strict=True)
            for name, *rest in [cells(row)]
        ]
        named = headers(baseline, group.metric) + ["simulated hours"] * _timed(group)
        named = [named[0], "its settings", *named[1:]] if own else named
        lines += [_task(group), "", *Table(named, table, 1 + own).markdown(), ""]
    title = common(group.metric for group in made).title
    lines += [
        f"![{title} on own tests against bytes]({picture})",
        "",
        *_notes(made, baseline),
        *(f"- {note}" for note in notes),
        "",
    ]
    return "\n".join([*lines, _origin(made, environments), ""])


def _timed(group: Group) -> bool:
    return any(row.mean("hours") is not None for row in group.rows)


def headers(baseline: str, metric: Metric = ACCURACY) -> list[str]:
    """Return the titles of the columns that `cells` fills, whose values are in `metric`."""
    named = "SSFL" if baseline == "ssfl" else f"`{baseline}`"
    own = (f"{what} {metric.column}" for what in ("central", "global on own tests", "personal on own tests"))
    gap = (f"Δ own tests vs {named}", "p", "p (Holm)")
    return ["strategy", "density", "of all params", "clients trained a round", *own, *gap, *COSTS]


def cells(row: Row) -> list[str]:
    """Return a row of the table; one whose runs are all missing has the reason's first word in place of values."""
    name = f"`{row.name}`"
    if not row.seeds:
        reasons = sorted({reason.partition(":")[0] for reason in row.missing.values()})
        return [name, shown(row.wanted, ".3g"), NONE, NONE, ", ".join(reasons), *[NONE] * (5 + len(COSTS))]
    if row.missing:
        name += f" ({len(row.seeds)} of {len(row.seeds) + len(row.missing)} seeds)"
    shares = [_estimate(row.estimate(key), row.metric) for key in ("central", "global", "personal")]
    sizes = [megabytes(row.mean(key)) for key in ("down", "up")] + [megabytes(row.mean("peer") or None)]
    counts = [shown(row.mean("image_passes"), ",.0f"), shown(row.mean("seconds"), ",.0f")]
    densities = [shown(row.mean(key), ".3g") for key in ("density", "density_all")]
    clients = shown(row.mean("trained_clients"), ".3g")
    return [name, *densities, clients, *shares, *_gap(row), *sizes, *counts]


def _estimate(found: Estimate | None, metric: Metric, sign: str = "") -> str:
    if found is None:
        return NONE
    mean = in_metric(found.mean, metric, 1, sign)
    return mean if found.half is None else f"{mean} ± {in_metric(found.half, metric, 1)}"


def _gap(row: Row) -> list[str]:
    found = row.difference
    if found is None:
        return [NONE, NONE, NONE]
    p = "same" if found.same else probability(found.p)
    return [_estimate(found.estimate, row.metric, "+"), p, probability(found.p_holm)]


def probability(p: float | None) -> str:
    """Return a p-value with three decimals."""
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def settings(row: Row) -> str:
    """Return the values that a row has of its own."""
    return ", ".join(f"{key} {value}" for key, value in row.settings.items()) or NONE


def _axes(group: Group) -> str:
    return ", ".join([*(f"{key} = {value}" for key, value in group.axes.items()), *filter(None, [group.terms])])


def _task(group: Group) -> str:
    data, partition, model, clients, rounds = (group.config.get(key) for key in TASK)
    width = float(group.config.get("model.width", 1.0))
    model = str(model) if width == 1.0 else f"{model} of width {width:g}"
    return f"{data}, {partition} partition, {model}, {clients} clients, {rounds} rounds."


def _notes(made: Sequence[Group], baseline: str) -> list[str]:
    rows = [row for group in made for row in group.rows]
    metrics = list(dict.fromkeys(group.metric for group in made))
    points = dict.fromkeys("points" if metric.share else "units of the target" for metric in metrics)
    notes = [GENERAL, GAP.format(baseline=baseline, points=" or ".join(points) or "points")]
    notes += [f"{each.title}: lower is better, and Δ below 0." for each in metrics if not each.higher]
    loose = [row for row in rows if row.wanted is None and row.difference is not None]
    largest = {row.difference.density for row in loose if row.difference}
    if loose and None not in largest:
        at = ", ".join(f"{density:.3g}" for density in sorted(x for x in largest if x is not None))
        notes.append(f"{_names(loose)}: mask.density does not matter; Δ and p are against `{baseline}` at {at}.")
    everyone = [row for row in rows if (row.mean("trained_clients") or 0) > (row.mean("cohort") or math.inf)]
    if everyone:
        notes.append(f"{_names(everyone)}: every client trains in every round; image passes and MB count them all.")
    if any(row.mean("peer") for row in rows):
        notes.append("Peer MB: what the same exchange would cost between peers without a server.")
    looking = [row for row in rows if row.mean("validation_passes")]
    if looking:
        notes.append(f"{_names(looking)}: validates while training; these forward passes are not in image passes.")
    if any(map(_timed, made)):
        profiles = ", ".join(dict.fromkeys(str(group.config.get("clock.profile")) for group in made))
        notes.append(
            f"Simulated hours: what clients of {profiles} would have taken, without evaluation (docs/clock.md)."
        )
    return [f"- {note}" for note in [*notes, *_lost(made)]]


def _lost(made: Sequence[Group]) -> Iterator[str]:
    """Yield why runs are missing, each reason once for all rows of a table that it is about."""
    for group in made:
        told: dict[str, list[str]] = {}
        for row in group.rows:
            of_row: dict[str, list[int]] = {}
            for seed, reason in sorted(row.missing.items()):
                of_row.setdefault(reason, []).append(seed)
            density = [] if row.wanted is None else [f"density {row.wanted:.3g}"]
            for reason, seeds in of_row.items():
                which = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
                told.setdefault(reason, []).append(", ".join([f"`{row.name}`", *density, which]))
        where = f"{_axes(group)}: " if _axes(group) else ""
        yield from (f"{where}{reason}: {'; '.join(rows)}." for reason, rows in told.items())


def _names(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(f"`{row.name}`" for row in rows))


def _origin(made: Sequence[Group], environments: Sequence[Mapping[str, Any]]) -> str:
    rows = [row for group in made for row in group.rows]
    seeds = sorted({seed for row in rows for seed in (*row.seeds, *row.missing)})
    parts = [f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} ({', '.join(map(str, seeds))})"]
    parts.append(f"{len(environments)} runs")  # one may be in two tables
    return "; ".join([*parts, *origin(environments)]) + "."


def origin(environments: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return where runs were played: machines, versions, days."""
    machines = {f"{e.get('cores')} cores of {e.get('cpu')}, {e.get('gpu') or 'no GPU'}" for e in environments}
    parts = sorted(machines)
    for name in ("python", "torch", "flwr", "ssfl-app", "git"):
        versions = sorted({str(e[name]) for e in environments if e.get(name)})
        parts += [f"{name} {' and '.join(versions)}"] if versions else []
    days = sorted({str(e["time"])[:10] for e in environments if e.get("time")})
    return parts + ([days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"] if days else [])


def picture(made: Sequence[Group], names: Sequence[str]) -> "Figure":
    """Return the metric on own tests against MB sent, a panel for each table; bars are 95 % intervals.

    Where runs have a simulated clock, a panel against its hours stands after that of their table. `names` are those
    of all rows, in the order of the legend; colours and markers go by it.
    """
    crowded = max((len(group.rows) for group in made), default=0) > CROWD
    drawn = [(group, by_hours) for group in made for by_hours in [False, True][: 1 + _timed(group)]]
    across = max(1, min(2 if crowded or len(drawn) > len(made) else 3, len(drawn)))
    down, width = max(1, math.ceil(len(drawn) / across)), (8.0 if crowded else 5.4) * across
    columns = max(1, min(len(names), int(13 * width) // (max(map(len, names), default=0) + 9)))
    legend = 0.25 * math.ceil(len(names) / columns)
    figure = _figure(max(7.0, width), (5.6 if crowded else 4.3) * down + legend)
    alike = len({group.metric for group in made}) < 2
    panels = list(figure.subplots(down, across, sharey=alike, squeeze=False).flat)
    for axes, (group, by_hours) in zip(panels, drawn, strict=False):
        _panel(axes, group, names, by_hours)
    for number, axes in enumerate(panels):
        axes.set_visible(number < len(drawn))
        axes.yaxis.label.set_visible(number % across == 0 or not alike)
        if (
            number < len(drawn) and drawn[number][0].metric.share
        ):  # an interval of few seeds may leave what is possible
            low, high = axes.get_ylim()
            axes.set_ylim(max(0.0, low), min(101.0, high))
    # One legend for all panels: a strategy may have points in some of them only.
    pairs = [axes.get_legend_handles_labels() for axes in figure.axes]
    found = {label: handle for handles, labels in pairs for handle, label in zip(handles, labels, strict=True)}
    listed = [name for name in map(_plain, names) if name in found]
    if listed:
        look = {"frameon": False, "fontsize": 9, "ncols": columns}
        figure.legend([found[name] for name in listed], listed, loc="outside lower center", **look)
    return figure


def _panel(axes: "Axes", group: Group, names: Sequence[str], by_hours: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shown = [row for row in group.rows if not by_hours or row.mean("hours") is not None]
    rows = [(row, found) for row in shown if (found := row.estimate("own")) is not None]
    cost, unit = (_hours, "h") if by_hours else (_sent, "MB")
    # A method that sends nothing has no place on a logarithmic axis: it stands at the left, with its 0 written there.
    nothing = min((cost(row) for row, _ in rows if cost(row)), default=1.0) / 2
    scale = group.metric.scale
    for index, name in enumerate(names):
        mine = [(row, found) for row, found in rows if row.name == name]
        xs = [cost(row) or nothing for row, _ in mine]
        ys, bars = [scale * found.mean for _, found in mine], [scale * (found.half or 0) for _, found in mine]
        if not mine:
            continue
        color, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        line = axes.errorbar(xs, ys, yerr=bars, ls=":", lw=0.9, capsize=2, elinewidth=0.9, color=color)
        line[0].set(marker=marker, ms=6, label=_plain(name))
        for part in (*line[1], *line[2]):
            part.set_alpha(0.5)
        for (row, _), x, y in zip(mine, xs, ys, strict=True):
            note = f"{row.density:.3g}" if cost(row) else f"{row.density:.3g} (0 {unit})"
            axes.annotate(note, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7, color=color)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    against, xlabel = "bytes", "MB down and up, with masks and discovery"
    if by_hours:
        against, xlabel = "hours", "Simulated hours"
    title = _axes(group) or f"{group.metric.title} against {against}; numbers are densities"
    words = title, xlabel, group.metric.axis("on own tests")
    _finish(axes, *map(_plain, words))


def _hours(row: Row) -> float:
    return row.mean("hours") or 0.0


def _sent(row: Row) -> float:
    return ((row.mean("down") or 0.0) + (row.mean("up") or 0.0)) / MB
