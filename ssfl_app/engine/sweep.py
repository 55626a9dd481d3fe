"""What `ssfl compare` does: play the runs of a plan, each as `ssfl run` in a process of its own, and compare them.

A run lives in ``DIR/runs/<slug>``. One that is finished is not played again, one that broke off is resumed, and one
that was started with another configuration is an error: nothing is mixed and nothing is overwritten.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ssfl_app import config as configuration
from ssfl_app import guard
from ssfl_app.engine import workers
from ssfl_app.engine.command import ENGINES
from ssfl_app.engine.sweep_plan import TASK, Plan, Planned, difference, read_plan
from ssfl_app.options import ConfigError
from ssfl_app.results.compare import Entry, as_json, tables
from ssfl_app.results.compare_page import markdown, picture
from ssfl_app.results.files import write_atomically, write_json
from ssfl_app.results.page import percent
from ssfl_app.results.plots import png_bytes
from ssfl_app.results.recorder import read_status
from ssfl_app.results.runs import CENTRAL, facts, read_run
from ssfl_app.sparsity.layout import Layout
from ssfl_app.strategies import REGISTRY
from ssfl_app.workshop import check

STOP_TIMEOUT = 60.0  # `ssfl run` ends a Ray engine in order, which takes a while
# What a run leaves that was killed in its first moments, before it wrote its configuration.
_BEFORE_CONFIG = {".lock", "checkpoint", "status.json"}


@dataclass(frozen=True)
class Sweep:
    """The words of `ssfl compare`."""

    files: list[Path]
    overrides: list[str]
    out: Path | None
    engine: str
    jobs: int
    report_only: bool


class _Job(NamedTuple):
    run: Planned
    process: workers.Worker
    errors: Path


def run_sweep(sweep: Sweep, say: Callable[[str], None]) -> None:
    """Play what is missing and write the comparison; exit with 1 if a run failed, or on Ctrl-C.

    Raises
    ------
    ConfigError
        A run cannot be played, or its folder holds another one; nothing was played.
    """
    if sweep.engine not in ENGINES:
        raise ConfigError(f"--engine is {sweep.engine!r}; it is one of {', '.join(ENGINES)}")
    if sweep.jobs < 1:
        raise ConfigError(f"--jobs is {sweep.jobs}; it is a number of at least 1")
    plan = read_plan(sweep.files, sweep.overrides)
    title = " + ".join(path.stem for path in sweep.files)
    folder = sweep.out or Path("runs") / f"compare-{title.replace(' ', '')}"
    folder = folder.expanduser().resolve()
    if sweep.report_only and not (folder / "runs").is_dir():
        raise ConfigError(f"--out is {folder}; with --report-only it is a folder that `ssfl compare` wrote")
    for run in plan.runs:
        state(run, folder)  # names the first folder that holds another run
    failed: dict[str, str] = {}
    if not sweep.report_only:
        check_all(plan)
        try:
            failed = play(plan.runs, folder, sweep.engine, sweep.jobs, say)
        except KeyboardInterrupt:
            print("ssfl: interrupted; the same command goes on where this one stopped", file=sys.stderr)
            sys.exit(1)
    entries = [read_entry(run, folder, failed.get(run.slug, "")) for run in plan.runs]
    say(write_comparison(entries, plan, folder, title))
    say(f"comparison: {folder / 'comparison.md'}")
    names = [run.name for run, entry in zip(plan.runs, entries, strict=True) if entry.reason.startswith("failed")]
    if names:
        print(f"ssfl: {len(names)} of {len(entries)} runs failed: {'; '.join(names)}", file=sys.stderr)
        sys.exit(1)


def check_all(plan: Plan) -> None:
    """Find out whether all runs can be played; data and model are looked at once for each task.

    Raises
    ------
    ConfigError
        What the first one is that cannot.
    """
    layouts: dict[tuple[object, ...], Layout] = {}
    for run in plan.runs:
        config = configuration.parse(run.flat)
        kept = (*TASK, "run.clients", "run.cohort", "run.device")
        task = tuple(value for key, value in sorted(run.flat.items()) if {key, key.partition(".")[0]} & {*kept})
        if task not in layouts:
            layouts[task] = check(config)
        REGISTRY[config.strategy](layouts[task], config.settings)


def state(run: Planned, folder: Path) -> str:
    """Return how a run stands in its folder: new, unfinished or finished.

    Raises
    ------
    ConfigError
        The folder holds a run of another configuration.
    """
    home = folder / "runs" / run.slug
    if not (home / "config.toml").is_file():
        return "new"
    clash = difference(run, configuration.read_file(home / "config.toml"))
    if clash is not None:
        raise ConfigError(f"{home} holds another run: {clash}; --out names another folder, or remove this one")
    finished = read_status(home).get("status") == "finished" and (home / "summary.json").is_file()
    return "finished" if finished else "unfinished"


def play(runs: Sequence[Planned], folder: Path, engine: str, jobs: int, say: Callable[[str], None]) -> dict[str, str]:
    """Play the runs that are not finished, `jobs` at once; return slug -> reason of those that failed.

    Raises
    ------
    ConfigError
        Another process is playing in this folder.
    """
    waiting = [run for run in runs if state(run, folder) != "finished"]
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    done, failed, running = len(runs) - len(waiting), dict[str, str](), list[_Job]()
    say(f"{done} of {len(runs)} runs are finished already: {folder}")
    lock = guard.take(folder / ".lock")
    if lock is None:
        raise ConfigError(f"--out is {folder}; it is a folder that no other `ssfl compare` is writing to")
    with lock, tempfile.TemporaryDirectory(prefix="ssfl-") as work:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_start(waiting.pop(0), folder, engine, Path(work)))
                time.sleep(0.05)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    done += 1
                    reason = _reason(job, folder)
                    failed |= {job.run.slug: reason} if reason else {}
                    say(f"[{done}/{len(runs)}] {job.run.name}: {reason or _result(job.run, folder)}")
        finally:
            _stop(running)
    return failed


def _start(run: Planned, folder: Path, engine: str, work: Path) -> _Job:
    home, file = folder / "runs" / run.slug, work / f"{run.slug}.toml"
    file.write_text(configuration.write_toml(run.flat))
    if state(run, folder) == "unfinished":
        words = ["--resume", str(home)]
    else:
        if home.is_dir() and {path.name for path in home.iterdir()} <= _BEFORE_CONFIG:
            shutil.rmtree(home)
        words = [str(file), "--out", str(home)]
    errors = home.with_name(f"{run.slug}.stderr")
    # If this process is killed, they end too.
    process = workers.start(engine, words, errors, {guard.LAUNCHER: str(folder / ".lock")})
    return _Job(run, process, errors)


def _reason(job: _Job, folder: Path) -> str:
    """Return why a run failed, in one line, or "" if it did not."""
    lines = [line.strip() for line in job.errors.read_text(errors="replace").splitlines() if line.strip()]
    if job.process.poll() == 0 and state(job.run, folder) == "finished":
        job.errors.unlink()
        return ""
    said = [line.removeprefix("ssfl: ") for line in lines if line.startswith("ssfl: ")] or lines[-1:]
    return f"failed: {said[0] if said else f'exit code {job.process.poll()}, {job.errors}'}"


def _result(run: Planned, folder: Path) -> str:
    known = facts(read_run(folder / "runs" / run.slug))
    return f"central {percent(known[CENTRAL])} %, {known['seconds_total']:.0f} s"


def _stop(jobs: Sequence[_Job]) -> None:
    """Ask the processes to end, wait, and kill what does not."""
    for job in jobs:
        job.process.terminate()
    end = time.monotonic() + STOP_TIMEOUT
    for job in jobs:
        if not job.process.wait(max(0.0, end - time.monotonic())):
            job.process.kill()
            job.process.wait(STOP_TIMEOUT)
        job.errors.unlink(missing_ok=True)


def read_entry(run: Planned, folder: Path, reason: str = "") -> Entry:
    """Return a planned run as it stands now: its results, or why it has none."""
    home, stands = folder / "runs" / run.slug, state(run, folder)
    if stands == "finished":
        return Entry(run.flat, run.dense, read_run(home))
    if not reason and stands == "unfinished":
        status = read_status(home)
        failure = " ".join(str(status.get("message", "")).split())
        reason = f"failed: {failure}" if status.get("status") == "failed" else "unfinished"
    return Entry(run.flat, run.dense, None, reason or "not played")


def write_comparison(entries: Sequence[Entry], plan: Plan, folder: Path, title: str) -> str:
    """Write comparison.md, comparison.png and comparison.json; return the Markdown text."""
    made = tables(entries, plan.axes, plan.baseline)
    environments = [entry.run.environment for entry in entries if entry.run is not None]
    text = markdown(made, plan.baseline, environments, title)
    drawn = png_bytes(picture(made, list(dict.fromkeys(str(run.flat["strategy"]) for run in plan.runs))))
    write_atomically(folder / "comparison.png", lambda file: file.write_bytes(drawn))
    write_json(folder / "comparison.json", as_json(made, plan.baseline, environments))
    write_atomically(folder / "comparison.md", lambda file: file.write_text(text, "utf-8"))
    return text
