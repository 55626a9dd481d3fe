"""What `ssfl compare` does: play the runs of a plan, each as `ssfl run` in a process of its own, and compare them.

A run lives in ``DIR/runs/<slug>``; `jobs` says what becomes of a folder that is there already.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ssfl_app import locks
from ssfl_app.experiments.jobs import Job, check_all, old_reason, reason, start, state, stop
from ssfl_app.experiments.sweep_spec import RunSpec, SweepSpec, read_plan
from ssfl_app.files import write_bytes, write_json
from ssfl_app.options import ConfigError
from ssfl_app.results.compare import Entry, as_json, tables
from ssfl_app.results.compare_page import markdown, picture
from ssfl_app.results.page import percent
from ssfl_app.results.plots import png_bytes
from ssfl_app.results.report import undone
from ssfl_app.results.run_folder import CENTRAL, metadata, read_run
from ssfl_app.runtime import find_device
from ssfl_app.simulation.run_args import check_engine
from ssfl_app.text import tell


@dataclass(frozen=True)
class CompareArgs:
    """The words of `ssfl compare`."""

    files: list[Path]
    overrides: list[str]
    out: Path | None
    engine: str
    jobs: int
    report_only: bool


def run_sweep(sweep: CompareArgs, say: Callable[[str], None]) -> None:
    """Play what is missing and write the comparison; exit with 1 if a run failed, or on Ctrl-C.

    Raises
    ------
    ConfigError
        A run cannot be played, or its folder holds another one; nothing was played.
    """
    check_engine(sweep.engine)
    if sweep.jobs < 1:
        raise ConfigError(f"--jobs is {sweep.jobs}; it is a number of at least 1")
    plan = read_plan(sweep.files, sweep.overrides)
    title = " + ".join(path.stem for path in sweep.files)
    folder = sweep.out or Path("runs") / f"compare-{title.replace(' ', '')}"
    folder = folder.expanduser().resolve()
    if sweep.report_only and not (folder / "runs").is_dir():
        raise ConfigError(f"--out is {folder}; with --report-only it is a folder that `ssfl compare` wrote")
    for run in plan.runs:
        state(run, _home(run, folder))  # names the first folder that holds another run
    failed: dict[str, str] = {}
    if not sweep.report_only:
        check_all(plan.runs)
        try:
            failed = play(plan.runs, folder, sweep.engine, sweep.jobs, say)
        except KeyboardInterrupt:
            tell("ssfl: interrupted; the same command goes on where this one stopped", error=True)
            sys.exit(1)
    entries = [read_entry(run, folder, failed.get(run.slug, "")) for run in plan.runs]
    say(write_comparison(entries, plan, folder, title, say))
    say(f"comparison: {folder / 'comparison.md'}")
    names = [run.name for run, entry in zip(plan.runs, entries, strict=True) if entry.reason.startswith("failed")]
    if names:
        tell(f"ssfl: {len(names)} of {len(entries)} runs failed: {'; '.join(names)}", error=True)
        sys.exit(1)


def play(runs: Sequence[RunSpec], folder: Path, engine: str, jobs: int, say: Callable[[str], None]) -> dict[str, str]:
    """Play the runs that are not finished, `jobs` at once; return slug -> reason of those that failed.

    Raises
    ------
    ConfigError
        Another process is playing in this folder.
    """
    waiting = [run for run in runs if state(run, _home(run, folder)) != "finished"]
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    done, failed, running = len(runs) - len(waiting), dict[str, str](), list[Job]()
    say(f"{done} of {len(runs)} runs are finished already: {folder}")
    lock = locks.try_lock(folder / ".lock")
    if lock is None:
        raise ConfigError(f"--out is {folder}; it is a folder that no other `ssfl compare` is writing to")
    with lock, tempfile.TemporaryDirectory(prefix="ssfl-") as work:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running.append(
                        start(_shared(run, jobs), _home(run, folder), engine, Path(work), folder / ".lock")
                    )
                time.sleep(0.05)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    done += 1
                    why = reason(job)
                    failed |= {job.run.slug: why} if why else {}
                    say(f"[{done}/{len(runs)}] {job.run.name}: {why or _result(job)}")
        finally:
            stop(running)
    return failed


def _shared(run: RunSpec, jobs: int) -> RunSpec:
    """Return a run that leaves the other jobs their share of the cores, unless it says how many clients at once."""
    if jobs == 1 or run.flat["engine.concurrent"] or find_device(str(run.flat["run.device"])).type == "cuda":
        return run
    return replace(run, flat=run.flat | {"engine.concurrent": max(1, (os.cpu_count() or 1) // jobs)})


def _home(run: RunSpec, folder: Path) -> Path:
    return folder / "runs" / run.slug


def _result(job: Job) -> str:
    known = metadata(read_run(job.home))
    return f"central {percent(known[CENTRAL])} %, {known['seconds_total']:.0f} s"


def read_entry(run: RunSpec, folder: Path, why: str = "") -> Entry:
    """Return a planned run as it stands now: its results, or why it has none."""
    home = _home(run, folder)
    stands = state(run, home)
    if stands == "finished":
        return Entry(run.flat, run.dense, read_run(home))
    if not why and stands == "unfinished":
        why = old_reason(home) or "unfinished"
    return Entry(run.flat, run.dense, None, why or "not played")


def write_comparison(
    entries: Sequence[Entry], plan: SweepSpec, folder: Path, title: str, say: Callable[[str], None]
) -> str:
    """Write comparison.md, comparison.png and comparison.json; return the Markdown text."""
    made = tables(entries, plan.axes, plan.baseline)
    environments = [entry.run.environment for entry in entries if entry.run is not None]
    text = markdown(made, plan.baseline, environments, title)
    png, order = folder / "comparison.png", list(dict.fromkeys(str(run.flat["strategy"]) for run in plan.runs))
    if why := undone(lambda: write_bytes(png, png_bytes(lambda: picture(made, order)))):
        say(f"warning: {png} could not be drawn ({why})")
    write_json(folder / "comparison.json", as_json(made, plan.baseline, environments))
    write_bytes(folder / "comparison.md", text.encode())
    return text
