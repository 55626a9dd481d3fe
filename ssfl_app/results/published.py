"""Published numbers beside measured ones: the table ``[published]`` of a configuration, and the page of many.

The numbers are those that a paper or its authors print, and are written nowhere else: accuracies in percent, MB of
10**6 bytes. 0 and "" mean that none is published.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssfl_app import config as configuration
from ssfl_app.metrics import ACCURACY
from ssfl_app.options import anything, at_least, build, choice, option
from ssfl_app.results.compare_page import origin
from ssfl_app.results.run_folder import CENTRAL, LOCAL, MB, PERSONAL, Run, evaluated, metadata
from ssfl_app.results.table import Table, in_metric, megabytes, percent, shown

METRICS = {
    "central": (CENTRAL, "the global model on all test images"),
    "local": (LOCAL, "the global model, mean over clients' own tests"),
    "personal": (PERSONAL, "personal models, mean over clients' own tests"),
}
"""What an accuracy is of: its key in a record, and the same in words."""
HEADERS = (
    *("row", "state", "accuracy of", "published %", "measured %", "at round"),
    *("published MB", "measured MB", "min"),
)
PUBLISHED = "published"
"""The profile that leaves every row as its file has it."""
# What may be changed without making another run of it; data.name has a warning of its own.
_SAME_RUN = {
    *configuration.RESUME_MAY_CHANGE,
    *("data.name", "data.path", "data.download", "run.device", "run.evaluate-every", "run.checkpoint-every"),
    *("run.round-timeout", "run.join-timeout"),
}
_ACCURACIES = "Accuracy of: " + "; ".join(f"{name}: {words}" for name, (_, words) in METRICS.items()) + "."
_SIZES = (
    "MB are those of a round, of payload, in one direction, as the paper counts: of all clients that train, the "
    "busier direction, or for methods without a server what one client gets from its peers. Discovery, masks that "
    "are sent once, and evaluation are left out."
)
NOTES = (_ACCURACIES, _SIZES, "Min: wall time of the rounds that are played, discovery included.")


@dataclass(frozen=True)
class Published:
    """What is published about a configuration."""

    source: str = anything("a text")  # where it is printed: "Table 1"
    profile: str = anything("a profile")  # that the configuration follows: a file in configs/profiles
    metric: str = choice(*METRICS)  # what the accuracy is of
    accuracy: float = option("a number of percent", lambda value: 0 <= value <= 100, 0.0)
    megabytes: float = at_least(0, 0.0)  # a round, one direction, of all clients of a cohort
    minutes: float = at_least(0, 0.0)  # how long it took
    hardware: str = anything("a text", "")  # and where
    note: str = anything("a text", "")  # what is not known, or was assumed


def read_published(path: Path) -> Published | None:
    """Return the table ``[published]`` of a configuration, None if it has none; ConfigError: one of both is bad."""
    everything = configuration.read_toml(path)
    found = {key.partition(".")[2]: value for key, value in everything.items() if key.startswith("published.")}
    return build(Published, "published", found) if found else None


def listing(rows: Sequence[tuple[str, Published]]) -> Table:
    """Return the published numbers of the rows of a table, for the terminal."""
    made = []
    for name, said in rows:
        numbers = [*_published(said), shown(said.minutes or None, "g")]
        made.append([name, said.source, said.profile, said.metric, *numbers])
    return Table(["row", "source", "profile", "accuracy of", "%", "MB", "min"], made, 4)


def _published(said: Published) -> tuple[str, str]:
    """Return accuracy in percent and MB, as tables show them."""
    return percent(said.accuracy / 100 or None), megabytes(said.megabytes * MB or None)


def overview(found: Mapping[str, Sequence[Published]]) -> Table:
    """Return the tables that there are, with the sources of their rows, for the terminal."""
    sources = {name: "; ".join(dict.fromkeys(said.source for said in all_)) for name, all_ in found.items()}
    rows = [[name, sources[name], str(len(all_))] for name, all_ in found.items()]
    return Table(["table", "sources", "rows"], rows, 2)


@dataclass(frozen=True)
class Line:
    """A row of the table: what is published, and how far its run has come.

    `state` is for people; `run` is None if nothing was played. `data` is the data set of the published number.
    """

    name: str
    published: Published
    data: str
    config: Mapping[str, Any]
    state: str
    run: Run | None


def measured(line: Line) -> dict[str, Any]:
    """Return what was measured: fractions in [0, 1], bytes, seconds; None for what is not known yet."""
    keys = ("accuracy", "round", "rounds", "bytes_a_round", "seconds", *(key for key, _ in METRICS.values()))
    if line.run is None:
        return dict.fromkeys(keys)
    known, rounds = metadata(line.run), len(line.run.rounds)
    places, values = evaluated(line.run, METRICS[line.published.metric][0])
    accuracy, place = (float(values[-1]), int(places[-1])) if len(values) else (None, None)
    # Peers pay for each other's models, each client for itself: the paper states the busiest node.
    peers = (known["bytes_peer"] or 0) / max(1, known["trained_clients"] or 1)
    sent = peers or max(known["bytes_train_down"], known["bytes_train_up"])
    at = None if place is None else line.run.rounds[place]["round"]
    everything = (accuracy, at, rounds, sent / rounds if rounds else None, known["seconds_total"])
    return dict(zip(keys, (*everything, *(known[key] for key, _ in METRICS.values())), strict=True))


def measured_text(line: Line, unit: str = "") -> str:
    """Return the measured accuracy in percent with `unit`, or the value and name of another metric."""
    metric = ACCURACY if line.run is None else line.run.metric
    called = unit if metric == ACCURACY else f"{metric.unit} {metric.name}"
    return in_metric(measured(line)["accuracy"], metric) + called


def cells(line: Line) -> list[str]:
    """Return the row of a line, under the headers of `as_table`."""
    known, (accuracy, mb) = measured(line), _published(line.published)
    minutes = None if known["seconds"] is None else known["seconds"] / 60
    row = [line.name, line.state, line.published.metric, accuracy, measured_text(line), shown(known["round"])]
    took = shown(minutes, ",.1f" if minutes is None or minutes >= 0.1 else ".2g")
    return [*row, mb, megabytes(known["bytes_a_round"]), took]


@dataclass(frozen=True)
class Page:
    """All rows of a table, the profile that they were played with, and the keys of the command line."""

    title: str
    profile: str
    overrides: Mapping[str, Any]
    lines: Sequence[Line]


def as_table(page: Page) -> Table:
    """Return the table of a page."""
    return Table(HEADERS, list(map(cells, page.lines)), 3)


def warnings(page: Page) -> list[str]:
    """Return why measured numbers are not comparable with the published ones, if there is a reason."""
    data = sorted({(line.config["data.name"], line.data) for line in page.lines})
    form = "The data are {}, the published numbers are of {}: do not compare them."
    said = [form.format(ours, theirs) for ours, theirs in data if ours != theirs]
    others = sorted({line.run.metric.name for line in page.lines if line.run and line.run.metric != ACCURACY})
    said += [f"Measured is the {name}, published are accuracies: do not compare them." for name in others]
    profiles = sorted({line.published.profile for line in page.lines} - {page.profile})
    if page.profile != PUBLISHED and profiles:
        said.append(f"Played with the profile {page.profile}; published numbers are of {' and '.join(profiles)}.")
    if changed := ", ".join(f"{key}={value!r}" for key, value in page.overrides.items() if key not in _SAME_RUN):
        said.append(f"Changed on the command line: {changed}. The published numbers are not of that.")
    return said


def markdown(page: Page) -> str:
    """Return the Markdown page: warnings, the table, notes, and where it was played."""
    lines = page.lines
    notes = [*NOTES, *(f"{line.name}: {line.published.note}" for line in lines if line.published.note)]
    places = origin([line.run.environment for line in lines if line.run is not None and line.run.environment])
    made = [f"# {page.title}", "", *(f"**{warning}**\n" for warning in warnings(page))]
    made += [*as_table(page).markdown(), "", *(f"- {note}" for note in notes), ""]
    return "\n".join([*made, *(["; ".join(places) + ".", ""] if places else [])])


def as_json(page: Page) -> dict[str, Any]:
    """Return all numbers of a page."""
    rows = [
        {
            "row": line.name,
            "state": line.state,
            "published": asdict(line.published),
            "measured": measured(line),
            "rounds": line.config["run.rounds"],
            "data": {"published": line.data, "measured": line.config["data.name"]},
            "environment": line.run.environment if line.run is not None else None,
        }
        for line in page.lines
    ]
    return {"title": page.title, "profile": page.profile, "warnings": warnings(page), "rows": rows}
