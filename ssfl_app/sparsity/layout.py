"""Names and shapes of a model's state: all that two ends must agree on before they exchange numbers.

A *state* is a dict from name to float32 tensor, in the order of the model's ``state_dict``. Integer buffers
(``num_batches_tracked``) are no part of it: they are neither sent nor averaged.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ssfl_app.options import ConfigError
from ssfl_app.sparsity.inner import InnerChannels, inner_of

State = dict[str, torch.Tensor]
Vector = npt.NDArray[np.float32]
Bits = npt.NDArray[np.bool_]
Index = npt.NDArray[np.intp] | slice
"""Coordinates of a vector in rising order: their numbers, or all of them."""
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Modules none of whose tensors is pruned."""


@dataclass(frozen=True)
class Layout:
    """Order, shapes and prunable tensors of a state.

    Attributes
    ----------
    shapes : tuple of (str, tuple of int)
        Every tensor of the state, in order.
    prunable : tuple of str
        The tensors that a mask may name, in the same order: what `is_prunable` tells, but for norms and buffers, and
        for what the model says is never pruned (`never_pruned`).
    norms : tuple of str
        The parameters and buffers of norm layers, in the same order, where the model is known.
    inner : tuple of InnerChannels
        Channels that can be removed as a whole, where the model is known. Layouts are equal without them.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    prunable: tuple[str, ...]
    norms: tuple[str, ...] = ()
    inner: tuple[InnerChannels, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, model: nn.Module) -> "Layout":
        """Return the layout of a model's state."""
        shapes = {name: tuple(tensor.shape) for name, tensor in state_of(model).items()}
        norms = {
            f"{path}.{name}".removeprefix(".")
            for path, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, NORMS)
            for name in (*module._parameters, *module._buffers)
        }
        weights = dict(model.named_parameters(remove_duplicate=False)).keys() - norms - never_pruned(model)
        prunable = tuple(name for name in shapes if name in weights and is_prunable(name, shapes))
        in_order = tuple(name for name in shapes if name in norms)
        return cls(tuple(shapes.items()), prunable, in_order, inner_of(model))

    @cached_property
    def spans(self) -> dict[str, slice]:
        """Where each tensor lies in the flat vector of all coordinates."""
        return _spans({name: math.prod(shape) for name, shape in self.shapes})

    @cached_property
    def prunable_sizes(self) -> dict[str, int]:
        """Number of coordinates of each prunable tensor."""
        shapes = dict(self.shapes)
        return {name: math.prod(shapes[name]) for name in self.prunable}

    @cached_property
    def prunable_spans(self) -> dict[str, slice]:
        """Where each prunable tensor lies in the flat vector of prunable coordinates."""
        return _spans(self.prunable_sizes)

    @cached_property
    def size(self) -> int:
        """Number of coordinates of the state."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    @cached_property
    def prunable_size(self) -> int:
        """Number of coordinates that a mask covers."""
        return sum(self.prunable_sizes.values())

    @cached_property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 over names, shapes and prunable names."""
        return hashlib.sha256(json.dumps([self.shapes, self.prunable]).encode()).hexdigest()[:16]

    @cached_property
    def is_prunable(self) -> Bits:
        """Return a bool vector of shape (size,): which coordinates a mask covers."""
        flags = np.zeros(self.size, dtype=np.bool_)
        for name in self.prunable:
            flags[self.spans[name]] = True
        return flags

    def flatten(self, state: Mapping[str, torch.Tensor]) -> Vector:
        """Return the state as one float32 vector of shape (size,)."""
        if (together := self.joined(state)) is not None:
            return from_gpu(together)
        flat = np.empty(self.size, dtype=np.float32)
        for name, span in self.spans.items():
            flat[span] = state[name].detach().reshape(-1).cpu().numpy()
        return flat

    def unflatten(self, flat: Vector) -> State:
        """Return the state of a vector of all coordinates, shape (size,), which is copied."""
        return self.scatter(flat, slice(None))

    def scatter(self, values: Vector, places: Bits | Index) -> State:
        """Return the state with `values` at `places`, numbers or a bool vector of shape (size,), and 0 elsewhere.

        Its tensors are views of one buffer that torch owns: kernels may round differently on buffers with
        another alignment, and equal runs must give equal bits.
        """
        memory = torch.zeros(self.size, dtype=torch.float32)
        memory.numpy()[places] = values
        return self._views(memory)

    def scatter_on(self, device: torch.device, values: Vector, places: torch.Tensor | None) -> State:
        """Return the same on a device, to which the values cross in one copy; numbers, int64, there; None: all."""
        sent = torch.empty(values.size, dtype=torch.float32, pin_memory=device.type == "cuda")
        sent.numpy()[:] = values
        sent = sent.to(device, non_blocking=True)
        if places is None:
            return self._views(sent)
        return self._views(torch.zeros(self.size, dtype=torch.float32, device=device).index_copy_(0, places, sent))

    def _views(self, memory: torch.Tensor) -> State:
        return {name: memory[self.spans[name]].view(shape) for name, shape in self.shapes}

    def joined(self, state: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Return a state that is on one GPU as one vector there, shape (size,), so that it is one copy; else None."""
        tensors = [state[name].detach() for name in self.spans]
        return torch.cat([tensor.reshape(-1) for tensor in tensors]).float() if on_one_gpu(tensors) else None

    def flatten_prunable(self, tensors: Mapping[str, torch.Tensor]) -> Vector:
        """Return the prunable tensors, e.g. scores, as one float32 vector of shape (prunable_size,)."""
        flat = np.empty(self.prunable_size, dtype=np.float32)
        for name, span in self.prunable_spans.items():
            flat[span] = tensors[name].detach().reshape(-1).cpu().numpy()
        return flat


def on_one_gpu(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether all tensors, and at least one, are on the same GPU."""
    return len({tensor.device for tensor in tensors}) == 1 and tensors[0].is_cuda


def from_gpu(vector: torch.Tensor) -> Vector:
    """Return a vector of a GPU in memory of the host that the GPU writes itself."""
    there = torch.empty(vector.shape, dtype=torch.float32, pin_memory=vector.is_cuda)
    there.copy_(vector)
    return there.numpy()


def _spans(sizes: Mapping[str, int]) -> dict[str, slice]:
    ends = accumulate(sizes.values())
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


def is_prunable(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether a floating tensor is one that a mask covers, as far as the names and shapes of a state tell.

    It has 2 dimensions or more (weights of linear, convolutional and recurrent layers, embeddings), and more than one
    that is larger than 1 (a class token is a vector) unless it is called a weight or by a number. The magnitudes of a
    weight norm are none.
    """
    shape = shapes[name]
    if len(shape) < 2:
        return False
    if sum(size > 1 for size in shape) > 1:
        return True
    return direction_of(name, shapes) is None and ("weight" in name or name.isdigit())


def never_pruned(model: nn.Module) -> set[str]:
    """Return the parameters that a model says no mask covers, by its attribute ``never_pruned``.

    It is a sequence of names of parameters, or of modules for all that they have.

    Raises
    ------
    ConfigError
        It names something that the model does not have.
    """
    names, found = list(dict(model.named_parameters(remove_duplicate=False))), set[str]()
    for spared in getattr(model, "never_pruned", ()):
        meant = {name for name in names if name == spared or name.startswith(f"{spared}.")}
        if not meant:
            raise ConfigError(f"never_pruned of the model has {spared!r}; it has names of its parameters and modules")
        found |= meant
    return found


def mask_everything(model: nn.Module) -> None:
    """Let a mask cover what the model says is never pruned: where dead weights are frozen, none is lost."""
    setattr(model, "never_pruned", ())  # noqa: B010 (torch declares what a module's attributes are)


def direction_of(magnitude: str, names: Iterable[str]) -> str | None:
    """Return the tensor whose rows a weight norm scales by `magnitude`, or None if it is no magnitude of any."""
    for ending, other in ((".original0", ".original1"), ("_g", "_v")):
        if magnitude.endswith(ending) and (direction := magnitude.removesuffix(ending) + other) in names:
            return direction
    return None


def state_of(model: nn.Module) -> State:
    """Return the model's state: its floating-point tensors by name, sharing memory with the model."""
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy a state into the model, on whatever device that is; integer buffers stay as they are."""
    if own := state_of(model):
        with torch.no_grad():
            torch._foreach_copy_(list(own.values()), [state[name] for name in own])


def state_digest(layout: Layout, state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 (hex) over names, shapes and float32 bits of a state."""
    digest = hashlib.sha256(json.dumps(layout.shapes).encode())
    digest.update(layout.flatten(state).data)
    return digest.hexdigest()
