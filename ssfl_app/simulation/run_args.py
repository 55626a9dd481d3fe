"""The arguments of `ssfl run`, as the command line gives them."""

from dataclasses import dataclass
from pathlib import Path

from ssfl_app.options import ConfigError

ENGINES = ("ray", "inline")


@dataclass(frozen=True)
class RunArgs:
    """The arguments of `ssfl run`; `engine` is one of `ENGINES`, or "deployment" for `ssfl federation run`."""

    file: Path | None
    overrides: list[str]
    nodes: int | None
    engine: str
    out: Path | None
    resume: Path | None


def check_engine(name: str) -> None:
    """Raise ConfigError unless `name` is one of `ENGINES`."""
    if name not in ENGINES:
        raise ConfigError(f"--engine is {name!r}; it is one of {', '.join(ENGINES)}")
