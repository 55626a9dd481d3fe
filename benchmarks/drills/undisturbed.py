"""The run that nothing happens to: bytes against Flower's own counter, bits against the simulation's, sizes."""

import threading
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.drills.field import Field, federation
from ssfl_app.deployment.control import control

PROGRAMS = {
    "flwr-clientapp": "flwr-clientapp",
    "flower-superlink": "flower-superlink",
    "flwr-serverapp": "flwr-serverapp",
    "flower-superexec": "flower-superexec",
    "ssfl_app.deployment.supernode": "flower-supernode",
    "ssfl_app.deployment.executor": "executor",
}
"""The name of a process, or a word of its command -> what it is called here."""


def undisturbed(work: Path, reference: dict[str, Any]) -> dict[str, Any]:
    """Play the run of the drills to its end and return what it cost."""
    with federation(work) as place:
        peaks: dict[str, float] = {}
        done = threading.Event()
        watch = threading.Thread(target=_watch, args=(place, peaks, done))
        watch.start()
        try:
            run = place.start(work / "run")
            code, errors = run.end()
        finally:
            done.set()
            watch.join()
        if code:
            raise RuntimeError(errors)
        counted = control(place.federation, "ls")["runs"][0]["network-traffic"]["total-bytes"]
        summary = run.summary
    kinds = ("discovery_down", "discovery_up", "train_down", "train_up", "evaluate_down")
    payload = sum(summary[f"bytes_{kind}"] for kind in kinds)
    return {
        "seconds_per_round": median(record["seconds"] for record in run.records if record["round"]),
        "payload": payload,
        "network_traffic": counted,
        "traffic_over_payload": counted / payload - 1,
        "same_bits": summary["model_sha256"] == reference["model_sha256"],
        "peak_rss_mb": dict(sorted(peaks.items())),
    }


def _watch(place: Field, peaks: dict[str, float], done: threading.Event) -> None:
    """Note the largest resident memory of any one process of each program."""
    home = str(place.folder)
    while not done.wait(0.1):
        for process in psutil.process_iter():
            try:
                words = [process.name(), *(Path(word).name for word in process.cmdline()[:5])]
                program = next((called for word, called in PROGRAMS.items() if word in words), None)
                if program is None or not process.environ().get("FLWR_HOME", "").startswith(home):
                    continue
                peaks[program] = max(peaks.get(program, 0.0), process.memory_info().rss / 1e6)
            except (psutil.Error, StopIteration):
                continue
