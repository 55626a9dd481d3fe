"""How saliency is read out of somebody else's train function: its optimizer is watched, and gets nowhere.

The function is called on the initial weights. A hook that torch calls before every step of every optimizer takes the
gradients and scores ``|g * w|`` (Lee et al., SNIP, ICLR 2019; Ohib et al., SSFL, arXiv 2405.09037, eq. 5); one that
torch calls after the step puts the weights back: the next minibatch is scored at the initial weights, too. The step
itself is a real one, with its gradients before and after it: optimizers and train functions rely on both. Where it
makes the gradients itself, by a closure, they are taken when the closure has returned for the first time.

Where nothing steps (another framework, plain NumPy) one whole local training w0 -> w1 stands in for the gradient:
``|w0 * (w0 - w1)|``. For one step of SGD that is the same up to the learning rate.
"""

import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ssfl_app.sparsity.layout import Layout, Vector

_ONE_AT_A_TIME = threading.Lock()  # the hooks are the process's


class Enough(Exception):
    """Leaves a train function whose gradients are known; the mod catches it."""


class Watch:
    """Watches the optimizers of a train function that starts from `weights`. A context manager.

    Parameters
    ----------
    layout : Layout
        Of the weights.
    weights : array of float32, shape (layout.size,)
        What the function is given.
    batches : int
        Optimizer steps whose gradients count.
    leave : bool
        Leave the function by `Enough` after them. A function that catches it goes on, and its steps change nothing.
        False: it goes on anyway, to its end.

    Notes
    -----
    A parameter of an optimizer is recognised by its shape and its values, which must be exactly those that were sent;
    among equal ones the order decides. Gradients are taken as the optimizer gets them: after clipping and unscaling.
    """

    def __init__(self, layout: Layout, weights: Vector, batches: int, leave: bool) -> None:
        self._layout, self._batches, self._leave = layout, batches, leave
        shapes = dict(layout.shapes)
        self._weights = {name: weights[layout.spans[name]].reshape(shapes[name]) for name in layout.prunable}
        self._sums = {name: np.zeros(shapes[name], dtype=np.float64) for name in layout.prunable}
        self._counts = dict.fromkeys(layout.prunable, 0)
        # Parameters are kept, so that an id is not given to another one.
        self._known: dict[int, tuple[torch.Tensor, str | None]] = {}
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # parameter, its values before its first step

    def __enter__(self) -> Self:
        _ONE_AT_A_TIME.acquire()
        self._handles = (
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Let the function be left early, whatever it made of `Enough`."""
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
        return any(self._counts.values())

    def scores(self) -> Vector:
        """Return the mean of |g * w| over the minibatches, float32, shape (layout.prunable_size,).

        Raises
        ------
        ValueError
            A prunable tensor got no gradient.
        """
        if missing := [name for name, count in self._counts.items() if not count]:
            raise ValueError(
                f"no optimizer had a gradient for {missing}: frozen, tied to another tensor, or not loaded as it was "
                "sent. Name the tensors to prune by SSFL(prunable=[...]), or score them by SparseMod(saliency=...)"
            )
        parts = [(self._sums[name] / count).reshape(-1) for name, count in self._counts.items()]
        return np.concatenate(parts).astype(np.float32)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        parameters = _parameters(optimizer)
        if all(self._name(parameter) is None for parameter in parameters):
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
        named = [(p, name) for p in _parameters(optimizer) if (name := self._name(p)) is not None]
        for parameter, name in named:
            if parameter.grad is not None and self._counts[name] < self._batches:
                self._sums[name] += np.abs(_gradient(parameter, optimizer) * self._weights[name])
                self._counts[name] += 1
        if self._leave and self.complete:
            raise Enough

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for parameter in _parameters(optimizer):
                if id(parameter) in self._held:
                    parameter.copy_(self._held[id(parameter)][1])

    def _name(self, parameter: torch.Tensor) -> str | None:
        if id(parameter) not in self._known:
            taken = {name for _, name in self._known.values()}
            values = parameter.detach().float().cpu().numpy()
            same = (n for n, w in self._weights.items() if n not in taken and np.array_equal(w, values))
            self._known[id(parameter)] = (parameter, next(same, None))
        return self._known[id(parameter)][1]


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _gradient(parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> Any:
    assert parameter.grad is not None
    gradient = parameter.grad.detach()
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    # A fused optimizer is handed the scale of mixed precision instead of gradients that are unscaled.
    scale = getattr(optimizer, "grad_scale", None)
    return gradient.double().cpu().numpy() / (1.0 if scale is None else float(scale))


def difference_scores(layout: Layout, before: Vector, after: Vector) -> Vector:
    """Return |w0 * (w0 - w1)| of one local training, float32, shape (layout.prunable_size,).

    Parameters
    ----------
    before, after : array of float32, shape (layout.size,)
        The weights w0 and w1.
    """
    scores = np.abs(before * (before - after))
    return np.asarray(scores[layout.is_prunable])


def own_scores(layout: Layout, weights: Vector, told: Mapping[str, Any], gradients: bool) -> Vector:
    """Return the scores that a user's own function tells, float32, shape (layout.prunable_size,).

    Parameters
    ----------
    weights : array of float32, shape (layout.size,)
        What the gradients were taken at.
    told : mapping of str to array or tensor
        By name of each prunable tensor, of its shape.
    gradients : bool
        Whether they are gradients, to be multiplied with the weights, or scores already.

    Raises
    ------
    ValueError
        A prunable tensor is missing or has another shape.
    """
    shapes, parts = dict(layout.shapes), []
    for name in layout.prunable:
        if name not in told:
            raise ValueError(f"the saliency function told nothing about {name}; it told {sorted(told)}")
        value = torch.as_tensor(told[name]).detach().float().cpu().numpy()
        if value.shape != shapes[name]:
            raise ValueError(f"the saliency function told shape {value.shape} for {name}; it is {shapes[name]}")
        flat = value.reshape(-1)
        parts.append(np.abs(flat * weights[layout.spans[name]]) if gradients else flat)
    return np.concatenate(parts).astype(np.float32)
