"""Figures of the studies: mask error against minibatches, and accuracy against a client's images and classes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ssfl_app.metrics import ACCURACY, common
from ssfl_app.results.client_study import ClientPoints, Spearman
from ssfl_app.results.plots import INK, LINES, PALETTE, _figure, _finish, _plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Errors = dict[str, dict[str, NDArray[np.float64]]]

SCORES, GRADIENT, DRAWS = "mean-of-scores", "score-of-mean-gradient", "mean-of-draws"
MEASURES = ("error", "jaccard", "flip-rate")
LEGENDS = {
    SCORES: "(a) mean of scores: mean of |g·w| over all training images, {cut} minibatches of one client each",
    GRADIENT: "(b) score of the mean gradient: |mean(g)·w| over the same; signs cancel, more batches do not reach it",
    DRAWS: "(a') mean of scores over all {drawn} minibatches the n are drawn from: 0 with all of them",
}
TITLES = {
    "error": "Mask error |A xor B| / 2k",
    "jaccard": "Jaccard distance 1 - |A and B| / |A or B|",
    "flip-rate": "Flip rate |A xor B| / d",
}


def mask_error(
    batches: Sequence[int], errors: Errors, clients: int, minibatches: Mapping[str, int], title: str
) -> "Figure":
    """Return the errors over the number of minibatches, a panel a measure and a line an oracle.

    `errors` has fractions of shape (repeats, len(batches)) by oracle and measure: the line is the mean, the band
    reaches from the least to the greatest. At n = `clients` there is one minibatch a client. `minibatches` has "cut"
    and "drawn": of how many the oracles are made.
    """
    figure = _figure(13.0, 4.9)
    figure.suptitle(_plain(title), fontsize=9.5, color=INK, x=0.01, ha="left")
    panels = figure.subplots(1, len(MEASURES))
    for axes, measure in zip(panels, MEASURES, strict=True):
        for index, oracle in enumerate(errors):
            table, color = 100 * errors[oracle][measure], PALETTE[index]
            axes.fill_between(batches, table.min(axis=0), table.max(axis=0), color=color, alpha=0.18, lw=0)
            look = {"ls": LINES[index], "color": color, "marker": "o", "ms": 3.5, "lw": 1.6, "clip_on": False}
            axes.plot(batches, table.mean(axis=0), **look, label=LEGENDS[oracle].format(**minibatches))
        _finish(axes, TITLES[measure], "Minibatches in the mean score, n", "%")
        _minibatch_axis(axes, batches, clients)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", frameon=False, fontsize=8.5, ncols=1)
    return figure


def _minibatch_axis(axes: "Axes", batches: Sequence[int], clients: int) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(batches)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylim(0, max(1e-9, 1.06 * axes.get_ylim()[1]))  # room for the words
    axes.axvline(clients, color=INK, lw=1.0, ls=":")
    far = clients > max(batches) / 4  # then there is no room on the right
    axes.annotate(
        f"K = {clients}: one minibatch a client",
        (clients, 0.98),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-3 if far else 3, 0),
        textcoords="offset points",
        ha="right" if far else "left",
        va="top",
        fontsize=7.5,
        color=INK,
    )


def accuracy_by_clients(groups: Sequence[ClientPoints]) -> "Figure":
    """Return each client's metric against its images and against the entropy of its classes, a colour a run.

    The legend has Spearman's correlation of it with images, entropy and number of classes; "none" where
    one of the two is the same for all clients.
    """
    figure = _figure(11.0, 4.2 + 0.22 * len(groups))
    left, right = figure.subplots(1, 2, sharey=True)
    for index, group in enumerate(groups):
        look = {"color": PALETTE[index % len(PALETTE)], "marker": "osD^v"[index // len(PALETTE) % 5]}
        for axes, xs in ((left, group.images), (right, group.entropy)):
            axes.scatter(
                xs, group.metric.scale * group.accuracy, **look, s=30, alpha=0.7, lw=0, clip_on=False, zorder=3
            )
        axes.scatter([], [], **look, s=30, label=_plain(legend(group)))
    kinds = {group.personal for group in groups}
    models = " and ".join(name for name, has in (("personal", True), ("global", False)) if has in kinds)
    metric = common(group.metric for group in groups)
    name, words = _plain(metric.title), metric.axis(f"of the {models} model\non the client's own test samples")
    ylabel = "\n".join(map(_plain, words.split("\n")))
    _finish(left, f"{name} and number of samples", "Training samples of the client", ylabel)
    _finish(right, f"{name} and spread of classes", "Entropy of the client's classes (bits)", "")
    left.locator_params(axis="x", integer=True)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=8.5)
    return figure


def legend(group: ClientPoints) -> str:
    """Return a run and its correlations in a line."""
    names = (("images", "samples"), ("entropy", "entropy"), ("classes", "number of classes"))
    found = ", ".join(f"{text} {_rho(group.spearman[key])}" for key, text in names)
    models = "personal models" if group.personal else "global model"
    of = "" if group.metric == ACCURACY else f" of {group.metric.name}"
    return f"{group.label}, {models}, {len(group.clients)} clients; Spearman{of} with {found}"


def _rho(found: Spearman) -> str:
    return "none" if found is None else f"{found[0]:+.2f} (p = {found[1]:.2g})"
