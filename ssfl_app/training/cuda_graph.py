"""The training step on buffers that never move, so that a GPU plays it as one graph.

A small model on small batches spends its time in Python: a step is hundreds of short kernels, each launched by more
code than it runs. Here a step reads a batch from buffers at fixed addresses, and what it changes (weights,
momentum, the sum of losses) stays at fixed addresses too. So a CUDA graph of it is captured once for each batch size
and replayed ever after: a step is then two copies and a launch, whatever the depth of the model. Learning rate and
mask are read from buffers as well: another client, round or mask is no new graph.

What is computed is what `EagerStep` computes, and on the CPU, where the same code runs uncaptured, to the last bit,
but for `Pull`, which is rounded twice. Four things look different and are not:

- momentum starts at -0.0 and not at nothing: -0.0 * m + g is g, bit for bit, for any g;
- weights are masked once, not after every step: a dead weight is +-0 and its gradient is, so SGD leaves it there;
- gradients are made anew in the graph's own memory: its addresses are fixed, and nothing is zeroed or added to;
- the gradient of `Proximal` is added, not derived: ``strength (w - centre)``, the centre being in buffers too.

Capturing runs the step a few times before; all that it changes is put back.
"""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ssfl_app.sparsity.mask import Mask
from ssfl_app.training.anchor import Anchor, Proximal, Pull
from ssfl_app.training.fused import FusedModel
from ssfl_app.training.gpu import own_stream, wait_for
from ssfl_app.training.reparam import originals
from ssfl_app.training.step import LocalOptions, bfloat16, mask_gradients, times

AHEAD = 48 << 20
"""Bytes of augmented images that are prepared at a time: a few launches for 4096 images of CIFAR."""

WARM_UP = 2
"""Steps before a capture, in which libraries choose and load kernels and take their memory."""

_CAPTURING = threading.Lock()  # torch captures one graph at a time


@dataclass
class _Batch:
    """The buffers of a batch size, and the graph that reads them."""

    inputs: torch.Tensor
    labels: torch.Tensor
    graph: torch.cuda.CUDAGraph | None = None


class GraphedStep:
    """Plain SGD on one model; call `begin` before the first step of each `fit`.

    The model's parameters stay where they are as long as this step is used (`serves`). Its forward pass draws no
    random numbers and does not look at its input's values. Without `capture` the same code runs step by step, on any
    device, and no CUDA graph is replayed. With `fused` a `FusedModel` of this type computes forward and backward, to
    other bits.
    """

    def __init__(
        self,
        model: nn.Module,
        options: LocalOptions,
        *,
        autocast: bool,
        capture: bool,
        fused: torch.dtype | None = None,
    ) -> None:
        self.ahead = AHEAD
        self._fused = None if fused is None else FusedModel(model, fused)
        self._model, self._clip, self._autocast, self._capture = model, options.clip, autocast, capture
        self._parameters = list(model.parameters())
        self._addresses = [parameter.data_ptr() for parameter in self._parameters]
        device = self._device = self._parameters[0].device
        self._lr = torch.zeros((), device=device)
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._mask: Mask | None = None  # that `_bits` hold
        self._masked = False
        self._weights = originals(model)
        self._bits: list[torch.Tensor] = []
        one = device.type == "cuda"  # reads the learning rate on the device; on the CPU its bits are not foreach's
        self._optimizer = torch.optim.SGD(
            self._parameters, self._lr, options.momentum, 0, options.weight_decay, fused=one, foreach=not one
        )
        self._optimizer.param_groups[0]["lr"] = self._lr  # this very tensor, should torch have copied it
        self._momenta = [torch.empty_like(p) for p in self._parameters] if options.momentum else []
        for parameter, momentum in zip(self._parameters, self._momenta, strict=False):
            self._optimizer.state[parameter]["momentum_buffer"] = momentum
        self._strength = torch.zeros((), device=device)  # of an anchor
        self._anchored: type[Anchor] | None = None
        self._centre: list[torch.Tensor] = []
        self._batches: dict[tuple[torch.Size, bool, type[Anchor] | None], _Batch] = {}
        self._pool: Any = None  # of the first graph
        self._stream: torch.cuda.Stream | None = None

    def serves(self, model: nn.Module) -> bool:
        """Return whether this is the step of `model`, whose parameters are where they were."""
        return model is self._model and [p.data_ptr() for p in model.parameters()] == self._addresses

    @torch.no_grad()
    def begin(self, lr: float, mask: Mask | None, anchor: Anchor | None = None) -> "GraphedStep":
        """Start a `fit`: with this rate, under this mask (None: all weights train), without momentum.

        With an anchor it is near that; a `Pull` goes with no mask.
        """
        self._lr.fill_(lr)
        self._total.zero_()
        if self._momenta:
            torch._foreach_zero_(self._momenta)
            torch._foreach_neg_(self._momenta)
        self._masked = mask is not None
        if mask is not None:
            if mask is not self._mask:
                self._bits = self._bits or [torch.empty_like(weight) for weight in self._weights.values()]
                tensors = mask.tensors(self._device)
                torch._foreach_copy_(self._bits, [tensors[name] for name in self._weights])
                self._mask = mask
            times(list(self._weights.values()), self._bits)
        self._anchored = None if anchor is None else type(anchor)
        if anchor is not None:
            self._strength.fill_(anchor.strength)
            self._centre = self._centre or [torch.empty_like(parameter) for parameter in self._parameters]
            torch._foreach_copy_(self._centre, anchor.centre)
        return self

    def __call__(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        """Change the model by a batch; the first one of its size is captured."""
        key = inputs.shape, self._masked, self._anchored
        if key not in self._batches:
            batch = _Batch(inputs.clone(), labels.clone())
            if self._capture:
                with _CAPTURING:
                    batch.graph = self._captured(batch)
            self._batches[key] = batch
        batch = self._batches[key]
        batch.inputs.copy_(inputs)
        batch.labels.copy_(labels)
        if batch.graph is None:
            self._step(batch)
        else:
            batch.graph.replay()

    def total(self) -> float:
        """Return the sum of the losses of all images so far."""
        wait_for(self._device)
        return float(self._total)

    def _step(self, batch: _Batch) -> None:
        self._optimizer.zero_grad()
        with bfloat16(self._autocast):
            loss = F.cross_entropy((self._fused or self._model)(batch.inputs), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._fused is not None:
            self._fused.hand_over()
        if self._anchored is Proximal:
            for parameter in self._parameters:
                if parameter.grad is None:  # the loss does not see it
                    parameter.grad = torch.zeros_like(parameter)
            torch._foreach_add_([p.grad for p in self._parameters if p.grad is not None], self._pulls())
        if self._masked:
            mask_gradients(list(self._weights.values()), self._bits)
        if self._clip:
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        if self._anchored is Pull:
            torch._foreach_sub_([parameter.detach() for parameter in self._parameters], self._pulls())
        self._total += loss.detach() * len(batch.labels)

    @torch.no_grad()
    def _pulls(self) -> list[torch.Tensor]:
        """Return strength (w - centre) of each parameter."""
        weights: list[torch.Tensor] = [*self._parameters]
        pulls = torch._foreach_sub(weights, self._centre)
        torch._foreach_mul_(pulls, self._strength)
        return list(pulls)

    def _captured(self, batch: _Batch) -> torch.cuda.CUDAGraph:
        current = torch.cuda.current_stream(self._device)
        # Not the thread's: torch may have given that to another thread too, whose kernels would be captured.
        self._stream = self._stream or own_stream(self, self._device)
        changed = [*self._parameters, *self._model.buffers(), *self._momenta, self._total]
        before = [tensor.detach().clone() for tensor in changed]
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                self._step(batch)
            with torch.no_grad():
                for tensor, value in zip(changed, before, strict=True):
                    tensor.copy_(value)
            self._optimizer.zero_grad()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # `torch.cuda.graph` would first wait for the device and give all unused memory back; other threads train on
        # it meanwhile. They do what they like, hence thread_local. The graphs of one step share their memory, in
        # which nothing outlives a step.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                self._step(batch)
            finally:
                graph.capture_end()
        self._optimizer.zero_grad()
        self._pool = graph.pool()
        return graph
