"""Check and measure training on one GPU: python benchmarks/gpu.py

In this order, and into benchmarks/results/gpu.json:

(a) checks: graphs, the same steps uncaptured and plain steps train to the same weights; graphs repeat bit for bit,
    also beside other clients. The script ends with 1 if one fails.
(b) images a second of `LocalTrainer` (plain steps, then graphs in fp32, tf32, bf16) and of whole rounds of the inline
    engine, with 1, 2, 4, ... clients at once. The recipe is the paper's: ResNet-18 with GroupNorm, 10 of 100 clients,
    5 epochs, batches of 16. Images are random unless --data names CIFAR-10 (parquet or torchvision's).
(c) a profile: which kernels the GPU runs and how busy it is; what a round's threads spend outside of training.
(d) minutes of 999 rounds at the best rate; with --full they are played.

It runs from a checkout; without Flower it leaves out what needs the engine. Without CUDA it ends with 2; with
``--device cpu --tiny`` it plays all of it in seconds, which measures nothing.
"""

import argparse
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from gpu_rates import Bench, Scale, engine_rate, profile, synthetic, trainer_rate  # noqa: E402

from ssfl_app.results.recorder import environment  # noqa: E402
from ssfl_app.sparsity.layout import Layout  # noqa: E402
from ssfl_app.sparsity.mask import Mask  # noqa: E402

GOAL_MINUTES, ROUNDS = 15, 999
WHOLE = Scale("resnet18", 32, 100, 500, 5, (1, 2, 4, 8, 10, 16), 12, 5, "")
TINY = Scale(
    "cnn", 8, 4, 36, 1, (1, 2), 3, 1,
    "model.name='cnn' run.clients=4 run.cohort=3 local.epochs=1 partition.name='iid' run.device='cpu'",
)  # fmt: skip
CLOSE, SAME = 1e-3, 1e-6
"""Largest distance of weights relative to how far they moved: of plain steps, whose SGD is not fused and rounds
otherwise, from the others; and of the same steps captured and uncaptured. Bits are the same where it is 0."""


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten().cpu() for tensor in model.state_dict().values()])


def trained(
    bench: Bench, steps: str, precision: str, norm: str = "group", name: str = "", by: float = 1
) -> torch.Tensor:
    """Return the weights after three clients of different sizes, rates and masks; with `by` 0 nothing moves."""
    model, run = bench.model(norm, name), bench.trainer(steps, precision, epochs=1, momentum=0.9)
    mask = Mask.random(Layout.of(model), 0.5, np.random.default_rng(1))
    for client, (count, lr, held) in enumerate([(36, 0.01, mask), (23, 0.005, None), (36, 0.01, mask)]):
        run.fit(model, bench.images(client, count), np.random.default_rng(client), lr=lr * by, mask=held)
    return flat(model)


def check(bench: Bench, precisions: tuple[str, ...]) -> list[dict]:
    """Return what was compared, how far apart it is, and whether that is near enough."""
    rows, fast = [], bench.fast

    def compare(what: str, one: torch.Tensor, other: torch.Tensor, start: torch.Tensor, most: float) -> None:
        far = float((one - other).norm() / (other - start).norm())
        rows.append({"check": what, "distance": far, "at_most": most, "ok": far <= most})
        print(f"{'ok    ' if far <= most else 'FAILED'} {what}: {far:.1e}, at most {most:.0e}", flush=True)

    for name, norm in ((bench.scale.model, "group"), ("cnn", "batch")):
        start = trained(bench, "plain", "fp32", norm, name, by=0)
        kinds = ("plain", "static", fast, fast)
        plain, static, graphs, again = (trained(bench, steps, "fp32", norm, name) for steps in kinds)
        compare(f"{name}, {norm} norm: uncaptured as plain", static, plain, start, CLOSE)
        compare(f"{name}, {norm} norm: {fast} as uncaptured", graphs, static, start, SAME)
        compare(f"{name}, {norm} norm: {fast} again", again, graphs, start, 0.0)
    start = trained(bench, "plain", "fp32", by=0)
    for precision in precisions:
        alone, found = trained(bench, fast, precision), dict[int, torch.Tensor]()
        bench.at_once(4, lambda i, p=precision, f=found: f.update({i: trained(bench, fast, p)}))
        for index in range(4):
            compare(f"{precision}: client {index} of 4 at once as alone", found[index], alone, start, 0.0)
    return rows


def trainers(bench: Bench, precisions: tuple[str, ...], add: Callable[[str, dict], None]) -> None:
    for precision in precisions[:2]:
        for at_once in (1, 8) if bench.on_gpu else (1,):
            add("trainer", trainer_rate(bench, "plain", precision, at_once))
    for precision in precisions:
        for at_once in bench.scale.at_once:
            add("trainer", trainer_rate(bench, bench.fast, precision, at_once))
    for norm in ("group", "batch"):  # GroupNorm leaves channels last, the other does not
        add("trainer", trainer_rate(bench, bench.fast, precisions[-1], bench.scale.at_once[-1], norm=norm, last=True))


def engines(options: argparse.Namespace, bench: Bench, record: dict, add: Callable[[str, dict], None]) -> None:
    scale = bench.scale
    if options.data is None:
        synthetic(scale)
    rates = [row for row in record["trainer"] if row["steps"] == bench.fast and "norm" not in row]
    best = max(rates, key=lambda row: row["images_per_second"])
    others = {row["precision"] for row in rates} - {best["precision"]}
    for precision, at_once in [(best["precision"], n) for n in scale.at_once] + [(p, 8) for p in sorted(others)]:
        add("engine", engine_rate(scale, options.data, precision, at_once))
    best = max(record["engine"], key=lambda row: row["images_per_second"])
    minutes = ROUNDS * best["images_per_round"] / best["images_per_second"] / 60
    record["recipe"] = {"rounds": ROUNDS, "extrapolated_minutes": minutes, "goal_minutes": GOAL_MINUTES}
    print(f"{ROUNDS} rounds would take {minutes:.1f} minutes; the goal is {GOAL_MINUTES}")
    if options.full:
        add("whole", engine_rate(scale, options.data, best["precision"], best["concurrent"], ROUNDS))
        record["recipe"]["minutes"] = record["whole"][0]["wall_seconds"] / 60
        print(f"{ROUNDS} rounds took {record['recipe']['minutes']:.1f} minutes")


def measure(options: argparse.Namespace) -> bool:
    """Write the record, part by part; return whether the checks held."""
    torch.set_num_threads(1)  # as each client has; more would split sums in other places
    bench = Bench(torch.device(options.device), TINY if options.tiny else WHOLE)
    precisions = ("fp32", "tf32", "bf16") if bench.on_gpu else ("fp32",)
    record: dict[str, Any] = {"environment": environment(), "data": str(options.data or "random")}
    record |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}

    def save() -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")

    def add(part: str, row: dict) -> None:
        record.setdefault(part, []).append(row)
        names = [str(row[key]) for key in ("steps", "precision", "norm") if key in row]
        rate = f"{row['concurrent']} at once: {row['images_per_second']:,.0f} images/s"
        print(f"{part} {' '.join(names)}, {rate}", flush=True)
        save()

    record["checks"] = check(bench, precisions)
    save()
    trainers(bench, precisions, add)
    record["profile"] = [profile(bench, precisions[-1], at_once) for at_once in ((1, 8) if bench.on_gpu else (1,))]
    for row in record["profile"]:
        busy = f"busy {row['busy']:.0%}, with {row['at_once']:.1f} kernels at once"
        print(f"profile, {row['concurrent']} at once: {busy}")
        for kernel in row["top"][:8]:
            print(f"  {kernel['share']:6.1%} {kernel['calls']:7d} calls  {kernel['name'][:90]}")
    save()
    if find_spec("flwr") is None:
        print("Flower is not installed: the engine is left out")
    else:
        engines(options, bench, record, add)
    save()
    return all(row["ok"] for row in record["checks"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="seconds, for a test of this script")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; else random images")
    parser.add_argument("--full", action="store_true", help=f"also play the {ROUNDS} rounds")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA here: this script measures a GPU (--device cpu --tiny only tries it out)", file=sys.stderr)
        return 2
    return 0 if measure(options) else 1


if __name__ == "__main__":
    sys.exit(main())
