"""`ssfl federation run`: a run on the SuperNodes of a federation, from the machine of its SuperLink.

The ServerApp runs on that machine and writes the run folder there, the same folder that `ssfl run` leaves. Whether
the run finished is what it recorded there: ``flwr run --stream`` exits with 0 in any case.
"""

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ssfl_app import config as configuration
from ssfl_app import locks
from ssfl_app.config import Config, foreign_modules, write_toml
from ssfl_app.deployment.control import control, is_up
from ssfl_app.deployment.federation import CONNECTION, Federation
from ssfl_app.deployment.status import services
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.results.status import read_status
from ssfl_app.simulation.command import RunArgs, telling
from ssfl_app.simulation.flower_app import copy_app, follow, judge
from ssfl_app.simulation.processes import environment, running, words_of
from ssfl_app.simulation.resolve import make_ready, resolve
from ssfl_app.text import tell

_LEFT_ALONE = 30.0
"""Seconds that a ServerApp gets to end after Flower's command did."""


def run_on(federation: Federation, command: RunArgs) -> None:
    """Run, or raise ConfigError before anything was written; exit with 1 if the run fails.

    Without run.clients in the configuration the clients are all nodes, and with fewer of them than run.cohort all of
    them train in each round.
    """
    if not is_up(federation):
        raise ConfigError(f"--dir is {federation.folder}; its federation is not up: ssfl federation up")
    if command.resume is None:
        command = replace(command, overrides=[*_sizes(federation, command), *command.overrides])
    config, layout = resolve(command)
    folder = make_ready(config, layout)
    with telling(folder, "federation", "run", "--dir", federation.folder):
        _launch(federation, config, tell)


def _sizes(federation: Federation, command: RunArgs) -> list[str]:
    """Return run.clients and run.cohort as overrides, where the command does not set them."""
    given = configuration.read_given(command.file, command.overrides)
    clients = int(given.get("run.clients", 0)) or len(federation.nodes)
    cohort = min(clients, int(configuration.defaults()["run.cohort"]))
    sizes = {"run.clients": clients, "run.cohort": cohort}
    return [f"{key}={value}" for key, value in sizes.items() if key not in given]


def _launch(federation: Federation, config: Config, say: Callable[[str], None]) -> None:
    folder = Path(config.settings.run.out)
    log, superlink = folder / "flower.log", services(federation).get("superlink")
    begin = log.stat().st_size if log.exists() else 0
    with tempfile.TemporaryDirectory(prefix="ssfl-") as work:
        toml, overrides = write_toml(config.flat), Path(work) / "run.toml"
        app = copy_app(Path(work) / "ssfl-app", toml, foreign_modules(config.flat))
        overrides.write_text(toml, "utf-8")
        flwr = ["flwr", "run", str(app), CONNECTION, "--stream", "-c", str(overrides)]
        with running(flwr, Path(work), environment(federation.flwr_home()), log) as process:
            try:
                follow(process, folder, say)
            except (KeyboardInterrupt, BrokenPipeError):
                _ask_to_stop(federation, log, begin)
                _wait_for_the_end(folder)
                raise
    _wait_for_the_end(folder)
    if read_status(folder).get("status") == "running" and services(federation).get("superlink") != superlink:
        raise RunFailed("the SuperLink ended in the middle of the run; it was started again, nodes come back to it")
    judge(folder, log, begin)


def _wait_for_the_end(folder: Path) -> None:
    """Wait until nobody writes to the run folder: Flower's command ends early if the SuperLink goes away."""
    end = time.monotonic() + _LEFT_ALONE
    while read_status(folder).get("status") == "running" and time.monotonic() < end:
        lock = locks.try_lock(folder / ".lock")
        if lock is not None:
            lock.close()
            return
        time.sleep(0.1)


def _ask_to_stop(federation: Federation, log: Path, begin: int) -> None:
    if started := re.search(r"started run (\d+)", words_of(log, begin)):
        control(federation, "stop", started[1])
