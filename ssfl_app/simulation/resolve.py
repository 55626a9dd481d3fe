"""Turns the arguments of `ssfl run` into a configuration, checked as far as possible before anything starts."""

import sys
from pathlib import Path

from ssfl_app import config as configuration
from ssfl_app.config import Config, Flat
from ssfl_app.core.strategy import ServerContext
from ssfl_app.options import ConfigError
from ssfl_app.results.checkpoint import resume
from ssfl_app.results.recorder import check_free, claim, default_folder
from ssfl_app.runtime import check, check_time
from ssfl_app.simulation.command import ENGINES, RunArgs
from ssfl_app.sparsity.layout import Layout
from ssfl_app.strategies import REGISTRY


def make_ready(config: Config, layout: Layout) -> Path:
    """Return the run folder, made, or checked to be one that a run goes on from; for engines in other processes.

    Its status.json goes: that of an earlier session says nothing about this one. ConfigError: another process is
    writing to the folder, or what it holds is damaged; nothing was changed.
    """
    folder = Path(config.settings.run.out)
    with claim(folder):
        if config.settings.run.resume:
            resume(REGISTRY[config.strategy](ServerContext(layout, config.settings)), folder, config.flat)
        (folder / "status.json").unlink(missing_ok=True)
    return folder


def resolve(words: RunArgs) -> tuple[Config, Layout]:
    """Return the checked configuration of a command line, with `run.out` absolute, and its model's layout.

    Raises
    ------
    ConfigError
        Anything about it cannot be run: keys, values, data, partition, GPU, folders.
    """
    nodes = words.nodes
    given = configuration.overlay(configuration.read_given(words.file, words.overrides), words.keys)
    if nodes is not None:
        if given.get("run.clients", nodes) != nodes:
            raise ConfigError(f"--nodes is {nodes}; run.clients, {given['run.clients']}, is the same number")
        given["run.clients"] = nodes
    if words.out is not None:
        given["run.out"] = str(words.out)
    for key in configuration.paths(given):
        # Flower runs the app in another folder, so what is relative here would not be found there.
        given[key] = str(absolute(key, given[key]))
    flat = _resumed(given, words.resume) if words.resume else configuration.merge(given)
    flat["run.resume"] = words.resume is not None
    config = configuration.parse(flat)
    if config.data.where == "sites" and words.engine.name in ENGINES:
        raise ConfigError("data.where is 'sites'; own data need real SuperNodes: ssfl federation run, or flwr run")
    check_time(config, words.engine.name in ENGINES)
    folder = absolute("run.out", flat["run.out"] or default_folder(config.strategy, config.data.name))
    config = configuration.with_out(config, folder)
    layout = check(config, keep=words.engine.name == "inline")
    if words.resume is None:
        check_free(folder)
    return config, layout


def absolute(key: str, path: object) -> Path:
    """Return a path as it is seen from everywhere; ConfigError: no file, or no TOML file, can have this name."""
    try:
        found = Path(str(path)).expanduser().resolve()
        str(found).encode()
        return found
    except UnicodeEncodeError as error:
        rule = f"it is a path in the locale's encoding, {sys.getfilesystemencoding()}"
        raise ConfigError(f"{key} is {path!r}; {rule}: another locale has more letters, LC_ALL=C.UTF-8") from error
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home, or links in a circle
        raise ConfigError(f"{key} is {path!r}; it is a path ({error})") from error


def _resumed(given: Flat, folder: Path) -> Flat:
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"--resume is {folder}; it is a folder that `ssfl run` wrote, with a config.toml")
    theirs = configuration.complete(configuration.read_file(folder / "config.toml"))
    known = configuration.merge({"strategy": theirs["strategy"]}, given)  # names unknown keys
    clash = configuration.first_clash({key: known[key] for key in given}, theirs)
    if clash is not None:
        raise ConfigError(f"--resume is {folder}; {clash}")
    if "run.out" in given:
        raise ConfigError(f"--out is {given['run.out']}; --resume goes on in {folder}, give one of them")
    free = {key: known[key] for key in configuration.RESUME_MAY_CHANGE if key in given}
    return theirs | free | {"run.out": str(folder)}
