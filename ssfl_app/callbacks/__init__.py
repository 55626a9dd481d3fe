"""Callbacks of a run, by name: trackers, and classes of one's own."""

import functools
from importlib.util import find_spec

from ssfl_app.callbacks.base import RunCallback
from ssfl_app.callbacks.mlflow import MlFlow
from ssfl_app.callbacks.tensorboard import TensorBoard
from ssfl_app.callbacks.wandb import Wandb
from ssfl_app.options import ConfigError, option
from ssfl_app.registry import Registry

REGISTRY: Registry[type[RunCallback]] = Registry(
    "ssfl.callbacks",
    {"tensorboard": TensorBoard, "mlflow": MlFlow, "wandb": Wandb},
    "a subclass of ssfl_app.RunCallback",
    lambda found: isinstance(found, type) and issubclass(found, RunCallback),
)


def names_in(text: str) -> list[str]:
    """Return the names of ``"tensorboard,mlflow"``."""
    return [name.strip() for name in text.split(",")] if text.strip() else []


def _check(text: str) -> bool:
    names = names_in(text)
    return all(REGISTRY[name] is not None for name in names) and len(set(names)) == len(names)


field = functools.partial(
    option, "names with commas between them, none of them twice", _check, "", names=[*REGISTRY, '"module:attribute"']
)
"""Return a dataclass field for several of these names."""


def check_installed(text: str) -> None:
    """Raise ConfigError if the library of a callback is missing where the server runs."""
    for name in names_in(text):
        library = REGISTRY[name].library
        found = find_spec(library) if library else None
        if library and (found is None or found.origin is None):  # a folder of this name is no library
            extra = f"ssfl-app[{name}]" if name in REGISTRY else library
            raise ConfigError(f'run.trackers is {text!r}; {library} is not installed here: pip install "{extra}"')


def make(text: str) -> dict[str, RunCallback]:
    """Return the callbacks of a run by name; ConfigError: a library is missing, or one cannot be made."""
    check_installed(text)
    made = {}
    for name in names_in(text):
        try:
            made[name] = REGISTRY[name]()
        except Exception as error:
            raise ConfigError(f"run.trackers is {text!r}; {name}() says {type(error).__name__}: {error}") from error
    return made
