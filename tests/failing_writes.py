"""Runs in which the n-th write fails, each in a fork of this process, and what becomes of them when they go on.

Started with nth.c preloaded: ``python -m tests.failing_writes WORK FIRST STRIDE "KEYS"``. Prints a JSON object for
each write that failed: which, exit codes, what was said, what lies about, and whether the run that went on has the
bits of the undisturbed one. In every second of them all later writes fail too: a full disk stays full.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import jinja2
import matplotlib.backends.backend_svg
import rich.console

from ssfl_app import server_app
from ssfl_app.cli.main import main as cli
from ssfl_app.data.readers import READERS
from ssfl_app.simulation import command
from ssfl_app.simulation import in_process as inline
from ssfl_app.training import models
from tests.conftest import few_digits, narrow_cnn

IMPORTED = (
    jinja2,
    matplotlib.backends.backend_svg,
    rich.console,
    server_app,
    command,
    inline,
)  # once, not in each fork


def child(words: list[str], said: Path, **variables: str) -> int:
    """Run a command line in a fork; return its exit code, 99 for a traceback."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.environ.update(variables)
    handle, code = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 0
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["ssfl", *words]
    try:
        cli()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def results(folder: Path) -> dict[str, bytes | str]:
    """Return what must have the same bits: model, mask, what clients keep, and the rounds without the clock."""
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in rounds:
        for name in ("seconds", "bytes_mask_down"):  # a resumed run sends its masks again
            record.pop(name, None)
    kept = [*folder.glob("*.safetensors"), *folder.glob("clients/**/*")]
    held: dict[str, bytes | str] = {str(p.relative_to(folder)): p.read_bytes() for p in kept if p.is_file()}
    return held | {"rounds": json.dumps(rounds)}


def try_one(n: int, stays: bool, work: Path, new: list[str]) -> dict[str, object] | None:
    """Return what became of a run whose n-th write failed; None if it has fewer."""
    folder, said, log = work / f"n{n}", work / f"said{n}", work / f"log{n}"
    fails = {"FAIL_DIR": f"{folder}/", "FAIL_N": str(n), "FAIL_LOG": str(log)} | (
        {"FAIL_STAYS": "1"} if stays else {}
    )
    code = child([*new, str(folder)], said, **fails)
    if not log.exists():
        return None
    half = [str(path) for path in folder.rglob(".*") if path.is_file() and path.name != ".lock"]
    status = folder / "status.json"
    told = {
        "what": log.read_text().splitlines()[0],
        "stays": stays,
        "code": code,
        "said": said.read_text(),
        "half": half,
    }
    told |= {"status": json.loads(status.read_text())["status"] if status.exists() else ""}
    if code:
        begun = (folder / "config.toml").exists()
        words = ["run", "--engine", "inline", "--resume", str(folder)] if begun else [*new, str(folder)]
        told |= {"again": child(words, said), "said again": said.read_text()}
    return told | {"same": results(folder) == results(work / "whole")}


def main() -> None:
    READERS["digits"], models.REGISTRY["cnn"] = few_digits, models.of_images(narrow_cnn)
    work, n, stride = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    new = ["run", "--engine", "inline", "-c", sys.argv[4], "--out"]
    if child([*new, str(work / "whole")], work / "said") != 0:
        sys.exit((work / "said").read_text())
    stays = False
    while (told := try_one(n, stays, work, new)) is not None:
        print(json.dumps(told), flush=True)
        n, stays = n + stride, not stays


if __name__ == "__main__":
    main()
