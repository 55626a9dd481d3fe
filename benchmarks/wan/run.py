"""Communication times of dense FedAvg and SSFL over emulated wide-area links.

sudo .venv/bin/python -m benchmarks.wan.run

Five real SuperNodes, each in a network namespace of its own, behind 50 Mbit/s and the round-trip time of its region.
Measured cases are kept in benchmarks/results/wan.json, and the table wan.md is made from that file. See README.md.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.wan import measure
from benchmarks.wan.federation import federation
from benchmarks.wan.table import write_table
from benchmarks.wan.topology import (
    BURST,
    CONGESTION,
    QUEUE_MS,
    RATE_MBIT,
    ROOT,
    SERVER,
    SITES,
    SLOW_START_AFTER_IDLE,
    WideArea,
    device,
)
from ssfl_app.deployment.federation import Federation
from ssfl_app.deployment.run import run_on
from ssfl_app.simulation.command import Engine, RunArgs

RESULTS = Path(__file__).parents[1] / "results"
DENSITIES = {
    "resnet32": [0.1],
    "resnet44": [0.1],
    "resnet56": [0.1],
    "resnet110": [0.1],
    "resnet18": [0.5, 0.1, 0.05],
}
CLASSES, IMAGES = 10, 20  # images a client

# As little computing as there can be: one minibatch a client. What is measured is what travels.
KEYS = (
    "data.name='folder' partition.name='iid' run.clients={n} run.cohort={n} local.epochs=1 local.batch-size={images} "
    "ssfl.saliency-batch-size=10 run.device='cpu' run.join-timeout=300"
)


def cases(models: list[str]) -> Iterator[tuple[str, str, float]]:
    """Yield (model, strategy, density): each model dense, and SSFL at its densities."""
    for model in models:
        yield model, "fedavg", 1.0
        for density in DENSITIES[model]:
            yield model, "ssfl", density


def make_data(root: Path) -> None:
    """Write images of noise, the same each time, as <root>/<train or test>/<class>/<number>.png."""
    rng = np.random.default_rng(20)
    for part, count in (("train", IMAGES * len(SITES)), ("test", 4 * CLASSES)):
        for number in range(count):
            folder = root / part / f"class{number % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number:04d}.png")


def play(made: Federation, area: WideArea, case: tuple[str, str, float], measured: int, data: Path) -> dict[str, Any]:
    """Run a case; return its measured rounds: all but the first, which brings the mask."""
    model, strategy, density = case
    rounds, out = measured + 1, Path(tempfile.mkdtemp(dir=made.folder)) / "run"
    keys = KEYS.format(n=len(SITES), images=IMAGES)
    keys += f" model.name='{model}' strategy='{strategy}' mask.density={density} data.path='{data}'"
    keys += f" run.rounds={rounds} run.evaluate-every={rounds} run.checkpoint-every={rounds}"
    logs = {made.folder / "nodes" / site.name / "node.log": number for number, site in enumerate(SITES)}
    first, counters, load = len(measure.read_packets(area.log)), interfaces(), os.getloadavg()
    with measure.Watch({**logs, out / "rounds.jsonl": None}) as watch:
        run_on(made, RunArgs(None, [keys], None, Engine("deployment"), out, None))
    time.sleep(1)  # the relay's log is written every tenth of a second
    packets = measure.read_packets(area.log, first)
    after, seen = interfaces(), measure.totals(packets, [s.name for s in SITES], 0, float("inf"))
    area.check()
    records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    return {
        "model": model,
        "strategy": strategy,
        "density": density,
        "date": str(date.today()),
        "load_before": load[0],
        "load_after": os.getloadavg()[0],
        "interface_bytes": {
            name: [b - a for a, b in zip(counters[name], after[name], strict=True)] for name in after
        },
        "logged_bytes": {name: [seen[name][way]["raw"] for way in ("up", "down")] for name in seen},
        "lateness_ms": lateness(packets),
        "environment": json.loads((out / "environment.json").read_text()),
        "rounds": list(summaries(watch.lines, packets, records, measured)),
    }


def summaries(
    lines: list[measure.Line], packets: measure.Packets, records: list[dict[str, Any]], measured: int
) -> Iterator[dict[str, Any]]:
    """Yield what is kept of each measured round."""
    ends, all_ = measure.round_ends(lines), list(measure.transfers(lines))
    for number in range(2, measured + 2):
        record = records[number]
        if record["lost"] or record["refused"]:
            raise RuntimeError(f"not all clients answered: {record}")
        payload = {way: record[f"bytes_train_{way}"] // len(SITES) for way in ("down", "up")}
        own = [t for t in all_ if t.kind == "train" and t.number == number]
        ups = [t for t in own if t.direction == "up"]
        slowest = max(ups, key=lambda t: t.end - t.begin)
        yield {
            "round": number,
            # The last round is evaluated: its transfers are like the others', its length is not.
            "seconds": record["seconds"] if number <= measured else None,
            "transfers": [measure.summarise(t, packets, payload[t.direction]) for t in own],
            "computing_seconds": computing(own),
            "bytes": measure.totals(packets, [s.name for s in SITES], ends[number - 1], ends[number]),
            "slowest_upload": measure.timeline(slowest, packets, 0.05),
        }


def computing(own: list[measure.Transfer]) -> list[float]:
    """Return for each site the seconds from the model's arrival to the reply's departure."""
    begin, end = ({t.site: t for t in own if t.direction == way} for way in ("down", "up"))
    return [end[site].begin - begin[site].end for site in sorted(begin)]


def interfaces() -> dict[str, list[int]]:
    """Return [received, sent] bytes of the server's device towards each site, by the kernel's counters."""
    rows = {}
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        rows[name.strip()] = [int(numbers.split()[i]) for i in (0, 8)]
    return {site.name: rows[device(number)] for number, site in enumerate(SITES)}


def lateness(packets: measure.Packets) -> dict[str, float]:
    """Return by how many milliseconds the relay handed packets over too late: mean, 99th percentile, largest."""
    delays = np.repeat([site.rtt / 2 for site in SITES], 2)
    late = 1000 * (packets["left"] - packets["came"]) - delays[packets["line"]]
    return {"mean": float(late.mean()), "p99": float(np.quantile(late, 0.99)), "max": float(late.max())}


def dropped() -> int:
    """Return how many packets the server's rate limits have dropped."""
    said = subprocess.run(["tc", "-s", "-j", "qdisc"], capture_output=True, text=True, check=True).stdout
    return sum(int(row.get("drops", 0)) for row in json.loads(said))


@contextmanager
def workplace() -> Iterator[Path]:
    """Yield a folder that goes away in the end, also when we are told to stop."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it
    folder = Path(tempfile.mkdtemp(prefix="ssfl-wan-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=DENSITIES, default=list(DENSITIES), metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of each case")
    parser.add_argument("--window", type=int, default=0, help="packets a new connection may send at once; 0: as is")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of wan.json and wan.md")
    parser.add_argument("--table", action="store_true", help="only write wan.md anew from wan.json")
    words = parser.parse_args()
    record = words.out / "wan.json"
    known = json.loads(record.read_text()) if record.exists() else {"cases": {}}
    if not words.table:
        if os.geteuid():
            sys.exit("network namespaces need root")
        with workplace() as work:
            measure_all(words, work, known, record)
    page = ROOT / "docs" / "wan.md" if words.out.resolve() == RESULTS.resolve() else None
    write_table(known, words.out / "wan.md", page)


def measure_all(words: argparse.Namespace, work: Path, known: dict[str, Any], record: Path) -> None:
    """Measure the cases asked for, and write the record after each."""
    os.environ["SSFL_CACHE"] = str(work / "cache")
    make_data(work / "data")
    with WideArea(SITES, work / "packets", words.window) as area:
        trips = {site.name: area.round_trip(site) for site in SITES}
        with federation(work / "federation", area) as made:
            for case in cases(words.models):
                result = play(made, area, case, words.rounds, work / "data")
                name = "{} {} {}".format(*case) + (f" window {words.window}" if words.window else "")
                known["cases"][name] = result | {"dropped_packets_so_far": dropped(), "window": words.window}
                known["links"] = {
                    "delay": "own relay between TUN devices (this kernel has no netem)",
                    "sites": {site.name: {"rtt_ms": site.rtt, "measured_ms": trips[site.name]} for site in SITES},
                    "rate_mbit": RATE_MBIT,
                    "burst_bytes": BURST,
                    "queue_ms": QUEUE_MS,
                    "congestion_control": CONGESTION,
                    "slow_start_after_idle": SLOW_START_AFTER_IDLE,
                    "kernel": platform.release(),
                    "server_namespace": SERVER,
                }
                record.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
