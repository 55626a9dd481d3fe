"""Finds out what the launcher of a run on Ray must know of it, in a process that imports torch for that and ends."""

import multiprocessing
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from ssfl_app.cores import usable_cores
from ssfl_app.options import ConfigError
from ssfl_app.simulation.command import RunArgs

if TYPE_CHECKING:
    from ssfl_app.config import Config, Flat


@dataclass(frozen=True)
class PreparedRun:
    """A run that was checked, and whose folder is ready; `model_bytes` is the size of a dense model."""

    folder: Path
    flat: "Flat"  # the configuration
    nodes: int
    asked: int  # clients that train in a round
    threads: int  # of torch, in each actor
    actors: int  # processes that train
    gpu: float  # share of a GPU for each
    model_bytes: int
    notes: list[str]  # lines for people
    modules: tuple[str, ...]  # foreign ones
    toml: str  # the configuration


def prepare_run(words: RunArgs) -> PreparedRun:
    """Resolve and check a command line in a process of its own, and make the run folder ready.

    Raises
    ------
    ConfigError
        The run cannot be played, and nothing was changed; or that process died.
    """
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_answer, args=(words, there), daemon=True)
    process.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:
        process.join()
        raise ConfigError(f"the process that checks the run died (exit code {process.exitcode})") from None
    finally:
        process.kill()
        process.join()
    if isinstance(found, PreparedRun):
        return found
    raise found


def _answer(words: RunArgs, there: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the launcher, which ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        there.send(_prepare(words))
    except (ConfigError, OSError) as error:
        there.send(ConfigError(str(error)))  # of this very class: others need not survive the way


def _prepare(words: RunArgs) -> PreparedRun:
    from ssfl_app.config import foreign_modules, write_toml
    from ssfl_app.runtime import gpu_notes
    from ssfl_app.simulation.resolve import make_ready, resolve

    config, layout = resolve(words)
    folder, (actors, gpu) = make_ready(config, layout), plan(config)
    return PreparedRun(
        folder,
        config.flat,
        config.settings.run.clients,
        max(config.settings.run.asked, 1),
        config.engine.threads,
        actors,
        gpu,
        4 * layout.size,
        gpu_notes(config, "ray"),
        tuple(foreign_modules(config.flat)),
        write_toml(config.flat),
    )


def plan(config: "Config") -> tuple[int, float]:
    """Return (actors, share of a GPU for each).

    One actor a core by default, never more than the cohort can use; actors share the visible GPUs evenly.
    """
    import torch

    from ssfl_app.runtime import find_device

    run = config.settings.run
    actors = config.engine.actors or min(usable_cores(), max(run.asked, 1))
    gpus = torch.cuda.device_count() if find_device(run.device).type == "cuda" else 0
    return actors, gpu_share(actors, gpus)


def gpu_share(actors: int, gpus: int) -> float:
    """Return the share of a GPU for each of some actors: one by how many share one, as none has parts of two.

    Ray counts in ten-thousandths; what is left of a GPU is nobody's.
    """
    return 10_000 // -(-actors // gpus) / 10_000 if gpus else 0.0
