"""Models: two small CNNs, ResNet-18/50 with CIFAR stem, the CIFAR ResNets of He et al., and a causal transformer.

Blocks come from torchvision; only what differs is here. ResNet-18 and ResNet-50 are those of the DisPFL and SSFL
code: 3x3 stem of stride 1, no max-pool, every norm a GroupNorm. With 10 classes and norm "group" ResNet-18 has
11,173,962 parameters (11,164,352 in conv and linear weights), ResNet-50 23,520,842 (23,467,712).

CIFAR ResNet-20/32/44/56/110 (He et al., CVPR 2016, section 4.2) have 3 stages of 16/32/64 channels and
parameter-free shortcuts (option A).

The transformer is in `ssfl_app.training.transformer`: 64 wide, 2 blocks deep, with 4 heads; other widths are the
nearest that the heads divide.

All of them can be narrower or wider: `scaled` says how many channels a layer then has.

Under BatchNorm a batch in training needs two values a channel: `fewest` says of how many images that is.

A model is built without touching torch's global generator, and its initial weights depend on the seed only.
"""

import bisect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from ssfl_app.options import ConfigError, PrivateError, Scalar, anything, choice, free, option
from ssfl_app.registry import Registry
from ssfl_app.seeding import torch_generator
from ssfl_app.sparsity.layout import State, load_state, state_of
from ssfl_app.text import in_a_line, one_line
from ssfl_app.training.transformer import Transformer

NORMS = ("group", "batch", "none")


def _groups(channels: int) -> int:
    # 32 groups from 64 channels on, as published, or a little fewer; narrower layers keep 2 channels a group.
    return max(1, channels // max(2, math.ceil(channels / 32)))


def norm_layer(name: str) -> Callable[[int], nn.Module]:
    """Return the constructor of a norm over `channels`: group, batch or none."""
    if name == "group":
        return lambda channels: nn.GroupNorm(_groups(channels), channels)
    if name == "batch":
        return nn.BatchNorm2d
    return lambda channels: nn.Identity()


def scaled(channels: int, width: float, times: int = 1) -> int:
    """Return a whole number near channels * width such that GroupNorm's groups divide it, and `times` as many.

    It is the nearest one, the smaller of two that are equally near, and at least 1.

    Examples
    --------
    >>> [scaled(64, width) for width in (1, 0.5, 0.45, 0.01, 1.6)]
    [64, 32, 28, 1, 104]
    """
    wanted = channels * width
    fit = (n for n in range(1, 2 * math.ceil(wanted) + 1) if not any(k % _groups(k) for k in (n, n * times)))
    return min(fit, key=lambda n: abs(n - wanted))


def _cnn(channels: int, classes: int, norm: Callable[[int], nn.Module], width: float) -> nn.Module:
    first, second, hidden = scaled(32, width), scaled(64, width), max(1, round(128 * width))
    return nn.Sequential(
        nn.Conv2d(channels, first, 3, padding=1, bias=False),
        norm(first),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1, bias=False),
        norm(second),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(second * 16, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def _conv4(channels: int, classes: int, norm: Callable[[int], nn.Module], width: float) -> nn.Module:
    layers: list[nn.Module] = []
    planes = channels
    for convolution, wanted in enumerate((32, 64, 128, 128)):
        inputs, planes = planes, scaled(wanted, width)
        layers += [nn.Conv2d(inputs, planes, 3, padding=1, bias=False), norm(planes), nn.ReLU()]
        if convolution < 3:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))  # an image of one pixel stays one
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(planes * 4, classes))


def _imagenet_resnet(
    block: str, layers: list[int], channels: int, classes: int, norm: Callable[[int], nn.Module], width: float
) -> nn.Module:
    from torchvision.models import resnet

    kind = getattr(resnet, block)
    model: Any = resnet.ResNet(kind, layers, norm_layer=norm)
    planes = [scaled(wanted, width, kind.expansion) for wanted in (64, 128, 256, 512)]
    model.conv1, model.bn1 = nn.Conv2d(channels, planes[0], 3, padding=1, bias=False), norm(planes[0])
    model.maxpool = nn.Identity()
    model.inplanes = planes[0]
    for stage, blocks in enumerate(layers):
        made = model._make_layer(kind, planes[stage], blocks, stride=2 if stage else 1)
        setattr(model, f"layer{stage + 1}", made)
    model.fc = nn.Linear(planes[-1] * kind.expansion, classes)
    return cast(nn.Module, model)


class _PadShortcut(nn.Module):
    """Option A: every second pixel, missing channels filled with zeros; no parameters."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


def _cifar_resnet(
    depth: int, channels: int, classes: int, norm: Callable[[int], nn.Module], width: float
) -> nn.Module:
    from torchvision.models.resnet import BasicBlock

    blocks: list[nn.Module] = []
    inputs = scaled(16, width)
    stem = [nn.Conv2d(channels, inputs, 3, padding=1, bias=False), norm(inputs), nn.ReLU()]
    for stage, wanted in enumerate((16, 32, 64)):
        planes = scaled(wanted, width)
        for i in range((depth - 2) // 6):
            first = i == 0 and stage > 0
            shortcut = _PadShortcut(planes - inputs) if first else None
            blocks.append(BasicBlock(inputs, planes, 2 if first else 1, shortcut, norm_layer=norm))
            inputs = planes
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


Factory = Callable[..., nn.Module]
"""factory(input_shape, outputs, norm, **options): a model for inputs (batch, *input_shape); `norm` of `NORMS`."""


def of_images(make: Callable[[int, int, Callable[[int], nn.Module], float], nn.Module]) -> Factory:
    """Return the factory of a model of images by its constructor: of channels, classes, a norm and model.width."""

    def factory(input_shape: tuple[int, ...], outputs: int, norm: str, width: float = 1.0) -> nn.Module:
        if len(input_shape) != 3:
            raise ValueError(f"inputs have shape {input_shape}; this model takes images, (channels, height, width)")
        return make(input_shape[0], outputs, norm_layer(norm), width)

    return factory


def _transformer(
    input_shape: tuple[int, ...],
    outputs: int,
    norm: str,
    width: float = 1.0,
    depth: int = 2,
    heads: int = 4,
    tied: bool = False,
) -> nn.Module:
    if len(input_shape) != 1:
        raise ValueError(f"inputs have shape {input_shape}; this model takes sequences of tokens, (length,)")
    if norm == "batch":
        raise ValueError("model.norm is 'batch'; it is 'group', which is a LayerNorm here, or 'none'")
    channels = heads * max(1, round(64 * width / max(1, heads)))
    return Transformer(input_shape[0], outputs, channels, depth, heads, tied, norm == "group")


REGISTRY: Registry[Factory] = Registry(
    "ssfl.models",
    {
        "cnn": of_images(_cnn),
        "conv4": of_images(_conv4),
        "resnet18": of_images(partial(_imagenet_resnet, "BasicBlock", [2, 2, 2, 2])),
        "resnet50": of_images(partial(_imagenet_resnet, "Bottleneck", [3, 4, 6, 3])),
        **{f"resnet{depth}": of_images(partial(_cifar_resnet, depth)) for depth in (20, 32, 44, 56, 110)},
        "transformer": _transformer,
    },
    "a function (input_shape, outputs, norm, **options) that returns a torch.nn.Module",
    callable,
)


@dataclass(frozen=True)
class ModelOptions:
    """Keys of the section ``model``."""

    name: str = REGISTRY.field("cnn", "what is trained")
    norm: str = choice(*NORMS, about="the layers that normalise")
    width: float = option(
        "a number in (0, 16]", lambda x: 0 < x <= 16, 1.0, "of a built-in model: times the channels of its layers"
    )
    weights: str = anything(
        "a file, or empty", "", "safetensors: initial weights, at server and clients; empty: drawn by run.seed"
    )
    options: Mapping[str, Scalar] = free(
        "arguments of a model of your own, model.options.width=64, or of the transformer: depth, heads, tied"
    )


_EVERY = ("input_shape", "outputs", "norm", "width")
"""Arguments of all built-in models."""


def _made(options: ModelOptions, shape: tuple[int, ...], outputs: int) -> nn.Module:
    arguments = {key.replace("-", "_"): value for key, value in options.options.items()}
    if options.name in REGISTRY:
        known = [name for name in signature(REGISTRY[options.name]).parameters if name not in _EVERY]
        for key, value in options.options.items():
            if key.replace("-", "_") not in known:
                rule = f"{options.name} is built in: it has model.width and model.norm"
                has = f", and model.options {', '.join(known)}" if known else "; options are for a model of your own"
                raise ConfigError(f"model.options.{key} is {value!r}; {rule}{has}")
        arguments["width"] = options.width
    elif options.width != 1.0:
        rule = f"it is for built-in models, and a model of your own such as {options.name} has model.options"
        raise ConfigError(f"model.width is {options.width}; {rule}")
    try:
        model: object = REGISTRY[options.name](shape, outputs, options.norm, **arguments)
    except Exception as error:
        called = ", ".join([f"{shape}, {outputs}, {options.norm!r}", *(f"{k}={v!r}" for k, v in arguments.items())])
        given = f"(input_shape, outputs, norm), here ({called}),"
        raise ConfigError(f"model.name is {options.name!r}; called with {given} it says {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.name is {options.name!r}; it made {type(model).__name__}, not a torch.nn.Module")
    if any(isinstance(weight, UninitializedParameter) for weight in model.parameters()):
        raise ConfigError(f"model.name is {options.name!r}; it has lazy layers, and all shapes are known beforehand")
    return model


def outline(options: ModelOptions, shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Return the model without memory, on the meta device; one of yours that cannot be made there, on the CPU.

    Parameters
    ----------
    shape : tuple of int
        Of an input.
    outputs : int
        Classes, or the values of a target.

    Raises
    ------
    ConfigError
        The model takes no such inputs or options.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return _made(options, shape, outputs)
        except ConfigError:
            if options.name in REGISTRY:
                raise
            return _made(options, shape, outputs)


def fewest(options: ModelOptions, shape: tuple[int, ...], outputs: int = 1) -> int:
    """Return how many inputs a training batch has at least: 2 where a BatchNorm sees one value a channel, else 1.

    A norm over a batch needs two values of each channel, and a map of one pixel gives it one an image. How large the
    maps of a built-in model are, a forward pass without numbers shows. Of another model it is not known: 2 if there
    is a BatchNorm.
    """
    if options.name in REGISTRY and options.norm != "batch":
        return 1
    model, pixels = outline(options, shape, outputs), list[int]()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if options.name not in REGISTRY:
        return 1 + bool(norms)
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, inputs: pixels.append(inputs[0][0, 0].numel()))
    model(torch.empty(2, *shape, device="meta"))
    return 2 if min(pixels) == 1 else 1


def parameters(options: ModelOptions, shape: tuple[int, ...], outputs: int) -> int:
    """Return how many parameters a model has, biases and norms included."""
    return sum(parameter.numel() for parameter in outline(options, shape, outputs).parameters())


def width_for(options: ModelOptions, shape: tuple[int, ...], outputs: int, count: int) -> float:
    """Return the model.width, in thousandths up to 1, at which a built-in model has nearest to `count` parameters.

    This is the dense control of a sparse method: `count` is what its mask leaves alive, with biases and norms.
    """
    widths = [thousandth / 1000 for thousandth in range(1, 1001)]

    def size(width: float) -> int:
        return parameters(replace(options, width=width), shape, outputs)

    above = bisect.bisect_left(widths, count, key=size, hi=len(widths) - 1)
    return min(widths[max(0, above - 1) : above + 1], key=lambda width: abs(size(width) - count))


def create(options: ModelOptions, shape: tuple[int, ...], outputs: int, seed: int) -> nn.Module:
    """Return a model for inputs of `shape` with initial weights: those of ``model.weights``, or else of `seed` only.

    Weights of conv and linear layers and biases of built-in models have PyTorch's default distributions (uniform
    within 1/sqrt(fan_in)), embeddings are normal with variance 1/width; norms start at weight 1, bias 0. A model of
    your own starts as its factory makes it, under torch's generator seeded with `seed`, which is put back afterwards.

    Raises
    ------
    ConfigError
        The model takes no such inputs or options, or the file has no such weights.
    """
    model = _drawn(options, shape, outputs, seed)
    if options.weights:
        load_state(model, read_weights(options.weights, state_of(model)))
    return model


def read_weights(path: str, wanted: Mapping[str, torch.Tensor]) -> State:
    """Return the tensors of a safetensors file, float32; those that a model's state, `wanted`, has, of its shapes.

    Raises
    ------
    PrivateError
        The file cannot be read, lacks a tensor, or has another shape or one more.
    """
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        what = "it is a safetensors file that can be read where server and clients run"
        raise _odd_weights(path, f"{what} ({error})", what) from error
    for name in [*wanted, *(name for name, tensor in found.items() if tensor.is_floating_point())]:
        have, need = (tuple(each[name].shape) if name in each else None for each in (found, wanted))
        if have != need:
            said = [f"of shape {shape}" if shape is not None else "missing" for shape in (have, need)]
            raise _odd_weights(path, f"{in_a_line(name)} is {said[0]} there and {said[1]} in the model")
    return {name: found[name].float() for name in wanted}


def _odd_weights(path: str, what: str, public: str = "") -> PrivateError:
    return PrivateError(f"model.weights is {path!r}; {what}", f"model.weights: {public or what}")


def _drawn(options: ModelOptions, shape: tuple[int, ...], outputs: int, seed: int) -> nn.Module:
    rng = torch_generator(seed, "init")
    if options.name not in REGISTRY:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.initial_seed())
            return _made(options, shape, outputs)
    # On the meta device nothing is drawn; the real numbers come from our own generator below.
    model = _materialised(outline(options, shape, outputs))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=rng)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.bias, -bound, bound, generator=rng)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5, generator=rng)
        elif isinstance(module, nn.GroupNorm | nn.BatchNorm2d | nn.LayerNorm):
            module.reset_parameters()
        elif next(module.parameters(recurse=False), None) is not None or len(list(module.buffers(recurse=False))):
            raise TypeError(f"{type(module).__name__} in model {options.name} has no initialisation here")
    return model


def _materialised(model: nn.Module) -> nn.Module:
    """Give a model of the meta device memory of the CPU that holds anything.

    `to_empty` does so too, by Python code of torch that imports sympy: a third of a second, in deployment a message.
    """
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model
