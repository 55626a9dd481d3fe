"""What `ssfl reproduce` does: play the rows of a published table, as many as fit into a budget of time.

A run lives in ``DIR/<row>``; `jobs` says what becomes of a folder that is there already.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssfl_app import config as configuration
from ssfl_app.experiments import jobs
from ssfl_app.experiments.reproduce_rows import Row, read_rows, tables
from ssfl_app.experiments.run_spec import RunSpec
from ssfl_app.files import write_bytes, write_json
from ssfl_app.options import ConfigError
from ssfl_app.results import published
from ssfl_app.results.published import Line, Page, as_json, as_table, listing, markdown, overview, warnings
from ssfl_app.results.run_folder import Run, read_run, train_counts
from ssfl_app.results.table import percent
from ssfl_app.simulation.command import Engine
from ssfl_app.strategies import REGISTRY

RECENT = 10  # rounds that the speed of a row is taken from

Say = Callable[[str], None]


def reproduce(
    table: str, profile: str, overrides: Sequence[str], budget: str, out: Path | None, engine: Engine, say: Say
) -> None:
    """Play what fits and write the table; exit with 1 if a run failed, or on Ctrl-C.

    The arguments are those of `ssfl reproduce`. ConfigError: a row cannot be played, or its folder holds another run;
    nothing was played.
    """
    seconds, override = jobs.read_budget(budget), configuration.read_overrides(overrides)
    rows = read_rows(table, profile, override)
    folder = (out or Path("runs") / f"reproduce-{table}-{profile}").expanduser().resolve()
    _check(rows)
    progress = Progress({row.name: row for row in rows}, folder, say)
    result, choose = progress.result, progress.choose
    runs = [row.run for row in rows]
    played = jobs.play(runs, folder, engine, say, result, homes=folder, budget=seconds, choose=choose)
    lines = [progress.line(row, played.failed.get(row.name, "")) for row in rows]
    page = Page(f"{table}, profile {profile}", profile, override, lines)
    write_json(folder / "reproduce.json", as_json(page))
    write_bytes(folder / "reproduce.md", markdown(page).encode())
    as_table(page).print()
    for warning in warnings(page):
        say(warning)
    say(f"table: {folder / 'reproduce.md'}")
    bad = [line.name for line in lines if line.state.startswith("failed")]
    jobs.finish(bad, len(rows), interrupted=played.interrupted)


def show(table: str, profile: str, overrides: Sequence[str]) -> None:
    """Print the rows of a table with their published numbers; without a table, what tables there are."""
    if table:
        rows = read_rows(table, profile, configuration.read_overrides(overrides))
        made = listing([(row.name, row.published) for row in rows])
    else:
        made = overview({name: list(found.values()) for name, found in tables().items()})
    made.print()


def _check(rows: Sequence[Row]) -> None:
    """Raise ConfigError if the data of a row cannot be had, or the first row of them cannot be played.

    The first one alone: some strategies draw a mask for each client before they say that they can be had, which takes
    half a minute each with ResNet-18. What they refuse, they refuse when their turn comes.
    """
    for row in rows:
        flat = row.run.flat
        if not flat["data.path"] and flat["data.name"] != "digits":
            cure = "-c \"data.path='/where/it/lies'\", and data.download=true to get it there first"
            raise ConfigError(f"data.path is ''; {row.name} plays {flat['data.name']}: {cure}")
    jobs.check_all(list({jobs.task(row.run): row.run for row in reversed(rows)}.values()))


@dataclass(frozen=True)
class Progress:
    """How far the rows of a table have come, by name; `folder` holds a run folder for each."""

    rows: Mapping[str, Row]
    folder: Path
    say: Say

    def choose(self, waiting: list[RunSpec], left: float) -> RunSpec:
        """Return the first run that fits into the seconds left, or whose cost is not known yet.

        If none fits, the first one is played in part.
        """
        costs = {run.slug: self.cost(run) for run in waiting}
        run = next((run for run in waiting if (costs[run.slug] or 0) <= left), waiting[0])
        self.say(_announced(run, costs[run.slug], left, self.folder))
        return run

    def result(self, run: RunSpec, why: str) -> str:
        """Return how a run ended, and its published and measured accuracy."""
        line = self.line(self.rows[run.slug], why)
        said, found = percent(line.published.accuracy / 100 or None), published.measured_text(line, " %")
        return f"{line.state}; published {said} %, measured {found}"

    def cost(self, run: RunSpec) -> float | None:
        """Return about how many seconds a row still needs; None if nothing like it was played yet.

        Of a row that was begun, the last rounds tell. Else what other rows of the same model and data took for an
        image in training, times the images of this row's rounds.
        """
        flat = run.flat
        own = self._played(run)
        if own is not None and own.rounds:
            recent = [float(entry["seconds"]) for entry in own.rounds[-RECENT:]]
            return float((int(flat["run.rounds"]) - own.rounds[-1]["round"]) * sum(recent) / len(recent))
        task = ("model.name", "data.name")
        others = [row.run for row in self.rows.values()]
        alike = (other for other in others if all(other.flat[key] == flat[key] for key in task))
        seen = [known for known in map(self._played, alike) if known is not None and known.rounds]
        passes = sum(entry.get("image_passes") or 0 for known in seen for entry in known.rounds)
        images = float(train_counts(seen[0]).sum()) if seen else 0.0
        if not passes or not images:
            return None
        seconds = sum(float(entry["seconds"]) for known in seen for entry in known.rounds)
        if not REGISTRY[str(flat["strategy"])].full_participation:
            images = images * int(flat["run.cohort"]) / int(flat["run.clients"])
        return float(int(flat["run.rounds"]) * images * int(flat["local.epochs"]) * seconds / passes)

    def line(self, row: Row, why: str = "") -> Line:
        """Return a row as it stands now; `why` its run failed, if it did."""
        home = self.folder / row.name
        finished, run, needs = jobs.state(row.run, home) == "finished", self._played(row.run), self.cost(row.run)
        more = "" if needs is None else f"; needs about {duration(needs)} at the measured speed"
        stands = ("not played" if run is None else _part(run, row)) + more
        said = "finished" if finished else why or jobs.old_reason(home) or stands
        return Line(row.name, row.published, row.data, row.run.flat, said, run)

    def _played(self, run: RunSpec) -> Run | None:
        home = self.folder / run.slug
        begun = (home / "config.toml").is_file() and (home / "rounds.jsonl").is_file()
        return read_run(home) if begun else None


def _announced(run: RunSpec, needs: float | None, left: float, folder: Path) -> str:
    """Return the line that a row starts with."""
    where = f"its rounds are written to {folder / run.slug / 'console.log'}"
    if needs is None:
        return f"{run.name}: {where}"
    part = f", played in part: {duration(left)} are left, and nothing else fits" if needs > left else ""
    return f"{run.name}: needs about {duration(needs)}{part}; {where}"


def _part(run: Run, row: Row) -> str:
    """Return how far a run came that was cut."""
    done, every = run.rounds[-1]["round"] if run.rounds else 0, int(row.run.flat["run.checkpoint-every"])
    lost = f" (begins anew: the first checkpoint is after round {every})" if done < every else ""
    return f"partial: round {done} of {row.run.flat['run.rounds']}{lost}"


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
