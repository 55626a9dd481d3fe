"""Hands a Flower app to `flwr run`, follows what it says, and finds out how it ended."""

import contextlib
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path

import tomli_w

from ssfl_app.files import app_folder
from ssfl_app.locks import RunFailed
from ssfl_app.registry import sources
from ssfl_app.results.status import read_status
from ssfl_app.simulation.processes import cause_in_log, words_of

FULL = 1_000_000
"""Free bytes of a run folder below which its disk counts as full: not even the reason of a failure fits."""

LAST_WORDS = 3.0
"""Seconds that Flower's command gets to bring the traceback of a failed run to its log."""


def copy_app(target: Path, toml: str, modules: Iterable[str] = ()) -> Path:
    """Copy this very package to a folder whose name Flower accepts.

    Its pyproject.toml has the configuration `toml`, since Flower takes no other keys, and the app brings foreign
    `modules` along.
    """
    package = Path(str(resources.files("ssfl_app")))
    ignore = shutil.ignore_patterns("__pycache__", "_app")
    shutil.copytree(package, target / "ssfl_app", ignore=ignore)
    for name in ("LICENSE", "README.md"):
        shutil.copy(app_folder() / name, target / name)
    brought: dict[str, Path] = {}
    for module in modules:
        brought = sources(module, brought)
    for name, file in brought.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target / name)
    project = tomllib.loads((app_folder() / "pyproject.toml").read_text("utf-8"))
    flower = project["tool"]["flwr"]["app"]
    flower["config"], flower["fab-include"] = tomllib.loads(toml), [*flower["fab-include"], *brought]
    (target / "pyproject.toml").write_text(tomli_w.dumps(project), "utf-8")
    return target


def follow(flwr: "subprocess.Popen[bytes]", folder: Path, say: Callable[[str], None]) -> None:
    """Say what the ServerApp adds to console.log, until it has recorded how it ended, or Flower's command ends."""
    console = folder / "console.log"
    read = console.stat().st_size if console.exists() else 0
    alive = True
    while alive:
        # Both are asked before reading, so that the last lines are read too.
        alive = flwr.poll() is None and read_status(folder).get("status", "running") == "running"
        if console.exists():
            with console.open(encoding="utf-8") as file:
                file.seek(read)
                text = file.read()
            whole = text[: text.rfind("\n") + 1]
            read += len(whole.encode())
            for line in whole.splitlines():
                say(line)
        if alive:
            time.sleep(0.1)
    with contextlib.suppress(subprocess.TimeoutExpired):
        if read_status(folder).get("status") != "finished":
            flwr.wait(LAST_WORDS)


def judge(folder: Path, log: Path, begin: int) -> None:
    """Raise RunFailed unless the ServerApp recorded in its run folder that the run is finished.

    `log` is the file of what ``flwr run`` said, which for this run begins after `begin` bytes.
    """
    status = read_status(folder)
    if status.get("status") == "finished":
        return
    if status.get("status") == "failed":
        raise RunFailed(str(status["message"]))
    if shutil.disk_usage(folder).free < FULL:
        raise RunFailed(f"no space is left for {folder}")
    why = cause_in_log(words_of(log, begin)) if log.exists() else ""
    raise RunFailed(f"{why or 'Flower ended the run without a reason'} (the log is {log})")
