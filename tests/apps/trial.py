"""Somebody else's app under `SSFL`: what its functions were given and returned, and masks that are made by hand.

The apps are played on the in-process grid, a message at a time. What is expected of them is computed beside them,
with plain torch and NumPy: neither the mask nor the scores of the product are asked.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result
from torch import nn

from ssfl_app import SSFL, sparse_mod
from ssfl_app.simulation.in_process import InlineGrid

Arrays = dict[str, npt.NDArray[Any]]
State = Mapping[str, torch.Tensor]


@dataclass
class Call:
    """One call of a train or evaluate function, as a mod behind `sparse_mod` sees it."""

    kind: str
    partition: int
    given: Arrays
    returned: Arrays


@dataclass
class Trial:
    """A finished run."""

    strategy: SSFL
    result: Result
    calls: list[Call]
    nodes: int

    @property
    def trained(self) -> list[Call]:
        """The calls of train functions, without the first ones, which are asked for scores."""
        return [call for call in self.calls if call.kind == "train"][self.nodes :]

    @property
    def arrays(self) -> Arrays:
        """The result."""
        return {name: array.numpy() for name, array in self.result.arrays.items()}

    @property
    def mask(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Where weights are alive, by tensor."""
        return {name: alive.numpy() for name, alive in self.strategy.mask.tensors().items()}

    def told(self, name: str, of: str = "train") -> list[float]:
        """Return the mean of a metric of the clients, round by round."""
        told = {"train": self.result.train_metrics_clientapp, "evaluate": self.result.evaluate_metrics_clientapp}[of]
        return [float(told[round_][name]) for round_ in sorted(told)]  # type: ignore[arg-type]


def watched(calls: list[Call], mod: Any = sparse_mod) -> list[Any]:
    """Return the mods of an app whose calls are noted."""

    def spy(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        given = arrays_of(message)
        reply = call_next(message, context)
        partition, returned = int(context.node_config["partition-id"]), arrays_of(reply)
        if returned:  # an old-style client's have numbers for names
            returned = dict(zip(given, returned.values(), strict=True))
        calls.append(Call(message.metadata.message_type, partition, given, returned))
        return reply

    return [mod, spy]


def arrays_of(message: Message) -> Arrays:
    """Return copies of the arrays of a message."""
    found = [] if message.has_error() else [r for r in message.content.values() if isinstance(r, ArrayRecord)]
    return {name: array.numpy().copy() for record in found for name, array in record.items()}


def play(
    app: ClientApp, calls: list[Call], initial: State | ArrayRecord, nodes: int, rounds: int, **ssfl: Any
) -> Trial:
    """Play an app that is `watched`."""
    strategy = SSFL(**ssfl)
    record = initial if isinstance(initial, ArrayRecord) else ArrayRecord(dict(initial))  # type: ignore[arg-type]
    grid = InlineGrid(app, {}, {1000 + partition: partition for partition in range(nodes)})
    return Trial(strategy, strategy.start(grid=grid, initial_arrays=record, num_rounds=rounds), calls, nodes)


Fit = Callable[[State, int], tuple[State, Mapping[str, float]]]
"""State dict that came, partition -> state dict that goes back, metrics."""
Test = Callable[[State, int], Mapping[str, float]]


@dataclass
class App:
    """An app of Flower's Message API around two functions."""

    fit: Fit
    test: Test | None = None
    calls: list[Call] = field(default_factory=list)

    def play(self, initial: State, nodes: int = 2, rounds: int = 3, **ssfl: Any) -> Trial:
        """Play it from these weights."""
        app = ClientApp(mods=watched(self.calls))

        @app.train()
        def train(message: Message, context: Context) -> Message:
            state, metrics = self.fit(state_of(message), int(context.node_config["partition-id"]))
            records = {"arrays": ArrayRecord(dict(state)), "metrics": MetricRecord(dict(metrics))}  # type: ignore[arg-type]
            return Message(RecordDict(records), reply_to=message)  # type: ignore[arg-type]

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            assert self.test is not None
            metrics = self.test(state_of(message), int(context.node_config["partition-id"]))
            return Message(RecordDict({"metrics": MetricRecord(dict(metrics))}), reply_to=message)

        if self.test is None:
            ssfl["fraction_evaluate"] = 0.0
        return play(app, self.calls, initial, nodes, rounds, **ssfl)


def state_of(message: Message) -> dict[str, torch.Tensor]:
    """Return the state dict of a message."""
    record: Any = message.content["arrays"]
    return dict(record.to_torch_state_dict())


# ---- by hand ---------------------------------------------------------------------------------------


def scores(model: nn.Module, losses: Sequence[torch.Tensor]) -> Arrays:
    """Return the mean of |g * w| over minibatches, for each parameter with two dimensions or more."""
    named = {name: p for name, p in model.named_parameters() if p.dim() > 1 and p.requires_grad}
    total = {name: np.zeros(p.shape) for name, p in named.items()}
    for loss in losses:
        for (name, p), g in zip(named.items(), torch.autograd.grad(loss, list(named.values())), strict=True):
            total[name] += (g * p).abs().detach().double().numpy() / len(losses)
    return total


def mean(scores: Sequence[Arrays], samples: Sequence[int]) -> Arrays:
    """Return the clients' mean, weighted by samples."""
    pairs = list(zip(scores, samples, strict=True))
    return {name: sum(n * each[name] for each, n in pairs) / sum(samples) for name in scores[0]}  # type: ignore[misc]


def top(scores: Arrays, density: float) -> dict[str, npt.NDArray[np.bool_]]:
    """Return where the floor(density * all) largest scores are."""
    flat = np.concatenate([each.reshape(-1) for each in scores.values()])
    alive = np.zeros(flat.size, dtype=np.bool_)
    alive[np.argsort(-flat)[: int(density * flat.size)]] = True
    ends = np.cumsum([each.size for each in scores.values()])[:-1]
    parts = zip(scores, np.split(alive, ends), scores.values(), strict=True)
    return {name: part.reshape(each.shape) for name, part, each in parts}


def same(one: Mapping[str, npt.NDArray[Any]], other: Mapping[str, npt.NDArray[Any]]) -> bool:
    """Whether names and values are equal."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def moved(alive: Mapping[str, npt.NDArray[np.bool_]], states: Sequence[Arrays]) -> int:
    """Return how many weights outside of a mask are not exactly 0, over all states."""
    return sum(int(np.count_nonzero(state[name][~there])) for state in states for name, there in alive.items())
