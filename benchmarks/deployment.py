"""Seconds a round of three real SuperNodes, and where they go: python -m benchmarks.deployment

A federation as `ssfl federation up` makes it, on this machine: TLS, a registered key for each node, the front. digits
is learnt by the default strategy and model; every second round is evaluated, which is a second message a node. The
same run is played with the nodes as they are, with plain ones (`SSFL_PLAIN_NODE`), which wait and start processes as
Flower does, and in one process: all three have the same bits. Events come from the nodes' own logs, CPU seconds are
sampled from their processes. Goal: at most `GOAL` seconds a round on two cores.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.drills.field import NODES, Field, federation, inline
from benchmarks.wan.measure import Transfer, Watch, round_ends, transfers
from ssfl_app.deployment.supernode import PLAIN
from ssfl_app.simulation.processes import families

HERE = Path(__file__).resolve().parent
GOAL, ROUNDS = 5.0, 7
SETTLED, IDLE = 35.0, 30.0  # seconds after a run until nodes ask as seldom as they ever do; and that are looked at
KEYS: dict[str, Any] = {"run__rounds": ROUNDS, "run__evaluate_every": 2, "run__checkpoint_every": ROUNDS}

# How a process is known, by its name or a word of its command, and what it is called here.
PROGRAMS = {
    "flwr-clientapp": "ClientApps",
    "flwr-serverapp": "ServerApp",
    "flower-superlink": "SuperLink",
    "front": "front",
    "ssfl_app.deployment.supernode": "SuperNodes",
    "ssfl_app.deployment.executor": "executors",
    "flower-superexec": "executors",
}


class Processes(threading.Thread):
    """Samples the CPU seconds of a federation's processes, and the memory that its nodes hold between messages."""

    def __init__(self, place: Field) -> None:
        super().__init__(daemon=True)
        names = [node.name for node in place.federation.nodes]
        self._roots = [place.service(name) for name in ("superlink", "front", *names)]
        self._seen: dict[tuple[int, float], tuple[str, float]] = {}
        self._stop_now = threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(0.05):
            self.look()

    def look(self) -> None:
        for process in families([root.pid for root in self._roots]):
            with suppress(psutil.Error):  # it has ended
                times, program = process.cpu_times(), self._program(process)
                if program:
                    self._seen[process.pid, process.create_time()] = program, times.user + times.system

    @staticmethod
    def _program(process: psutil.Process) -> str:
        words = [process.name(), *(Path(word).name for word in process.cmdline())]
        return next((called for word, called in PROGRAMS.items() if word in words), "")

    def seconds(self) -> dict[str, float]:
        """Return the CPU seconds so far of each program, all of its processes together."""
        self.look()
        total = dict.fromkeys(PROGRAMS.values(), 0.0)
        for program, seconds in self._seen.values():
            total[program] += seconds
        return total

    def node_mb(self) -> float:
        """Return the memory of one node with all its processes, what they share counted once, in MB."""
        return sum(process.memory_full_info().pss for process in families([self._roots[-1].pid])) / 1e6

    def end(self) -> None:
        self._stop_now.set()
        self.join()


def played(work: Path, plain: bool) -> dict[str, Any]:
    """Play the run on a federation; return its seconds, by what they were spent on."""
    with federation(work, **({PLAIN: "1"} if plain else {})) as place:
        processes, out = Processes(place), work / "run"
        idle = processes.node_mb()
        logs: dict[Path, int | None] = {
            place.folder / "nodes" / node.name / "node.log": i for i, node in enumerate(place.federation.nodes)
        }
        processes.start()
        with Watch({**logs, out / "rounds.jsonl": None}) as watch:
            run = place.start(out, **KEYS)
            run.wait_for(f" 1/{ROUNDS} ")  # the mask is found, and every process that stays is there
            before = processes.seconds()
            code, errors = run.end()
        cpu = {name: seconds - before[name] for name, seconds in processes.seconds().items()}
        ready = processes.node_mb()
        time.sleep(SETTLED)
        port = place.federation.address.rpartition(":")[2]
        before, sent = processes.seconds(), connections(port)
        time.sleep(IDLE)
        asked = {name: (seconds - before[name]) / IDLE for name, seconds in processes.seconds().items()}
        moved_idle = {port: count - sent.get(port, 0) for port, count in connections(port).items()}
        processes.end()
        if code:
            raise RuntimeError(errors)
        ends, moved = round_ends(watch.lines), list(transfers(watch.lines))
        rounds = [whereabouts(record, ends, moved) for record in run.records if record["round"] > 1]
        return {
            "seconds": {
                kind: median(r["seconds"] for r in rounds if r["evaluated"] is bool_) for kind, bool_ in KINDS
            },
            "profile": {kind: profile(r for r in rounds if r["evaluated"] is bool_) for kind, bool_ in KINDS},
            "cpu_seconds_a_round": {name: seconds / ROUNDS for name, seconds in cpu.items()},
            "idle_cpu_seconds_a_second": asked,
            "idle_bytes_a_second_of_a_node": sum(moved_idle.values()) / IDLE / len(place.federation.nodes),
            "node_mb": {"before the first message": idle, "after a run": ready},
            "rounds": rounds,
            "model_sha256": run.summary["model_sha256"],
            "environment": json.loads((out / "environment.json").read_text()),
        }


def connections(port: str) -> dict[str, int]:
    """Return the bytes that went through each TCP connection to a port, both ways, TLS included, by its own port."""
    words = ["ss", "--tcp", "--info", "--numeric", "--no-header", "--oneline", f"( dport = :{port} )"]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    found = {}
    for line in said.splitlines():
        local = line.split()[3]
        found[local] = sum(map(int, re.findall(r"bytes_(?:acked|received):(\d+)", line)))
    return found


KINDS = (("trained", False), ("trained and tested", True))


def whereabouts(record: dict[str, Any], ends: list[float], moved: list[Transfer]) -> dict[str, Any]:
    """Return the parts of a round, mean over its nodes, and of each message if there are two.

    `asking`: until the node looks for the message; `down` and `up`: its way; `answering`: from its arrival until the
    node sends the reply. `rest` is what is left of the round behind its slowest node.
    """
    number = record["round"]
    begin, end = ends[number - 1], ends[number]
    own = [t for t in moved if begin <= t.begin < end]
    parts = dict.fromkeys(("asking", "down", "answering", "up"), 0.0)
    sites, last = {t.site for t in own}, begin
    for kind in sorted({t.kind for t in own}, reverse=True):  # train, then evaluate
        asked, slowest = last, last
        for site in sites:
            down, up = (
                next(t for t in own if (t.site, t.kind, t.direction) == (site, kind, w)) for w in ("down", "up")
            )
            steps = {
                "asking": down.begin - asked,
                "down": down.end - down.begin,
                "answering": up.begin - down.end,
                "up": up.end - up.begin,
            }
            for name, seconds in steps.items():
                parts[name] += seconds / len(sites)
            slowest = max(slowest, up.end)
        last = slowest
    return {
        "round": number,
        "evaluated": any(t.kind == "evaluate" for t in own),
        "seconds": record["seconds"],
        "parts": parts | {"rest": end - last},
    }


def profile(rounds: Iterator[dict[str, Any]]) -> dict[str, float]:
    """Return the median of each part over some rounds."""
    found = [r["parts"] for r in rounds]
    return {name: median(parts[name] for parts in found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=["warm", "plain"], help="play one of the two, and keep what is recorded")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "deployment.json")
    words = parser.parse_args()
    record = json.loads(words.out.read_text()) if words.only and words.out.exists() else {}
    record |= {"nodes": NODES, "keys": KEYS, "goal": GOAL}
    with tempfile.TemporaryDirectory() as work:
        same = inline(Path(work) / "inline", **KEYS)["model_sha256"]
        for way in [words.only] if words.only else ["warm", "plain"]:
            load = os.getloadavg()[0]
            row = played(Path(work) / way, way == "plain")
            record[way] = row | {"same_bits": row["model_sha256"] == same, "load": load}
            print(f"{way}: {row['seconds']}\n  {row['profile']}\n  CPU seconds a round {row['cpu_seconds_a_round']}")
            print(f"  memory of a node {row['node_mb']}, same bits {record[way]['same_bits']}", flush=True)
            words.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
