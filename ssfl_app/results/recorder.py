"""The run folder: what a run writes while it goes on, and what it can be resumed from.

``rounds.jsonl`` has one line a round, ``checkpoint/`` one file that is replaced by an atomic rename, so a run that is
killed at any moment can be resumed. Everything is written where `folder` says, whatever the working directory of the
process is.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy.typing as npt
import torch
from safetensors import torch as safe_torch

from ssfl_app import locks
from ssfl_app.config import Flat, write_toml
from ssfl_app.files import append, not_regular, remove_unfinished, write_atomically, write_bytes, write_json
from ssfl_app.metrics import ACCURACY, Metric
from ssfl_app.options import ConfigError
from ssfl_app.results import checkpoint
from ssfl_app.results.run_folder import simulated_hours
from ssfl_app.results.status import write_status
from ssfl_app.results.table import in_metric
from ssfl_app.sparsity.layout import Layout, State, state_digest
from ssfl_app.sparsity.mask import Mask
from ssfl_app.text import printable

Record = dict[str, Any]

MOST_WARNINGS = 50
"""Lines of a run that say which client was lost or refused, and why; rounds.jsonl has them all."""

# What a run leaves that ended before it wrote its configuration.
_BEFORE_CONFIG = {".lock", "checkpoint", "clients", "status.json", "flower.log"}

# What is written into as it is; anything else is replaced as a whole, a link as well.
_WRITTEN = {".lock", "console.log", "rounds.jsonl", "flower.log", "checkpoint", "clients"}
_WRITTEN |= {"tensorboard", "mlflow", "wandb"}


def default_folder(strategy: str, data: str) -> Path:
    """Return runs/<time>-<strategy>-<dataset>."""
    name = f"{datetime.now().astimezone():%Y%m%d-%H%M%S}-{strategy}-{data}"
    return Path("runs") / re.sub(r"[^\w.+-]", "-", name)  # "mine:Mine" is no name everywhere


def check_free(folder: Path) -> None:
    """Raise ConfigError unless a folder is missing, empty, or holds what a start left that came to nothing."""
    try:
        free = not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= _BEFORE_CONFIG)
        free = free and not any((folder / "checkpoint").glob("[!.]*"))
    except (OSError, ValueError) as error:  # too long, with a NUL, below a folder that may not be entered
        raise ConfigError(f"run.out is {folder}; it is a folder that can be written to ({error})") from error
    if not free:
        raise ConfigError(f"run.out is {folder}; it is a new or empty folder, or --resume goes on with the run in it")


class Recorder:
    """Writes one run folder, which is `claim`-ed for it. Nothing in it changes before `begin`.

    `folder` is absolute, `flat` the resolved configuration; lines for people go to `say`, besides ``console.log``.
    """

    def __init__(self, folder: Path, flat: Flat, say: Callable[[str], None], metric: Metric = ACCURACY) -> None:
        self.folder, self.metric = folder, metric
        self.records: list[Record] = []
        self._flat, self._say, self._began, self._seconds_before = flat, say, time.monotonic(), 0.0
        self._lines = hashlib.sha256()  # over rounds.jsonl
        self.names: dict[int, str] = {}
        self._told: set[tuple[str, str]] = set()
        self._lock = claim(folder)

    def begin(self, saved: checkpoint.Saved | None = None) -> None:
        """Write what a run folder has from its start.

        Rounds after a checkpoint that the run goes on from are dropped from rounds.jsonl: they will be played again.
        """
        write_bytes(self.folder / "config.toml", write_toml(self._flat).encode())
        self.status("running")
        remove_unfinished(self.folder)
        if not (self.folder / "environment.json").exists():  # that of the start stays, when a run is resumed
            write_json(self.folder / "environment.json", {**environment(), "metric": self.metric.metadata()})
        if saved is None:
            (self.folder / "rounds.jsonl").unlink(missing_ok=True)
        else:
            self.records, self._seconds_before = saved.records, saved.seconds
            kept = "".join(map(_line, self.records)).encode()
            write_bytes(self.folder / "rounds.jsonl", kept)
            self._lines.update(kept)

    def status(self, status: str, message: str = "") -> None:
        """Record how the run stands: running, finished, interrupted or failed."""
        write_status(self.folder, status, message)

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.close()

    def say(self, text: str) -> None:
        """Tell people a line: printed, and kept in console.log."""
        text = printable(text, keep="\n")
        with append(self.folder / "console.log") as file:
            file.write(text + "\n")
        self._say(text)

    def round(self, record: Record) -> None:
        """Append a finished round, and tell people about it."""
        self.records.append(record)
        line = _line(record)
        with append(self.folder / "rounds.jsonl") as file:
            file.write(line)
        self._lines.update(line.encode())
        if record["round"]:
            if record.get("setup_asked"):
                self.say(discovery_line(record, "setup_") + f", mask distance {record['mask_distance']:.3f}")
            timed, rounds = [r["seconds"] for r in self.records if r["round"]], int(self._flat["run.rounds"])
            left = (rounds - record["round"]) * sum(timed) / len(timed)
            self.say(round_line(record, rounds, left, self.metric))
        elif record["asked"]:
            self.say(discovery_line(record, "") + f", {record['seconds']:.1f} s")
        for client, note in {c: n for key in failure_keys("notes") for c, n in record.get(key, {}).items()}.items():
            self.say(f"warning: client {client}: {note}")
        for kind in ("lost", "refused"):
            reasons = {(c, why) for key in failure_keys(kind) for c, why in record.get(key, {}).items()}
            # Once, and no more than a screen of them: the line of each round has their number.
            for client, why in sorted(reasons - self._told)[: max(0, MOST_WARNINGS - len(self._told))]:
                self._told.add((client, why))
                self.say(f"warning: client {self.names.get(int(client), client)} was {kind}: {why}")

    def checkpoint(self, round_: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replace the checkpoint by one taken after `round_`."""
        count, lines = len(self.records), self._lines.hexdigest()
        checkpoint.save(self.folder, self._flat, round_, self._seconds(), count, lines, arrays)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    # ---- the end -----------------------------------------------------------------------------

    def finish(self, metadata: Record, whole: Layout, layout: Layout, state: State, mask: Mask) -> Record:
        """Write model, mask and summary.json; return the summary.

        `layout` is that of `state`; `whole` is that of the network of which it may be a narrower one. `metadata` is
        what the recorder cannot know: strategy, dataset, engine and so on. It comes first.
        """
        sparse = self.model(layout, state, mask, "model.safetensors", "mask.safetensors")
        rounds = [record for record in self.records if record["round"]]
        messages = sum(r["messages_train_down"] + r["messages_train_up"] for r in rounds)
        accuracies = ("central_accuracy", "local_accuracy_mean", "personal_accuracy_mean")
        evaluated = [r for r in rounds if any(r[name] is not None for name in accuracies)]
        summary = metadata | {
            "density": rounds[-1]["density"],
            "density_all": rounds[-1]["density_all"],
            "parameters": whole.size,
            "prunable": whole.prunable_size,
            "alive": round(rounds[-1]["density"] * whole.prunable_size),
            "train_loss": rounds[-1]["train_loss"],
            **{name: evaluated[-1][name] if evaluated else None for name in accuracies},
            **self._bytes(),
            "bytes_peer": sum(r["bytes_peer"] for r in rounds),
            "bytes_dense_train": 4 * whole.size * messages,
            "image_passes": sum(r["image_passes"] for r in self.records),
            "validation_passes": sum(r["validation_passes"] for r in self.records),
            "seconds_total": self._seconds(),
            "seconds_rounds": sum(r["seconds"] for r in rounds),
            **simulated_hours(self.records),
            "lost_replies": self._count("lost"),
            "refused_replies": self._count("refused"),
            **({"late_replies": late} if (late := self._count("late")) else {}),
            "model_sha256": state_digest(layout, state),
            "mask_sha256": hashlib.sha256(mask.packed().tobytes()).hexdigest() if sparse else None,
        }
        write_json(self.folder / "summary.json", summary)
        return summary

    def model(self, layout: Layout, state: State, mask: Mask, name: str, mask_name: str) -> bool:
        """Write a model and, if it is sparse, its mask to files of these names; return whether it is sparse."""
        sparse = mask.count < layout.prunable_size
        write_atomically(self.folder / name, lambda f: safe_torch.save_file(_whole(state), f))
        if sparse:
            bits = _whole(mask.tensors())
            write_atomically(self.folder / mask_name, lambda f: safe_torch.save_file(bits, f))
        return sparse

    def _bytes(self) -> Record:
        # Discovery may also take place between rounds.
        kinds = ("discovery_up", "mask_down", "train_down", "train_up", "evaluate_down")
        sums = {f"bytes_{k}": sum(r.get(f"bytes_{k}", 0) for r in self.records) for k in kinds}
        # Masks belong to discovery: they are what it found, sent once to each client.
        models = sum(r.get("bytes_discovery_down", 0) for r in self.records)
        return {"bytes_discovery_down": models + sums["bytes_mask_down"], **sums}

    def _count(self, kind: str) -> int:
        return sum(len(r.get(name, {})) for r in self.records for name in failure_keys(kind))


def claim(folder: Path) -> IO[str]:
    """Return the lock of a run folder, which is made if need be: an open file, locked for this process.

    Raises
    ------
    ConfigError
        The folder cannot be written to, or another process is writing to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A pipe where console.log is to be would be waited for, for ever; a link leads to where others want it.
        for path in folder.iterdir():
            link = path.is_symlink() and path.name in _WRITTEN
            if link or (path.exists() and not path.is_file() and not path.is_dir()):
                raise not_regular(path)
        lock = locks.try_lock(folder / ".lock")
    except (OSError, ValueError) as error:
        raise ConfigError(f"run.out is {folder}; it is a folder that can be written to ({error})") from error
    if lock is None:
        raise ConfigError(f"run.out is {folder}; it is a folder that no other process is writing to")
    return lock


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def discovery_line(record: Record, prefix: str) -> str:
    """Return the line of a discovery: before round 1, or (`prefix` "setup_") before a later round."""
    down, up = record["bytes_discovery_down"] / 1e6, record["bytes_discovery_up"] / 1e6
    answered = f"{len(record[f'{prefix}ok'])} of {len(record[f'{prefix}asked'])} clients answered"
    return f"discovery: {answered}, {down:.3f} MB down, {up:.3f} MB up"


def failure_keys(kind: str) -> tuple[str, ...]:
    """Return where a record names clients by `kind`, lost, refused, late, notes: training, evaluation, discovery."""
    return kind, f"evaluate_{kind}", f"setup_{kind}"


def round_line(record: Record, rounds: int, left: float, metric: Metric = ACCURACY) -> str:
    """Return the line a round prints; `left` is the estimate of the seconds still to go."""

    def said(name: str) -> str:
        value = record[name]
        return "   -  " if value is None else f"{in_metric(value, metric):>6}{metric.unit.strip()}"

    down = record["bytes_train_down"] + record["bytes_evaluate_down"] + record["bytes_mask_down"]
    counts = {kind: sum(len(record.get(k, {})) for k in failure_keys(kind)) for kind in ("lost", "refused", "late")}
    failed = [f"{count} {kind}" for kind, count in counts.items() if count]
    personal = record["personal_accuracy_mean"]
    return "  ".join(
        [
            f"round {record['round']:>{len(str(rounds))}}/{rounds}",
            *([] if record["train_loss"] is None else [f"loss {record['train_loss']:.4f}"]),
            *([f"epsilon {record['epsilon']:.3f}"] if "epsilon" in record else []),
            ("" if metric == ACCURACY else f"{metric.name}: ") + f"central {said('central_accuracy')}",
            f"local {said('local_accuracy_mean')}",
            *([] if personal is None else [f"personal {said('personal_accuracy_mean')}"]),
            f"{down / 1e6:.3f} MB down",
            f"{record['bytes_train_up'] / 1e6:.3f} MB up",
            f"{record['seconds']:.1f} s",
            *([f"{record['simulated_seconds']:.1f} s simulated"] if "simulated_seconds" in record else []),
            f"ETA {int(left // 60)}:{int(left % 60):02d}",
            *failed,
        ]
    )


def environment() -> Record:
    """Return what a number depends on besides the configuration: versions, cores, GPU, code, time."""
    packages = ("ssfl-app", "flwr", "ray", "torch", "torchvision", "numpy", "scipy")
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "git": _git(),
    }


def _version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _git() -> str | None:
    # SSFL_SOURCE is set by the launcher: the app itself runs from a copy that is no repository.
    where = os.environ.get("SSFL_SOURCE") or str(Path(__file__).parent)
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["git", "-C", where, "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, timeout=5, check=False)
        return done.stdout.decode(errors="replace").strip() or None
    return None


def _whole(tensors: State) -> State:
    # safetensors refuses views of one buffer.
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
