"""What the discovery of a mask costs, and how far the masks of other score types are from that of fp32 scores.

ResNet-18, 100 clients of CIFAR-10 (Dirichlet 0.3), 16 images a client: the setup of the paper's run, which the app's
own server and client halves play in this process. No round of training follows.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from ssfl_app import client_app
from ssfl_app.comm.messenger import Check, Reply
from ssfl_app.comm.payload import Metadata, Payload, PayloadEncoder, decode_payload
from ssfl_app.config import merge, parse, read_overrides
from ssfl_app.core.means import WeightedMean
from ssfl_app.core.rounds import Query, Record
from ssfl_app.core.strategy import ServerContext, SparseStrategy
from ssfl_app.runtime import get_runtime
from ssfl_app.simulation.in_process import InlineGrid
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import SCORE_TYPES, read_values
from ssfl_app.strategies.ssfl.strategy import Ssfl

KEYS = (
    "data.name='parquet' data.path='{data}' model.name='{model}' run.clients={clients} run.cohort=1 "
    "mask.density={density} ssfl.saliency-batch-size=16 run.device='cpu' engine.threads=2 "
    "run.round-timeout=36000.0 ssfl.score-values='{kind}'"
)
DENSITIES = (0.5, 0.1, 0.05)


class _Observed(Ssfl):
    """SSFL that also keeps the mean scores, at the densities that are compared."""

    def find_mask(self, ask: Query, *words: Any, **more: Any) -> Mask:
        """Find the mask, and take the mean of the replies a second time."""
        kind, size = self.options.score_values, self.layout.prunable_size
        mean = WeightedMean(size)

        def watching(
            question: str, clients: Iterable[int], check: Check, take: Callable[[Reply], None], *payload: Any
        ) -> None:
            def taking(reply: Reply) -> None:
                mean.add(read_values(reply.arrays, kind, size), reply.samples)
                take(reply)

            ask(question, clients, check, taking, *payload)

        found = super().find_mask(watching, *words, **more)
        self.scores = mean.value()
        assert Mask.top(self.layout, self.scores, self.settings.mask.density) == found
        return found


class _Watch:
    """Keeps the record of the setup."""

    def __init__(self) -> None:
        self.record: Record = {}

    def met(self, sites: dict[int, Metadata]) -> None:
        """Look away."""

    def warn(self, line: str) -> None:
        """Look away."""

    def round(self, record: Record, strategy: SparseStrategy) -> None:
        """Keep the record."""
        self.record = record


def measure(data: str, model: str, clients: int) -> dict[str, Any]:
    """Return bytes and mask overlap with fp32 by score type, and the bytes of bitmaps by density."""
    found: dict[str, Any] = {"model": model, "clients": clients, "types": {}}
    scores: dict[str, np.ndarray] = {}
    for kind in SCORE_TYPES:
        keys = KEYS.format(data=data, model=model, clients=clients, density=0.5, kind=kind)
        flat = merge(read_overrides([keys]))
        runtime, began, watch = get_runtime(flat), time.monotonic(), _Watch()
        strategy = _Observed(ServerContext(runtime.layout, parse(flat).settings, callback=watch))
        grid = InlineGrid(client_app.app, flat, {1000 + i: i for i in range(clients)})
        strategy.start(grid, ArrayRecord(runtime.initial_state()), num_rounds=0)
        scores[kind] = strategy.scores
        bitmaps = {str(d): _bitmaps(strategy, scores[kind], d) for d in DENSITIES}
        found["types"][kind] = {
            "seconds": time.monotonic() - began,
            "down": watch.record["bytes_discovery_down"],
            "up": watch.record["bytes_discovery_up"],
            "bitmaps": bitmaps,
            "overlap": {str(d): _overlap(strategy, scores, kind, d) for d in DENSITIES},
        }
        print(kind, found["types"][kind], flush=True)
    return found


def _overlap(strategy: SparseStrategy, scores: dict[str, np.ndarray], kind: str, density: float) -> float:
    """Return the share of the weights alive under fp32 scores that are alive under these."""
    exact, other = (Mask.top(strategy.layout, scores[k], density) for k in ("fp32", kind))
    return (exact & other).count / exact.count


def _bitmaps(strategy: SparseStrategy, scores: np.ndarray, density: float) -> dict[str, int]:
    """Return the bytes of the mask's bitmap on the wire, plain and deflated."""
    payload = Payload({"mask": Mask.top(strategy.layout, scores, density).packed()})
    sizes = {}
    for kind in ("plain", "zlib"):
        record = PayloadEncoder(kind).record(payload)
        bitmap = payload.arrays["mask"]
        assert decode_payload(record, unfolded=bitmap.nbytes).arrays["mask"].tobytes() == bitmap.tobytes()
        sizes[kind] = len(record["arrays"]["mask"].data)
    return sizes


def table(found: dict[str, Any]) -> list[str]:
    """Return Markdown: bytes of the discovery and overlap."""
    clients = found["clients"]
    lines = [
        f"{found['model']}, {clients} clients, density 0.5; the mask as a bitmap for each of them is in the sum.",
        "",
        "| scores | weights down GB | scores up GB | masks down GB | all GB | overlap with fp32's mask: "
        + " | ".join(f"density {d}" for d in DENSITIES)
        + " |",
        "| --- | --- | --- | --- | --- |" + " --- |" * len(DENSITIES),
    ]
    for kind, row in found["types"].items():
        masks = clients * row["bitmaps"]["0.5"]["zlib"]
        total = row["down"] + row["up"] + masks
        shares = " | ".join(f"{100 * row['overlap'][str(d)]:.3f} %" for d in DENSITIES)
        numbers = " | ".join(f"{n / 1e9:.3f}" for n in (row["down"], row["up"], masks, total))
        lines.append(f"| {kind} | {numbers} | {shares} |")
    lines += ["", "| density | bitmap bytes | deflated | saved |", "| --- | --- | --- | --- |"]
    for density, sizes in found["types"]["fp32"]["bitmaps"].items():
        saved = 1 - sizes["zlib"] / sizes["plain"]
        lines.append(f"| {density} | {sizes['plain']:,} | {sizes['zlib']:,} | {100 * saved:.1f} % |")
    return lines
