"""`mask_gradients`: the one line that keeps dead weights dead inside a foreign training loop."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
from torch import nn

from ssfl_app.sparsity.layout import State
from ssfl_app.sparsity.mask import Mask

_CURRENT: ContextVar[Mask | None] = ContextVar("ssfl_mask", default=None)

_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and torch.compile


@contextmanager
def working_under(mask: Mask | None) -> Iterator[None]:
    """Make `mask` the one that `mask_gradients` finds by itself; None: there is none."""
    token = _CURRENT.set(mask)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def mask_gradients(model: nn.Module, mask: Mask | Mapping[str, torch.Tensor] | None = None) -> None:
    """Set the gradients of dead weights to exactly 0; call it between ``backward()`` and ``step()``.

    A weight that is 0 and whose gradient is 0 stays exactly 0 under SGD and Adam, with momentum and weight decay.
    Without this line a train function may move dead weights as it pleases; the mod then drops what became of them,
    so they are 0 again in the next round, but the alive weights were trained beside them.

    Parameters
    ----------
    model : nn.Module
        On any device; DataParallel and torch.compile wrappers are looked through.
    mask : Mask or mapping of str to bool tensor, optional
        True where a weight is alive. Default: the mask of the message that `sparse_mod` works on. Outside of an SSFL
        round, and while weights are scored, there is none, and nothing happens.

    Raises
    ------
    ValueError
        The model lacks a tensor that the mask names, or has it in another shape.

    Notes
    -----
    The default is looked up in a context variable, which threads do not inherit: a loop that runs in a thread of its
    own must pass `mask`. Ohib et al., "SSFL", TMLR 2026, arXiv 2405.09037, algorithm 1: clients train with m * g.
    """
    mask = _CURRENT.get() if mask is None else mask
    if mask is None:
        return
    shapes = dict(mask.layout.shapes) if isinstance(mask, Mask) else {n: tuple(t.shape) for n, t in mask.items()}
    names = mask.layout.prunable if isinstance(mask, Mask) else tuple(mask)
    parameters = _by_name(model, mask, names)
    for name in names:
        parameter = parameters[name]
        if tuple(parameter.shape) != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}; the mask has {shapes[name]}")
        if parameter.grad is not None:
            # Filled, not multiplied: NaN * 0 is NaN and -1 * 0 is -0.0.
            parameter.grad.masked_fill_(_dead(mask, parameter.grad.device)[name], 0.0)


def _dead(mask: Mask | Mapping[str, torch.Tensor], device: torch.device) -> State:
    if isinstance(mask, Mask):
        return _dead_of(mask, device)
    return {name: ~alive.to(device=device, dtype=torch.bool) for name, alive in mask.items()}


@lru_cache(maxsize=4)  # a loop asks for every minibatch
def _dead_of(mask: Mask, device: torch.device) -> State:
    return {name: ~alive for name, alive in mask.tensors(device).items()}


def _by_name(model: nn.Module, mask: object, names: tuple[str, ...]) -> Mapping[str, nn.Parameter]:
    parameters = {}
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        parameters[name] = parameter
    missing = [name for name in names if name not in parameters]
    if not missing:
        return parameters
    if isinstance(mask, Mask) and not set(names) & set(parameters):
        # Arrays without names ("0", "1", ...) stand for the state dict in its order, as NumPyClients have it.
        floating = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
        if len(floating) == len(mask.layout.shapes):
            own = dict(model.named_parameters())
            pairs = zip(mask.layout.shapes, floating, strict=True)
            return {name: own[mine] for (name, _), mine in pairs if mine in own and name in names}
    raise ValueError(f"the mask names {missing}; the model's parameters are {sorted(parameters)}")
