"""A run of many: how it stands in its folder, and how it is started, ended and explained. Each is an `ssfl run`.

One that is finished is not played again, one that broke off is resumed, and one that was started with another
configuration is an error: nothing is mixed and nothing is overwritten.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ssfl_app import config as configuration
from ssfl_app import locks
from ssfl_app.core.strategy import ServerContext
from ssfl_app.experiments import workers
from ssfl_app.experiments.sweep_spec import TASK, RunSpec, difference
from ssfl_app.options import ConfigError
from ssfl_app.results.status import read_status
from ssfl_app.runtime import check, check_at_once
from ssfl_app.sparsity.layout import Layout
from ssfl_app.strategies import REGISTRY

STOP_TIMEOUT = 60.0  # an inline run ends when its clients are through with what they are at


class Job(NamedTuple):
    """A run that was started: its folder, its process, and the file with what that says on stderr."""

    run: RunSpec
    home: Path
    process: workers.Worker
    errors: Path


def task(run: RunSpec) -> tuple[object, ...]:
    """Return what data and model of a run depend on: runs that agree in it are checked with one look at them."""
    kept = (*TASK, "run.clients", "run.cohort", "run.device")
    return tuple(value for key, value in sorted(run.flat.items()) if {key, key.partition(".")[0]} & {*kept})


def check_all(runs: Sequence[RunSpec]) -> None:
    """Find out whether all runs can be played; data and model are looked at once for each task.

    Raises
    ------
    ConfigError
        What the first one is that cannot.
    """
    layouts: dict[tuple[object, ...], Layout] = {}
    for run in runs:
        config = configuration.parse(run.flat)
        check_at_once(config)
        if task(run) not in layouts:
            layouts[task(run)] = check(config)
        REGISTRY[config.strategy](ServerContext(layouts[task(run)], config.settings))


def state(run: RunSpec, home: Path) -> str:
    """Return how a run stands in its folder: new, unfinished or finished.

    Raises
    ------
    ConfigError
        The folder holds a run of another configuration.
    """
    if not (home / "config.toml").is_file():
        return "new"
    clash = difference(run, configuration.read_file(home / "config.toml"))
    if clash is not None:
        raise ConfigError(f"{home} holds another run: {clash}; --out names another folder, or remove this one")
    finished = read_status(home).get("status") == "finished" and (home / "summary.json").is_file()
    return "finished" if finished else "unfinished"


def start(run: RunSpec, home: Path, engine: str, work: Path, lock: Path) -> Job:
    """Start a run, or go on with it.

    Parameters
    ----------
    run, home : RunSpec, Path
        What is played, and its folder.
    engine : str
        Of `ssfl run`.
    work : Path
        A folder for the configuration.
    lock : Path
        The file that this process holds locked: if it is killed, the run ends too.
    """
    file = work / f"{run.slug}.toml"
    file.write_text(configuration.write_toml(run.flat), "utf-8")
    words = ["--resume", str(home)] if state(run, home) == "unfinished" else [str(file), "--out", str(home)]
    errors = home.with_name(f"{run.slug}.stderr")
    return Job(run, home, workers.start(engine, words, errors, {locks.LAUNCHER: str(lock)}), errors)


def reason(job: Job) -> str:
    """Return why a run failed, in one line, or "" if it did not."""
    said = job.errors.read_text("locale", errors="replace")  # as the process shows it on a terminal
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if job.process.poll() == 0 and state(job.run, job.home) == "finished":
        job.errors.unlink()
        return ""
    why = [line.removeprefix("ssfl: ") for line in lines if line.startswith("ssfl: ")] or lines[-1:]
    return f"failed: {why[0] if why else f'exit code {job.process.poll()}, {job.errors}'}"


def old_reason(home: Path) -> str:
    """Return why a run that is not finished failed earlier, or "" if it did not."""
    status = read_status(home)
    return f"failed: {' '.join(str(status.get('message', '')).split())}" if status.get("status") == "failed" else ""


def stop(jobs: Sequence[Job]) -> None:
    """Ask the processes to end, wait, and kill what does not."""
    for job in jobs:
        job.process.terminate()
    end = time.monotonic() + STOP_TIMEOUT
    for job in jobs:
        if not job.process.wait(max(0.0, end - time.monotonic())):
            job.process.kill()
            job.process.wait(STOP_TIMEOUT)
        job.errors.unlink(missing_ok=True)
