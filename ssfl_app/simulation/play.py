"""Plays a run on this machine, on the engine that is asked for. Torch is imported by what computes, not here."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from ssfl_app.results.progress import showing
from ssfl_app.simulation.command import RunArgs
from ssfl_app.text import tell


def play(words: RunArgs, ending: Callable[..., AbstractContextManager[None]], quiet: bool = False) -> Path:
    """Play a run and return its folder; `ending` is `settling` or `telling`. `quiet`: nothing is printed.

    ConfigError: it cannot be run, and nothing was written.
    """
    if words.engine.name == "inline":
        from ssfl_app import client_app, server_app
        from ssfl_app.simulation.in_process import run_inline
        from ssfl_app.simulation.resolve import resolve

        checked, _ = resolve(words)
        folder = Path(checked.settings.run.out)
        with ending(folder, *words.going_on), showing(quiet):
            run_inline(server_app.app, client_app.app, checked)
        return folder
    from ssfl_app.simulation.prepared_run import prepare_run
    from ssfl_app.simulation.ray import Launch

    with Launch(words.engine.cluster) as launch:
        prepared = prepare_run(words)
        with ending(prepared.folder, *words.going_on), showing(quiet):
            launch.play(prepared, tell)
    return prepared.folder
