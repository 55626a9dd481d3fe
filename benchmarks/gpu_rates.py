"""What benchmarks/gpu_window.py measures with: trainers on one device, rounds of the in-process engine, a profile."""

import functools
import gc
import json
import re
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ssfl_app.data import readers
from ssfl_app.data.cache import ArrayDataset
from ssfl_app.data.dataset import Samples, Transform
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from ssfl_app.training.models import ModelOptions, create
from ssfl_app.training.trainer import LocalOptions, LocalTrainer

RECIPE = {  # of the paper; the section local has its values by default
    "strategy": "ssfl",
    "data.name": "cifar10",
    "model.name": "resnet18",
    "mask.density": 0.5,
    "run.clients": 100,
    "run.cohort": 10,
    "run.evaluate-every": 50,
    "run.checkpoint-every": 25,
    "ssfl.saliency-batch-size": 16,
}
MOMENTS = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


@dataclass(frozen=True)
class Scale:
    """How much is measured; `keys` change the recipe, and the first `skipped` rounds capture most graphs.

    `at_once` are the numbers of clients of the sweep, `many` is the cohort.
    """

    model: str
    side: int
    clients: int
    images: int
    epochs: int
    at_once: tuple[int, ...]
    many: int
    rounds: int
    skipped: int
    keys: str


def noise(count: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8), rng.integers(0, 10, count)


class WorkerState:
    """Makes models, trainers and images on one device."""

    def __init__(self, device: torch.device, scale: Scale) -> None:
        self.device, self.scale, self.on_gpu = device, scale, device.type == "cuda"
        self.fast = "graphs" if self.on_gpu else "static"
        pixels, labels = noise(8 * scale.images, scale.side, 1)
        self.all = Samples(torch.from_numpy(pixels), torch.from_numpy(labels)).to(device)

    def images(self, client: int, count: int = 0) -> Samples:
        start = client % 8 * self.scale.images
        part = slice(start, start + (count or self.scale.images))
        return Samples(self.all.inputs[part], self.all.labels[part])

    def model(self, norm: str = "group", name: str = "", last: bool = False) -> torch.nn.Module:
        """Return a model with the same weights each time; `last`: channels last."""
        model = create(ModelOptions(name or self.scale.model, norm), (3, 8, 8), 10, seed=1).to(self.device)
        return model.to(memory_format=torch.channels_last if last else torch.preserve_format)

    def trainer(self, steps: str, precision: str, kernels: str = "torch", **changes: float) -> LocalTrainer:
        recipe = {"epochs": self.scale.epochs, "batch_size": 16, "lr": 0.1, "lr_decay": 0.998, "momentum": 0.0}
        options = LocalOptions(**recipe | {"weight_decay": 5e-4, "clip": 10.0} | changes)  # type: ignore[arg-type]
        transform = Transform(*MOMENTS, "crop-flip")
        return LocalTrainer(options, transform, self.device, precision, steps, kernels=kernels)  # type: ignore[arg-type]

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def at_once(self, count: int, work: Callable[[int], None]) -> None:
        """Run work(0), ..., work(count - 1), each in a thread with a stream of its own, as the inline engine does."""
        errors: list[BaseException] = []

        def run(index: int) -> None:
            torch.set_num_threads(1)
            stream = torch.cuda.stream(torch.cuda.Stream(self.device)) if self.on_gpu else nullcontext()
            try:
                with stream:
                    work(index)
            except BaseException as error:
                errors.append(error)

        if count == 1:
            run(0)
        else:
            threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.wait()
        if errors:
            raise errors[0]


class Clients:
    """Clients that train at once under masks of half the weights; one pass each is over when they are made."""

    def __init__(self, bench: WorkerState, steps: str, precision: str, count: int, kernels: str = "torch") -> None:
        self.bench, self.count = bench, count
        self.trainers = [bench.trainer(steps, precision, kernels) for _ in range(count)]
        self.models = [bench.model(last=kernels == "fused") for _ in range(count)]
        self.mask = Mask.random(Layout.of(self.models[0]), 0.5, np.random.default_rng(1))
        self.train(epochs=1)

    def train(self, epochs: int) -> float:
        """Train and return images a second."""
        before, began = sum(run.passes for run in self.trainers), time.monotonic()
        self.bench.at_once(self.count, functools.partial(self._train, epochs=epochs))
        return (sum(run.passes for run in self.trainers) - before) / (time.monotonic() - began)

    def _train(self, index: int, epochs: int) -> None:
        data, rng = self.bench.images(index), np.random.default_rng(index)
        self.trainers[index].fit(self.models[index], data, rng, lr=0.01, mask=self.mask, epochs=epochs)


def trainer_rate(bench: WorkerState, precision: str, at_once: int, kernels: str = "torch") -> dict:
    """Return images a second of clients that train at once, with everything captured; its memory is free again."""
    rate = Clients(bench, bench.fast, precision, at_once, kernels).train(2 * bench.scale.epochs)
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()
    return {"precision": precision, "concurrent": at_once, "kernels": kernels, "images_per_second": rate}


# ---- rounds of the engine ---------------------------------------------------------------------


def synthetic(scale: Scale) -> None:
    """Let the data set cifar10 be random images in this process."""
    (train, labels), (test, test_labels) = (
        noise(scale.clients * scale.images, scale.side, 1),
        noise(20 * scale.clients, scale.side, 2),
    )
    raw = ArrayDataset(train, labels, test, test_labels, tuple(f"class {i}" for i in range(10)), *MOMENTS)
    readers.READERS["cifar10"] = lambda path, download, size: raw


@contextmanager
def stopwatch(
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[dict[str, float], list[tuple[float, float]]]]:
    """Add up the seconds that threads spend in the parts of a round; also yield when each `fit` began and ended."""
    from ssfl_app.comm.payload import PayloadEncoder
    from ssfl_app.core.client import ClientAlgorithm
    from ssfl_app.core.means import WeightedMean
    from ssfl_app.core.rounds import RoundLoop
    from ssfl_app.core.strategy import SparseStrategy

    spent: dict[str, float] = defaultdict(float)
    fits: list[tuple[float, float]] = []
    parts = {
        "a round's training": (RoundLoop, "_training"),
        "train": (LocalTrainer, "fit"),
        "client reads the model": (ClientAlgorithm, "load"),
        "client writes its answer": (ClientAlgorithm, "reply"),
        "messages become records": (PayloadEncoder, "record"),
        "server writes the model": (SparseStrategy, "train_payload"),
        "server checks an answer": (SparseStrategy, "check_trained"),
        "server measures an update": (SparseStrategy, "update_norm"),
        "server adds an answer": (WeightedMean, "add"),
        "server takes the mean": (WeightedMean, "value"),
    }
    before = {part: getattr(owner, name) for part, (owner, name) in parts.items()}

    def timed(function: Callable, part: str) -> Callable:
        @functools.wraps(function)
        def call(*args: object, **more: object) -> object:
            began = clock()
            try:
                return function(*args, **more)
            finally:
                spent[part] += clock() - began
                if part == "train":
                    fits.append((began, clock()))

        return call

    for part, (owner, name) in parts.items():
        setattr(owner, name, timed(before[part], part))
    try:
        yield spent, fits
    finally:
        for part, (owner, name) in parts.items():
            setattr(owner, name, before[part])


def covered(spans: list[tuple[float, float]]) -> float:
    """Return how many seconds lie in at least one of the spans."""
    total, end = 0.0, -1.0
    for start, stop in sorted(spans):
        total, end = total + max(0.0, stop - max(start, end)), max(end, stop)
    return total


@contextmanager
def gpu_busy(on_gpu: bool) -> Iterator[list[float]]:
    """Sample NVML's share of time in which the GPU ran a kernel; an empty list without NVML."""
    samples: list[float] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.1):
            try:
                samples.append(torch.cuda.utilization() / 100)
            except Exception:  # NVML is one more library, and this one more number
                return

    thread = threading.Thread(target=sample, daemon=True)
    if on_gpu:
        thread.start()
    try:
        yield samples
    finally:
        over.set()


def engine_rate(
    scale: Scale, data: Path | None, precision: str, at_once: int, device: str, kernels: str = "torch"
) -> dict:
    """Return images a second of rounds of the in-process engine, and where their time went.

    `device_seconds` are those in which at least one client trains; the rest, `host_seconds`, is what the host needs
    before and after and does not hide. `thread_seconds` adds up all threads.
    """
    from ssfl_app import client_app, server_app
    from ssfl_app.config import merge, parse, read_overrides
    from ssfl_app.simulation.in_process import run_inline

    rounds = scale.rounds
    keys = {"run.rounds": rounds, "engine.concurrent": at_once, "engine.precision": precision, "run.device": device}
    keys |= {"run.evaluate-every": rounds, "run.checkpoint-every": rounds} | images_at(data)
    keys |= {"engine.kernels": kernels}
    if data is None:
        synthetic(scale)
    on_gpu = device == "cuda"
    with tempfile.TemporaryDirectory() as folder, stopwatch() as (spent, fits), gpu_busy(on_gpu) as busy:
        out = Path(folder) / "run"
        config = merge(RECIPE, keys, read_overrides([scale.keys]), {"run.out": str(out)})
        began = time.monotonic()
        run_inline(server_app.app, client_app.app, parse(config))
        wall = time.monotonic() - began
        records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
        summary = json.loads((out / "summary.json").read_text())
    records = [record for record in records if record["round"]]
    timed = records[scale.skipped : -1]  # the last round also tests the model at each client
    images, seconds = (sum(record[name] for record in timed) for name in ("image_passes", "seconds"))
    row = {"precision": precision, "kernels": kernels, "concurrent": at_once, "images_per_second": images / seconds}
    row |= {"rounds": len(timed)}
    in_rounds, training = sum(record["seconds"] for record in records), covered(fits)
    row |= {"device_seconds": training, "host_seconds": in_rounds - training, "thread_seconds": dict(spent)}
    row |= {"gpu_busy": float(np.mean(busy)) if busy else None, "wall_seconds": wall}
    row |= {"round_seconds": [record["seconds"] for record in records], "images_per_round": images / len(timed)}
    return row | {"central_accuracy": summary["central_accuracy"]}


def images_at(data: Path | None) -> dict[str, str]:
    """Return the keys for CIFAR-10 in a folder, as parquet files or as torchvision's; crop and flip as published."""
    if data is None:
        return {}
    kind = "parquet" if any(data.rglob("*.parquet")) else "cifar10"
    return {"data.path": str(data.resolve()), "data.name": kind, "data.augment": "crop-flip"}


# ---- a profile --------------------------------------------------------------------------------


def profile(bench: WorkerState, precision: str, at_once: int) -> dict:
    """Return the kernels that take the GPU's time, and for which share of the time it runs any."""
    activity = torch.profiler.ProfilerActivity.CUDA if bench.on_gpu else torch.profiler.ProfilerActivity.CPU
    clients = Clients(bench, bench.fast, precision, at_once)
    with torch.profiler.profile(activities=[activity]) as profiler:
        clients.train(epochs=1)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(Path(folder) / "trace.json"))
        events = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if bench.on_gpu else ("cpu_op",)
    seen = [event for event in events if event.get("cat") in kinds]
    if not seen:
        raise RuntimeError("the profiler saw no kernel: CUPTI is not allowed here")
    return {"precision": precision, "concurrent": at_once} | digest(seen)


def digest(events: list[dict]) -> dict:
    """Return what a trace's events come to.

    `busy` is a share of the time, `at_once` how many kernels run while it is busy; `layout` are kernels that only
    change a layout, by their names; `top` the largest.
    """
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        total[event["name"]][0] += event["dur"]
        total[event["name"]][1] += 1
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in events]
    wall, busy = max(stop for _, stop in spans) - min(start for start, _ in spans), covered(spans)
    work = sum(spent for spent, _ in total.values())
    rows = [
        {"name": name[:120], "share": spent / work, "calls": calls, "ms": spent / 1e3}
        for name, (spent, calls) in sorted(total.items(), key=lambda item: -item[1][0])
    ]
    layout = [row for row in rows if re.search("nchw.*nhwc|nhwc.*nchw|transpose|layout", row["name"], re.IGNORECASE)]
    found = {"busy": busy / wall, "at_once": work / busy, "wall_ms": wall / 1e3, "launches": len(events)}
    return found | {"layout": layout[:10], "top": rows[:15]}
