"""Run folders read back: one `Run` a folder, and the series and totals that tables and figures show.

Bytes are shown in MB of 10**6 bytes; what keys call accuracy are values of `Run.metric`. A run that was killed has no
``summary.json``: its totals are then added up from the rounds that were written.
"""

import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssfl_app.metrics import Metric
from ssfl_app.options import ConfigError, flatten

MB = 1e6
CENTRAL, LOCAL, PERSONAL = "central_accuracy", "local_accuracy_mean", "personal_accuracy_mean"
ROUND_BYTES = ("bytes_train_down", "bytes_train_up", "bytes_evaluate_down", "bytes_mask_down")
SETUP_BYTES = ("bytes_discovery_down", "bytes_discovery_up")
ALL_BYTES = (*SETUP_BYTES, *ROUND_BYTES)
WORK = ("image_passes", "validation_passes", "bytes_peer")
LAST = (CENTRAL, LOCAL, PERSONAL, "density", "density_all")  # of these a summary has the last value
TOTALS = (
    *("alive", "prunable", "parameters", "clients", "cohort", "rounds", "seed", "trained_clients"),
    *("bytes_dense_train", "seconds_total", "seconds_rounds", "lost_replies", "refused_replies", "simulated_hours"),
)
UNBOUNDED = ("train_loss", "central_loss", CENTRAL)  # of a model that diverged
MOST = 2**63
KINDS = ("lost", "refused", "late", "busy", "notes")
NUMBERS = (*ALL_BYTES, *WORK, *LAST, "train_loss", "central_loss", "seconds", "simulated_seconds")


class Layer(NamedTuple):
    """One masked tensor: its name, shape, number of weights and how many of them are alive."""

    name: str
    shape: tuple[int, ...]
    size: int
    alive: int


class Failure(NamedTuple):
    """A reply that did not count: its round (0: setup), client, "lost" or "refused", and the reason.

    "late" are those without which the round closed, "busy" clients that were not asked for that reason; "notes" are
    of replies that count: what the client found out of order.
    """

    round: int
    client: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Run:
    """What one run folder holds.

    ``config`` has dotted keys; ``setup`` is round 0 and ``rounds`` holds the others in order; ``summary`` is
    None for an unfinished run, ``layers`` is empty for a dense one, ``clients`` is None without its file.
    """

    folder: Path
    config: dict[str, Any]
    rounds: list[dict[str, Any]]
    setup: dict[str, Any] | None
    summary: dict[str, Any] | None
    layers: list[Layer]
    clients: dict[str, Any] | None
    environment: dict[str, Any]
    metric: Metric

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.folder.resolve().name


def read_run(folder: Path) -> Run:
    """Return the run that ``ssfl run`` wrote to `folder`.

    Raises
    ------
    ConfigError
        The folder is missing, is not a run folder, or one of its files is broken. A last line of
        ``rounds.jsonl`` that was cut off (the run was killed while it wrote) is left out instead.
    """
    with _naming(folder):
        lacking = [f"a folder without {x}" for x in ("config.toml", "rounds.jsonl") if not (folder / x).is_file()]
        if lacking or not folder.is_dir():
            what = lacking[0] if folder.is_dir() else "not a folder"
            more = f": {folder / '*'} names those in it" if next(folder.glob("*/config.toml"), None) else ""
            raise ConfigError(f"{folder} is {what}; it is a folder that `ssfl run` wrote{more}")
    # A resumed run repeats the rounds after its checkpoint; the line written last is the one that counts.
    rounds = {entry["round"]: entry for entry in _read_rounds(folder / "rounds.jsonl")}
    setup, config = rounds.pop(0, None), _read_config(folder / "config.toml")
    summary = _read_object(folder / "summary.json")
    _check_numbers(summary or {}, (*NUMBERS, *TOTALS), str(folder / "summary.json"))
    layers, path = _read_layers(folder / "mask.safetensors"), folder / "environment.json"
    environment = _read_object(path) or {}
    with _naming(path):
        metric = Metric(**environment.get("metric", {}))  # folders of before there were others have accuracies
    clients, played = _read_clients(folder / "clients.json", metric), [rounds[i] for i in sorted(rounds)]
    return Run(folder, config, played, setup, summary, layers, clients, environment, metric)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever a file of a stranger brings about into one line that names the file."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path} cannot be read ({why[:300]}); it is a file that `ssfl run` wrote") from None


def _read_config(path: Path) -> dict[str, Any]:
    with _naming(path):
        try:
            return flatten(tomllib.loads(path.read_text("utf-8-sig")))
        except ValueError as error:
            raise ConfigError(f"{path} is not TOML ({error})") from None


def _read_rounds(path: Path) -> list[dict[str, Any]]:
    entries = []
    with _naming(path):
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            try:
                entry = json.loads(line)
            except ValueError:
                if not line.endswith(b"\n"):
                    break  # the run was killed while it wrote this line
                raise ConfigError(f"{path} line {number} is not JSON; it is one JSON object a line") from None
            _check_round(entry, f"{path} line {number}")
            entries.append(entry)
    return entries


def _check_round(entry: Any, where: str) -> None:
    if not (isinstance(entry, dict) and type(entry.get("round")) is int and 0 <= entry["round"] < MOST):
        raise ConfigError(f'{where} is not a round; it is a JSON object with "round", a whole number from 0')
    _check_numbers(entry, NUMBERS, where)
    for key in ("cohort", "ok"):
        if not isinstance(entry.get(key) or [], list):
            raise ConfigError(f"{where}: {key} is {_cut(entry[key])}; it is a list")
    for kind in (*KINDS, "stale"):
        for key in (kind, f"setup_{kind}", f"evaluate_{kind}"):
            if not isinstance(entry.get(key, {}), dict):
                raise ConfigError(f"{where}: {key} is {_cut(entry[key])}; it is an object by client")


def _check_numbers(entry: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    for key in keys:
        value: Any = entry.get(key)
        bounded = type(value) in (int, float) and (value != value or abs(value) < MOST)
        if not (value is None or bounded or (key in UNBOUNDED and type(value) is float)):
            raise ConfigError(f"{where}: {key} is {_cut(value)}; it is a number or null")


def _cut(value: object) -> str:
    return repr(value)[:80]


def _read_object(path: Path) -> dict[str, Any] | None:
    with _naming(path):
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_bytes())
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON ({error})") from None
        if not isinstance(value, dict):
            raise ConfigError(f"{path} is a JSON {type(value).__name__}; it is a JSON object")
        return value


def _read_layers(path: Path) -> list[Layer]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    with _naming(path):
        if not path.is_file():
            return []
        try:
            tensors = load_file(path).items()
        except SafetensorError as error:
            raise ConfigError(f"{path} is not a safetensors file ({error})") from None
        layers = [Layer(name, mask.shape, mask.size, int(np.count_nonzero(mask))) for name, mask in tensors]
    # The file keeps no order of its own: "layer2" goes before "layer10".
    return sorted(layers, key=lambda layer: re.sub(r"\d+", lambda part: part[0].zfill(9), layer.name))


def _read_clients(path: Path, metric: Metric) -> dict[str, Any] | None:
    value = _read_object(path)
    if value is None:
        return None
    try:
        rows, names = value["clients"], value["class_names"]
        good = isinstance(rows, list) and isinstance(names, list) and all(isinstance(name, str) for name in names)
        good = good and all(_is_client(row, len(names), metric) for row in rows)
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        values = "accuracies from 0 to 1" if metric.share else "finite accuracies"
        rule = f'each client has "client", "train" (one number a class), and {values}'
        raise ConfigError(f"{path} is damaged; {rule}")
    return value


def _is_client(row: Mapping[str, Any], classes: int, metric: Metric) -> bool:
    """Return whether a row of clients.json has a number, a count for each class, and accuracies that are numbers."""
    counts, (low, high) = [row["client"], *row["train"]], (0, 1) if metric.share else (-MOST, MOST)
    shares = [row.get(key) for key in ("accuracy", "personal_accuracy")]
    return (
        isinstance(row["train"], list)
        and len(row["train"]) == classes
        and all(type(count) is int and 0 <= count < 2**53 for count in counts)
        and all(share is None or (type(share) in (int, float) and low <= share <= high) for share in shares)
        and isinstance(row.get("name") or "", str)
    )


def round_numbers(run: Run) -> NDArray[np.int64]:
    """Return the numbers of the rounds that were written, shape (R,)."""
    return np.array([entry["round"] for entry in run.rounds], dtype=np.int64)


def evaluated(run: Run, key: str = CENTRAL) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return where `key` is neither null nor NaN, as (positions in `run.rounds`, values), shape (E,) each."""
    values = np.array([entry.get(key) for entry in run.rounds], dtype=float)  # None becomes NaN
    positions = np.flatnonzero(np.isfinite(values)).astype(np.int64)
    return positions, values[positions]


def cumulative_mb(run: Run) -> NDArray[np.float64]:
    """Return the MB of all messages, down and up, until the end of each round, shape (R,)."""
    # A method that asks its clients in every round has discovery bytes in every round.
    sent = [sum(entry.get(key) or 0 for key in ALL_BYTES) for entry in [run.setup or {}, *run.rounds]]
    return np.cumsum(np.array(sent, dtype=float))[1:] / MB


def cumulative_hours(run: Run) -> NDArray[np.float64]:
    """Return the hours until the end of each round by the simulated clock, shape (R,); zeros without one."""
    seconds = [entry.get("simulated_seconds") or 0.0 for entry in [run.setup or {}, *run.rounds]]
    return np.cumsum(np.array(seconds, dtype=float))[1:] / 3600


def has_clock(run: Run) -> bool:
    """Return whether a run has a simulated clock (clock.profile)."""
    return any("simulated_seconds" in entry for entry in run.rounds)


def simulated_hours(entries: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return what a summary has of the simulated clock: nothing without one."""
    known = [entry["simulated_seconds"] for entry in entries if entry.get("simulated_seconds") is not None]
    return {"simulated_hours": math.fsum(known) / 3600} if known else {}


def train_counts(run: Run) -> NDArray[np.int64]:
    """Return the training images of each client by class, shape (K, C); (0, 0) without clients.json."""
    known = run.clients or {"clients": [], "class_names": []}
    shape = len(known["clients"]), len(known["class_names"])
    return np.array([row["train"] for row in known["clients"]], dtype=np.int64).reshape(shape)


def failures(run: Run) -> list[Failure]:
    """Return every reply that was lost, refused or came with a note, by round."""
    return [
        Failure(entry["round"], str(client), kind, str(reason))
        for entry in [*([run.setup] if run.setup else []), *run.rounds]
        for kind in KINDS
        for key in (kind, f"setup_{kind}", f"evaluate_{kind}")
        for client, reason in entry.get(key, {}).items()
    ]


def metadata(run: Run) -> dict[str, Any]:
    """Return the keys of ``summary.json``; what it lacks, unfinished or old, comes from the rounds, or is None."""
    entries, config = [run.setup or {}, *run.rounds], run.config
    alive, prunable = sum(x.alive for x in run.layers), sum(x.size for x in run.layers)
    kinds = [failure.kind for failure in failures(run)]
    known: dict[str, Any] = dict.fromkeys(("bytes_dense_train", "parameters"))
    for what, key in (("strategy", "strategy"), ("dataset", "data.name"), ("partition", "partition.name")):
        known[what] = config.get(key)
    known |= {key: config.get(f"run.{key}") for key in ("clients", "cohort", "rounds", "seed")}
    known |= {"alive": alive or None, "prunable": prunable or None}
    known |= {key: (evaluated(run, key)[1].tolist() or [None])[-1] for key in LAST}
    known |= {key: sum(entry.get(key) or 0 for entry in entries) for key in (*ALL_BYTES, *WORK)}
    known["bytes_discovery_down"] += known["bytes_mask_down"]
    if not any("image_passes" in entry for entry in entries):  # a folder older than the count
        known |= dict.fromkeys(("image_passes", "validation_passes"))
    known["trained_clients"] = max((len(entry.get("cohort") or ()) for entry in run.rounds), default=known["cohort"])
    known |= {"lost_replies": kinds.count("lost"), "refused_replies": kinds.count("refused")}
    known["seconds_rounds"] = sum(entry.get("seconds") or 0 for entry in run.rounds)
    known |= simulated_hours(entries)
    known["seconds_total"] = known["seconds_rounds"] + (entries[0].get("seconds") or 0)
    known |= run.summary or {}
    if known["density"] is None and prunable:
        known["density"] = alive / prunable
    if known["density_all"] is None and known["parameters"] and known["density"] is not None:
        known["density_all"] = 1 - known["prunable"] * (1 - known["density"]) / known["parameters"]
    return known


def run_names(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run: its folder's, or the whole path where two folders have one name."""
    short = [run.name for run in runs]
    return [str(run.folder) if short.count(name) > 1 else name for run, name in zip(runs, short, strict=True)]


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Return "strategy, density, seed" of each run, and its name where that does not tell two apart."""
    labels = []
    for known in map(metadata, runs):
        density = known["density"]
        sparse = [] if density is None else ["dense" if density >= 1 else f"density {density:.3g}"]
        labels.append(", ".join([str(known["strategy"]), *sparse, f"seed {known['seed']}"]))
    named = zip(labels, run_names(runs), strict=True)
    return [f"{label} ({name})" if labels.count(label) > 1 else label for label, name in named]
