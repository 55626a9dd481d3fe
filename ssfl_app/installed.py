"""Whether what ``ssfl`` and `ssfl_app.run` need is installed: a Flower project that plugs SSFL in needs less."""

import importlib
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from ssfl_app.options import ConfigError


def lacking(package: str, extras: Iterable[str]) -> Iterator[str]:
    """Yield the packages that are not installed but belong to these extras of an installed package."""
    for requirement in map(Requirement, metadata.requires(package) or []):
        if requirement.marker and any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            try:
                yield from lacking(requirement.name, requirement.extras)
            except metadata.PackageNotFoundError:
                yield requirement.name


def check_installed() -> None:
    """Raise ConfigError if only what the plug-in layer needs was installed.

    Now, not when a picture is drawn at the end of a long run. A checkout on PYTHONPATH has no metadata to ask. Ray is
    asked for by the engine that needs it.
    """
    try:
        if missing := sorted({*lacking("ssfl-app", ["app"])} - {"ray"}):
            raise ConfigError(f'{", ".join(missing)} not installed: pip install "ssfl-app[app]"')
    except metadata.PackageNotFoundError:
        return


def needed(module: str) -> Any:
    """Return a module of the extra ``privacy``; ConfigError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0].replace("_", "-")
        raise ConfigError(
            f"privacy.level is not 'none'; {library} is not installed here: pip install \"ssfl-app[privacy]\""
        ) from error
