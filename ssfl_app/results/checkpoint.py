"""The checkpoint of a run: what it can be taken up again from, bound to its configuration and its records.

``checkpoint/latest.safetensors`` holds a strategy's `snapshot`, the round, the configuration, and digests of the
arrays and of the lines that ``rounds.jsonl`` had. These lines are on the disk before it is.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt

from ssfl_app.config import Flat, complete, first_clash, identity
from ssfl_app.core.strategy import SparseStrategy
from ssfl_app.files import check_regular, sync
from ssfl_app.options import ConfigError
from ssfl_app.seal import Damaged, read_sealed, write_sealed

Record = dict[str, Any]


class Saved(NamedTuple):
    """What a run goes on from: the round it was taken after, seconds spent, records until then, the snapshot."""

    round: int
    seconds: float
    records: list[Record]
    arrays: dict[str, npt.NDArray[Any]]


def path_of(folder: Path) -> Path:
    """Return the file of a run folder's checkpoint."""
    return folder / "checkpoint" / "latest.safetensors"


def save(
    folder: Path, flat: Flat, round_: int, seconds: float, records: int, lines: str, arrays: Mapping[str, Any]
) -> None:
    """Replace the checkpoint by one taken after `round_`, when rounds.jsonl had so many records.

    `lines` is the SHA-256 (hex) of what was written there.
    """
    sync(folder / "rounds.jsonl")
    metadata = {"round": round_, "seconds": seconds, "records": records, "config": identity(flat), "lines": lines}
    write_sealed(path_of(folder), metadata, arrays)


def load(folder: Path, flat: Flat) -> Saved | None:
    """Return the checkpoint of the run in a folder, or None if it never got as far as one.

    Raises
    ------
    ConfigError
        The checkpoint, the configuration or the records are damaged or belong to another run. Nothing was changed.
    """
    path, lines = path_of(folder), folder / "rounds.jsonl"
    try:
        if not path.exists():
            return None
        metadata, arrays = read_sealed(path)
        round_, seconds, count = metadata["round"], metadata["seconds"], metadata["records"]
        well = type(round_) is int and type(count) is int and type(seconds) is float
        if not well or not 0 <= round_ <= int(flat["run.rounds"]) or count < 1:
            raise Damaged(f"is of round {round_!r} with {count!r} records; rounds are 0 to {flat['run.rounds']}")
        theirs = identity(complete(metadata["config"]))  # an older version had fewer keys
        if theirs != identity(flat):
            clash = first_clash(identity(flat), theirs) or "it lacks a key"
            raise ConfigError(
                f"{folder / 'config.toml'} is another one than {path} was written under: {clash}. Put that back, or "
                "begin the run anew in another folder"
            )
        kept = _lines(lines)[:count]
        if len(kept) != count or metadata["lines"] != hashlib.sha256(b"".join(kept)).hexdigest():
            raise ConfigError(f"{lines} is damaged: it does not begin with the {count} records that {path} goes with")
        return Saved(round_, seconds, [json.loads(line) for line in kept], arrays)
    except (Damaged, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = error if isinstance(error, Damaged) else f"is damaged ({error!r})"
        raise ConfigError(f"{path} {why}; put back a copy, or begin the run anew in another folder") from error
    except OSError as error:
        raise ConfigError(f"{error.filename or path} cannot be read ({error.strerror or error})") from error


def resume(strategy: SparseStrategy, folder: Path, flat: Flat) -> Saved | None:
    """Let the strategy continue from the checkpoint of the run in a folder; return it, or None if there is none yet.

    ConfigError: as `load` does; or the snapshot in it is not one of this strategy, model and number of clients.
    """
    saved = load(folder, flat)
    if saved is None:
        return None
    try:
        strategy.load_state_dict(saved.round, saved.arrays)
        again = {name: (a.dtype, a.shape) for name, a in strategy.state_dict().items()}
        given = {name: (a.dtype, a.shape) for name, a in saved.arrays.items()}
        odd = sorted(name for name in {*again, *given} if again.get(name) != given.get(name))
        if odd:
            raise ValueError(f"array {odd[0]!r} is {given.get(odd[0])}; it is {again.get(odd[0])}")
    except (KeyError, ValueError, TypeError, IndexError, OverflowError, AttributeError) as error:
        why = f"array {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{path_of(folder)} does not fit this run: {why}") from error
    return saved


def _lines(path: Path) -> list[bytes]:
    check_regular(path)
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
