"""Inner channels of a model: those that one layer makes and the next one reads, and nothing else.

They can be removed as a whole, and what is left is a smaller network. Channels that a shortcut adds to others are no
inner ones: the residual stream keeps its width.

A model tells its own by a method `inner_channels`. Without one they are found where the structure says it:

- in a model that is an ``nn.Sequential``: between two convolutional or linear layers in series, with a norm,
  activations and pools between them;
- in torchvision's residual blocks: the output of every convolution but the last.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssfl_app.options import ConfigError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHANNELWISE = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Hardswish),
    *(nn.Dropout, nn.Dropout2d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
)
_BLOCKS = {"BasicBlock": ("conv1", "conv2"), "Bottleneck": ("conv1", "conv2", "conv3")}


@dataclass(frozen=True)
class InnerChannels:
    """Channels that a model can do without: units of a hidden layer, channels of a convolution, heads of attention.

    Attributes
    ----------
    name : str
        Of what makes them, in messages and tables.
    size : int
        How many they are.
    axes : mapping of str to int, kept as a tuple of pairs
        The tensors of the state that have entries of each channel, and along which axis: weights and biases of what
        makes them, of their norm, and weights of what reads them. Along it each channel has equally many
        entries, one channel's after the other's: a head has those of its dimensions.
    together : int
        How many of them stay or go together: those of a group of GroupNorm.
    counts : tuple of str
        Attributes of the model's parts that hold `size`: ``("attention.heads",)``. Layers of torch need none.
    """

    name: str
    size: int
    axes: tuple[tuple[str, int], ...] | Mapping[str, int]
    together: int = 1
    counts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pairs = self.axes.items() if isinstance(self.axes, Mapping) else self.axes
        object.__setattr__(self, "axes", tuple((str(name), int(axis)) for name, axis in pairs))

    @property
    def pairs(self) -> tuple[tuple[str, int], ...]:
        """`axes` as pairs."""
        assert isinstance(self.axes, tuple)
        return self.axes

    @property
    def units(self) -> int:
        """How many parts there are that stay or go by themselves."""
        return self.size // self.together


def inner_of(model: nn.Module) -> tuple[InnerChannels, ...]:
    """Return the inner channels of a model, in the order in which it has them; none if it does not say.

    Raises
    ------
    ConfigError
        What its method `inner_channels` says does not fit its tensors.
    """
    tell = getattr(model, "inner_channels", None)
    if callable(tell):
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return checked(f"inner_channels of {type(model).__name__}", tell(), shapes)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    shared = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    lone = {name for name in names if shared[id(model.get_parameter(name))] == 1}
    found = [*_in_series(model), *_in_blocks(model)]
    buffers = dict(model.named_buffers())
    found = [inner for inner in found if all(name in lone or name in buffers for name, _ in inner.pairs)]
    order = {name: place for place, name in enumerate(names)}
    return tuple(sorted(found, key=lambda inner: order[inner.pairs[0][0]]))


def checked(
    where: str, told: Iterable[InnerChannels], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[InnerChannels, ...]:
    """Return the inner channels that were told; ConfigError, which begins with `where`, if no tensor has them."""
    seen, found = set[tuple[str, int]](), tuple(told)
    for inner in found:
        what = f"{where}: {inner.name!r}"
        if inner.size < 1 or inner.together < 1 or inner.size % inner.together:
            raise ConfigError(f"{what} has {inner.size} channels, {inner.together} together; one divides the other")
        for name, axis in inner.pairs:
            shape = shapes.get(name, ())
            if not 0 <= axis < len(shape):
                raise ConfigError(f"{what} names axis {axis} of {name!r}, whose shape is {shape}")
            if shape[axis] % inner.size:
                raise ConfigError(f"{what} has {inner.size} channels; axis {axis} of {name!r} is {shape[axis]} long")
            if (name, axis) in seen:
                raise ConfigError(f"{what} names axis {axis} of {name!r}, which is another's already")
            seen.add((name, axis))
    return found


def _tensors(path: str, module: nn.Module) -> list[str]:
    """Return the names of a layer's or norm's tensors that have an entry a channel along axis 0."""
    held = {**module._parameters, **module._buffers}
    return [f"{path}.{name}" for name, tensor in held.items() if tensor is not None and tensor.dim()]


def _between(makes: tuple[str, nn.Module], norms: list[tuple[str, nn.Module]], reads: str) -> InnerChannels:
    path, layer = makes
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    together = 1
    axes = [(name, 0) for name in _tensors(path, layer)]
    for where, norm in norms:
        axes += [(name, 0) for name in _tensors(where, norm)]
        if isinstance(norm, nn.GroupNorm):
            together = max(together, norm.num_channels // norm.num_groups)
    return InnerChannels(path, weight.shape[0], (*axes, (f"{reads}.weight", 1)), together)


def _in_series(model: nn.Module) -> list[InnerChannels]:
    """Return the inner channels between the layers of an ``nn.Sequential`` and those that it holds."""
    found: list[InnerChannels] = []
    made: tuple[str, nn.Module] | None = None
    norms: list[tuple[str, nn.Module]] = []
    flat, size = False, 0
    for path, module in _leaves(model) if type(model) is nn.Sequential else ():
        convolution = type(module) in CONVOLUTIONS and module.groups == 1
        if convolution or type(module) is nn.Linear:
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            wide = weight.shape[1]
            if made is not None:
                # Without Flatten a linear layer reads the last axis of images; behind linear layers it mixes axes.
                one_kind = (type(made[1]) is nn.Linear) == (not convolution)
                fits = wide == size if one_kind else flat and not convolution and wide % size == 0
                if fits:
                    found.append(_between(made, norms, path))
            made, norms, flat, size = (path, module), [], False, weight.shape[0]
        elif isinstance(module, nn.GroupNorm | _BatchNorm) and module.affine:
            norms.append((path, module))
        elif type(module) is nn.Flatten and module.start_dim == 1:
            flat = True
        elif type(module) not in _CHANNELWISE:
            made = None
    return found


def _leaves(model: nn.Module, path: str = "") -> Iterable[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        where = f"{path}.{name}" if path else name
        if type(child) is nn.Sequential:
            yield from _leaves(child, where)
        else:
            yield where, child


def _in_blocks(model: nn.Module) -> list[InnerChannels]:
    """Return the inner channels of torchvision's residual blocks."""
    found = []
    for path, block in model.named_modules():
        kind = type(block)
        if kind.__module__ != "torchvision.models.resnet" or kind.__name__ not in _BLOCKS:
            continue
        names = _BLOCKS[kind.__name__]
        for place, (maker, reader) in enumerate(pairwise(names), 1):
            layers, prefix = dict(block.named_children()), f"{path}." if path else ""
            if all(type(layers[name]) is nn.Conv2d and layers[name].groups == 1 for name in (maker, reader)):
                norm = f"bn{place}"
                found.append(
                    _between((prefix + maker, layers[maker]), [(prefix + norm, layers[norm])], prefix + reader)
                )
    return found
