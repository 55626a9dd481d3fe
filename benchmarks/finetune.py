"""Loss against bytes of federated fine-tuning: python benchmarks/finetune.py [--minutes N] [--part 0/2]

A causal transformer is pre-trained on part of Python's help pages (`pydoc_data.topics`, characters), and fine-tuned
by 22 clients, each a page held back. Masks of frozen weights are compared with full fine-tuning, LoRA (peft's; its
base is no part of what travels), sparse uploads of LoRA (FLASC, Kuo et al., arXiv 2406.05233; here models go down
whole), and what no mask has a say in: biases and norms alone.

Each method has the learning rate that is best of `RATES` after `SHORT` rounds on a seed that the table does not use.
Each call plays what fits into its minutes and writes the record after every run; two calls with ``--part`` share the
methods. Goal: SSFL at density 0.01 is at least level with LoRA at equal bytes of training.
"""

import argparse
import fcntl
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pydoc_data.topics import topics

import torch
from torch import nn

import ssfl_app
from ssfl_app.config import Flat
from ssfl_app.locks import RunFailed
from ssfl_app.results.recorder import environment
from ssfl_app.sparsity.layout import load_state, state_of
from ssfl_app.testing.grid import play
from ssfl_app.training.models import ModelOptions, create, read_weights

HERE = Path(__file__).parent
RECORD, TABLE = HERE / "results" / "finetune.json", HERE / "results" / "finetune.md"
START = HERE.parent / "runs" / "finetune-start"
HELD = (3_000, 15_000)
"""Characters of a page that is held back for a client."""
SEEDS, TUNED = (1, 2, 3), 11
RATES = (0.0125, 0.05, 0.2, 0.8)
ROUNDS, SHORT = 8, 3

DATA = {"data.name": "benchmarks.finetune:pages", "partition.name": "natural"}
RUN = DATA | {"run.clients": 22, "run.cohort": 4, "run.evaluate-every": 4, "local.epochs": 1, "local.batch-size": 16}
RUN |= {"local.momentum": 0.9, "local.weight-decay": 0.0, "local.clip": 1.0}
FROZEN = {"mask.dead": "frozen", "ssfl.score-values": "log8", "ssfl.saliency-share": 0.25}


def _mask(density: float, strategy: str = "ssfl", criterion: str = "gradient") -> Flat:
    asked = FROZEN | {"ssfl.criterion": criterion} if strategy == "ssfl" else {"mask.dead": "frozen"}
    return {"model.name": "transformer", "strategy": strategy, "mask.density": density, **asked}


def _lora(rank: int, targets: str = "qv", **more: Any) -> Flat:
    options = {"model.options.rank": rank, "model.options.targets": targets}
    return {"model.name": "benchmarks.finetune:lora", "strategy": "fedavg", **options, **more}


METHODS: dict[str, Flat] = {
    "SSFL, |g|, 1 %": _mask(0.01),
    "LoRA, r 4, query and value": _lora(4),
    "LoRA, r 8, query and value": _lora(8),
    "random mask, 1 %": _mask(0.01, "random"),
    "SSFL, |g w|, 1 %": _mask(0.01, criterion="snip"),
    "biases and norms alone": _mask(0.00002, "random"),
    "full": {"model.name": "transformer", "strategy": "fedavg"},
    "LoRA, r 16, query and value": _lora(16),
    "SSFL, |g|, 5 %": _mask(0.05),
    "LoRA, r 4, all six matrices": _lora(4, "all"),
    "FLASC, r 16, a quarter up": _lora(16, **{"strategy": "topk", "mask.density": 0.25, "topk.of": "update"}),
}
"""By the name in the table, the more important first."""


@functools.cache
def pages(path: str, part: str = "held", length: int = 32) -> Any:
    """Return windows of text with the characters that follow; the last fifth of each page is for testing."""
    letters = {letter: code for code, letter in enumerate(sorted(set("".join(topics.values()))))}
    held = [name for name in sorted(topics) if HELD[0] <= len(topics[name]) < HELD[1]]
    names = held if part == "held" else sorted(topics.keys() - held)
    parts: list[list[Any]] = [[], []]
    for client, name in enumerate(names):
        codes = torch.tensor([letters[letter] for letter in topics[name]])
        rows = codes[: (len(codes) - 1) // length * length + 1]
        x, y = rows[:-1].view(-1, length), rows[1:].view(-1, length)
        cut = len(x) * 4 // 5
        for rows_of, where in zip(parts, (slice(0, cut), slice(cut, None)), strict=True):
            rows_of.append((x[where], y[where], torch.full((len(x[where]),), client)))
    return tuple(tuple(torch.cat(column) for column in zip(*each, strict=True)) for each in parts)


def lora(
    input_shape: tuple[int, ...], outputs: int, norm: str, rank: int = 4, targets: str = "qv", start: str = ""
) -> nn.Module:
    """Return the pre-trained transformer with adapters, which are all that its state has."""
    from peft import LoraConfig, inject_adapter_in_model

    model = create(ModelOptions("transformer"), input_shape, outputs, 1)
    load_state(model, read_weights(start, state_of(model)))
    names = ["query", "value"] if targets == "qv" else ["query", "key", "value", "out", "rise", "fall"]
    adapted: nn.Module = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), model)
    for module in adapted.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if not weight.requires_grad:
                delattr(module, name)
                module.register_buffer(name, weight.detach(), persistent=False)
    adapted.never_pruned = ()
    return adapted


def pretrained() -> Path:
    """Return the weights that all methods start from; they are trained if they are not there."""
    weights = START / "model.safetensors"
    if not weights.exists():
        keys = RUN | {"run.clients": 1, "run.cohort": 1, "run.rounds": 12, "partition.name": "iid"}
        keys |= {"data.options.part": "rest", "local.lr": 0.1, "local.lr-decay": 0.85}
        ssfl_app.run("fedavg", model="transformer", config=keys, out=START, quiet=True)
    return weights


def before(weights: Path) -> dict[str, float]:
    """Return the loss on the test pages, and how many parameters the model has, before any fine-tuning."""
    (x, y, _), test = pages("")
    outputs = int(max(part[1].max() for part in ((x, y), test))) + 1
    model = create(ModelOptions("transformer", weights=str(weights)), tuple(x.shape[1:]), outputs, 1).eval()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(test[0]).flatten(0, 1), test[1].flatten()).item()
    return {"loss": loss, "parameters": sum(weight.numel() for weight in model.parameters())}


def tune(method: str, seed: int, rate: float, rounds: int, weights: Path) -> dict[str, Any]:
    """Return what a run reaches, a point each evaluated round: the loss, and bytes of clients up and down so far."""
    began, start = time.process_time(), "model.options.start" if "lora" in METHODS[method]["model.name"] else ""
    keys = RUN | METHODS[method] | {"run.seed": seed, "run.rounds": rounds, "local.lr": rate}
    try:
        records = play(keys | {start or "model.weights": str(weights)}).records
    except RunFailed as error:  # a rate under which values leave all bounds
        return {"rate": rate, "points": [], "failed": str(error)}
    points, training, once = [], 0, 0
    for row in records:
        training += row.get("bytes_train_up", 0) + row.get("bytes_train_down", 0)
        once += row.get("bytes_discovery_up", 0) + row.get("bytes_discovery_down", 0) + row.get("bytes_mask_down", 0)
        if row.get("central_loss") is not None:
            told = {"loss": row["central_loss"], "accuracy": row["central_accuracy"]}
            points.append({"round": row["round"], "training": training, "once": once, **told})
    seconds = round(time.process_time() - began, 1)
    return {"rate": rate, "points": points, "cpu": environment()["cpu"], "day": str(date.today()), "seconds": seconds}


def best_rate(tried: dict[str, Any]) -> float:
    """Return the rate with the lowest loss; a run that diverged has none."""
    losses = {float(rate): row["points"][-1]["loss"] if row["points"] else math.inf for rate, row in tried.items()}
    return min(losses, key=lambda rate: (not math.isfinite(losses[rate]), losses[rate]))


def table(record: dict[str, Any]) -> str:
    """Return the table of the record."""
    lines = ["| method | rate | values a message | MB of training | MB once | loss | accuracy % | seeds |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for method in METHODS:
        runs = [row["points"][-1] for row in record["runs"].get(method, {}).values()]
        if not runs:
            continue
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        spread = statistics.stdev(run["loss"] for run in runs) if len(runs) > 1 else 0.0
        values = mean["training"] / (2 * 4 * int(RUN["run.cohort"]) * ROUNDS)
        loss, right = f"{mean['loss']:.4f} +- {spread:.4f}", f"{100 * mean['accuracy']:.1f}"
        lines.append(
            f"| {method} | {record['rates'][method]:g} | {values:,.0f} | {mean['training'] / 1e6:.2f} | "
            f"{mean['once'] / 1e6:.2f} | {loss} | {right} | {len(runs)} |"
        )
    start, all_runs = record["before"], [run for runs in record["runs"].values() for run in runs.values()]
    days, kinds = sorted({run["day"] for run in all_runs}), sorted({run["cpu"] for run in all_runs})
    where = f"One core of {', '.join(kinds)}, {days[0]} to {days[-1]}." if all_runs else ""
    lines += ["", f"Before: loss {start['loss']:.4f}, {start['parameters']:,} parameters. {where}"]
    return "\n".join(lines) + "\n"


@contextmanager
def open_record() -> Iterator[dict[str, Any]]:
    """Read the record, and write what became of it; one process at a time."""
    with (START.parent / "finetune.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = RECORD.read_text() if RECORD.exists() else '{"tuning": {}, "rates": {}, "runs": {}}'
        record = json.loads(text)
        yield record
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        TABLE.write_text(table(record))


def main() -> None:
    """Play what the record lacks, until the minutes are over."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--part", default="0/1")
    words = parser.parse_args()
    end, (part, parts) = time.monotonic() + 60 * words.minutes, map(int, words.part.split("/"))
    weights = pretrained()
    with open_record() as record:
        record["before"] = before(weights)
    names = list(METHODS)[part::parts]
    groups = names[: 4 // parts], names[4 // parts :]  # the more important ones are done before others begin
    for method, seed in [(method, seed) for group in groups for seed in (TUNED, *SEEDS) for method in group]:
        with open_record() as record:
            tried, known = record["tuning"].get(method, {}), record["runs"].get(method, {})
        if time.monotonic() > end:
            break
        if seed == TUNED:
            for rate in [rate for rate in RATES if str(rate) not in tried]:
                tried[str(rate)] = tune(method, seed, rate, SHORT, weights)
                print(method, rate, [p["loss"] for p in tried[str(rate)]["points"]], flush=True)
            with open_record() as record:
                record["tuning"][method], record["rates"][method] = tried, best_rate(tried)
        elif known.get(str(seed), {}).get("rate") != best_rate(tried):
            made = tune(method, seed, best_rate(tried), ROUNDS, weights)
            print(method, seed, made["points"][-1], made["seconds"], flush=True)
            with open_record() as record:
                record["runs"].setdefault(method, {})[str(seed)] = made
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
