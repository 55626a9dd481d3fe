"""Play many runs, each as `ssfl run` in a process of its own, for `ssfl compare` and `ssfl reproduce`.

A run that is finished is not played again, one that broke off is resumed, and one that was started with another
configuration is an error: nothing is mixed and nothing is overwritten.
"""

import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from ssfl_app import config as configuration
from ssfl_app import locks
from ssfl_app.core.strategy import ServerContext
from ssfl_app.cores import usable_cores
from ssfl_app.experiments import workers
from ssfl_app.experiments.run_spec import TASK, RunSpec, run_clash
from ssfl_app.options import ConfigError
from ssfl_app.results.status import read_status
from ssfl_app.runtime import check, check_at_once, find_device
from ssfl_app.simulation.command import Engine
from ssfl_app.sparsity.layout import Layout
from ssfl_app.strategies import REGISTRY
from ssfl_app.text import tell

UNITS = {"s": 1, "m": 60, "h": 3600}
STOP_TIMEOUT = 60.0  # an inline run ends when its clients are through with what they are at


class Played(NamedTuple):
    """What became of many runs: slug -> why it failed, and whether Ctrl-C ended them."""

    failed: dict[str, str]
    interrupted: bool


class Job(NamedTuple):
    """A run that was started: its folder, its process, and the file with what that says on stderr."""

    run: RunSpec
    home: Path
    process: BaseProcess
    errors: Path


def read_budget(text: str) -> float:
    """Return "90s", "10m" or "2h" in seconds, "none" is infinite; ConfigError: it is none of these."""
    if text == "none":
        return math.inf
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None or not float(match[1]):
        raise ConfigError(f"--budget is {text!r}; it is a time above 0 such as 90s, 10m or 2h, or none")
    return float(match[1]) * UNITS[match[2]]


def task(run: RunSpec) -> tuple[object, ...]:
    """Return what data and model of a run depend on: runs that agree in it are checked with one look at them."""
    kept = (*TASK, "run.clients", "run.cohort", "run.device")
    return tuple(value for key, value in sorted(run.flat.items()) if {key, key.partition(".")[0]} & {*kept})


def check_all(runs: Sequence[RunSpec]) -> None:
    """Raise ConfigError for the first run that cannot be played; data and model are looked at once for each task."""
    layouts: dict[tuple[object, ...], Layout] = {}
    seen = set[tuple[object, ...]]()
    for run in runs:
        same = tuple(value for key, value in sorted(run.flat.items()) if key != "run.seed")
        if same in seen:
            continue
        seen.add(same)
        config = configuration.parse(run.flat)
        check_at_once(config)
        kind = REGISTRY[config.strategy]
        place = (*task(run), kind.uses_density)
        if place not in layouts:
            layouts[place] = check(config)
        kind(ServerContext(layouts[place], config.settings))


def play(
    runs: Sequence[RunSpec],
    folder: Path,
    engine: Engine,
    say: Callable[[str], object],
    result: Callable[[RunSpec, str], str],
    *,
    homes: Path,
    at_once: int = 1,
    budget: float = math.inf,
    choose: Callable[[list[RunSpec], float], RunSpec] = lambda waiting, _: waiting[0],
) -> Played:
    """Play the runs that are not finished, until all are or the budget (seconds) is over, or until Ctrl-C.

    A run that the end of the budget cuts goes on from its checkpoint another time.

    Parameters
    ----------
    folder, homes : Path
        What the user named, and the folder that holds a run folder for each run.
    say : callable
        Is told in a line how far all have come.
    result : callable
        Returns what is told of a run that ended: of the run and why it failed, "" if it did not.
    choose : callable
        Returns the next run: of those that wait and the seconds that are left.

    Raises
    ------
    ConfigError
        Another process is playing in this folder, a run's folder holds another run, or several runs are to be played
        at once on a Ray cluster: each takes all of it.
    """
    if engine.cluster is not None and at_once > 1:
        raise ConfigError(f"--jobs is {at_once}; it is 1 with --ray-address, where a run takes all of the cluster")
    waiting = [run for run in runs if state(run, homes / run.slug) != "finished"]
    done, failed, running = len(runs) - len(waiting), dict[str, str](), list[Job]()
    homes.mkdir(parents=True, exist_ok=True)
    lock = locks.try_lock(folder / ".lock")
    if lock is None:
        raise ConfigError(
            f"--out is {folder}; it is a folder that no other `ssfl compare` or `ssfl reproduce` is writing to"
        )
    end = time.monotonic() + budget
    with lock, tempfile.TemporaryDirectory(prefix="ssfl-") as work:
        try:
            say(f"{done} of {len(runs)} runs are finished already: {folder}")
            while running or (waiting and time.monotonic() < end):
                while waiting and len(running) < at_once and (left := end - time.monotonic()) > 0:
                    run = choose(waiting, left)
                    waiting.remove(run)
                    home = homes / run.slug
                    running.append(start(_shared(run, at_once), home, engine, Path(work), folder / ".lock"))
                time.sleep(0.05)
                ended = [job for job in running if job.process.exitcode is not None]
                for job in ended:
                    running.remove(job)
                    done += 1
                    why = reason(job)
                    failed |= {job.run.slug: why} if why else {}
                    say(f"[{done}/{len(runs)}] {job.run.name}: {result(job.run, why)}")
                if time.monotonic() >= end:
                    stop(running)
                    for job in running:
                        say(f"{job.run.name}: {result(job.run, '')}")
                    running.clear()
        except KeyboardInterrupt:
            return Played(failed, interrupted=True)
        finally:
            stop(running)
    return Played(failed, interrupted=False)


def finish(names: Sequence[str], total: int, *, interrupted: bool) -> None:
    """Name the runs that failed; exit with 1 if there are any, or if Ctrl-C ended them."""
    if names:
        tell(f"ssfl: {len(names)} of {total} runs failed: {'; '.join(names)}", error=True)
    if interrupted:
        tell("ssfl: interrupted; the same command goes on where this one stopped", error=True)
    if names or interrupted:
        sys.exit(1)


def _shared(run: RunSpec, at_once: int) -> RunSpec:
    """Return a run that leaves the other jobs their share of the cores, unless it says how many clients at once."""
    if at_once == 1 or run.flat["engine.concurrent"] or find_device(str(run.flat["run.device"])).type == "cuda":
        return run
    return replace(run, flat=run.flat | {"engine.concurrent": max(1, usable_cores() // at_once)})


def state(run: RunSpec, home: Path) -> str:
    """Return how a run stands in its folder, new, unfinished or finished; ConfigError: that holds another run."""
    if not (home / "config.toml").is_file():
        return "new"
    clash = run_clash(run, configuration.read_file(home / "config.toml"))
    if clash is not None:
        raise ConfigError(f"{home} holds another run: {clash}; --out names another folder, or remove this one")
    finished = read_status(home).get("status") == "finished" and (home / "summary.json").is_file()
    return "finished" if finished else "unfinished"


def start(run: RunSpec, home: Path, engine: Engine, work: Path, lock: Path) -> Job:
    """Start a run in the folder `home`, or go on with it; its configuration is written to the folder `work`.

    `lock` is the file that this process holds locked: if it is killed, the run ends too.
    """
    file = work / f"{run.slug}.toml"
    file.write_text(configuration.write_toml(run.flat), "utf-8")
    words = ["--resume", str(home)] if state(run, home) == "unfinished" else [str(file), "--out", str(home)]
    errors = home.with_name(f"{run.slug}.stderr")
    errors.touch()  # it is read even if the process dies before it writes
    return Job(run, home, workers.start(engine, words, errors, {locks.LAUNCHER: str(lock)}), errors)


def reason(job: Job) -> str:
    """Return why a run failed, in one line, or "" if it did not."""
    said = job.errors.read_text("locale", errors="replace")  # as the process shows it on a terminal
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if job.process.exitcode == 0 and state(job.run, job.home) == "finished":
        job.errors.unlink()
        return ""
    why = [line.removeprefix("ssfl: ") for line in lines if line.startswith("ssfl: ")] or lines[-1:]
    return f"failed: {why[0] if why else f'exit code {job.process.exitcode}, {job.errors}'}"


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
        job.process.join(max(0.0, end - time.monotonic()))
        if job.process.exitcode is None:
            job.process.kill()
            job.process.join(STOP_TIMEOUT)
        job.errors.unlink(missing_ok=True)
