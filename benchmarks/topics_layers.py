"""Which layers of the transformer of examples/own/topics.py a mask costs most: python -m benchmarks.topics_layers

Trained in one place, without clients, so that nothing but the mask differs: `STEPS` steps of SGD on batches of 64
windows. A mask leaves `DENSITY` of some tensors and all of the others: the largest |g * w| of each tensor at the
start, on 2,000 windows. Queries and keys are two thirds of PyTorch's `in_proj_weight`, values the last third.
Accuracies of the next character on the test windows. What is played is in benchmarks/results/topics-layers.json and
not played again.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ssfl_app.files import write_json
from ssfl_app.results.recorder import environment
from ssfl_app.seeding import generator

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "topics-layers.json"
DENSITY, STEPS, BATCH, RATE, SCORED = 0.2, 1500, 64, 0.3, 2000
SEEDS = (1, 2)
GROUPS = {
    "none (dense)": (),
    "embeddings of letters, head": ("letters", "head"),
    "embeddings of places": ("places",),
    "feed-forward layers": ("feed",),
    "queries, keys": ("queries-keys",),
    "values, output of attention": ("values", "out_proj"),
    "all of attention": ("queries-keys", "values", "out_proj"),
    "all": ("",),
}


def pieces(net: nn.Module) -> Iterator[tuple[str, nn.Parameter, slice]]:
    """Yield name, tensor and rows of what a mask ranks by itself."""
    for name, tensor in net.named_parameters():
        if tensor.dim() < 2:
            continue
        if name.endswith("in_proj_weight"):
            third = len(tensor) // 3
            yield f"{name}.queries-keys", tensor, slice(2 * third)
            yield f"{name}.values", tensor, slice(2 * third, None)
        else:
            yield name, tensor, slice(None)


def scored_net(topics: Any, x: torch.Tensor, y: torch.Tensor, seed: int) -> tuple[nn.Module, torch.Generator]:
    """Return the network of a seed with the gradient that scores it, and a generator for what follows."""
    draws = torch.Generator().manual_seed(int(generator(seed, "topics-layers").integers(2**62)))
    torch.manual_seed(seed)
    net = topics.Transformer(x.shape[1:], int(x.max()) + 1, "none")
    scored = torch.randperm(len(x), generator=draws)[:SCORED]
    F.cross_entropy(net(x[scored]).transpose(1, 2), y[scored]).backward()
    return net, draws


def score(tensor: nn.Parameter, rows: slice) -> torch.Tensor:
    assert tensor.grad is not None
    return (tensor.detach() * tensor.grad).abs()[rows]


def ranked_together(topics: Any, seed: int) -> dict[str, float]:
    """Return which share of each group a ranking of all weights together leaves alive."""
    (x, y, _), _ = topics.pages(None)
    scores = {name: score(tensor, rows) for name, tensor, rows in pieces(scored_net(topics, x, y, seed)[0])}
    every = torch.cat([each.flatten() for each in scores.values()])
    least = every.topk(round(DENSITY * every.numel())).values[-1]
    shares = {}
    for group, words in GROUPS.items():
        of = [each.flatten() for name, each in scores.items() if any(word in name for word in words)]
        if of:
            shares[group] = float((torch.cat(of) >= least).float().mean())
    return shares


def train(topics: Any, words: tuple[str, ...], seed: int) -> float:
    """Return the accuracy of a network whose tensors that have one of `words` in their names are masked."""
    (x, y, _), (test_x, test_y, _) = topics.pages(None)
    net, draws = scored_net(topics, x, y, seed)
    masks: list[tuple[nn.Parameter, slice, torch.Tensor]] = []
    for name, tensor, rows in pieces(net):
        if any(word in name for word in words):
            scores = score(tensor, rows)
            alive = scores.flatten().topk(round(DENSITY * scores.numel())).indices
            masks.append((tensor, rows, torch.zeros(scores.numel()).index_fill_(0, alive, 1.0).view_as(scores)))
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for _ in range(STEPS):
        with torch.no_grad():
            for tensor, rows, mask in masks:
                tensor[rows] *= mask
        batch = torch.randint(len(x), (BATCH,), generator=draws)
        optimizer.zero_grad()
        F.cross_entropy(net(x[batch]).transpose(1, 2), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        for tensor, rows, mask in masks:
            tensor[rows] *= mask
        return float((net(test_x).argmax(-1) == test_y).float().mean())


def main() -> None:
    sys.path.insert(0, str(ROOT / "examples" / "own"))
    import topics

    torch.set_num_threads(1)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"reached": {}}
    for seed in SEEDS:
        for name, words in GROUPS.items():
            row = record["reached"].setdefault(name, {})
            if str(seed) not in row:
                row[str(seed)] = train(topics, words, seed)
                record |= {"date": str(date.today()), "environment": environment()}
                write_json(RECORD, record)
                print(f"{name}, seed {seed}: {row[str(seed)]:.4f}", flush=True)
    shares = [ranked_together(topics, seed) for seed in SEEDS]
    record["alive"] = {name: statistics.mean(share[name] for share in shares) for name in shares[0]}
    write_json(RECORD, record)
    for name, row in record["reached"].items():
        print(f"{name}: {statistics.mean(row.values()):.3f}, alive {record['alive'].get(name, 1.0):.3f}")


if __name__ == "__main__":
    main()
