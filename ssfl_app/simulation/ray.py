"""Runs `flwr run` on a SuperLink of its own, with an exit code that says how the run ended.

What plain ``flwr run`` leaves to its user, and is done here:

- a local SuperLink that Flower starts stays up for ever and keeps environment, venv and working directory of whoever
  started it first; later runs of another checkout then silently get that one's client code. Here every run has its
  own SuperLink, on a free port, in a neutral folder, with its own FLWR_HOME; all of it is gone afterwards.
- without a switch each run installs torch anew; telemetry and update checks go to the internet.
- Ray listens on all interfaces without a password: whoever reaches the machine runs code on it. Here its processes
  listen on the loopback interface only, and want a token that is drawn for the run.
- Ray joins a cluster that was ever started on this machine, and fails if that is gone. Here every run has its own.
- the folder of a Flower app may hold letters, digits and hyphens only, a clone's need not: the app is copied.
- ``flwr run --stream`` exits with 0 even if the run failed. Here success is what the ServerApp recorded.
- Flower and Ray take seconds to end in order. Here nothing waits for that: when the ServerApp has recorded how the
  run ended, every process of it is killed, and what it left goes with its folder.

With an address the run takes part in a cluster that others started (`cluster`), which stays as it was.
"""

import contextlib
import json
import secrets
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from ssfl_app import locks
from ssfl_app.cores import usable_cores
from ssfl_app.files import app_folder
from ssfl_app.simulation.command import RayCluster
from ssfl_app.simulation.flower_app import copy_app, follow, judge
from ssfl_app.simulation.prepared_run import PreparedRun
from ssfl_app.simulation.processes import (
    environment,
    free_port,
    kill_families,
    short_folder,
    spawn,
    wait_until_healthy,
)

SMALLEST_STORE = 100_000_000  # Ray refuses less than 79 MB


class Launch:
    """A SuperLink for one run on Ray, all its processes, and its files besides the run folder.

    It starts while the run is checked. Whoever has used it closes it; `play` does so itself. Without a `cluster` the
    run has a Ray of its own.
    """

    def __init__(self, cluster: RayCluster | None = None) -> None:
        self._cluster = cluster
        self._work = tempfile.TemporaryDirectory(prefix="ssfl-", dir=short_folder(), ignore_cleanup_errors=True)
        self._home = Path(self._work.name)
        self._address = f"127.0.0.1:{free_port()}"
        self._later = self._home / "later.json"
        self._log = self._home / "superlink.log"
        self._variables = _variables(self._home, self._address, self._later)
        if cluster is None:
            self._variables |= _own_ray(self._home)
        # Under ``ray job submit`` Ray would merge that job's environment into this run's, and fail.
        self._variables.pop("RAY_JOB_CONFIG_JSON_ENV_VAR", None)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "Launch":
        self._held.enter_context(locks.locked(Path(self._variables[locks.LAUNCHER])))
        superlink = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
        superlink += ["--host", "127.0.0.1", "--port", self._address.rpartition(":")[2]]
        self._superlink = spawn(superlink, self._home, self._variables, self._log)
        self._processes.append(self._superlink)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all processes of the run, and remove its files."""
        kill_families([process.pid for process in self._processes])
        while self._processes:
            self._processes.pop().wait()
        self._held.close()
        self._work.cleanup()

    def play(self, run: PreparedRun, say: Callable[[str], None]) -> None:
        """Run it and wait for its end.

        Raises
        ------
        ConfigError
            The cluster does not fit, as `joined` has it.
        RunFailed
            With the reason that the ServerApp, Flower or Ray gave.
        """
        log = run.folder / "flower.log"
        begin = log.stat().st_size if log.exists() else 0
        try:
            modules = run.modules if self._cluster else ()  # on this machine they are found where they lie
            app, overrides = copy_app(self._home / "ssfl-app", run.toml, modules), self._home / "run.toml"
            overrides.write_text(run.toml, encoding="utf-8")
            room, later = self._room(run, app, log, say)
            self._later.write_text(json.dumps({"OMP_NUM_THREADS": str(run.threads)} | later), "utf-8")
            wait_until_healthy(self._superlink, self._address, self._log)
            flwr = spawn(_flwr_run(run, room, app, overrides), self._home, self._variables, log)
            self._processes.append(flwr)
            follow(flwr, run.folder, say)
        finally:
            self.close()
        judge(run.folder, log, begin)

    def _room(self, run: PreparedRun, app: Path, log: Path, say: Callable[[str], None]) -> tuple[str, dict[str, str]]:
        """Say where the actors are; return Flower's words for it, and the variables for its simulation."""
        each = f"{run.threads} torch thread(s) and {{:g}} GPU each"
        if self._cluster is None:
            say(f"engine ray: {run.actors} actors, {each.format(run.gpu)}, on {usable_cores()} cores")
            room, later = f"1 client-resources-num-gpus={run.gpu} init-args-num-cpus={run.actors}", _object_store(run)
        else:
            from ssfl_app.simulation.cluster import joined  # Flower and NumPy: seconds that other runs do not need

            found = self._held.enter_context(joined(self._cluster, run, app, self._variables, log))
            say(f"engine ray: {found.line}, {each.format(found.room.gpu)}")
            room, later = f"{found.room.cpus} client-resources-num-gpus={found.room.gpu}", found.variables
        for line in run.notes:
            say(line)
        return room, later


def _flwr_run(run: PreparedRun, room: str, app: Path, overrides: Path) -> list[str]:
    federation = f"num-supernodes={run.nodes} client-resources-num-cpus={room} init-args-log-to-driver=false"
    command = ["flwr", "run", str(app), "local", "--stream", "-c", str(overrides)]
    return [*command, "--federation-config", federation]


def _variables(home: Path, address: str, later: Path) -> dict[str, str]:
    flwr_home = home / "flwr"
    flwr_home.mkdir()
    (flwr_home / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "{address}"\ninsecure = true\n', "utf-8"
    )
    own = {locks.LAUNCHER: str(home / "launcher.lock"), locks.LATER: str(later), "SSFL_SOURCE": str(app_folder())}
    # Flower looks for a run each second by default.
    return environment(flwr_home, **own, FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.1")


def _own_ray(home: Path) -> dict[str, str]:
    """Return the variables of a Ray that is the run's own, with its files where they are removed."""
    # Processes that Ray starts before it is asked are never used, since Flower's actors have another environment;
    # those that are used import torch when they start, not when the first message comes.
    actors = {"RAY_prestart_worker_first_driver": "0", "RAY_preload_python_modules": "ssfl_app.client_app"}
    return {"RAY_TMPDIR": str(home), **_closed(), **actors}


def _closed() -> dict[str, str]:
    """Return the variables that keep others out of this run's Ray, and this run out of others'.

    By its defaults every process of Ray listens on all interfaces and runs what it is sent, whoever sends it. Flower
    passes no address on to `ray.init`; the first variable, made for two other systems, is Ray's own way to take the
    loopback interface. There the token keeps out other users of this machine. Without the last one Ray
    connects to the cluster whose address some ``ray start`` has left on this machine, living or dead.
    """
    token = secrets.token_hex(32)
    closed = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    return closed | {"RAY_ADDRESS": "local"}


def _object_store(run: PreparedRun) -> dict[str, str]:
    # A message and a reply for every actor. By default Ray takes 30 % of the machine and, while there is room, puts
    # each object at another address; all of it then counts as memory of the server's process.
    size = max(SMALLEST_STORE, 2 * run.actors * run.model_bytes)
    return {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(size)}
