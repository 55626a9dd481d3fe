"""`mask_gradients`: the one line that keeps dead weights dead inside a foreign training loop."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from ssfl_app.plugin.tensor_report import storage_key
from ssfl_app.sparsity.layout import State
from ssfl_app.sparsity.mask import Mask

_CURRENT: ContextVar[tuple[Mask | None, bool]] = ContextVar("ssfl_mask", default=(None, False))

_WRAPPERS = ("module", "_module", "_orig_mod", "default")
"""Components that a name has on one side only: DataParallel's, Opacus's, torch.compile's, that of PEFT's adapters."""

_STEPPING: Any = WeakTensorKeyDictionary()  # parameter -> where it is dead, and what it is there, until the next step

Shapes = dict[str, tuple[int, ...]]


@contextmanager
def under_mask(mask: Mask | None, frozen: bool = False) -> Iterator[None]:
    """Make `mask` the one that `active_mask` returns; None: there is none. Its dead weights are 0, or `frozen`."""
    token = _CURRENT.set((mask, frozen))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def active_mask() -> Mask | None:
    """Return the mask of the message that `sparse_mod` works on; its ``tensors()`` are bool, True = alive, by name.

    None outside of an SSFL round, and while weights are scored. It is looked up in a context variable, which threads
    do not inherit: a loop that runs in a thread of its own must be given it.
    """
    return _CURRENT.get()[0]


def mask_gradients(
    model: nn.Module,
    mask: Mask | Mapping[str, torch.Tensor] | None = None,
    *,
    prefix: str | None = None,
    frozen: bool = False,
) -> None:
    """Keep dead weights as they are through the step that follows; call it between ``backward()`` and ``step()``.

    It sets their gradients to exactly 0, and the weights to exactly 0 once the optimizer has stepped, or under
    ``SSFL(dead="frozen")`` to what they were: weight decay moves them otherwise, and one that makes gradients of its
    own, as Opacus's does with their noise. Without this line a train function
    may move dead weights as it pleases; the mod then drops what became of them, so they are 0 again in the next
    round, but the alive weights were trained beside them.

    Parameters
    ----------
    model : nn.Module
        On any device, or a part of the model. Wrappers (DataParallel, torch.compile, Opacus, PEFT's adapter) are
        looked through.
    mask : Mask or mapping of str to bool tensor, optional
        True where a weight is alive. Default: `active_mask()`. Where that is None, nothing happens.
    prefix : str, optional
        Where a part stands in the model, "discriminator." for example. Default: the only place where all of its
        parameters fit by name and shape.
    frozen : bool
        With a `mask` of your own: whether its dead weights keep their values.

    Raises
    ------
    ValueError
        The model lacks a tensor that the mask names, or has it in another shape; a part fits in two places.

    Notes
    -----
    Ohib et al., "SSFL", TMLR 2026, arXiv 2405.09037, algorithm 1: clients train with m * g.
    """
    if mask is None:
        mask, frozen = _CURRENT.get()
    if mask is None:
        return
    _listen()
    shapes: Shapes = {n: tuple(t.shape) for n, t in mask.items()} if isinstance(mask, Mapping) else {}
    shapes = dict(mask.layout.shapes) if isinstance(mask, Mask) else shapes
    names = mask.layout.prunable if isinstance(mask, Mask) else tuple(mask)
    for name, parameter in _matched(model, shapes, names, prefix).items():
        if tuple(parameter.shape) != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}; the mask has {shapes[name]}")
        dead = _dead(mask, parameter.device)[name]
        _STEPPING[parameter] = dead, parameter.detach().clone() if frozen else None
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = _masked(parameter.grad, dead)
        else:
            # Filled, not multiplied: NaN * 0 is NaN and -1 * 0 is -0.0.
            parameter.grad.masked_fill_(dead, 0.0)


@cache
def _listen() -> None:
    """Have torch call us after every step of every optimizer, from the first call on."""
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _STEPPING:
        return
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (held := _STEPPING.pop(parameter, None)) is None:
                    continue
                dead, kept = held
                if kept is None:
                    parameter.masked_fill_(dead, 0.0)
                else:
                    parameter.copy_(torch.where(dead, kept, parameter))


def _masked(gradient: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    gradient = gradient.coalesce()
    gradient.values().masked_fill_(dead[tuple(gradient.indices())], 0.0)
    return gradient


def _dead(mask: Mask | Mapping[str, torch.Tensor], device: torch.device) -> State:
    if isinstance(mask, Mask):
        return _dead_of(mask, device)
    return {name: ~alive.to(device=device, dtype=torch.bool) for name, alive in mask.items()}


@lru_cache(maxsize=4)  # a loop asks for every minibatch
def _dead_of(mask: Mask, device: torch.device) -> State:
    return {name: ~alive for name, alive in mask.tensors(device).items()}


# ---- which parameter is meant by a name ------------------------------------------------------------


def _matched(
    model: nn.Module, shapes: Shapes, names: tuple[str, ...], prefix: str | None
) -> Mapping[str, nn.Parameter]:
    """Return the parameters that the mask covers, by the mask's names."""
    # Tied tensors under all of their names: the mask has one of them.
    own = dict(_unwrapped(model).named_parameters(remove_duplicate=False))
    short = _short(own)
    if prefix is not None:
        inside = {name: _plain(name.removeprefix(prefix)) for name in names if name.startswith(prefix)}
        if part := {name: short[rest] for name, rest in inside.items() if rest in short}:
            return part
        raise ValueError(f"under prefix {prefix!r} the mask has {list(inside)}; the model has {sorted(short)}")
    # As it is called comes first: an attribute of the user's may be called as a wrapper is.
    for parameters in (own, dict(model.named_parameters(remove_duplicate=False))):
        if all(name in parameters for name in names):
            return {name: parameters[name] for name in names}
    plain = {_plain(name): name for name in shapes}
    if len(plain) == len(shapes):
        if all(_plain(name) in short for name in names):
            return {name: short[_plain(name)] for name in names}
        part = _part(short, {k: shapes[n] for k, n in plain.items()}, [k for k, n in plain.items() if n in names])
        if part:
            return {plain[name]: parameter for name, parameter in part.items()}
    if not set(names) & set(own):
        # Arrays without names ("0", "1", ...) stand for the state dict in its order, as NumPyClients have it.
        # A tied tensor stands there under each of its names, and in the mask under the first one.
        state = _unwrapped(model).state_dict()
        averaged = {key: t for key, t in state.items() if t.is_floating_point() or t.is_complex()}
        firsts: dict[tuple[Any, ...], str] = {}
        for key, tensor in averaged.items():
            firsts.setdefault((*storage_key(tensor), tensor.shape), key)
        for keys in (list(averaged), list(firsts.values())):
            if len(keys) == len(shapes):
                pairs = zip(shapes, keys, strict=True)
                return {name: own[mine] for name, mine in pairs if mine in own and name in names}
        # Tied biases travel under both names, so that neither number is right.
        if all(name.isdigit() and int(name) < len(state) for name in names):
            keys = list(state)
            return {name: own[keys[int(name)]] for name in names if keys[int(name)] in own}
    missing = [name for name in names if name not in short]
    raise ValueError(f"the mask names {missing}; the model's parameters are {sorted(short)}")


def _unwrapped(model: nn.Module) -> nn.Module:
    kinds = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, kinds) or isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model.module if isinstance(model, kinds) else model._orig_mod  # type: ignore[assignment]
    return model


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _short(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the parameters by names without wrappers, or as they are called where two would be called the same."""
    short = {_plain(name): parameter for name, parameter in parameters.items()}
    return short if len(short) == len(parameters) else parameters


def _part(own: Mapping[str, nn.Parameter], shapes: Shapes, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return those of `names` that a part has, by their names in the whole model, or a whole by those in its part."""
    mine, covered = {name: tuple(p.shape) for name, p in own.items()}, {name: shapes[name] for name in names}
    places = _places(mine, shapes)
    if len(places) > 1:
        raise ValueError(f"this part of the model fits at {places}; say which one by prefix={places[0]!r}")
    if places:
        return {full: parameter for name, parameter in own.items() if (full := places[0] + name) in covered}
    places = _places(covered, mine)
    return {name: own[places[0] + name] for name in covered} if len(places) == 1 else {}


def _places(part: Shapes, whole: Shapes) -> list[str]:
    """Return the prefixes under which all of `part` is in `whole`, with its shapes."""
    if not part:
        return []
    first = next(iter(part))
    starts: Iterable[str] = (name.removesuffix(first) for name in whole if name.endswith("." + first))
    return [start for start in starts if all(whole.get(start + name) == shape for name, shape in part.items())]
