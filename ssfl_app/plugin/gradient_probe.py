"""How saliency is read out of somebody else's train function: its optimizer is watched, and gets nowhere.

The function is called on the initial weights. A hook that torch calls before every step of every optimizer takes the
gradients and scores ``|g * w|`` (Lee et al., SNIP, ICLR 2019; Ohib et al., SSFL, arXiv 2405.09037, eq. 5); one that
torch calls after the step puts the weights back: the next minibatch is scored at the initial weights, too. The step
itself is a real one, with its gradients before and after it: optimizers and train functions rely on both. Where it
makes the gradients itself, by a closure, they are taken when the closure has returned for the first time.

A tensor that starts at 0 everywhere (LoRA's B, a zero head) has ``|g * w|`` = 0 whatever it would learn. Its scores
are ``|g|``, which the server ranks among themselves only.

Where nothing steps (another framework, plain NumPy) one whole local training w0 -> w1 stands in for the gradient:
``|w0 * (w0 - w1)|``. For one step of SGD that is the same up to the learning rate.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ssfl_app.plugin.model_inspector import ModelInspector
from ssfl_app.plugin.state_spec import StateSpec
from ssfl_app.plugin.tensor_report import TensorReport, Ties
from ssfl_app.sparsity.layout import Layout, Vector

_ONE_AT_A_TIME = threading.Lock()  # the hooks are the process's


class StopScoring(Exception):
    """Leaves a train function whose gradients are known; the mod catches it."""


class GradientProbe:
    """Watches the optimizers of a train function that starts from `weights`. A context manager.

    The gradients of so many optimizer steps, `batches`, count; scored as ``|g * scale|``, or with no `scales`,
    float32, shape (layout.size,), as they are. With `leave` the function is left after them, by
    `StopScoring`; one that catches it goes on, and its steps change nothing.

    Notes
    -----
    A parameter of an optimizer is recognised by its values, which must be exactly those that were sent, and by its
    name in the module that holds it (`ModelInspector`). Gradients are taken as the optimizer gets them: after
    clipping and unscaling.
    """

    def __init__(self, spec: StateSpec, weights: Vector, batches: int, leave: bool, scales: Vector | None) -> None:
        layout = spec.layout
        self._layout, self._batches, self._leave = layout, batches, leave
        shapes, self._scales = dict(layout.shapes), scales
        self._sight = ModelInspector(spec, weights)
        self._sums = {name: np.zeros(shapes[name], dtype=np.float64) for name in layout.prunable}
        self._counts = dict.fromkeys(layout.prunable, 0)
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # parameter, its values before its first step

    def __enter__(self) -> Self:
        _ONE_AT_A_TIME.acquire()
        self._handles = (
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        )
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        """Let the function be left early, whatever it made of `StopScoring`."""
        for handle in self._handles:
            handle.remove()
        _ONE_AT_A_TIME.release()
        return isinstance(error, Exception) and self._leave and self.complete

    @property
    def complete(self) -> bool:
        """Whether every prunable tensor has the gradients that were wanted."""
        return all(count >= self._batches for count in self._counts.values())

    @property
    def stepped(self) -> bool:
        """Whether an optimizer with any of these tensors wanted to step."""
        return any(self._counts.values()) or bool(self._sight.unsure)

    @property
    def seen(self) -> TensorReport:
        """What was seen of the model."""
        return self._sight.seen

    def scores(self) -> Vector:
        """Return the mean score over the minibatches, float32, shape (layout.prunable_size,).

        A tensor that has no gradient of its own (a later name of another one, a buffer) has scores of 0.

        Raises
        ------
        ValueError
            A prunable tensor got no gradient.
        """
        missing = [name for name, count in self._counts.items() if not count]
        if unsure := [name for name in missing if name in self._sight.unsure]:
            raise ValueError(
                f"{unsure} started with equal values, and no torch.nn.Module of this process tells them apart by "
                "these names; score them by SparseMod(saliency=...)"
            )
        if missing:
            raise ValueError(
                f"no optimizer had a gradient for {missing}: frozen, or not loaded as it was sent. Name the tensors "
                "to prune by SSFL(prunable=[...]), or score them by SparseMod(saliency=...)"
            )
        parts = [(sums / self._counts.get(name, 1)).reshape(-1) for name, sums in self._sums.items()]
        return np.concatenate(parts).astype(np.float32)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        parameters = _parameters(optimizer)
        if not self._named(parameters):
            return None  # somebody else's
        for parameter in parameters:
            self._held.setdefault(id(parameter), (parameter, parameter.detach().clone()))
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._watched(optimizer, kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # the first one is the optimizer
            return (args[0], self._watched(optimizer, args[1]), *args[2:]), kwargs
        self._read(optimizer)
        return None

    def _watched(self, optimizer: torch.optim.Optimizer, closure: Callable[..., Any]) -> Callable[..., Any]:
        calls = 0

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            loss = closure(*args, **kwargs)
            calls += 1
            if calls == 1:  # LBFGS calls again, at weights that it moved
                self._read(optimizer)
            return loss

        return watched

    def _read(self, optimizer: torch.optim.Optimizer) -> None:
        named = self._named(_parameters(optimizer))
        for parameter, name in named:
            if parameter.grad is not None and self._counts[name] < self._batches:
                gradient = _gradient(parameter, optimizer)
                if self._scales is not None:
                    gradient = abs(gradient * self._scales[self._layout.spans[name]].reshape(gradient.shape))
                self._sums[name] += gradient
                self._counts[name] += 1
        if self._leave and self.complete:
            raise StopScoring

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for parameter in _parameters(optimizer):
                if id(parameter) in self._held:
                    parameter.copy_(self._held[id(parameter)][1])

    def _named(self, parameters: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, str]]:
        """Return the prunable ones of an optimizer's parameters, and wait for no gradient that cannot come."""
        named = self._sight.named(parameters)
        for name in self._sight.unscored:
            self._counts.pop(name, None)
        return named


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _gradient(parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> Any:
    assert parameter.grad is not None
    gradient = parameter.grad.detach()
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    # A fused optimizer is handed the scale of mixed precision instead of gradients that are unscaled.
    scale = getattr(optimizer, "grad_scale", None)
    return gradient.double().cpu().numpy() / (1.0 if scale is None else float(scale))


def scales_of(layout: Layout, weights: Vector) -> Vector:
    """Return what gradients are multiplied with, float32, shape (layout.size,): weights, or 1 in tensors of zeros."""
    scales = weights
    for name in starts_at_zero(layout, weights):
        scales = scales.copy() if scales is weights else scales
        scales[layout.spans[name]] = 1
    return scales


def starts_at_zero(layout: Layout, weights: Vector) -> list[str]:
    """Return the prunable tensors whose weights are all 0."""
    return [name for name in layout.prunable if not weights[layout.spans[name]].any()]


def difference_scores(layout: Layout, before: Vector, after: Vector, scales: Vector | None) -> Vector:
    """Return |scale * (w0 - w1)| of one local training, shape (layout.prunable_size,), or without scales w0 - w1."""
    change = before - after
    return np.asarray((change if scales is None else np.abs(scales * change))[layout.is_prunable])


def own_scores(layout: Layout, told: Mapping[str, Any], scales: Vector | None, ties: Ties = ()) -> Vector:
    """Return the scores that a user's own function tells, float32, shape (layout.prunable_size,).

    A tensor of which `ties` is a later name has scores of 0. `told` are arrays or tensors by name of each prunable
    tensor, of its shape: gradients, to be multiplied with `scales`, or without these what is asked for already.

    Raises
    ------
    ValueError
        A prunable tensor is missing or has another shape.
    """
    shapes, parts = dict(layout.shapes), []
    later = {name for name, first in ties if first in layout.prunable}
    names = {first: name for name, first in reversed(ties) if name in told}  # where only a later name was told
    for name in layout.prunable:
        if name in later:
            parts.append(np.zeros(int(np.prod(shapes[name])), dtype=np.float32))
            continue
        key = name if name in told else names.get(name, name)
        if key not in told:
            raise ValueError(f"the saliency function told nothing about {name}; it told {sorted(told)}")
        value = torch.as_tensor(told[key]).detach().float().cpu().numpy()
        if value.shape != shapes[name]:
            raise ValueError(f"the saliency function told shape {value.shape} for {name}; it is {shapes[name]}")
        flat = value.reshape(-1)
        parts.append(flat if scales is None else np.abs(flat * scales[layout.spans[name]]))
    return np.concatenate(parts).astype(np.float32)
