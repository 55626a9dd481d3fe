"""A run as the command line asks for it: its arguments, and what people are told when it ends badly.

Torch is imported by what computes, not here: the launcher of a run on Ray only waits for it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.results.status import settle
from ssfl_app.text import command, tell

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


@contextmanager
def telling(folder: Path, *words: object) -> Iterator[None]:
    """Play a run inside; if it fails or is interrupted, say why and how to go on, and exit with 1.

    When the processes that wrote to its folder are gone, status.json says how it ended, whether they could or not.
    `words` are those of the command that goes on with it, without ``--resume``.
    """
    try:
        yield
    except ConfigError:  # nothing was written, and perhaps it is another's run
        raise
    except BrokenPipeError:  # nobody reads any more, so nothing is said
        settle(folder, "interrupted")
        raise
    except (RunFailed, OSError) as error:
        # OSError: a full disk, a folder that went away. The checkpoint before it is intact.
        settle(folder, "failed", str(error))
        _end(f"the run failed: {error}", folder, *words)
    except KeyboardInterrupt:
        settle(folder, "interrupted")
        _end("interrupted", folder, *words)
    except Exception as error:
        settle(folder, "failed", f"{type(error).__name__}: {error}")
        raise


def _end(why: str, folder: Path, *words: object) -> NoReturn:
    cure = command("ssfl", *words, "--resume", folder)
    if not (folder / "config.toml").is_file():
        cure = "the same command again; nothing was played yet"
    tell(f"ssfl: {why}\nto go on: {cure}", error=True)
    sys.exit(1)
