"""What a client tells about the model beside its scores: which tensors are one, and which are no weights."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ssfl_app.plugin.state_spec import StateSpec
from ssfl_app.sparsity.layout import Layout, Vector
from ssfl_app.sparsity.values import Allowed, Arrays, PayloadError, read_array

Ties = tuple[tuple[str, str], ...]
"""Pairs of names of one tensor: a later name, and the first one."""


class TensorKind(IntEnum):
    """What a tensor is, as far as a client sees."""

    WEIGHT = 0
    UNTRAINED = 1  # a buffer, or an array that a whole local training did not change
    NORM = 2


@dataclass(frozen=True)
class TensorReport:
    """What a client tells about the model beside its scores; nothing is told about most models.

    `ties`: each later name of a tensor that has several, and its first name in the order of the state dict. `kinds`
    are of prunable tensors that are no plain weights.
    """

    ties: Ties
    kinds: Mapping[str, TensorKind]

    @staticmethod
    def allowed(spec: StateSpec) -> Allowed:
        """Return the arrays that `written` may give."""
        return {"same": (np.int32, len(spec.layout.shapes)), "kinds": (np.uint8, len(spec.layout.prunable))}

    def written(self, spec: StateSpec) -> Arrays:
        """Return it as flat arrays: the place of each floating tensor's first name, and a kind per prunable one."""
        arrays, layout, first = Arrays(), spec.layout, dict(self.ties)
        if first:
            places = {name: place for place, (name, _) in enumerate(layout.shapes)}
            arrays["same"] = np.array([places[first.get(name, name)] for name in places], dtype=np.int32)
        if self.kinds:
            kinds = [self.kinds.get(name, TensorKind.WEIGHT) for name in layout.prunable]
            arrays["kinds"] = np.array(kinds, dtype=np.uint8)
        return arrays

    @classmethod
    def read(cls, arrays: Mapping[str, npt.NDArray[Any]], spec: StateSpec, model: Vector) -> "TensorReport":
        """Return what `written` wrote, whoever says so; `model` are the initial weights, shape (layout.size,).

        Raises
        ------
        PayloadError
            It is malformed, or tensors that are said to be one have other shapes, types or initial values, or none
            of them is prunable.
        """
        layout, ties, kinds = spec.layout, dict[str, str](), dict[str, TensorKind]()
        if "same" in arrays:
            same = read_array(arrays, "same", np.int32, len(layout.shapes)).tolist()
            types = {name: (shape, kind) for name, shape, kind in spec.tensors}
            names = [name for name, _ in layout.shapes]
            for place, first in enumerate(same):
                if first == place:
                    continue
                if not 0 <= first < place or same[first] != first:
                    raise PayloadError(
                        f"same[{place}] is {first}; it is {place} or the place of an earlier first name"
                    )
                one, other = names[first], names[place]
                values, others = model[layout.spans[one]], model[layout.spans[other]]
                if types[one] != types[other] or not np.array_equal(values, others):
                    raise PayloadError(
                        f"says that {other} is tied to {one}; in the initial arrays they differ: tie them there, too"
                    )
                ties[other] = one
            masked = {ties.get(name, name) for name in layout.prunable}
            if idle := next((pair for pair in ties.items() if pair[1] not in masked), None):
                raise PayloadError(f"says that {idle[0]} is tied to {idle[1]}; no name of that tensor is prunable")
        if "kinds" in arrays:
            told = read_array(arrays, "kinds", np.uint8, len(layout.prunable)).tolist()
            if (most := max(told, default=0)) > max(TensorKind):
                raise PayloadError(f"kinds has the value {most}; it is at most {int(max(TensorKind))}")
            kinds = {name: TensorKind(kind) for name, kind in zip(layout.prunable, told, strict=True) if kind}
        return cls(tuple(ties.items()), kinds)


NOTHING = TensorReport((), {})


def storage_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return where a tensor lies; an empty one lies nowhere, and is only itself."""
    return (tensor.device, tensor.data_ptr()) if tensor.numel() else (id(tensor),)


def fingerprint(values: npt.NDArray[Any]) -> bytes:
    """Return what tells arrays of other shapes or float32 values apart."""
    flat = np.ascontiguousarray(values, dtype=np.float32)
    return hashlib.blake2b(repr(flat.shape).encode() + flat.tobytes(), digest_size=16).digest()


def told_together(layout: Layout, weights: Vector, told: Mapping[str, Any]) -> TensorReport:
    """Return the ties among what a user's own function told by name.

    Two names are of one tensor if their arrays lie in the same memory, or if nothing is told about one, as
    ``named_parameters`` does, and exactly one tensor that something is told about starts with the same values.
    """
    ties, lies = dict[str, str](), dict[tuple[Any, ...], str]()
    shapes = dict(layout.shapes)

    def equal(one: str, other: str) -> bool:
        values, others = weights[layout.spans[one]], weights[layout.spans[other]]
        return shapes[one] == shapes[other] and np.array_equal(values, others)

    for name in shapes:
        if isinstance(told.get(name), torch.Tensor):
            first = lies.setdefault(storage_key(told[name]), name)
            if first != name and equal(first, name):
                ties[name] = first
    for name in layout.prunable:
        values = weights[layout.spans[name]]
        if name in told or (values == values[:1]).all():  # zeros are equal everywhere
            continue
        twins = [other for other in layout.prunable if other in told and other not in ties and equal(name, other)]
        if len(twins) == 1:
            ties[name] = twins[0]
    return TensorReport(_ordered(layout, ties), {})


def changed_together(layout: Layout, before: Vector, after: Vector) -> TensorReport:
    """Return what one local training tells: tensors that it left alone, and pairs that it changed to equal values."""
    still, groups = set[str](), dict[bytes, str]()
    ties = dict[str, str]()
    for name, shape in layout.shapes:
        old, new = (flat[layout.spans[name]].reshape(shape) for flat in (before, after))
        if np.array_equal(old, new):
            still.add(name)
        elif len(shape) >= 2 and (first := groups.setdefault(fingerprint(old) + fingerprint(new), name)) != name:
            ties[name] = first
    if still.issuperset(layout.prunable):
        return NOTHING  # its scores are 0, by which the server knows that there was nothing to see
    return TensorReport(
        _ordered(layout, ties), {name: TensorKind.UNTRAINED for name in layout.prunable if name in still}
    )


def check_untied(layout: Layout, given: Vector, trained: Vector) -> None:
    """Refuse, by ValueError, what a train function returns if tensors given with other values came back equal.

    They are one tensor to it, and nobody found out: a mask of one of them would mask nothing.
    """
    often = Counter(shape for _, shape in layout.shapes)
    groups: dict[tuple[tuple[int, ...], bytes], list[str]] = {}
    for name, shape in layout.shapes:
        values = trained[layout.spans[name]]
        if often[shape] < 2 or len(shape) < 2 or not values.size or (values == values[0]).all():
            continue
        few = values[:: 1 + values.size // 64].tobytes()  # most tensors differ there: all of it is seldom compared
        for other in groups.setdefault((shape, few), []):
            one, before = trained[layout.spans[other]], given[layout.spans[other]]
            if np.array_equal(one, values) and not np.array_equal(before, given[layout.spans[name]]):
                raise ValueError(
                    f"{other} and {name} were sent with other values and came back equal: they are one tensor here. "
                    "Tie them in the initial arrays, too, or leave both out of SSFL(prunable=[...])"
                )
        groups[shape, few].append(name)


def _ordered(layout: Layout, ties: Mapping[str, str]) -> Ties:
    """Return ties that lead to the first name of each tensor, in the layout's order; those of prunable tensors."""
    groups: dict[str, list[str]] = {}
    for name, _ in layout.shapes:
        groups.setdefault(ties.get(name, name), []).append(name)
    masked = [group for group in groups.values() if set(group) & set(layout.prunable)]
    first = {name: group[0] for group in masked for name in group[1:]}
    return tuple((name, first[name]) for name, _ in layout.shapes if name in first)
