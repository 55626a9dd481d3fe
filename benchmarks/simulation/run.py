"""What simulation costs on this machine's cores beside the training itself.

.venv/bin/python -m benchmarks.simulation.run [efficiency|peers|busy|startup|scale|many ...]

Each part replaces what benchmarks/results/simulation.json has of it; simulation.md and the plot are made from that
file. See README.md.
"""

import argparse
import json
import os
import tempfile
import time
from datetime import date
from pathlib import Path

from benchmarks.simulation import busy, efficiency, many, peers, scale, startup
from benchmarks.simulation.table import write_table
from ssfl_app.results.recorder import environment

RESULTS = Path(__file__).parents[1] / "results"
PARTS = {"efficiency": efficiency, "peers": peers, "busy": busy, "startup": startup, "scale": scale, "many": many}
IMAGES = 3200
"""Of CIFAR-10: 160 for each of the 20 clients, five steps; rounds of some seconds on two cores."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS) + "; all if none is named")
    parser.add_argument("--images", type=int, default=IMAGES, help="training images of CIFAR-10")
    parser.add_argument("--tiny", action="store_true", help="a few seconds each, to see that all works; give --out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of simulation.json, .md and the plot")
    parser.add_argument("--table", action="store_true", help="only write simulation.md and the plot anew")
    words = parser.parse_args()
    if words.tiny and words.out.resolve() == RESULTS.resolve():
        parser.error("--tiny is no measurement: give another folder with --out")
    if unknown := set(words.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    record = words.out / "simulation.json"
    words.out.mkdir(parents=True, exist_ok=True)
    known = json.loads(record.read_text()) if record.exists() else {}
    for name in [] if words.table else words.parts or PARTS:
        known[name] = measure(name, words)
        record.write_text(json.dumps(known, indent=1) + "\n")
    write_table(known, words.out)


def measure(name: str, words: argparse.Namespace) -> dict:
    """Measure a part; return it with when and where that was."""
    images = 80 if words.tiny else words.images
    load, began = os.getloadavg()[0], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ssfl-simulation-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        os.environ["SSFL_CACHE"] = str(work / "cache")  # decoded once, here, before anybody's clock runs
        found = PARTS[name].measure(work, images, words.tiny)
    about = {"date": str(date.today()), "tiny": words.tiny, "images": images, "load_before": load}
    about |= {"load_after": os.getloadavg()[0], "took_seconds": time.monotonic() - began}
    return about | {"environment": environment()} | found


if __name__ == "__main__":
    main()
