"""Play the paper's recipe on a GPU for as long as there is time: python benchmarks/gpu_paper.py OUT --minutes N

SSFL, FedAvg, random masks and DisPFL on CIFAR-10: ResNet-18 with GroupNorm, 100 Dirichlet clients, 10 of them a
round, density 0.5 (`configs/table1-*.toml` under the profile ``tmlr``). Each gets the same share of the minutes, and
of what an earlier one leaves over. A run lies in OUT/<name> and goes on from its checkpoint when the same command is
given again; OUT/gpu_paper.json and gpu_paper.html have the curves so far. DisPFL trains all 100 clients in every
round, so it comes a tenth as far.

gpu_window.py says how a bare machine gets what this needs. A checkpoint of ResNet-18 is 22 MB at density 0.5 and 45
MB for FedAvg, and DisPFL keeps a model for each client: where only small files come back from a machine, the curves
do and the runs begin anew. ``--tiny`` plays small runs on digits, for a test.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from gpu_rates import images_at  # noqa: E402

from ssfl_app.config import merge, read_file, write_toml  # noqa: E402
from ssfl_app.experiments.reproduce_rows import folder_of_configs, layer  # noqa: E402
from ssfl_app.files import write_json  # noqa: E402
from ssfl_app.results.recorder import environment  # noqa: E402
from ssfl_app.results.report import write_report  # noqa: E402
from ssfl_app.results.run_folder import CENTRAL, LOCAL, PERSONAL, Run, read_run  # noqa: E402
from ssfl_app.results.status import read_status  # noqa: E402

SYSTEMS = {"ssfl": "table1-ssfl", "fedavg": "table1-fedavg", "random": "table1-ssfl", "dispfl": "table1-dispfl"}
"""Systems in their order, and the file of each one's configuration."""

TINY = {"data.name": "digits", "data.augment": "auto", "model.name": "cnn", "run.clients": 8, "run.cohort": 3}
TINY |= {"run.rounds": 3, "local.epochs": 1, "partition.name": "iid", "run.device": "cpu"}
ENOUGH = 5.0  # seconds under which a run is not begun


def recipe(system: str, options: argparse.Namespace) -> str:
    """Return the configuration of a system as TOML."""
    own = read_file(folder_of_configs() / f"{SYSTEMS[system]}.toml") | {"strategy": system}
    flat = merge(own, layer("tmlr", merge(own), SYSTEMS[system]))
    flat |= {"run.checkpoint-every": 5, "engine.precision": options.precision, "run.seed": options.seed}
    return write_toml(flat | images_at(options.data) | (TINY if options.tiny else {}))


def play(system: str, options: argparse.Namespace, seconds: float) -> str:
    """Begin a run or go on with it, for so many seconds at the longest; return how it ended."""
    home, configuration = options.out / system, options.out / f"{system}.toml"
    words = ["run", "--engine", "inline"]
    if (home / "config.toml").is_file():
        words += ["--resume", str(home)]
    else:
        configuration.write_text(recipe(system, options))
        words += [str(configuration), "--out", str(home)]
    command = [sys.executable, "-c", "from ssfl_app.cli.main import main; main()", *words]
    with (options.out / f"{system}.log").open("a") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, cwd=HERE.parent, env=os.environ)
        try:
            run.wait(seconds)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGTERM)  # it ends after the clients that are being trained
            run.wait()
            return "cut"
    return "finished" if run.returncode == 0 else f"failed: {read_status(home).get('message') or log.name}"


def curve(run: Run) -> dict:
    """Return what a run reached, a value a round: accuracies (None: not tested), density, costs; and its machine."""
    kinds = (CENTRAL, LOCAL, PERSONAL, "density", "bytes_train_down", "bytes_train_up", "image_passes", "seconds")
    return {kind: [record[kind] for record in run.rounds] for kind in kinds} | {"environment": run.environment}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="tf32")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="small runs on digits and the CPU, for a test")
    options = parser.parse_args()
    if options.data is None and not options.tiny:
        parser.error("--data names a folder with CIFAR-10")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    end, ended = time.monotonic() + 60 * options.minutes, {}
    waiting = [name for name in SYSTEMS if read_status(options.out / name).get("status") != "finished"]
    for index, system in enumerate(waiting):
        share = (end - time.monotonic()) / (len(waiting) - index)
        ended[system] = play(system, options, share) if share >= ENOUGH else "no time was left"
        print(f"{system}: {ended[system]}", flush=True)
        report(options.out)
    return int(any(how.startswith("failed") for how in ended.values()))


def report(out: Path) -> None:
    """Write curves and page of all runs that have a round, and print how far they are."""
    runs = [read_run(out / name) for name in SYSTEMS if (out / name / "rounds.jsonl").is_file()]
    write_json(out / "gpu_paper.json", {"environment": environment(), "systems": {r.name: curve(r) for r in runs}})
    write_report(runs, out / "gpu_paper.html")
    for run in runs:
        tested = {kind: [r[kind] for r in run.rounds if r[kind] is not None] for kind in (CENTRAL, LOCAL, PERSONAL)}
        best = ", ".join(f"{kind} {100 * values[-1]:.2f} %" for kind, values in tested.items() if values)
        print(f"  {run.name}: {len(run.rounds)} rounds, {sum(r['seconds'] for r in run.rounds):.0f} s; {best}")


if __name__ == "__main__":
    sys.exit(main())
