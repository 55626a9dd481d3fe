"""The launcher: `flwr run` on a SuperLink of its own, as a command that tells the truth in its exit code.

What plain ``flwr run`` leaves to its user, and is done here:

- a local SuperLink that Flower starts stays up for ever and keeps environment, venv and working directory of whoever
  started it first; later runs of another checkout then silently get that one's client code. Here every run has its
  own SuperLink, on a free port, in a neutral folder, with its own FLWR_HOME; all of it is gone afterwards.
- without a switch each run installs torch anew; telemetry and update checks go to the internet.
- Ray listens on all interfaces without a password: whoever reaches the machine runs code on it. Here its processes
  listen on the loopback interface only, and want a token that is drawn for the run.
- the folder of a Flower app may hold letters, digits and hyphens only, a clone's need not: the app is copied.
- ``flwr run --stream`` exits with 0 even if the run failed. Here success is what the ServerApp recorded.
"""

import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ssfl_app import guard
from ssfl_app.config import Config, app_folder, write_toml
from ssfl_app.engine.flower_app import copy_app, follow, judge
from ssfl_app.engine.processes import environment, free_port, running, short_folder, wait_until_healthy
from ssfl_app.workshop import find_device, gpu_notes

SMALLEST_STORE = 100_000_000  # Ray refuses less than 79 MB


def plan(config: Config) -> tuple[int, float]:
    """Return (actors, share of a GPU for each).

    One actor a core by default, never more than the cohort can use; actors share the visible GPUs evenly.
    """
    run = config.settings.run
    actors = config.engine.actors or min(os.cpu_count() or 1, max(run.cohort, 1))
    gpus = torch.cuda.device_count() if find_device(run.device).type == "cuda" else 0
    return actors, gpus / actors


def launch(config: Config, model_bytes: int, say: Callable[[str], None]) -> None:
    """Run the configuration on Ray and wait for its end; `run.out` names the run folder, which is there.

    `model_bytes` is the size of a dense model; it sets the size of Ray's object store.

    Raises
    ------
    RunFailed
        With the reason the ServerApp gave, or the end of Flower's log.
    """
    actors, gpu = plan(config)
    threads, cores = config.engine.threads, os.cpu_count()
    say(f"engine ray: {actors} actors, {threads} torch thread(s) and {gpu:g} GPU each, on {cores} cores")
    for note in gpu_notes(config, "ray"):
        say(note)
    folder = Path(config.settings.run.out)
    with tempfile.TemporaryDirectory(prefix="ssfl-", dir=short_folder(), ignore_cleanup_errors=True) as work:
        home, address = Path(work), f"127.0.0.1:{free_port()}"
        app, overrides = copy_app(home / "ssfl-app"), home / "run.toml"
        overrides.write_text(write_toml(config.flat), "utf-8")
        variables = _variables(home, address, threads) | _object_store(2 * actors * model_bytes)
        federation = (
            f"num-supernodes={config.settings.run.clients} client-resources-num-cpus=1 "
            f"client-resources-num-gpus={gpu} init-args-num-cpus={actors} init-args-log-to-driver=false"
        )
        command = ["flwr", "run", str(app), "local", "--stream", "-c", str(overrides)]
        command += ["--federation-config", federation]
        superlink = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
        superlink += ["--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
        log = folder / "flower.log"
        begin = log.stat().st_size if log.exists() else 0
        with (
            guard.hold(Path(variables[guard.LAUNCHER])),
            running(superlink, home, variables, home / "superlink.log") as process,
        ):
            wait_until_healthy(process, address, home / "superlink.log")
            with running(command, home, variables, log) as flwr:
                follow(flwr, folder / "console.log", say)
    judge(folder, log, begin)


def _variables(home: Path, address: str, threads: int) -> dict[str, str]:
    flwr_home = home / "flwr"
    flwr_home.mkdir()
    (flwr_home / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "{address}"\ninsecure = true\n',
        "utf-8",
    )
    own = {guard.LAUNCHER: str(home / "launcher.lock"), "SSFL_SOURCE": str(app_folder()), "RAY_TMPDIR": str(home)}
    return environment(flwr_home, OMP_NUM_THREADS=str(threads), **own, **_closed())


def _closed() -> dict[str, str]:
    """Return the variables that keep others out of this run's Ray.

    By its defaults every process of Ray listens on all interfaces and runs what it is sent, whoever sends it. Flower
    passes no address on to `ray.init`; the first variable, made for two other systems, is Ray's own way to take the
    loopback interface. There the token keeps out other users of this machine.
    """
    token = secrets.token_hex(32)
    return {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def _object_store(size: int) -> dict[str, str]:
    # A message and a reply for every actor. By default Ray takes 30 % of the machine and, while there is room, puts
    # each object at another address; all of it then counts as memory of the server's process.
    return {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(max(SMALLEST_STORE, size))}
