"""The Python interface: `run` plays what ``ssfl run`` plays, `load_run` reads what it left."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssfl_app import config as configuration
from ssfl_app.options import ConfigError, flatten, not_a_key
from ssfl_app.registry import here_only, import_from, name_of
from ssfl_app.results.run_folder import Run, read_run
from ssfl_app.simulation.command import ENGINES, RunArgs, play, settling

SHORT = {
    "strategy": "strategy",
    "model": "model.name",
    "data": "data.name",
    "partition": "partition.name",
    "task": "task.name",
    "clients": "run.clients",
    "cohort": "run.cohort",
    "rounds": "run.rounds",
    "seed": "run.seed",
    "density": "mask.density",
}
"""Arguments of `run` and the keys that they stand for."""


def run(
    strategy: object = None,
    *,
    config: Mapping[str, Any] | str | Path | None = None,
    engine: str = "inline",
    out: str | Path | None = None,
    resume: str | Path | None = None,
    quiet: bool = False,
    **keys: Any,
) -> Run:
    """Play a run and return it; it leaves the run folder that ``ssfl run`` leaves.

    Parameters
    ----------
    strategy : str or type of SparseStrategy, optional
        A name, or a class of your own; ``"ssfl"`` if nothing else says what it is.
    config : mapping or path, optional
        Keys, ``{"local.lr": 0.05}`` or nested, or a TOML file with them.
    engine : str
        ``"inline"``, in this process and its forks, or ``"ray"``, Flower's simulation.
    out : path, optional
        Run folder; by default ``runs/<time>-<strategy>-<dataset>``.
    resume : path, optional
        Go on with the run in this folder.
    quiet : bool
        Show nothing. Otherwise a terminal and a notebook show a progress bar, and other outputs plain lines.
    **keys
        The names in `SHORT`, ``clients=20`` or ``density=0.1``, and any other key with underscores:
        ``local_lr=0.05``, ``model_options={"width": 64}``. `model`, `data`, `partition` and `task` are names, or
        functions and classes; `data` may also be the data themselves, ``((x, y), (test_x, test_y))``. With
        `clients` and without `cohort` no more clients train in a round than there are.

    Returns
    -------
    Run
        With `history`, `plot`, `model`, `mask` and `summary`.

    Raises
    ------
    ConfigError
        It cannot be run; nothing was written.
    RunFailed
        It broke off; `resume` goes on with it.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine is {engine!r}; it is one of {', '.join(ENGINES)}")
    import_from(Path.cwd())
    file = Path(config) if isinstance(config, str | Path) else None
    given = flatten(config) if isinstance(config, Mapping) else {}
    chosen = given | ({} if strategy is None else {"strategy": strategy})
    chosen = {key: _named(key, value) for key, value in chosen.items()}
    known = configuration.defaults(configuration.merge({"strategy": chosen.get("strategy", "ssfl")})["strategy"])
    flat = dict(chosen)
    for key, value in flatten(_dotted(keys, known)).items():
        if key in chosen:
            raise ConfigError(f"{key} is given twice, {chosen[key]!r} and {value!r}; give one of them")
        flat[key] = _named(key, value)
    if "run.clients" in flat and "run.cohort" not in flat and file is None and resume is None:
        flat["run.cohort"] = min(flat["run.clients"], known["run.cohort"])
    for key in configuration.NAMED:
        if engine != "inline" and here_only(str(flat.get(key, ""))):
            raise ConfigError(f"{key} is {flat[key]!r}; with engine {engine!r} it is in a module of its own, a file")
    folders = [None if path is None else Path(path) for path in (out, resume)]
    threads = torch.get_num_threads()
    try:
        return read_run(play(RunArgs(file, [], None, engine, *folders, flat), settling, quiet))
    finally:
        torch.set_num_threads(threads)


def load_run(folder: str | Path) -> Run:
    """Return the run in a folder that `run` or ``ssfl run`` wrote.

    Raises
    ------
    ConfigError
        It is no such folder, or one of its files is damaged.
    """
    return read_run(Path(folder))


def _dotted(keys: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments under the keys that they stand for."""
    spelled = {re.sub("[.-]", "_", key): key for key in known} | SHORT
    spelled |= {f"{section}_options": f"{section}.options" for section in ("model", "data", "task")}
    for word in keys:
        if word not in spelled:
            raise not_a_key(word, [*spelled, *known], "ssfl keys lists them")
    return {spelled[word]: value for word, value in keys.items()}


def _named(key: str, value: Any) -> Any:
    """Return a value as the configuration has it: things of Python by a name."""
    if isinstance(value, Path):
        return str(value)
    if key not in configuration.NAMED or isinstance(value, str):
        return value
    if isinstance(value, nn.Module):
        raise ConfigError(
            f"{key} is a {type(value).__name__}, made already; it is the class or function that makes it, which is "
            "called with (input_shape, outputs, norm)"
        )
    if not callable(value):
        if key != "data.name":
            raise ConfigError(f"{key} is {value!r}; it is a name, or a function or class")
        return name_of(_reader_of(value), "data")
    return name_of(value)


def _reader_of(data: object) -> Callable[..., object]:
    return lambda path: data
