"""Keeps services alive: a SuperLink or SuperNode that ends is started again, until a signal says stop.

Flower refuses a SuperNode that comes back within a minute of a crash, since it still counts as online, and the node
ends; so a service is tried again and again, a little later each time.
"""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType

from ssfl_app.files import write_json
from ssfl_app.simulation.processes import end, spawn

DELAYS = (1.0, 2.0, 5.0, 10.0)
"""Seconds before a service is started again: after its first end, its second, ..."""

STEADY = 60.0
"""Seconds after which a service that still runs is taken to be well again."""

TICK = 0.2


@dataclass
class Service:
    """A command that is to run at all times; what it says is added to the file `log`.

    `surrender` is what it says there when it has given up without ending: it is then ended, and started again.
    """

    name: str
    command: list[str]
    cwd: Path
    variables: dict[str, str]
    log: Path
    surrender: str = ""
    process: "subprocess.Popen[bytes] | None" = None
    began: float = 0.0
    due: float = 0.0
    ends: int = 0  # since it last ran steadily
    restarts: int = 0
    read: int = 0  # bytes of the log that were looked at

    def start(self) -> None:
        """Start it."""
        self._note(f"starting {self.name}")
        self.read = self.log.stat().st_size
        self.process, self.began = spawn(self.command, self.cwd, self.variables, self.log), time.monotonic()

    def look(self, now: float) -> bool:
        """Start it again if it ended and its time has come; return whether anything changed."""
        if self.process is not None:
            if self._gave_up():
                self._note(f"{self.name} gave up and is ended")
                end(self.process)
            if self.process.poll() is None:
                self.ends = 0 if now - self.began > STEADY else self.ends
                return False
            delay = DELAYS[min(self.ends, len(DELAYS) - 1)]
            self._note(f"{self.name} ended with {self.process.returncode}; started again in {delay:g} s")
            self.process, self.due, self.ends, self.restarts = None, now + delay, self.ends + 1, self.restarts + 1
            return True
        if now < self.due:
            return False
        self.start()
        return True

    def _gave_up(self) -> bool:
        if not self.surrender or self.log.stat().st_size <= self.read:
            return False
        with self.log.open("rb") as file:
            file.seek(self.read)
            said = file.read()
        whole = said[: said.rfind(b"\n") + 1]
        self.read += len(whole)
        return self.surrender.encode() in whole

    def _note(self, text: str) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} supervisor: {text}\n")


class Supervisor:
    """Runs services until SIGTERM or SIGINT.

    The JSON file `state` says which process runs what; it is rewritten whenever that changes, and gone at the end.
    """

    def __init__(self, state: Path) -> None:
        self._state = state
        self._services: list[Service] = []
        self._stopping = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def add(self, services: Sequence[Service]) -> None:
        """Start services; they are kept alive from `run` on."""
        for service in services:
            service.start()
            self._services.append(service)
        self._write()

    def look(self) -> None:
        """Start again what has ended and is due."""
        now = time.monotonic()
        changed = [service.look(now) for service in self._services]  # each of them, also after one that changed
        if any(changed):
            self._write()

    def run(self) -> None:
        """Keep the services alive until a signal ends that."""
        while not self._stopping:
            self.look()
            time.sleep(TICK)

    def close(self) -> None:
        """End all services and their children."""
        end(*(service.process for service in self._services if service.process is not None))
        self._state.unlink(missing_ok=True)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _write(self) -> None:
        pids = {s.name: s.process.pid if s.process else None for s in self._services}
        services = {s.name: {"pid": pids[s.name], "restarts": s.restarts} for s in self._services}
        write_json(self._state, {"pid": os.getpid(), "services": services})
