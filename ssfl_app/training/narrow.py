"""Makes a network physically smaller: fewer inner channels, fewer multiplications."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from ssfl_app.options import ConfigError
from ssfl_app.sparsity.channels import check_widths, entries, first_units, unit_spans, widths_in, widths_of
from ssfl_app.sparsity.inner import CONVOLUTIONS
from ssfl_app.sparsity.layout import Bits, Layout


def narrowed(model: nn.Module, layout: Layout, kept: Bits) -> nn.Module:
    """Return a copy of a model that has the inner channels of the units `kept` and no others.

    Parameters
    ----------
    model : nn.Module
        Of this layout; it is not changed.
    kept : array of bool, shape (units,)
        At least one of each inner layer (`ssfl_app.sparsity.channels`).
    """
    check_widths(layout, widths_of(layout, kept))
    small, touched = copy.deepcopy(model), defaultdict[str, set[str]](set)
    for inner, span in zip(layout.inner, unit_spans(layout), strict=True):
        for path, axis in inner.pairs:
            where, _, name = path.rpartition(".")
            module = small.get_submodule(where)
            old = getattr(module, name)
            new = old.detach().index_select(axis, entries(inner, old.shape[axis], kept[span]).to(old.device))
            if isinstance(old, nn.Parameter):
                setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
            else:
                setattr(module, name, new)
            touched[where].add(name)
        for path in inner.counts:
            where, _, name = path.rpartition(".")
            setattr(small.get_submodule(where), name, int(kept[span].sum()) * inner.together)
    for where in touched:
        _state_sizes(small.get_submodule(where))
    return small


def of_widths(model: nn.Module, layout: Layout, widths: tuple[int, ...]) -> nn.Module:
    """Return a copy of a model with inner layers of these widths; its weights mean nothing."""
    return narrowed(model, layout, first_units(layout, widths))


def narrowed_to(model: nn.Module, arrays: Mapping[str, Any]) -> nn.Module:
    """Return a network with as many inner channels as arrays of its state have, which are loaded into it next.

    Parameters
    ----------
    model : nn.Module
        The whole network; it is returned itself if the arrays have all channels, and not changed.
    arrays : mapping of str to array
        By the names of its state: a Flower ``ArrayRecord``, arrays or tensors.

    Raises
    ------
    ValueError
        Names or shapes are those of no narrower network of this model.
    """
    layout = Layout.of(model)
    shapes = {name: tuple(arrays[name].shape) for name, _ in layout.shapes if name in arrays}
    return model if shapes == dict(layout.shapes) else of_widths(model, layout, widths_in(layout, shapes))


def _state_sizes(module: nn.Module) -> None:
    """Have a layer of torch state the sizes that its tensors have."""
    if isinstance(module, CONVOLUTIONS):
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.GroupNorm):
        channels = module.weight.shape[0]
        module.num_groups = module.num_groups * channels // module.num_channels
        module.num_channels = channels
    elif isinstance(module, _BatchNorm):
        module.num_features = (module.weight if module.affine else module.running_mean).shape[0]  # type: ignore
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)


def flops(model: nn.Module, shape: tuple[int, ...], tokens: bool = False) -> int:
    """Return the floating-point operations of a forward pass of one sample, as torch counts them.

    `shape` is that of a sample; `tokens` are integers. On the meta device nothing is computed.
    """
    outline = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outline(torch.zeros(1, *shape, device="meta", dtype=torch.int64 if tokens else torch.float32))
    return int(counter.get_total_flops())


def uses_of_weights(model: nn.Module, layout: Layout, shape: tuple[int, ...]) -> dict[str, int]:
    """Return how often a forward pass of one sample multiplies by each weight of a prunable tensor, by its name.

    It is the number of positions to which a layer is applied.

    Raises
    ------
    ConfigError
        A layer with prunable weights is no convolutional or linear one.
    """
    outline, times = copy.deepcopy(model).to("meta").eval(), dict[str, int]()
    for path, module in outline.named_modules():
        names = [name for name in layout.prunable if name.rpartition(".")[0] == path]
        if not names:
            continue
        if not isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            rule = f"it is 'parameters' with a model that has weights in {type(module).__name__}"
            raise ConfigError(f"mask.budget is 'flops'; {rule}: their multiplications are not known")

        def count(module: nn.Module, _: object, output: torch.Tensor, name: str = names[0]) -> None:
            times[name] = times.get(name, 0) + output.numel() // module.weight.shape[0]  # type: ignore

        module.register_forward_hook(count)
    with torch.no_grad():
        outline(torch.zeros(1, *shape, device="meta"))
    return {name: times.get(name, 0) for name in layout.prunable}
