"""The Python interface: `run` plays what ``ssfl run`` plays, `load_run` reads what it left."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ssfl_app import config as configuration
from ssfl_app import installed
from ssfl_app.options import ConfigError, PrivateError, flatten, not_a_key
from ssfl_app.registry import here_only, import_from, name_of
from ssfl_app.results import plots, run_folder
from ssfl_app.results.export import mask_of, trained, transform_of, write
from ssfl_app.simulation.command import Engine, RunArgs, settling
from ssfl_app.simulation.play import play

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHORT = {
    "strategy": "strategy",
    **{word: f"{word}.name" for word in ("model", "data", "partition", "task")},
    **{word: f"run.{word}" for word in ("clients", "cohort", "rounds", "seed")},
    "density": "mask.density",
}
"""Arguments of `run` and the keys that they stand for."""


@contextmanager
def _whole() -> Iterator[None]:
    """Raise what the owner of the files may read in full as the error that is documented, with the same traceback."""
    try:
        yield
    except PrivateError as error:
        raise ConfigError(str(error)).with_traceback(error.__traceback__) from error.__cause__


@dataclass(frozen=True, repr=False)
class Run(run_folder.Run):
    """What a run folder holds, with what was learnt; `summary` is its summary.json.

    `mask` has bool tensors by name, none in a dense run; `transform.test` makes the input of `model()` of data as a
    reader gives them; `export(to, out)` writes a file (`results.export`).
    """

    def __repr__(self) -> str:
        played = f"{len(self.rounds)} of {self.config.get('run.rounds')} rounds"
        return f"Run({str(self.folder)!r}: {run_folder.run_labels([self])[0]}, {played})"

    @property
    def history(self) -> Any:
        """A row a round: its numbers, how many clients, and MB sent so far; a DataFrame if pandas is installed.

        Without pandas it is a list of dicts. What a round did not measure is None.
        """
        rows = []
        for entry, sent in zip(self.rounds, run_folder.cumulative_mb(self), strict=True):
            row = {key: value for key, value in entry.items() if value is None or type(value) in (int, float)}
            counts = {key: len(entry.get(key) or ()) for key in ("cohort", "ok", "lost", "refused")}
            rows.append(row | counts | {"mb_sent": float(sent)})
        if find_spec("pandas") is None:
            return rows
        import pandas

        return pandas.DataFrame(rows)

    def plot(self) -> "Figure":
        """Return the headline metric over rounds as a matplotlib figure; ConfigError: no round was evaluated."""
        if not plots.has_accuracy(self):
            raise ConfigError(f"{self.folder} has no round that was evaluated; a plot needs one")
        return plots.accuracy_by_round([self])

    mask = property(mask_of)
    transform = property(transform_of)
    model = _whole()(trained)
    export = _whole()(write)


@_whole()
def run(
    strategy: object = None,
    *,
    model: object = None,
    data: object = None,
    partition: object = None,
    task: object = None,
    clients: int | None = None,
    cohort: int | None = None,
    rounds: int | None = None,
    seed: int | None = None,
    density: float | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    engine: str = "inline",
    ray_address: str = "",
    ray_without_token: bool = False,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    quiet: bool = False,
    **keys: Any,
) -> Run:
    """Play a run as ``ssfl run`` does, and return what is in its folder.

    Parameters
    ----------
    strategy : str or type of SparseStrategy, optional
        ``"ssfl"`` if `config` does not say otherwise, as all that is not given has its default.
    model, data, partition, task : str, function or class, optional
        Names, or what they would stand for; `data` also ``((x, y), (test_x, test_y))``, arrays or tensors.
    clients, cohort, rounds, seed, density : number, optional
        ``run.clients`` and so on, and ``mask.density``. Without `cohort` it is at most `clients`.
    config : mapping or path, optional
        Other keys, ``{"local.lr": 0.05}`` or nested, or a TOML file of them.
    engine : str
        ``"inline"``, in this process and its forks, or ``"ray"``, Flower's simulation.
    ray_address : str
        ``"HOST:PORT"`` of the head of a Ray cluster that is up, or ``"auto"``; the engine is ray there.
    ray_without_token : bool
        Also where that cluster has no token and runs anybody's code.
    out, resume : path, optional
        A new run folder, by default ``runs/<time>-<strategy>-<dataset>``; or that of a run to go on with.
    quiet : bool
        Show nothing. Otherwise a terminal and a notebook show a progress bar, and other outputs plain lines.
    **keys
        Any other key, with underscores: ``local_lr=0.05``, ``model_options={"width": 64}``.

    Raises
    ------
    ConfigError
        It cannot be run, and nothing was written.
    RunFailed
        It broke off; `resume` goes on with it.
    """
    words = {word: value for word, value in locals().items() if word in SHORT and value is not None}
    where = Engine.of(engine, ray_address, ray_without_token)
    import_from(Path.cwd())
    file = Path(config) if isinstance(config, str | Path) else None
    given = _named(flatten(config)) if isinstance(config, Mapping) else {}
    of = given.get("strategy") or _named({"strategy": strategy or "ssfl"})["strategy"]
    known = configuration.defaults(configuration.merge({"strategy": of})["strategy"])
    called = _named(flatten(_spelled(words | keys, known)))
    for key in given.keys() & called.keys():
        raise ConfigError(f"{key} is given twice, {given[key]!r} and {called[key]!r}; give one of them")
    flat = given | called
    for key in configuration.NAMED:
        if where.name != "inline" and here_only(str(flat.get(key, ""))):
            raise ConfigError(
                f"{key} is {flat[key]!r}; with engine {where.name!r} it is in a module of its own, a file"
            )
    for word, path in (("out", out), ("resume", resume)):
        if not isinstance(path, str | Path | None):
            raise ConfigError(f"{word} is {path!r}; it is the path of a run folder")
    installed.check_installed()
    into, going_on = (None if path is None else Path(path) for path in (out, resume))
    threads = torch.get_num_threads()
    try:
        return load_run(play(RunArgs(file, [], None, where, into, going_on, flat), settling, quiet))
    finally:
        torch.set_num_threads(threads)


def load_run(folder: str | Path) -> Run:
    """Return the run in a folder that `run` or ``ssfl run`` wrote; ConfigError: it is none, or is damaged."""
    return Run(**vars(run_folder.read_run(Path(folder))))


def _spelled(words: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments under the keys that they stand for."""
    keys = {re.sub("[.-]", "_", key): key for key in known} | SHORT
    keys |= {"model_options": "model.options", "data_options": "data.options", "task_options": "task.options"}
    for word in words:
        if word not in keys:
            raise not_a_key(word, list(keys), "ssfl keys lists them, here with underscores")
    return {keys[word]: value for word, value in words.items()}


def _named(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration in which things of Python have names."""
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in flat.items()}
    return {key: _name(key, str(value) if isinstance(value, Path) else value) for key, value in plain.items()}


def _name(key: str, value: Any) -> Any:
    if key not in configuration.NAMED or isinstance(value, str):
        return value
    if isinstance(value, nn.Module):
        how = "what makes it, called with (input_shape, outputs, norm)"
        raise ConfigError(f"{key} is a {type(value).__name__} that is made already; it is {how}")
    if callable(value):
        return name_of(value)
    if key == "data.name":
        return name_of(lambda path: value, "data")
    raise ConfigError(f"{key} is {value!r}; it is a name, or a function or class")
