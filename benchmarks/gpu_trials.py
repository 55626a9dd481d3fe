"""Trials for benchmarks/gpu_window.py: what a faster training step on a GPU could be made of."""

import functools
import time
from collections.abc import Callable, Iterator

import torch
from gpu_rates import WorkerState
from torch import nn
from torch.nn import functional as F

from ssfl_app.training.cuda_graph import GraphedStep

STAGES = ((64, 32), (128, 16), (256, 8), (512, 4))
"""Channels and pixels a side of the 3x3 convolutions of ResNet-18 on CIFAR."""

KINDS = (
    ("tf32 NCHW", torch.float32, False),
    ("bf16 NCHW", torch.bfloat16, False),
    ("bf16 NHWC", torch.bfloat16, True),
)
BATCH, REPEATS = 16, 50


def microseconds(bench: WorkerState, work: Callable[[], object]) -> float:
    """Return how long `work` takes on the device: replays of a graph of many of it, since Python would be slower."""
    if not bench.on_gpu:
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1e6
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph, begin, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            work()
    graph.replay()
    begin.record()
    for _ in range(5):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / (5 * REPEATS)


def convolutions(bench: WorkerState, clients: int = 1) -> Iterator[dict]:
    """Yield microseconds of the convolutions of each stage, forward and both backward.

    With `clients` above 1 a grouped convolution works for so many at once: a group has the channels of a client.
    """
    rng = torch.Generator().manual_seed(1)
    stages = STAGES if bench.on_gpu else ((8, 4),)
    for channels, side in stages:
        shape = (BATCH, clients * channels, side, side)
        for kind, dtype, last in KINDS:
            layout = torch.channels_last if last else torch.contiguous_format
            x, gradient = (
                torch.randn(shape, generator=rng).to(bench.device, dtype, memory_format=layout) for _ in "xg"
            )
            weight = torch.randn((clients * channels, channels, 3, 3), generator=rng)
            weight = weight.to(bench.device, dtype, memory_format=layout)
            for deterministic in (True, False):
                torch.backends.cudnn.deterministic = deterministic
                torch.backends.cudnn.allow_tf32 = True
                row = {"kind": kind, "channels": channels, "side": side, "clients": clients}
                row |= {"deterministic": deterministic}
                for name, work in passes(x, weight, gradient, clients).items():
                    row[f"{name}_us"] = microseconds(bench, work)
                yield row


def passes(x: torch.Tensor, w: torch.Tensor, gradient: torch.Tensor, groups: int) -> dict[str, Callable[[], object]]:
    backward = functools.partial(
        torch.ops.aten.convolution_backward, gradient, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], groups
    )
    return {
        "forward": lambda: F.conv2d(x, w, padding=1, groups=groups),
        "input_gradient": lambda: backward([True, False, False]),
        "weight_gradient": lambda: backward([False, True, False]),
    }


def compiled(bench: WorkerState) -> Iterator[dict]:
    """Yield images a second of steps of the compiled model beside those of the model as it is, in bf16 and NHWC.

    The same `GraphedStep` captures both. Compiling needs a C compiler and takes its time, which is told too.
    """
    backend = "inductor" if bench.on_gpu else "eager"  # a CPU's compiler would take a minute of a test
    images = bench.images(0, BATCH)
    inputs = bench.trainer("static", "bf16").transform.test(images.inputs)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    for last in (False, True):
        for compiles in (False, True):
            model = bench.model(last=last)
            began = time.monotonic()
            run: nn.Module = torch.compile(model, backend=backend) if compiles else model  # type: ignore[assignment]
            step = GraphedStep(
                run, bench.trainer("static", "bf16").options, autocast=bench.on_gpu, capture=bench.on_gpu
            )
            step.begin(0.01, None)
            step(inputs, images.labels)
            bench.wait()
            ready, count, began_steps = time.monotonic() - began, 200 if bench.on_gpu else 2, time.monotonic()
            for _ in range(count):
                step(inputs, images.labels)
            bench.wait()
            rate = BATCH * count / (time.monotonic() - began_steps)
            yield {"compiled": compiles, "channels_last": last, "ready_seconds": ready, "images_per_second": rate}
