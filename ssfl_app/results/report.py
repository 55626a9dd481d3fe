"""The HTML report of runs, and the picture and table of a partition."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from ssfl_app.data.summary import ALL
from ssfl_app.files import write_bytes
from ssfl_app.metrics import common
from ssfl_app.options import ConfigError
from ssfl_app.results import page, plots
from ssfl_app.results.rows import compare_table, round_table, summary_table
from ssfl_app.results.run_folder import KINDS, Run, failures, has_clock, metadata, run_names, train_counts
from ssfl_app.results.table import NONE, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def partition_table(counts: ArrayLike, class_names: Sequence[str]) -> Table:
    """Return a table of images, classes held and largest class by client (`plots.check_counts`), or of samples."""
    array = plots.check_counts(counts, class_names)
    if tuple(class_names) == ALL:
        sizes = [[str(client), f"{count:,}"] for client, count in enumerate(array[:, 0])]
        return Table(["Client", "Samples"], [*sizes, ["all", f"{array.sum():,}"]], 1)
    rows = []
    for client, row in enumerate([*array, array.sum(axis=0)]):
        total, top = int(row.sum()), int(row.argmax())
        largest = f"{class_names[top]} ({100 * row[top] / total:.0f} %)" if total else NONE
        name = str(client) if client < len(array) else "all"
        rows.append([name, largest, f"{total:,}", f"{int((row > 0).sum())} of {len(row)}"])
    return Table(["Client", "Largest class", "Samples", "Classes"], rows, 2)


def write_picture(png: Path, draw: "Callable[[], Figure]") -> str:
    """Write the figure that `draw` returns to a PNG file; return the line that tells people where it is, or why not.

    OSError: it was drawn, and cannot be written there.
    """
    made: list[bytes] = []
    if why := undone(lambda: made.append(plots.png_bytes(draw))):
        return f"warning: {png} could not be drawn ({why})"
    write_bytes(png, made[0])
    return f"picture: {png.resolve()}"


def undone(draw: Callable[[], object]) -> str:
    """Draw a page or a picture; return why that cannot be done, or "".

    What is over is not to fail by its pictures, whatever stands in their way: a name that no font has, a library that
    is missing, a disk that is full.
    """
    try:
        draw()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Write a self-contained HTML report of one run or a comparison of several, at least one, to `path`."""
    write_bytes(path, report_page(runs).encode())


def report_page(runs: Sequence[Run]) -> str:
    """Return that report."""
    if not runs:
        raise ConfigError("runs is empty; a report is made of one run or more")
    names = run_names(runs)
    single, known = len(runs) == 1, metadata(runs[0])
    context = {
        "title": names[0] if single else f"{len(runs)} runs compared",
        "subtitle": f"{known['strategy']} on {known['dataset']}" if single else ", ".join(names),
        "warnings": [_unfinished(run) for run in runs if not run.summary],
        "sections": _single(runs[0]) if single else _several(runs),
    }
    return page.render(context)


def _single(run: Run) -> list[dict[str, Any]]:
    config = Table([], [[key, str(value)] for key, value in sorted(run.config.items())])
    environment = Table([], [[key, str(value)] for key, value in run.environment.items()])
    dense = "" if run.layers else "There is no mask in this run folder, so there is no density by layer."
    notes = " ".join(filter(None, [_untested([run]), dense]))
    return [
        page.section("Summary", content=summary_table(metadata(run), metric=run.metric)),
        page.section("Figures", images=_figures([run]), note=notes),
        page.section("Rounds", content=round_table(run), folded=f"{len(run.rounds)} rounds"),
        _failure_section([run]),
        page.section("Configuration", content=config, folded=f"{len(run.config)} keys"),
        page.section("Environment", content=environment, folded=f"{len(run.environment)} entries"),
    ]


def _figures(runs: Sequence[Run]) -> list[dict[str, str]]:
    made: list[tuple[str, Callable[[], Figure]]] = []
    name = common(run.metric for run in runs).title
    if not _untested(runs):
        sent = f"{name} by MB sent: discovery, mask, training and evaluation"
        made += [(f"{name} by round", lambda: plots.accuracy_by_round(runs))]
        made += [(sent, lambda: plots.accuracy_by_bytes(runs))]
        timed = [run for run in runs if has_clock(run)]
        if timed and not _untested(timed):
            profiles = ", ".join(dict.fromkeys(str(run.config["clock.profile"]) for run in timed))
            clock = f"{name} by hours of the simulated clock, without evaluation: clients of {profiles}"
            made += [(clock, lambda: plots.accuracy_by_hours(timed))]
    run, clients = runs[0], (runs[0].clients or {"clients": []})["clients"]
    if len(runs) == 1 and run.layers:
        made.append(("Density by layer", lambda: plots.density_by_layer(run)))
    if len(runs) == 1 and run.clients:
        names = run.clients["class_names"]
        made.append(("Classes by client", lambda: plots.class_distribution(train_counts(run), names)))
        if any(row.get("accuracy") is not None for row in clients):
            made.append((f"{name} by client on its own test samples", lambda: plots.accuracy_by_client(run)))
    return [_figure(caption, draw) for caption, draw in made]


def _untested(runs: Sequence[Run]) -> str:
    """Return why there is no picture of the metric, or ""."""
    name = common(run.metric for run in runs).name
    return "" if any(map(plots.has_accuracy, runs)) else f"No round was evaluated, so there is no {name} to draw."


def _figure(caption: str, draw: "Callable[[], Figure]") -> dict[str, str]:
    made: list[bytes] = []
    if why := undone(lambda: made.append(plots.svg_bytes(draw))):
        return {"caption": f"{caption}: could not be drawn ({why})", "uri": ""}
    return {"caption": caption, "uri": page.data_uri(made[0])}


def _several(runs: Sequence[Run]) -> list[dict[str, Any]]:
    keys = sorted({key for run in runs for key in run.config} - {"run.out"})
    rows = [[key, *(str(run.config.get(key, NONE)) for run in runs)] for key in keys]
    differ = [row for row in rows if len(set(row[1:])) > 1]
    options = Table(["Key", *run_names(runs)], differ) if differ else None
    note = "" if differ else "All runs have the same configuration."
    return [
        page.section("Comparison", content=compare_table(runs)),
        page.section("Figures", images=_figures(runs), note=_untested(runs)),
        _failure_section(runs),
        page.section("Options that differ", content=options, note=note),
    ]


def _failure_section(runs: Sequence[Run]) -> dict[str, Any]:
    named = list(zip(run_names(runs), runs, strict=True))
    found = [(name, failure) for name, run in named for failure in failures(run)]
    title = "Lost and refused replies"
    if not found:
        return page.section(title, note="Every reply arrived and was accepted.")
    rows = [[f"client {x.client}", str(x.round or "setup"), x.kind, x.reason, name] for name, x in found]
    headers = ["Client", "Round", "What", "Reason", "Run"]
    if len(runs) == 1:
        headers, rows = headers[:-1], [row[:-1] for row in rows]
    kinds = Counter(x.kind for _, x in found)
    line = ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kinds[kind] or kind in ("lost", "refused"))
    return page.section(title, content=Table(headers, rows), folded=line)


def _unfinished(run: Run) -> str:
    planned = run.config.get("run.rounds", NONE)
    done = run.rounds[-1]["round"] if run.rounds else 0
    return f"{run.name} is unfinished: {done} of {planned} rounds were written; totals are of those rounds."
