"""A run as the command line or `ssfl_app.run` asks for it: its arguments, and what is recorded when it ends badly.

Torch is imported by what computes, not here: the launcher of a run on Ray only waits for it.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError, Scalar
from ssfl_app.results.status import settle
from ssfl_app.text import command, tell

ENGINES = ("ray", "inline")


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster that others started: HOST:PORT of its head, or "auto", as Ray finds one.

    `open_too`: it is taken without a token as well.
    """

    address: str
    open_too: bool = False

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if self.address != "auto" and not (host and port.isdecimal() and "/" not in host):
            raise ConfigError(f"--ray-address is {self.address!r}; it is HOST:PORT of a cluster's head, or auto")


@dataclass(frozen=True)
class Engine:
    """Where a run is played: `name` is one of `ENGINES`, or "deployment" for `ssfl federation run`.

    With a `cluster` it is "ray".
    """

    name: str = "inline"
    cluster: RayCluster | None = None

    @classmethod
    def of(cls, name: str, ray_address: str = "", ray_without_token: bool = False) -> "Engine":
        """Return what a command, or Python, asks for; ConfigError: no such engine, or its package is missing."""
        if name not in ENGINES:
            raise ConfigError(f"--engine is {name!r}; it is one of {', '.join(ENGINES)}")
        if ray_without_token and not ray_address:
            raise ConfigError("--ray-without-token is given; it is about the cluster of --ray-address")
        if ray_address:
            name = "ray"
        if name == "ray" and find_spec("ray") is None:
            raise ConfigError("--engine is 'ray'; ray is not installed: pip install \"ssfl-app[app]\"")
        return cls(name, RayCluster(ray_address, ray_without_token) if ray_address else None)

    @property
    def words(self) -> list[str]:
        """What a command says to get it; nothing for the default."""
        if self.cluster is None:
            return [] if self.name == "inline" else ["--engine", self.name]
        return ["--ray-address", self.cluster.address, *["--ray-without-token"] * self.cluster.open_too]


@dataclass(frozen=True)
class RunArgs:
    """The arguments of `ssfl run`; `keys` are those that Python gives, dotted, over those of `file`."""

    file: Path | None
    overrides: list[str]
    nodes: int | None
    engine: Engine
    out: Path | None
    resume: Path | None
    keys: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def going_on(self) -> list[str]:
        """The words of the command that goes on with such a run, before ``--resume``."""
        return ["run", *self.engine.words]


@contextmanager
def settling(folder: Path, *_: object) -> Iterator[None]:
    """Play a run inside; when the processes that wrote to its folder are gone, status.json says how it ended."""
    try:
        yield
    except ConfigError:  # nothing was written, and perhaps it is another's run
        raise
    except (BrokenPipeError, KeyboardInterrupt):
        settle(folder, "interrupted")
        raise
    except (RunFailed, OSError) as error:
        # OSError: a full disk, a folder that went away. The checkpoint before it is intact.
        settle(folder, "failed", str(error))
        raise
    except Exception as error:
        settle(folder, "failed", f"{type(error).__name__}: {error}")
        raise


@contextmanager
def telling(folder: Path, *words: object) -> Iterator[None]:
    """Do what `settling` does; if the run fails or is interrupted, say why and how to go on, and exit with 1.

    `words` are those of the command that goes on with it, without ``--resume``.
    """
    try:
        with settling(folder):
            yield
    except (ConfigError, BrokenPipeError):  # nobody reads any more, so nothing is said
        raise
    except (RunFailed, OSError) as error:
        _end(f"the run failed: {error}", folder, *words)
    except KeyboardInterrupt:
        _end("interrupted", folder, *words)


def _end(why: str, folder: Path, *words: object) -> NoReturn:
    cure = command("ssfl", *words, "--resume", folder)
    if not (folder / "config.toml").is_file():
        cure = "the same command again; nothing was played yet"
    tell(f"ssfl: {why}\nto go on: {cure}", error=True)
    sys.exit(1)
