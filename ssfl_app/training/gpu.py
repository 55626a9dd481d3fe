"""What training on a GPU needs: streams that are not shared, waiting without spinning, free memory."""

import threading
import weakref

import torch
from torch import nn

from ssfl_app.locks import RunFailed

MOST_AT_ONCE = 16
"""Clients that may train on one GPU at once; each takes one of torch's 32 streams of two priorities."""

STREAMS = 32
"""Streams of one priority that torch makes on a device; the 33rd that is asked for is the first one again."""

EVALUATION_BATCH = 500
"""Images of a forward pass without gradients; fixed, so that it never changes the bits of a loss."""

_SCORED = 64
"""Images whose gradients are taken at a time, as `memory_need` supposes."""

_LIBRARIES = 256 << 20
"""Bytes for workspaces of cuBLAS and cuDNN, and for what the allocator rounds up."""

_LENDING = threading.Lock()
_LENT: set[int] = set()


def own_stream(holder: object, device: torch.device) -> torch.cuda.Stream:
    """Return a stream that nobody else gets from here as long as `holder` lives.

    Two threads on one stream are harmless until one captures a graph: it then has the other one's kernels in it, and
    says nothing. The stream is of high priority, so it is none of those that threads work on either.

    Raises
    ------
    RunFailed
        All streams are lent.
    """
    with _LENDING:
        for _ in range(STREAMS):
            stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
            if stream.cuda_stream not in _LENT:
                _LENT.add(stream.cuda_stream)
                weakref.finalize(holder, _LENT.discard, stream.cuda_stream)
                return stream
    raise RunFailed(f"{len(_LENT)} models have a stream of {device} for their graphs; torch has no more of them")


def wait_for(device: torch.device) -> None:
    """Sleep until the GPU has done what this thread asked of it; elsewhere it is done already.

    Reading a number waits too, but spins: ten clients that wait would keep ten cores from the server.
    """
    if device.type == "cuda":
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        event.synchronize()


def memory_need(model: nn.Module, shape: tuple[int, ...], batch_size: int, tokens: bool = False) -> int:
    """Return about how many bytes of a GPU one client takes beside the data, for choosing how many train at once.

    An upper estimate: weights with what their training keeps and copies, activations of a captured batch, the larger
    of what testing and scoring take on top, and the libraries' workspaces. ``tests/training/test_gpu.py`` holds it
    against what torch's allocator reserves. On the meta device no pass is computed. `shape` is that of one
    input; `tokens` are integers.
    """
    outputs: list[int] = []
    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [leaf.register_forward_hook(lambda *args: outputs.append(_bytes(args[2]))) for leaf in leaves]
    with torch.no_grad():
        dtype = torch.int64 if tokens else torch.float32
        model.to("meta").eval()(torch.empty(1, *shape, device="meta", dtype=dtype))
    for handle in handles:
        handle.remove()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    passing = max(4 * EVALUATION_BATCH * max(outputs), _SCORED * sum(outputs))
    return 7 * weights + 2 * batch_size * sum(outputs) + passing + _LIBRARIES


def _bytes(output: object) -> int:
    """Return the bytes of what a layer returns: a tensor, or for recurrent layers and attention a tuple of them."""
    if isinstance(output, torch.Tensor):
        return output.nbytes
    return sum(map(_bytes, output)) if isinstance(output, tuple) else 0
