"""What fewer channels are worth: .venv/bin/python benchmarks/channels.py speed | ranks | accuracy | patterns

`speed`: seconds of local training and multiplications of networks that keep a share of their parameters, on one core:
batches of BATCH images, in turns in one run, so that what else the machine does falls on all alike; a turn is one
`LocalTrainer.fit`. Channels are kept uniformly (mask.scope "layer"), in parameters. A model that is recorded is left
out. Then its peak memory, in part "memory": of a fresh process that trains two batches, less what it had before, with
the network and the images. It takes Linux's /proc.

`ranks`: how scores of channels are made comparable between layers, on digits, seeds 101, 102, ...: what the product
does is what wins here. `accuracy`: channels, weights, uniform width and random channels at equal parameters, digits,
seeds 1, 2, ...; `patterns`: masks of weights, 2:4 and blocks at equal density. All go on where they were broken off.

Results: benchmarks/results/channels.json.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import ssfl_app  # noqa: E402
from ssfl_app.data.dataset import Samples, Transform  # noqa: E402
from ssfl_app.files import write_json  # noqa: E402
from ssfl_app.results.recorder import environment  # noqa: E402
from ssfl_app.sparsity import channels  # noqa: E402
from ssfl_app.sparsity.layout import Layout, Vector  # noqa: E402
from ssfl_app.strategies.shared import narrowing  # noqa: E402
from ssfl_app.training import models  # noqa: E402
from ssfl_app.training.malloc import keep_heap  # noqa: E402
from ssfl_app.training.narrow import flops, narrowed  # noqa: E402
from ssfl_app.training.trainer import LocalOptions, LocalTrainer  # noqa: E402

OUT = HERE / "results" / "channels.json"
MODELS, SHARES = ("resnet18", "resnet20", "cnn"), (1.0, 0.5, 0.25, 0.1, 0.05)
BATCH, TURNS = 16, 3
QUIET = {"run.device": "cpu", "engine.concurrent": 1}
IMAGES = {"resnet18": 32, "resnet20": 160, "cnn": 320}


def _merge(part: str, value: object) -> None:
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    write_json(OUT, known | {part: value})


# ---- seconds and multiplications -----------------------------------------------------------------


def smaller(model: torch.nn.Module, share: float) -> torch.nn.Module:
    """Return a network with this share of the weights that a mask covers, uniformly narrow inside."""
    if share == 1:
        return model
    layout = Layout.of(model)
    ranks = channels.ranks_in_layers(layout, np.zeros(channels.unit_count(layout)))
    return narrowed(model, layout, channels.choose(layout, ranks, share, channels.Cost(layout)))


def images_of(count: int, rng: np.random.Generator) -> Samples:
    return Samples(torch.from_numpy(rng.integers(0, 256, (count, 3, 32, 32), np.uint8)), torch.arange(count) % 10)


def make_trainer() -> LocalTrainer:
    options = LocalOptions(batch_size=BATCH, epochs=1)
    return LocalTrainer(options, Transform((0.5,) * 3, (0.25,) * 3, "none"), torch.device("cpu"))


def speed(names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    keep_heap()
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    rng, rows = np.random.default_rng(1), known.get("speed", {}).get("rows", [])
    for name in names:
        if any(row["model"] == name for row in rows):
            continue
        count = IMAGES[name]
        images, trainer = images_of(count, rng), make_trainer()
        whole = models.create(models.ModelOptions(name), (3, 32, 32), 10, seed=1)
        nets = {share: smaller(whole, share) for share in SHARES}
        seconds: dict[float, list[float]] = {share: [] for share in SHARES}
        for turn in range(TURNS + 1):
            for share, net in nets.items():
                began = time.process_time()
                trainer.fit(net, images, rng, lr=0.01)
                if turn:  # the first one makes kernels
                    seconds[share].append(time.process_time() - began)
        for share, net in nets.items():
            ratios = [whole / part for whole, part in zip(seconds[1.0], seconds[share], strict=True)]
            row = {
                "model": name,
                "share": share,
                "parameters": sum(p.numel() for p in net.parameters()),
                "parameters kept": sum(p.numel() for p in net.parameters())
                / sum(p.numel() for p in whole.parameters()),
                "widths": [inner.size for inner in Layout.of(net).inner],
                "flops a sample, forward": flops(net, (3, 32, 32)),
                "flops, times fewer": flops(whole, (3, 32, 32)) / flops(net, (3, 32, 32)),
                "milliseconds a step": 1e3 * statistics.median(seconds[share]) / (count / BATCH),
                "times faster": statistics.median(ratios),
                "times faster, lowest and highest turn": [min(ratios), max(ratios)],
            }
            rows.append(row)
            print({key: value for key, value in row.items() if key != "widths"}, flush=True)
        how = {"batch": BATCH, "turns": TURNS, "seconds are": "of the process's CPU time, forward, backward and step"}
        head = {"date": date.today().isoformat(), "environment": environment(), "load": os.getloadavg()[0], **how}
        _merge("speed", {**head, "rows": rows})


# ---- memory ----------------------------------------------------------------------------------------


def memory(names: Sequence[str]) -> None:
    for name in names:
        for share in SHARES:
            known = json.loads(OUT.read_text()) if OUT.exists() else {}
            rows = known.get("memory", {}).get("rows", [])
            if any((row["model"], row["share"]) == (name, share) for row in rows):
                continue
            words = [sys.executable, __file__, "peak", name, str(share)]
            done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
            row = {"model": name, "share": share, **json.loads(done.stdout)}
            print(row, flush=True)
            head = {"date": date.today().isoformat(), "environment": environment(), "batch": BATCH}
            _merge("memory", {**head, "rows": [*rows, row]})


def peak(name: str, share: float) -> dict[str, int]:
    """Return bytes: the peak of this process while it trains a network, and that less what it had before.

    The network is made without the whole one, and another one is trained first: training would use the memory of the
    one again, and loads code that counts as memory.
    """
    torch.set_num_threads(1)
    keep_heap()
    rng, trainer, shape = np.random.default_rng(1), make_trainer(), (3, 32, 32)
    tiny = models.create(models.ModelOptions(width=0.05), shape, 10, seed=1)
    trainer.fit(tiny, images_of(2, rng), rng, lr=0.01)
    net = smaller(models.outline(models.ModelOptions(name), shape, 10), share).to_empty(device="cpu")
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    images = images_of(2 * BATCH, rng)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    trainer.fit(net, images, rng, lr=0.01)
    return {"bytes, process": resident("VmHWM"), "bytes, training": resident("VmHWM") - before}


def resident(what: str) -> int:
    """Return the memory of this process in bytes: "VmRSS" now, "VmHWM" at most."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


# ---- ranks, and accuracy -------------------------------------------------------------------------

Rank = Callable[[Layout, Vector, channels.Cost], np.ndarray]


def tempered(alpha: float, by_weights: float = 0.0) -> Rank:
    """Return scores by the mean score of their layer to the power `alpha`, and by a unit's weights to another."""

    def rank(layout: Layout, scores: Vector, _: channels.Cost) -> np.ndarray:
        ranks, cost, widths = scores.astype(np.float64), channels.Cost(layout), channels.whole_widths(layout)
        for place, (inner, span) in enumerate(zip(layout.inner, channels.unit_spans(layout), strict=True)):
            ranks[span] /= ranks[span].mean() ** alpha * (cost.around(place, widths) / inner.units) ** by_weights
        return ranks

    return rank


def by_cost(layout: Layout, scores: Vector, cost: channels.Cost) -> np.ndarray:
    """Return scores by what a unit takes from the budget."""
    ranks, widths = scores.astype(np.float64), channels.whole_widths(layout)
    for place, (inner, span) in enumerate(zip(layout.inner, channels.unit_spans(layout), strict=True)):
        ranks[span] *= inner.units / cost.around(place, widths)
    return ranks


MULTIPLICATIONS = "score / multiplications of the channel"
RANKS: dict[str, Rank] = {
    "score": tempered(0),
    "score / weights of the channel": tempered(0, 1),
    MULTIPLICATIONS: by_cost,
    "score / sqrt(weights of the channel)": tempered(0, 0.5),
    "score / sqrt(mean of its layer)": tempered(0.5),
    "score / mean of its layer": tempered(1),
    "rank in its layer": lambda layout, scores, *_: channels.ranks_in_layers(layout, scores),
}


@contextlib.contextmanager
def ranked_by(rank: Rank | None, least: float = 0.0) -> Iterator[None]:
    """Have SSFL rank channels another way; each layer keeps a share `least` of its channels."""
    kind, choose = narrowing.NarrowingStrategy, narrowing.choose
    old = kind.ranks

    def raised(layout: Layout, ranks: np.ndarray, *more: object) -> np.ndarray:
        if least and ranks.any():
            ranks = ranks.copy()
            for inner, span in zip(layout.inner, channels.unit_spans(layout), strict=True):
                best = np.argsort(-ranks[span], kind="stable")[: int(np.ceil(least * inner.units))]
                ranks[span.start + best] = np.inf
        return choose(layout, ranks, *more)

    try:
        narrowing.choose = raised
        if rank is not None:
            kind.ranks = lambda self, scores: rank(self.context.layout, scores, self.cost())
        yield
    finally:
        kind.ranks, narrowing.choose = old, choose


def play(strategy: str, seed: int, keys: dict, rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run = ssfl_app.run(
            strategy,
            seed=seed,
            out=Path(folder) / "run",
            quiet=True,
            config={"run.rounds": rounds, "run.evaluate-every": rounds, **QUIET, **keys},
        )
        summary = run.summary
        return {
            "accuracy": summary["central_accuracy"],
            "loss": summary["train_loss"],
            "parameters": round(summary["density_all"] * summary["parameters"]),
            "widths": list(summary.get("widths", {}).values()),
            "bytes": summary["bytes_train_up"],
            "bytes of discovery": summary["bytes_discovery_up"],
            "seconds": time.perf_counter() - began,
        }


def played(part: str, name: str, density: float, seed: int, rounds: int, make: Callable[[], dict]) -> None:
    """Play a run unless its row is there already."""
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    rows = known.get(part, {}).get("rows", [])
    if any(
        (row["name"], row["density"], row["seed"], row["rounds"]) == (name, density, seed, rounds) for row in rows
    ):
        return
    row = {"name": name, "density": density, "seed": seed, "rounds": rounds, **make()}
    print(row, flush=True)
    head = {"date": date.today().isoformat(), "environment": environment()}
    _merge(part, {**head, "rows": [*rows, row]})


def ranks(seeds: int, densities: list[float], rounds: int, budget: str) -> None:
    """Play each rule; one by multiplications is that by weights where the budget is one of weights."""
    part = "ranks" if budget == "parameters" else "ranks by flops"
    for seed in range(101, 101 + seeds):
        for density in densities:
            keys = {"mask.granularity": "channel", "mask.density": density, "mask.budget": budget}
            for name, rank in RANKS.items():
                if name == MULTIPLICATIONS and budget == "parameters":
                    continue
                for more, least in (("", 0.0), (", each layer keeps the density", density)):
                    if least and name not in ("score", "score / sqrt(mean of its layer)"):
                        continue

                    def make(rank: Rank = rank, least: float = least, keys: dict = keys, seed: int = seed) -> dict:
                        with ranked_by(rank, least):
                            return play("ssfl", seed, keys, rounds)

                    played(part, name + more, density, seed, rounds, make)


def narrow(density: float) -> dict:
    """Return the keys of a dense network of uniform width with as many parameters as SSFL's channels leave."""
    options, shape = models.ModelOptions(), (1, 8, 8)
    layout = Layout.of(models.outline(options, shape, 10))
    count = round(density * layout.prunable_size) + layout.size - layout.prunable_size
    return {"model.width": models.width_for(options, shape, 10, count)}


def accuracy(seeds: int, densities: list[float], rounds: int) -> None:
    for seed in range(1, 1 + seeds):
        for density in densities:
            by_channel = {"mask.granularity": "channel", "mask.density": density}
            runs: dict[str, tuple[str, dict]] = {
                "channels": ("ssfl", by_channel),
                "weights": ("ssfl", {"mask.density": density}),
                "uniform width": ("fedavg", narrow(density)),
                "random channels": ("random", by_channel),
                "shuffled channels": ("shuffled", by_channel),
            }
            for name, (strategy, keys) in runs.items():

                def make(strategy: str = strategy, keys: dict = keys, seed: int = seed) -> dict:
                    return play(strategy, seed, keys, rounds)

                played("accuracy", name, density, seed, rounds, make)


def patterns(seeds: int, rounds: int) -> None:
    """Play masks of weights in a pattern, and without one."""
    for seed in range(1, 1 + seeds):
        for name, density in (("weight", 0.5), ("2:4", 0.5), ("block", 0.5), ("weight", 0.1), ("block", 0.1)):

            def make(name: str = name, density: float = density, seed: int = seed) -> dict:
                return play("ssfl", seed, {"mask.granularity": name, "mask.density": density}, rounds)

            played("patterns", name, density, seed, rounds, make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("speed", "ranks", "accuracy", "patterns"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="of speed")
    parser.add_argument("--budget", choices=("parameters", "flops"), default="parameters", help="of ranks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.25])
    parser.add_argument("--rounds", type=int, default=20)
    if sys.argv[1:2] == ["peak"]:
        print(json.dumps(peak(sys.argv[2], float(sys.argv[3]))))
        return
    words = parser.parse_args()
    if words.what == "speed":
        speed(words.models)
        memory(words.models)
    elif words.what == "ranks":
        ranks(words.seeds, words.densities, words.rounds, words.budget)
    elif words.what == "patterns":
        patterns(words.seeds, words.rounds)
    else:
        accuracy(words.seeds, words.densities, words.rounds)


if __name__ == "__main__":
    main()
