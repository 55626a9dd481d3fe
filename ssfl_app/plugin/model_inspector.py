"""What a client sees of the model that a foreign train function trains: which tensor is which, and which are one.

A tensor is known by where it lies in the memory and by its name in the ``nn.Module`` that holds it, never by its
values alone: layers that were copied from each other start equal, and all tensors of zeros are. Where values leave a
doubt the modules are found among the objects of this process, so that nothing has to be patched, whoever made,
loaded, wrapped or copied them.
"""

import gc
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from ssfl_app.plugin.state_spec import StateSpec
from ssfl_app.plugin.tensor_report import TensorKind, TensorReport, fingerprint, storage_key
from ssfl_app.sparsity.layout import NORMS, Vector


class ModelInspector:
    """Names the parameters of a train function's optimizers.

    A parameter that does not hold exactly the values that were sent, `weights`, is not one of the model's. `unsure`
    are prunable tensors that started equal, and that no module names apart. Methods raise ValueError where two
    tensors share memory, and are not of one shape, or not one parameter.
    """

    def __init__(self, spec: StateSpec, weights: Vector) -> None:
        self._layout, self.unsure = spec.layout, set[str]()
        self._spec = spec
        self._shapes = dict(spec.layout.shapes)
        self._alike: dict[bytes, list[str]] = {}
        for name, span in spec.layout.spans.items():
            self._alike.setdefault(fingerprint(weights[span].reshape(self._shapes[name])), []).append(name)
        spans = {name: weights[spec.layout.spans[name]] for name in spec.layout.prunable}
        self._flat = {name for name, values in spans.items() if (values == values[:1]).all()}  # one number all over
        # Parameters are kept, so that an id is not given to another one.
        self._known: dict[int, tuple[torch.Tensor, str | None]] = {}
        self._ties: dict[str, str] = {}
        self._kinds: dict[str, TensorKind] = {}

    @property
    def seen(self) -> TensorReport:
        """What there is to tell the server."""
        ties = tuple((name, self._ties[name]) for name in self._shapes if name in self._ties)
        return TensorReport(ties, dict(self._kinds))

    @property
    def unscored(self) -> set[str]:
        """Prunable tensors that get no gradient of their own: later names of a tensor, and buffers."""
        buffers = {name for name, kind in self._kinds.items() if kind == TensorKind.UNTRAINED}
        scored = {name for _, name in self._known.values() if name is not None}
        groups = {name: self._ties.get(name, name) for name in self._layout.prunable}
        done = {groups[name] for name in scored}
        return buffers | {name for name, first in groups.items() if first in done and name not in scored}

    def named(self, parameters: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, str]]:
        """Return those of an optimizer's parameters that are prunable tensors of the model, with their names."""
        if fresh := [parameter for parameter in parameters if id(parameter) not in self._known]:
            self._look(fresh)
        pairs = [self._known[id(parameter)] for parameter in parameters]
        return [(parameter, name) for parameter, name in pairs if name is not None]

    def _look(self, fresh: Sequence[torch.Tensor]) -> None:
        prints = {id(parameter): fingerprint(_real(parameter)) for parameter in fresh}
        books = _books(fresh) if self._in_doubt(set(prints.values())) else []
        model, names = self._model(books)
        places: dict[tuple[Any, ...], list[str]] = {}
        for key, name in names.items():
            places.setdefault(storage_key(books[model][1][key]), []).append(name)
        whole = len(names) == len(self._shapes)
        self._tie(places, {name: books[model][1][key] for key, name in names.items()})
        counts = Counter(prints.values())
        for parameter in fresh:
            taken = {name for _, name in self._known.values()}
            alike = self._alike.get(prints[id(parameter)], [])
            found = [name for name in places.get(storage_key(parameter), []) if name in alike]
            if not found and not whole:
                alike = [name for name in alike if name not in taken]
                found = _fitting(alike, parameter, books)
                if not found and len(alike) == counts[prints[id(parameter)]] == 1:
                    found = alike
                if not found:
                    self.unsure.update(name for name in alike if name in self._layout.prunable)
            # In the order of what was sent, which may be another than the module's: the server reads the first one.
            chosen = next((name for name in self._layout.prunable if name in found), None)
            for other, same in self._known.values():
                if chosen and same and storage_key(other) == storage_key(parameter):
                    raise ValueError(
                        f"the parameters {same} and {chosen} share memory; make them one to tie them, or leave both "
                        "out of SSFL(prunable=[...])"
                    )
            self._known[id(parameter)] = (parameter, chosen)
        for key, name in names.items():
            if name in self._layout.prunable:
                self._note(name, books[model][0], key, books[model][1][key])

    def _in_doubt(self, held: set[bytes]) -> bool:
        """Return whether values do not say all: some are equal, one number all over, or in no parameter."""
        prunable = set(self._layout.prunable)
        return any(
            (len(names) > 1 or names[0] in self._flat or value not in held)
            for value, names in self._alike.items()
            if prunable.intersection(names)
        )

    def _model(self, books: "Books") -> tuple[int, dict[str, str]]:
        """Return which of the modules is the one whose state dict was sent, and its keys' names there."""
        best, names = 0, dict[str, str]()
        sent = [shape for _, shape, _ in self._spec.tensors]
        for number, (_, book) in enumerate(books):
            same = {key: key for key, tensor in book.items() if self._shapes.get(key) == _real_shape(tensor)}
            if not same and [tuple(tensor.shape) for tensor in book.values()] == sent:  # as get_weights has them
                pairs = zip(book, (name for name, _, _ in self._spec.tensors), strict=True)
                same = {key: name for key, name in pairs if name in self._shapes}
            if len(same) > len(names):
                best, names = number, same
        return best, names

    def _tie(self, places: Mapping[tuple[Any, ...], list[str]], tensors: Mapping[str, torch.Tensor]) -> None:
        order = {name: place for place, name in enumerate(self._shapes)}
        for together in places.values():
            first, *later = sorted(together, key=order.__getitem__)
            if not later or not set(together) & set(self._layout.prunable):
                continue
            for name in later:
                one, other = tensors[first], tensors[name]
                if one.shape != other.shape or one.stride() != other.stride():
                    raise ValueError(
                        f"{first} and {name} share memory in other shapes, {tuple(one.shape)} and "
                        f"{tuple(other.shape)}; leave both out of SSFL(prunable=[...])"
                    )
                self._ties[name] = first

    def _note(self, name: str, model: nn.Module, key: str, tensor: torch.Tensor) -> None:
        owner: Any = model
        for part in key.split(".")[:-1]:
            owner = getattr(owner, "_modules", {}).get(part)
        if not isinstance(tensor, nn.Parameter):
            self._kinds[name] = TensorKind.UNTRAINED
        elif isinstance(owner, NORMS):
            self._kinds[name] = TensorKind.NORM


Books = list[tuple[nn.Module, Mapping[str, torch.Tensor]]]


def _books(parameters: Iterable[torch.Tensor]) -> Books:
    """Return the modules that hold any of the parameters, the largest first, with their state dicts."""
    wanted, kinds, books = {id(parameter) for parameter in parameters}, [nn.Module], []
    for kind in kinds:  # it grows
        kinds += kind.__subclasses__()
    # By the ids of types: isinstance asks an object for its class, and a lazy proxy would load what it stands for.
    known = set(map(id, kinds))
    for module in [thing for thing in gc.get_objects() if id(type(thing)) in known]:
        if "_parameters" in vars(module) and any(id(parameter) in wanted for parameter in module.parameters()):
            state = module.state_dict(keep_vars=True)
            books.append((module, {key: t for key, t in state.items() if isinstance(t, torch.Tensor)}))
    return sorted(books, key=lambda book: -len(book[1]))


def _fitting(names: Iterable[str], parameter: torch.Tensor, books: Books) -> list[str]:
    """Return the names that a parameter has in the largest module that holds it, if each fits one of its keys alone.

    A name fits a key if the parts of one are in the other, in their order: a wrapper or an adapter adds parts.
    """
    names, found = list(names), []
    for _, book in books:
        keys = [key for key, tensor in book.items() if tensor is parameter]
        for key in keys:
            fitting = [name for name in names if _within(name, key) or _within(key, name)]
            if len(fitting) == 1:
                found.append(fitting[0])
        if keys:
            break
    return found


def _within(short: str, long: str) -> bool:
    rest = iter(long.split("."))
    return all(part in rest for part in short.split("."))


def _real_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape)


def _real(tensor: torch.Tensor) -> npt.NDArray[Any]:
    tensor = tensor.detach()
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).float().cpu().numpy()
