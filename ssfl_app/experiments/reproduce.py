"""What `ssfl reproduce` does: play the rows of a published table, as many as fit into a budget of time.

A run lives in ``DIR/<row>``; `jobs` says what becomes of a folder that is there already.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssfl_app import config as configuration
from ssfl_app import locks
from ssfl_app.experiments import jobs
from ssfl_app.experiments.reproduce_rows import Row, read_budget, read_rows, tables
from ssfl_app.files import write_bytes, write_json
from ssfl_app.options import ConfigError
from ssfl_app.results.page import percent
from ssfl_app.results.published import Line, Page, as_json, listing, markdown, measured, overview, table, warnings
from ssfl_app.results.run_folder import Run, read_run, train_counts
from ssfl_app.simulation.run_args import check_engine
from ssfl_app.strategies import REGISTRY
from ssfl_app.text import tell

RECENT = 10  # rounds that the speed of a row is taken from

Say = Callable[[str], None]


@dataclass(frozen=True)
class ReproduceArgs:
    """The words of `ssfl reproduce`."""

    table: str
    profile: str
    overrides: list[str]
    budget: str
    out: Path | None
    engine: str


def reproduce(words: ReproduceArgs, say: Say) -> None:
    """Play what fits and write the table; exit with 1 if a run failed, or on Ctrl-C.

    Raises
    ------
    ConfigError
        A row cannot be played, or its folder holds another run; nothing was played.
    """
    check_engine(words.engine)
    budget, override = read_budget(words.budget), configuration.read_overrides(words.overrides)
    rows = read_rows(words.table, words.profile, override)
    folder = (words.out or Path("runs") / f"reproduce-{words.table}-{words.profile}").expanduser().resolve()
    for row in rows:
        jobs.state(row.run, folder / row.name)  # names the first folder that holds another run
    _check(rows)
    stage, interrupted = Stage(rows, folder, words.engine), False
    try:
        stage.play(budget, say)
    except KeyboardInterrupt:
        interrupted = True
    title = f"{words.table}, profile {words.profile}"
    page = Page(title, words.profile, override, [stage.line(row) for row in rows])
    write(page, folder, say)
    bad = [line.name for line in page.lines if line.state.startswith("failed")]
    if bad:
        tell(f"ssfl: {len(bad)} of {len(rows)} runs failed: {', '.join(bad)}", error=True)
    if interrupted:
        tell("ssfl: interrupted; the same command goes on where this one stopped", error=True)
    if bad or interrupted:
        sys.exit(1)


def show(words: ReproduceArgs) -> None:
    """Print the rows of a table with their published numbers; without a table, what tables there are.

    Raises
    ------
    ConfigError
        As `reproduce`.
    """
    from rich.console import Console

    console = Console()
    if words.table:
        rows = read_rows(words.table, words.profile, configuration.read_overrides(words.overrides))
        made = listing([(row.name, row.published) for row in rows])
    else:
        made = overview({name: list(found.values()) for name, found in tables().items()})
    Console(width=max(console.width, 140)).print(made)


def _check(rows: Sequence[Row]) -> None:
    """Raise ConfigError if the data of a row cannot be had, or the first row of them cannot be played.

    The first one alone: some strategies draw a mask for each client before they say that they can be had, which takes
    half a minute each with ResNet-18. What they refuse, they refuse when their turn comes.
    """
    for row in rows:
        flat = row.run.flat
        if not flat["data.path"] and flat["data.name"] != "digits":
            raise ConfigError(
                f"data.path is ''; {row.name} plays {flat['data.name']}: -c \"data.path='/where/it/lies'\", and "
                "data.download=true to get it there first"
            )
    jobs.check_all(list({jobs.task(row.run): row.run for row in reversed(rows)}.values()))


def write(page: Page, folder: Path, say: Say) -> None:
    """Write reproduce.md and reproduce.json, and print the table."""
    from rich.console import Console

    write_json(folder / "reproduce.json", as_json(page))
    write_bytes(folder / "reproduce.md", markdown(page).encode())
    console = Console()
    Console(width=max(console.width, 140)).print(table(page))
    for warning in warnings(page):
        say(warning)
    say(f"table: {folder / 'reproduce.md'}")


@dataclass(frozen=True)
class Stage:
    """Where the rows of a table are played.

    Attributes
    ----------
    folder : Path
        Holds a run folder for each row.
    failed : dict of str to str
        Row -> why it failed, of the runs that were played here.
    """

    rows: Sequence[Row]
    folder: Path
    engine: str
    failed: dict[str, str] = field(default_factory=dict)

    def play(self, budget: float, say: Say) -> None:
        """Play rows until all are finished or `budget` seconds are over.

        The next row is the first one that fits into what is left, or whose cost is not known yet. If none fits, the
        first one is played in part. A run that the end of the budget cuts goes on from its checkpoint another time.

        Raises
        ------
        ConfigError
            Another process is playing in this folder.
        """
        waiting = [row for row in self.rows if jobs.state(row.run, self.folder / row.name) != "finished"]
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = locks.try_lock(self.folder / ".lock")
        if lock is None:
            raise ConfigError(f"--out is {self.folder}; it is a folder that no other `ssfl reproduce` is writing to")
        say(f"{len(self.rows) - len(waiting)} of {len(self.rows)} rows are finished already: {self.folder}")
        end = time.monotonic() + budget
        with lock, tempfile.TemporaryDirectory(prefix="ssfl-") as work:
            while waiting and (left := end - time.monotonic()) > 0:
                costs = {row.name: self.cost(row) for row in waiting}
                row = next((row for row in waiting if (costs[row.name] or 0) <= left), waiting[0])
                waiting.remove(row)
                say(_announced(row, costs[row.name], left, self.folder))
                self._play(row, Path(work), end)
                line = self.line(row)
                published, found = line.published.accuracy / 100 or None, measured(line)["accuracy"]
                say(f"{row.name}: {line.state}; published {percent(published)} %, measured {percent(found)} %")

    def _play(self, row: Row, work: Path, end: float) -> None:
        """Play a row until `end` at the longest, and note why it failed."""
        job = jobs.start(row.run, self.folder / row.name, self.engine, work, self.folder / ".lock")
        try:
            while job.process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            if job.process.poll() is not None and (why := jobs.reason(job)):
                self.failed[row.name] = why
        finally:
            if job.process.poll() is None:
                jobs.stop([job])

    def cost(self, row: Row) -> float | None:
        """Return about how many seconds a row still needs; None if nothing like it was played yet.

        Of a row that was begun, the last rounds tell. Else what other rows of the same model and data took for an
        image in training, times the images of this row's rounds.
        """
        flat = row.run.flat
        own = self._played(row)
        if own is not None and own.rounds:
            recent = [float(entry["seconds"]) for entry in own.rounds[-RECENT:]]
            return float((int(flat["run.rounds"]) - own.rounds[-1]["round"]) * sum(recent) / len(recent))
        task = ("model.name", "data.name")
        alike = (other for other in self.rows if all(other.run.flat[key] == flat[key] for key in task))
        seen = [run for run in map(self._played, alike) if run is not None and run.rounds]
        passes = sum(entry.get("image_passes") or 0 for run in seen for entry in run.rounds)
        images = float(train_counts(seen[0]).sum()) if seen else 0.0
        if not passes or not images:
            return None
        seconds = sum(float(entry["seconds"]) for run in seen for entry in run.rounds)
        if not REGISTRY[str(flat["strategy"])].full_participation:
            images = images * int(flat["run.cohort"]) / int(flat["run.clients"])
        return float(int(flat["run.rounds"]) * images * int(flat["local.epochs"]) * seconds / passes)

    def line(self, row: Row) -> Line:
        """Return a row as it stands now."""
        home = self.folder / row.name
        finished, run, needs = jobs.state(row.run, home) == "finished", self._played(row), self.cost(row)
        more = "" if needs is None else f"; needs about {duration(needs)} at the measured speed"
        if finished:
            said = "finished"
        elif why := self.failed.get(row.name) or jobs.old_reason(home):
            said = why
        else:
            said = ("not played" if run is None else _part(run, row)) + more
        return Line(row.name, row.published, row.data, row.run.flat, said, run)

    def _played(self, row: Row) -> Run | None:
        home = self.folder / row.name
        if not (home / "config.toml").is_file() or not (home / "rounds.jsonl").is_file():
            return None
        return read_run(home)


def _announced(row: Row, needs: float | None, left: float, folder: Path) -> str:
    """Return the line that a row starts with."""
    where = f"its rounds are written to {folder / row.name / 'console.log'}"
    if needs is None:
        return f"{row.name}: {where}"
    part = f", played in part: {duration(left)} are left, and nothing else fits" if needs > left else ""
    return f"{row.name}: needs about {duration(needs)}{part}; {where}"


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
