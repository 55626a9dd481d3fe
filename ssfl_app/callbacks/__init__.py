"""Callbacks of a run, by name: trackers, and classes of one's own."""

from importlib.util import find_spec
from typing import Any

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


def field(about: str) -> Any:
    """Return a dataclass field for several of these names."""
    rule, names = "names with commas between them, none of them twice", [*REGISTRY, '"module:attribute"']
    return option(rule, _check, "", about, names)


def find(text: str) -> dict[str, type[RunCallback]]:
    """Return the callbacks of these names; ConfigError if the library of one is missing where the server runs."""
    found = {name: REGISTRY[name] for name in names_in(text)}
    for name, library in [(name, kind.library) for name, kind in found.items() if kind.library]:
        spec = find_spec(library)
        if spec is None or spec.origin is None:  # a folder of this name is no library
            extra = f"ssfl-app[{name}]" if name in REGISTRY else library
            raise ConfigError(f'run.trackers is {text!r}; {library} is not installed here: pip install "{extra}"')
    return found
