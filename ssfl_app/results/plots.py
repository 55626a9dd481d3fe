"""Figures of runs and partitions, each a matplotlib `Figure` of its own (no pyplot, no global state).

Colours are those of Okabe and Ito, which stay apart for colour-blind readers; line styles change too.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssfl_app.metrics import common
from ssfl_app.options import ConfigError
from ssfl_app.results import run_folder
from ssfl_app.results.run_folder import Run
from ssfl_app.results.table import in_metric
from ssfl_app.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
LINES = ("-", "--", "-.", ":")
INK, FAINT = "#333333", "#DDDDDD"
# A linear axis squeezes what is small into its edge: one run that spans this, or runs whose ends do.
LOG_SPAN, LOG_BETWEEN = 100.0, 5.0
MANY = 1000  # clients: with more, a picture does not grow with their number


def png_bytes(draw: Callable[[], "Figure"]) -> bytes:
    """Return the figure that `draw` returns as a PNG file."""
    from ssfl_app.results import canvas

    return canvas.saved(draw, format="png", dpi=150)


def svg_bytes(draw: Callable[[], "Figure"]) -> bytes:
    """Return that figure as an SVG file, the same each time; text is drawn as paths and needs no font to show it."""
    from ssfl_app.results import canvas

    return canvas.saved(draw, format="svg", metadata={"Date": None})


def has_accuracy(run: Run) -> bool:
    """Return whether any round of a run was evaluated, so that there is something to draw."""
    keys = (run_folder.CENTRAL, run_folder.LOCAL, run_folder.PERSONAL)
    return any(len(run_folder.evaluated(run, key)[0]) for key in keys)


def accuracy_by_round(runs: Sequence[Run]) -> "Figure":
    """Return the metric over rounds, a panel for each of the models that any run tested (`has_accuracy`)."""
    return _accuracy(runs, [run_folder.round_numbers(run).astype(float) for run in runs], "Round")


def accuracy_by_bytes(runs: Sequence[Run]) -> "Figure":
    """Return the metric over the MB sent down and up so far; the axis is logarithmic where it spans much."""
    return _accuracy(runs, [run_folder.cumulative_mb(run) for run in runs], "Sent so far, down and up (MB)")


def accuracy_by_hours(runs: Sequence[Run]) -> "Figure":
    """Return the metric over the hours of the simulated clock, which these runs have (`run_folder.has_clock`)."""
    return _accuracy(runs, [run_folder.cumulative_hours(run) for run in runs], "Simulated hours so far")


def _accuracy(runs: Sequence[Run], xs: Sequence[NDArray[np.float64]], xlabel: str) -> "Figure":
    own = "Clients' own test samples, mean"
    titles = {run_folder.CENTRAL: "Central test set", run_folder.LOCAL: own}
    titles |= {run_folder.PERSONAL: f"{own}: personal models"}
    found = {key: [run_folder.evaluated(run, key) for run in runs] for key in titles}
    shown = [key for key in titles if any(len(at) for at, _ in found[key])]
    labels = [_plain(label) for label in run_folder.run_labels(runs)]
    columns = max(1, min(len(runs), 130 // (max(map(len, labels), default=0) + 8)))
    lines = math.ceil(len(runs) / columns)
    figure = _figure(max(10.0, 4.6 * len(shown)), 3.9 + 0.22 * lines)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    handles: dict[int, Line2D] = {}
    ylabel = _plain(common(run.metric for run in runs).axis())
    for axes, key in zip(panels, shown, strict=True):
        for index, ((at, values), x, label) in enumerate(zip(found[key], xs, labels, strict=True)):
            if not len(at):  # an empty line has a place, the corner of the picture, and the panels shrink to nothing
                continue
            marker, line = "o" if len(at) <= 40 else "", LINES[index // len(PALETTE) % len(LINES)]
            look: dict[str, Any] = {"ls": line, "color": PALETTE[index % len(PALETTE)]}
            look |= {"marker": marker, "ms": 3.5, "lw": 1.6, "label": label, "clip_on": False}
            handles.setdefault(index, *axes.plot(x[at], runs[index].metric.scale * values, **look))
        _finish(axes, titles[key], xlabel, ylabel if axes is panels[0] else "")
        _x_axis(axes, [x[at] for (at, _), x in zip(found[key], xs, strict=True) if len(at)], xlabel)
    shape = {"ncols": math.ceil(len(runs) / lines), "fontsize": 9}
    lines_of_runs = [handles[index] for index in sorted(handles)]
    figure.legend(handles=lines_of_runs, loc="outside lower center", frameon=False, **shape)
    return figure


def _x_axis(axes: "Axes", xs: Sequence[NDArray[np.float64]], xlabel: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    low, ends = min((x.min() for x in xs), default=0.0), [x.max() for x in xs]
    if xlabel == "Round":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    elif low > 0 and (max(ends) / low > LOG_SPAN or max(ends) / min(ends) > LOG_BETWEEN):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    else:
        axes.set_xlim(left=0)


def density_by_layer(run: Run) -> "Figure":
    """Return the share of alive weights of each masked layer, in percent.

    ConfigError: the run has no mask (it is dense, or was stopped before it had one).
    """
    if not run.layers:
        raise ConfigError(f"{run.folder} has no mask.safetensors; a density plot needs a sparse run")
    densities = [100 * layer.alive / max(1, layer.size) for layer in run.layers]
    whole = 100 * sum(layer.alive for layer in run.layers) / max(1, sum(layer.size for layer in run.layers))
    figure = _figure(9.0, 1.5 + 0.19 * max(4, len(densities)))
    axes = figure.subplots()
    rows, beside = np.arange(len(densities)), axes.get_yaxis_transform()
    axes.barh(rows, densities, height=0.72, color=PALETTE[0])
    axes.axvline(whole, color=PALETTE[1], lw=1.2, ls="--", label=f"all layers together: {whole:.2f} %")
    axes.set_yticks(rows, [_plain(_short(layer.name, 44)) for layer in run.layers], fontsize=7.5)
    axes.set_ylim(len(densities) - 0.4, -0.6)
    for row, layer, density in zip(rows, run.layers, densities, strict=True):
        notes = (1.09, "right", f"{density:.2f} %"), (1.11, "left", f"{layer.alive:,} of {layer.size:,}")
        for x, side, note in notes:
            axes.text(x, float(row), note, ha=side, va="center", fontsize=7, color=INK, transform=beside)
    _finish(axes, "Alive weights by layer", "Alive weights (%)", "")
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    return figure


def class_distribution(counts: ArrayLike, class_names: Sequence[str]) -> "Figure":
    """Return a heat map of images by client and class (`check_counts`), with each client's total beside it."""
    from matplotlib.colors import PowerNorm

    table = check_counts(counts, class_names)
    clients, classes = table.shape
    width, height = float(np.clip(4.2 + 0.3 * classes, 7, 14)), float(np.clip(2.0 + 0.24 * clients, 3.2, 13))
    figure = _figure(width, height)
    grid = {"width_ratios": [max(3.0, width - 3.5), 1.4]}
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw=grid)
    # The root keeps a handful of images visible next to a class with hundreds.
    norm = PowerNorm(0.5, vmin=0, vmax=max(1, int(table.max())))
    image = left.imshow(table, aspect="auto", cmap="Blues", norm=norm, interpolation="nearest")
    if classes <= 12 and clients <= 40:
        _write_cells(left, table)
    _finish(left, "Training samples by client and class", "Class", "Client")
    _finish(right, "", "Samples", "")
    left.grid(visible=False)
    right.grid(visible=False, axis="y")
    step = math.ceil(clients * 0.16 / (height - 1.5))
    left.set_yticks(range(0, clients, step))
    _class_ticks(left, class_names, width - 3.0)
    if clients <= MANY:
        right.barh(range(clients), table.sum(axis=1), height=0.75, color=PALETTE[0])
    else:  # one shape, not one a client
        shape = {"orientation": "horizontal", "fill": True, "color": PALETTE[0], "rasterized": True}
        right.stairs(table.sum(axis=1), np.arange(clients + 1) - 0.5, **shape)
    right.tick_params(left=False, labelleft=False)
    figure.colorbar(image, ax=right, label="Samples in a cell", shrink=min(1.0, 4 / height), aspect=18)
    return figure


def check_counts(counts: ArrayLike, class_names: Sequence[str]) -> NDArray[np.int64]:
    """Return the images of client k in class c as an array of shape (K, C), or say why it is none (ConfigError)."""
    table = np.asarray(counts, dtype=np.int64)
    if table.ndim != 2 or table.size == 0 or table.shape[1] != len(class_names):
        rule = f"it is (clients, classes) with one column for each of the {len(class_names)} class names"
        raise ConfigError(f"counts has shape {table.shape}; {rule}")
    return table


def _write_cells(axes: "Axes", table: NDArray[np.int64]) -> None:
    dark = table > 0.3 * table.max()
    for row, column in np.argwhere(table > 0).tolist():
        color = "white" if dark[row, column] else INK
        axes.text(column, row, f"{table[row, column]}", ha="center", va="center", fontsize=7, color=color)


def _class_ticks(axes: "Axes", class_names: Sequence[str], inches: float) -> None:
    step = math.ceil(len(class_names) * 0.17 / inches)
    names = [_plain(_short(str(name), 18)) for name in class_names]
    rotation = 0 if max(map(len, names)) * len(names) * 0.09 < inches else 90
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=rotation, fontsize=8)


def accuracy_by_client(run: Run) -> "Figure":
    """Return each client's metric on its own test images against its number of training images.

    Where all clients have about as many, it is against the client's number instead. The three clients that it serves
    worst are named. The line is the plain mean over clients. ConfigError: no client of the run has an accuracy.
    """
    rows = run.clients["clients"] if run.clients else []
    kept = [index for index, row in enumerate(rows) if row.get("accuracy") is not None]
    if not kept:
        raise ConfigError(f"{run.folder} has no client accuracies; the plot needs them in clients.json")
    images = run_folder.train_counts(run).sum(axis=1)[kept]
    metric = run.metric
    accuracy = metric.scale * np.array([rows[index]["accuracy"] for index in kept], dtype=float)
    figure = _figure(9.0, 4.2)
    axes = figure.subplots()
    xs, xlabel = images, "Training samples of the client"
    if images.min() >= 0.95 * images.max():
        xs = np.array([int(rows[index]["client"]) for index in kept])
        xlabel = f"Client ({images.min()} to {images.max()} training samples each)"
        axes.locator_params(axis="x", integer=True)
    dots = axes.scatter(xs, accuracy, s=34, color=PALETTE[0], alpha=0.75, lw=0, clip_on=False, zorder=3)
    dots.set_rasterized(len(kept) > MANY)
    mean = f"mean of {len(kept)} clients: {in_metric(accuracy.mean() / metric.scale, metric)}{metric.unit}"
    axes.axhline(accuracy.mean(), color=PALETTE[1], lw=1.2, ls="--", label=mean)
    for index in np.argsort(accuracy if metric.higher else -accuracy, kind="stable")[:3]:
        row, point = rows[kept[index]], (float(xs[index]), float(accuracy[index]))
        name = _plain(row.get("name") or f"client {row['client']}")
        axes.annotate(name, point, xytext=(6, -3), textcoords="offset points", fontsize=8, color=INK)
    ylabel = _plain(metric.axis("on its own test samples"))
    _finish(axes, _plain(f"{metric.title} by client: {run_folder.run_labels([run])[0]}"), xlabel, ylabel)
    _x_axis(axes, [xs.astype(float)], xlabel)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    return figure


def _figure(width: float, height: float) -> "Figure":
    from ssfl_app.results import canvas

    return canvas.Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _finish(axes: "Axes", title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.grid(visible=True, color=FAINT, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")


def _plain(text: str) -> str:
    # matplotlib reads text between dollar signs as a formula, and fails on one that is none.
    return printable(str(text)).replace("$", r"\$")


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit // 2 - 1] + "…" + text[-(limit // 2) :]
