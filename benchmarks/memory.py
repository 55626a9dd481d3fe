"""Peak memory of the server process with ResNet-18, 10 and 100 clients answering: python benchmarks/memory.py

Runs one round of SSFL on Ray, discovery included (every client sends 44.7 MB of scores), with a cohort of all
clients, and samples /proc of the process that holds ServerApp and Ray's driver. Goal: the two peaks within 15 %, and
at most 10 models' size above the idle process, which is the same process just before the first model is sent.

Tiny images and few of them keep the clients fast; the messages are those of the full model.
"""

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

import psutil

HERE = Path(__file__).parent
KEYS = (
    "model.name='resnet18' mask.density=0.5 partition.name='iid' run.rounds=2 run.evaluate-every=2 local.epochs=1 "
    "local.batch-size=144 ssfl.saliency-batch-size=8 run.clients={n} run.cohort={n}"
)
GOAL_MODELS, GOAL_SPREAD = 10, 0.15


def resident(pid: int) -> dict[str, int]:
    """Return anonymous, shared-memory (Ray's object store, as far as mapped) and file pages, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return {k: 1024 * int(v) for k, v in re.findall(r"Rss(Anon|Shmem|File):\s+(\d+) kB", status)}


class Sampler(threading.Thread):
    """Follows the memory of the process with the ServerApp: a child with `name` in its command line, or "" itself."""

    def __init__(self, folder: Path, launcher: int, name: str = "flwr-simulation") -> None:
        super().__init__(daemon=True)
        self.folder, self.launcher, self.name = folder, psutil.Process(launcher), name
        self.idle = self.peak = 0
        self.stop = False
        self.at_peak: dict[str, int] = {}

    def run(self) -> None:
        driver = None
        while not self.stop:
            try:
                if driver is None:
                    for child in self.launcher.children(recursive=True) if self.name else [self.launcher]:
                        if self.name in " ".join(child.cmdline()):
                            driver = child.pid
                else:
                    now = resident(driver)
                    total = now["Anon"] + now["Shmem"]
                    greeted = (self.folder / "clients.json").exists()  # written when all clients have joined
                    if not greeted:
                        self.idle = max(self.idle, total)
                    if total > self.peak:
                        self.peak, self.at_peak = total, now
            except (psutil.Error, OSError, KeyError):  # the process is ending
                pass
            time.sleep(0.02)


def measure(clients: int) -> dict:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "run"
        command = [
            str(Path(sys.executable).parent / "ssfl"),
            "run",
            "--engine",
            "ray",
            "-c",
            KEYS.format(n=clients),
            "--out",
            str(folder),
        ]
        process = subprocess.Popen(command)
        sampler = Sampler(folder, process.pid)
        sampler.start()
        assert process.wait() == 0
        sampler.stop = True
        sampler.join()
        summary = json.loads((folder / "summary.json").read_text())
        environment = json.loads((folder / "environment.json").read_text())
    model = 4 * summary["parameters"]
    return {
        "clients": clients,
        "idle_mb": sampler.idle / 1e6,
        "peak_mb": sampler.peak / 1e6,
        "at_peak_mb": {k: v / 1e6 for k, v in sampler.at_peak.items()},
        "models_above_idle": (sampler.peak - sampler.idle) / model,
        "model_mb": model / 1e6,
        "seconds": summary["seconds_total"],
        "environment": environment,
    }


def main() -> None:
    rows = [measure(clients) for clients in (10, 100)]
    peaks = [row["peak_mb"] for row in rows]
    spread = max(peaks) / min(peaks) - 1
    for row in rows:
        print(
            f"{row['clients']:>4} clients: idle {row['idle_mb']:.0f} MB, peak {row['peak_mb']:.0f} MB, "
            f"{row['models_above_idle']:.1f} models above idle, {row['seconds']:.0f} s"
        )
    print(f"peaks differ by {100 * spread:.1f} %")
    record = {"date": str(date.today()), "spread": spread, "rows": rows}
    (HERE / "results" / "memory.json").write_text(json.dumps(record, indent=1) + "\n")
    assert spread <= GOAL_SPREAD, f"peaks differ by {spread:.0%}, goal {GOAL_SPREAD:.0%}"
    for row in rows:
        assert row["models_above_idle"] <= GOAL_MODELS, f"{row['models_above_idle']:.1f} models, goal {GOAL_MODELS}"


if __name__ == "__main__":
    main()
