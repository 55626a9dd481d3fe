"""A model as a GPU trains it with fewer kernels: channels last, weights in half precision, norms fused with ReLU.

Used by `ssfl_app.training.cuda_graph` where ``engine.kernels`` is "fused". The model itself, in float32, is what the
optimizer steps; this is another form of it that shares its norms.
"""

import copy
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn

from ssfl_app.options import ConfigError

KERNELS = ("torch", "fused")


def check_fused(model: nn.Module, name: str) -> None:
    """Raise ConfigError unless Triton is installed and a model, whose name is told, has a fused form."""
    if find_spec("triton") is None:
        raise ConfigError("engine.kernels is 'fused'; it is 'torch' without Triton, which torch for CUDA brings")
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    odd = None if norms and all(norm.affine for norm in norms) else "no GroupNorm with weights"
    for module in model.modules():
        own = [*module._parameters.values(), *module._buffers.values()]
        if not isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm)) and any(tensor is not None for tensor in own):
            odd = odd or type(module).__name__
    if odd:
        raise ConfigError(f"engine.kernels is 'fused'; it is 'torch' with model.name {name!r}, which has {odd}")


class FusedModel:
    """Computes what a model does, with the weights that it has at that moment.

    Parameters
    ----------
    model : nn.Module
        In float32, which `check_fused` accepts. In ``nn.Sequential`` and in blocks of torchvision, whose forward
        passes are known, norms are fused with the addition and ReLU behind them; elsewhere a norm is fused alone.
    dtype : torch.dtype
        Of activations, and of the weights of convolutional and linear layers.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._network = _fused(copy.deepcopy(model, {id(p): p for p in model.parameters()}))
        self._network.train()
        pairs: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        for module in self._network.modules() if dtype != torch.float32 else ():
            for name, weight in module._parameters.items():
                if isinstance(module, (nn.Conv2d, nn.Linear)) and weight is not None:
                    pairs.setdefault(id(weight), (weight, nn.Parameter(weight.detach().to(dtype))))
                    module._parameters[name] = pairs[id(weight)][1]
        self._weights: list[torch.Tensor] = [weight for weight, _ in pairs.values()]
        self._copies: list[torch.Tensor] = [copied for _, copied in pairs.values()]
        self._gradients = [torch.empty_like(weight) for weight in self._weights]

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs, (B, n) of float32, of float32 images (B, C, H, W)."""
        self._refresh()
        images = inputs.to(self._dtype, memory_format=torch.channels_last)
        return cast(torch.Tensor, self._network(images).float())

    @torch.no_grad()
    def _refresh(self) -> None:
        if self._copies:
            torch._foreach_copy_(self._copies, self._weights)

    @torch.no_grad()
    def hand_over(self) -> None:
        """Give the model the gradients of the last backward pass, in float32, at the same addresses each time."""
        gradients = {i: copied.grad for i, copied in enumerate(self._copies) if copied.grad is not None}
        if gradients:
            torch._foreach_copy_([self._gradients[i] for i in gradients], list(gradients.values()))
        for i in gradients:
            self._weights[i].grad, self._copies[i].grad = self._gradients[i], None


class _Norm(nn.Module):
    """A GroupNorm with what comes behind it."""

    def __init__(self, norm: nn.GroupNorm, relu: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.groups, self.eps, self.relu = norm.num_groups, norm.eps, relu

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        from ssfl_app.training.fused_norm import group_norm_act

        return group_norm_act(x, self.weight, self.bias, self.groups, self.eps, shortcut=shortcut, relu=self.relu)


class _Block(nn.Module):
    """A residual block of torchvision: convolutions with norm and ReLU; before the last ReLU the input is added."""

    def __init__(self, block: Any, convolutions: int) -> None:
        super().__init__()
        numbers = range(1, convolutions + 1)
        self.convolutions = nn.ModuleList(getattr(block, f"conv{i}") for i in numbers)
        self.norms = nn.ModuleList(_Norm(getattr(block, f"bn{i}"), relu=True) for i in numbers)
        self.shortcut = nn.Identity() if block.downsample is None else _fused(block.downsample)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, last = x, len(self.norms) - 1
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            out = norm(convolution(out), self.shortcut(x) if i == last else None)
        return out


def _fused(module: nn.Module) -> nn.Module:
    """Return a module, which may be changed, with its GroupNorms fused with what is known to come behind them."""
    from torchvision.models import resnet

    if isinstance(module, nn.GroupNorm):
        return _Norm(module)
    count = {resnet.BasicBlock: 2, resnet.Bottleneck: 3}.get(type(module))
    if count and all(isinstance(module.get_submodule(f"bn{i + 1}"), nn.GroupNorm) for i in range(count)):
        return _Block(module, count)
    children = dict(module.named_children())
    behind = dict(zip(children, [*children][1:], strict=False)) if type(module) is nn.Sequential else {}
    if type(module) is resnet.ResNet:
        behind = {"bn1": "relu"}  # which is used once
    for name, child in children.items():
        after = behind.get(name, "")
        if isinstance(child, nn.GroupNorm) and type(children.get(after)) is nn.ReLU:
            setattr(module, name, _Norm(child, relu=True))
            setattr(module, after, nn.Identity())
        elif type(getattr(module, name)) is not nn.Identity:
            setattr(module, name, _fused(child))
    return module
