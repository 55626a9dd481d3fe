"""What noise does to a search for the mask: .venv/bin/python benchmarks/private_densities.py

Digits, the CNN of 151,072 prunable weights, Dirichlet 0.3; each client scores one minibatch, as SSFL asks. Measured,
for noise multipliers of the search (0: no noise):

- layer densities from private shares (`ssfl_app.privacy.densities`), against those of SSFL's own mask: `misplaced` is
  the share of the budget that lies in another layer than there, sum |count - count of SSFL| / 2k; `factor` is by how
  much a layer's density is off, the geometric mean over layers. Beside the product's weights of layers, 1 /
  sqrt(size), are counts (1) and densities (1 / size);
- for comparison a private *unstructured* mask: each client's scores clipped at the median length of all, noise on the
  sum, the k largest. `overlap` is the share of SSFL's mask that it has; a random mask has the density.

Clipping and noise are the product's (whole numbers of 2**-20), the noise from fixed keys. Means of REPEATS draws.
Results: benchmarks/results/private-densities.json.
"""

import argparse
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from ssfl_app.config import merge  # noqa: E402
from ssfl_app.experiments.mask_study import Scorer  # noqa: E402
from ssfl_app.files import write_json  # noqa: E402
from ssfl_app.privacy import densities as private  # noqa: E402
from ssfl_app.privacy.clipping import clipped  # noqa: E402
from ssfl_app.privacy.noise import Stream, gaussian, key_stream  # noqa: E402
from ssfl_app.results.recorder import environment  # noqa: E402
from ssfl_app.runtime import get_runtime  # noqa: E402
from ssfl_app.sparsity.layout import Layout, Vector  # noqa: E402
from ssfl_app.sparsity.mask import Mask  # noqa: E402

CLIENTS, DENSITIES, MULTIPLIERS, REPEATS, UNSTRUCTURED = (20, 100), (0.1, 0.05), (0.0, 1.0, 2.0, 4.0), 20, 3
WEIGHTS = {"counts": 0.0, "square roots": 0.5, "densities": 1.0}
STEP = 2.0**-20


def noised(total: np.ndarray, multiplier: float, stream: Stream) -> np.ndarray:
    """Return a sum of vectors of length at most 1, in steps, with noise."""
    return (total + gaussian(multiplier / STEP, total.size, stream) if multiplier else total) * STEP


def shares_under(
    weight: float, scores: list[Vector], layout: Layout, density: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of the clients' shares if layers weigh 1 / size ** weight, and what makes ours of it."""
    dense = private.tiny_layers(layout, density)
    sizes = np.array([size for name, size in layout.prunable_sizes.items() if name not in dense], dtype=float)
    other = sizes ** (0.5 - weight)  # ours are count / size ** 0.5
    rows = [private.own_shares(each, layout, density) * other for each in scores]
    return sum(clipped(row / np.linalg.norm(row), 1.0, STEP) for row in rows), 1 / other


def misplaced(counts: dict[str, int], wanted: dict[str, int]) -> float:
    return sum(abs(counts[name] - wanted[name]) for name in wanted) / 2 / sum(wanted.values())


def factor(counts: dict[str, int], wanted: dict[str, int]) -> float:
    return float(np.exp(np.mean([abs(np.log(counts[name] / wanted[name])) for name in wanted])))


def measure(scores: list[Vector], layout: Layout, density: float, stream: Stream) -> dict:
    """Return the results of one density."""
    sizes = layout.prunable_sizes
    true = Mask.top(layout, np.mean(scores, axis=0, dtype=np.float64).astype(np.float32), density)
    wanted = {name: alive for name, alive, _ in true.layers()}
    rows = []
    for multiplier in MULTIPLIERS:
        row: dict = {"multiplier": multiplier, "misplaced": {}, "factor": {}}
        for name, weight in WEIGHTS.items():
            total, back = shares_under(weight, scores, layout, density)
            turns = REPEATS if multiplier else 1
            found = [
                private.densities(noised(total, multiplier, stream) * back, layout, density) for _ in range(turns)
            ]
            row["misplaced"][name] = float(np.mean([misplaced(counts, wanted) for counts in found]))
            row["factor"][name] = float(np.exp(np.mean([np.log(factor(counts, wanted)) for counts in found])))
            if name == "square roots":
                row["density of layers"] = {n: found[0][n] / sizes[n] for n in sizes}
        lengths = [float(np.linalg.norm(each)) for each in scores]
        most = float(np.median(lengths))
        total = sum(clipped(each / most, 1.0, STEP) for each in scores)
        turns = UNSTRUCTURED if multiplier else 1
        masks = [
            Mask.top(layout, noised(total, multiplier, stream).astype(np.float32), density) for _ in range(turns)
        ]
        row["overlap of an unstructured mask"] = float(np.mean([(each & true).count / true.count for each in masks]))
        rows.append(row)
    return {
        "density of layers, SSFL": {name: wanted[name] / sizes[name] for name in sizes},
        "misplaced by equal densities": misplaced({n: round(density * s) for n, s in sizes.items()}, wanted),
        "tiny layers": private.tiny_layers(layout, density),
        "noise": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "private-densities.json")
    words = parser.parse_args()
    torch.set_num_threads(1)
    stream, results, began = key_stream(bytes(32)), [], time.perf_counter()
    for clients in CLIENTS:
        keys = {"strategy": "ssfl", "run.device": "cpu", "run.clients": clients, "partition.alpha": 0.3}
        shop = get_runtime(merge(keys))
        scorer = Scorer(shop, 0)
        scores = [scorer.drawn((client, 0)) for client in range(clients)]
        for density in DENSITIES:
            found = measure(scores, shop.layout, density, stream)
            results.append({"clients": clients, "density": density, **found})
            for row in found["noise"]:
                print(clients, density, {key: row[key] for key in row if key != "density of layers"}, flush=True)
    how = {"repeats": REPEATS, "repeats of an unstructured mask": UNSTRUCTURED}
    seconds = round(time.perf_counter() - began, 1)
    record = {"date": date.today().isoformat(), "seconds": seconds, "environment": environment(), **how}
    write_json(words.out, {**record, "results": results})


if __name__ == "__main__":
    main()
