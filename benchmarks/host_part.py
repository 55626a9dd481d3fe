"""What a round of the paper's recipe costs beside training: python benchmarks/host_part.py [--out FILE --as NAME]

ResNet-18 at density 0.5, 10 of 100 clients, in process and one after the other on one core; `fit` does nothing, so
what a round takes is the host's: messages, models read and written, checks, the mean. On a GPU clients read and write
at the same time, and the server's part is what a round waits for. Prints seconds of the processor a round, by part;
with --out they go into a JSON file under a name. `benchmarks/gpu_window.py` (part "rounds") measures the same beside
a GPU, by the clock on the wall.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from gpu_rates import RECIPE, Scale, stopwatch, synthetic  # noqa: E402

from ssfl_app import client_app, server_app  # noqa: E402
from ssfl_app.config import merge, parse  # noqa: E402
from ssfl_app.core.strategy import SparseStrategy  # noqa: E402
from ssfl_app.files import write_json  # noqa: E402
from ssfl_app.results.recorder import environment  # noqa: E402
from ssfl_app.simulation.in_process import run_inline  # noqa: E402
from ssfl_app.training.trainer import LocalTrainer  # noqa: E402

CLIENTS = ("client reads the model", "client writes its answer")


def rounds(count: int) -> dict[str, float]:
    """Return seconds of a round by part, the mean of `count` rounds."""
    synthetic(Scale("resnet18", 32, 100, 20, 1, (1,), 10, count, 0, ""))
    keys = {"strategy": "random", "run.rounds": count, "run.evaluate-every": 10**6, "run.checkpoint-every": 10**6}
    keys |= {"partition.name": "iid"}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(mock.patch.object(LocalTrainer, "fit", return_value=1.0))
        stack.enter_context(mock.patch.object(LocalTrainer, "evaluate", return_value=(1.0, 0.5)))
        stack.enter_context(mock.patch.object(SparseStrategy, "evaluated", return_value=False))
        spent, _ = stack.enter_context(stopwatch(time.process_time))
        out = Path(folder) / "run"
        config = parse(merge(RECIPE, keys, {"run.out": str(out), "run.device": "cpu", "engine.concurrent": 1}))
        run_inline(server_app.app, client_app.app, config)
    parts = {part: seconds / count for part, seconds in sorted(spent.items()) if part != "train"}
    return parts | {"of clients": sum(map(parts.__getitem__, CLIENTS))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--as", dest="name", default="now")
    options = parser.parse_args()
    torch.set_num_threads(1)
    row = rounds(options.rounds)
    for part, seconds in row.items():
        print(f"{part:26} {1e3 * seconds:7.0f} ms")
    if options.out:
        known = json.loads(options.out.read_text()) if options.out.is_file() else {}
        write_json(options.out, known | {options.name: {"environment": environment(), "seconds": row}})


if __name__ == "__main__":
    main()
