"""What scores give away of the images they are made of: .venv/bin/python benchmarks/inversion.py [--sums]

An attack by a server that wants to see a site's images. It knows the weights w (it drew them) and gets |g * w| of a
batch, so it knows |g|, and looks for images whose gradient has these magnitudes: it moves pixels downhill on 1 - the
cosine between the two (Geiping et al., "Inverting gradients", NeurIPS 2020), from random starts, and keeps the best
end. It is told the labels, which the last layer gives away for one image and mostly for ten. No picture of a digit is
known to it beforehand. Scores are the product's own, of the default model on digits.

`correlation` is that of found and true pixels, each image less the mean one of its class, of a true image with the
found one of its class that is most like it; `by_chance` is what as many other images of these classes reach.

With --sums the same attack is made on what a server has of eight clients under privacy.secure-aggregation: the sum
of their scores, weighed by their samples, in whole numbers of fixed32. It knows the weights, and is told which labels
are whose. Clients and their images are the product's own.

Results: benchmarks/results/inversion.json; of one part only, what it says of the other stays.
"""

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from ssfl_app.config import merge, parse  # noqa: E402
from ssfl_app.files import write_json  # noqa: E402
from ssfl_app.results.recorder import environment  # noqa: E402
from ssfl_app.runtime import Runtime, get_runtime  # noqa: E402
from ssfl_app.seeding import generator  # noqa: E402
from ssfl_app.sparsity.fixed import FixedPoint  # noqa: E402
from ssfl_app.sparsity.layout import state_of  # noqa: E402
from ssfl_app.sparsity.saliency import snip  # noqa: E402
from ssfl_app.strategies.shared.scoring import SsflOptions  # noqa: E402

# Images of an answer, in how many minibatches, how many answers are attacked, and steps from each start.
CASES = ((1, 1, 3, 300), (4, 1, 2, 300), (32, 1, 1, 800), (32, 32, 1, 150))
STARTS, RATE = 2, 0.05

CLIENTS = 8
# Images that each client is asked for, how many sums are attacked, and steps from each start.
SUMS = ((1, 3, 300), (8, 1, 150))


def magnitudes(shop: Runtime, pixels: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return the mean of |g| over equally large minibatches of these shares, differentiable in `pixels`, flat."""
    state = {name: weight.detach() for name, weight in shop.model.named_parameters()}
    rest = {name: weight for name, weight in state.items() if name not in shop.layout.prunable}

    def loss(weights: dict[str, torch.Tensor], some: torch.Tensor, their: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(shop.model, {**rest, **weights}, (some,)), their)

    weights = {name: state[name] for name in shop.layout.prunable}
    parts = pixels.unflatten(0, (len(shares), -1)), labels.unflatten(0, (len(shares), -1))
    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(weights, *parts)
    sizes = [(gradients[n].square() + 1e-16).sqrt() for n in shop.layout.prunable]
    return torch.cat([torch.tensordot(shares, each, 1).flatten() for each in sizes])


def invert(
    shop: Runtime, told: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor, steps: int, seed: int
) -> tuple[float, torch.Tensor]:
    """Return 1 - cosine and the images, pixel values 0 to 1, of the best of several starts."""
    transform, best = shop.data.transform, (2.0, torch.empty(0))
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (transform.mean, transform.std))
    random = torch.Generator().manual_seed(seed)
    for _ in range(STARTS):
        guess = torch.rand(len(labels), *shop.data.shape, generator=random, requires_grad=True)
        optimizer = torch.optim.Adam([guess], lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            far = 1 - F.cosine_similarity(magnitudes(shop, (guess - mean) / std, labels, shares), told, dim=0)
            (guess.grad,) = torch.autograd.grad(far, [guess])
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                guess.clamp_(0, 1)
        best = min(best, (float(far.detach()), guess.detach().clone()), key=lambda pair: pair[0])
    return best


def correlations(found: torch.Tensor, true: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Return for each true image how much the found one of its class is like it that is most like it."""
    rows = []
    for label, image in zip(labels, true, strict=True):
        same = found[labels == label].flatten(1).numpy()
        rows.append(max(float(np.corrcoef(one, image.flatten().numpy())[0, 1]) for one in same))
    return rows


def scores(shop: Runtime, chosen: np.ndarray) -> np.ndarray:
    """Return the scores of a minibatch, float32, shape (prunable,)."""
    gradient = shop.trainer.gradient(shop.model, shop.data.train.take(chosen))
    return shop.layout.flatten_prunable(snip(gradient, state_of(shop.model)))


def answer(shop: Runtime, size: int, batches: int, seed: int) -> tuple[np.ndarray, list[np.ndarray], list[float]]:
    """Return a client's mean score of `size` images, their minibatches, and the share of each of these."""
    parts = np.split(np.random.default_rng(seed).permutation(len(shop.data.train))[:size], batches)
    return np.mean([scores(shop, part) for part in parts], 0), parts, [1 / batches] * batches


def masked_sum(size: int, seed: int) -> tuple[Runtime, np.ndarray, list[np.ndarray], list[float]]:
    """Return a run, and as `answer` what the server has of the scores of its clients, each of `size` images."""
    flat = merge({"strategy": "ssfl", "run.device": "cpu", "run.seed": seed, "run.clients": CLIENTS})
    flat |= {"run.cohort": CLIENTS, "ssfl.saliency-batch-size": size, "privacy.secure-aggregation": True}
    flat |= {"ssfl.saliency-sampling": "plain"}  # exactly so many images, whatever classes a client has
    shop, settings = get_runtime(flat), parse(flat).settings
    clients = [shop.share(client)[0] for client in range(CLIENTS)]
    held, total, parts = [len(images) for images in clients], 0, []
    fixed = FixedPoint.of("fixed32", settings.wire.range, float(sum(held)), CLIENTS)
    for client, images in enumerate(clients):
        rng, labels = generator(seed, "saliency", client, 0), shop.data.train.take(images).labels.numpy()
        parts.append(images[SsflOptions.from_settings(settings).minibatch(labels, rng)])
        summand, clipped = fixed.write(scores(shop, parts[-1]), held[client])
        assert not clipped
        total += summand[:-1]  # the count of clipped ones is the last
    return shop, fixed.mean(total, sum(held)), parts, [each / sum(held) for each in held]


def attack(
    shop: Runtime, mean: np.ndarray, parts: list[np.ndarray], shares: list[float], steps: int, seed: int
) -> dict[str, object]:
    """Attack what the server has: a mean of the scores of minibatches."""
    train, chosen = shop.data.train, np.concatenate(parts)
    batch, size = train.take(chosen), len(chosen)
    order = np.random.default_rng(seed).permutation(len(train))
    order = order[~np.isin(order, chosen)]
    weights = shop.layout.flatten_prunable(state_of(shop.model))
    told = torch.from_numpy((mean / np.maximum(np.abs(weights), 1e-12)).astype(np.float32))
    began = time.perf_counter()
    far, found = invert(shop, told, batch.labels, torch.tensor(shares), steps, seed)
    true = batch.inputs.float() / 255
    means = torch.stack([train.inputs[train.labels == c].float().mean(0) / 255 for c in range(shop.data.classes)])
    own, others = means[batch.labels], [order[train.labels[order] == c] for c in range(shop.data.classes)]
    # The seed's next images of the same classes: other people's.
    taken = [int(others[c][turn]) for turn, c in enumerate(batch.labels.tolist())]
    known = correlations(train.inputs[taken].float() / 255 - own, true - own, batch.labels)
    reached = correlations(found - own, true - own, batch.labels)
    return {
        "one_minus_cosine": far,
        "correlation": reached,
        "by_chance": known,
        "pixel_error_of_255": float((found - true).abs().mean()) * 255 if size == 1 else None,
        "seconds": round(time.perf_counter() - began, 1),
    }


def case(rows: list[dict[str, object]]) -> dict[str, object]:
    """Return what attacks of one kind reached together."""
    reached, known = (np.concatenate([row[key] for row in rows]) for key in ("correlation", "by_chance"))
    return {
        "median_correlation": round(float(np.median(reached)), 3),
        "highest_correlation": round(float(reached.max()), 3),
        "median_by_chance": round(float(np.median(known)), 3),
        "highest_by_chance": round(float(known.max()), 3),
        "answers": rows,
    }


def answers() -> dict[str, object]:
    """Attack the answers of one client."""
    flat = merge({"strategy": "ssfl", "run.device": "cpu"})
    shop, cases = get_runtime(flat), {}
    assert parse(flat).settings.mask.density < 1
    for size, batches, count, steps in CASES:
        rows = [attack(shop, *answer(shop, size, batches, seed), steps, seed) for seed in range(count)]
        cases[f"{size}" if batches == 1 else f"{size} in {batches} minibatches"] = case(rows)
    return cases


def sums() -> dict[str, object]:
    """Attack the sums of several clients."""
    cases = {}
    for size, count, steps in SUMS:
        made = [masked_sum(size, seed) for seed in range(count)]
        rows = []
        for seed, each in enumerate(made):
            rows.append(attack(*each, steps, seed))
            print(size, seed, rows[-1], flush=True)
        cases[f"{size} of each of {CLIENTS} clients"] = case(rows)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "inversion.json")
    parser.add_argument("--sums", action="store_true", help="attack sums under secure aggregation, not answers")
    words = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(words.out.read_text()) if words.out.exists() else {}
    cases = sums() if words.sums else answers()
    for name, found in cases.items():
        print(name, {key: value for key, value in found.items() if key != "answers"}, flush=True)
    steps = [each[-1] for each in (SUMS if words.sums else CASES)]
    how = {"starts": STARTS, "rate": RATE, "steps": steps}
    part = {"date": date.today().isoformat(), "environment": environment(), "attack": how, "images": cases}
    record |= {"sums": part} if words.sums else part
    write_json(words.out, record)


if __name__ == "__main__":
    main()
