"""What `ssfl run` does: have the command line resolved and checked, then play the run on an engine.

Torch is imported by what computes, not here: the launcher of a run on Ray only waits for it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.results.status import settle
from ssfl_app.simulation.run_args import RunArgs, check_engine
from ssfl_app.text import command, tell


def run_command(words: RunArgs) -> None:
    """Run, or raise ConfigError before anything was written; exit with 1 if the run fails."""
    check_engine(words.engine)
    if words.engine == "inline":
        from ssfl_app import client_app, server_app
        from ssfl_app.simulation.in_process import run_inline
        from ssfl_app.simulation.resolve import resolve

        config, _ = resolve(words)
        with telling(Path(config.settings.run.out), "run"):
            run_inline(server_app.app, client_app.app, config)
    else:
        from ssfl_app.simulation.prepared_run import prepare_run
        from ssfl_app.simulation.ray import Launch

        with Launch() as launch:
            checked = prepare_run(words)
            with telling(checked.folder, "run", "--engine", words.engine):
                launch.play(checked, tell)


@contextmanager
def telling(folder: Path, *words: object) -> Iterator[None]:
    """Play a run inside; if it fails or is interrupted, say why and how to go on, and exit with 1.

    When the processes that wrote to its folder are gone, status.json says how it ended, whether they could or not.

    Parameters
    ----------
    folder : Path
        Of the run.
    *words : object
        Those of the command that goes on with it, without ``--resume``.
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
