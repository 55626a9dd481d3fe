"""SCAFFOLD: every local step is corrected by how the client's gradient differs from that of all.

Karimireddy, Kale, Mohri, Reddi, Stich and Suresh, "SCAFFOLD: Stochastic controlled averaging for federated learning",
ICML 2020, algorithm 1, option II, with global learning rate 1. With control variates c of the server and c_i of a
client, all 0 at first, client i starts at y = x, the model that came down, and

1. takes K steps ``y <- y - lr (g_i(y) + c - c_i)``;
2. sends y and ``d_i = (x - y) / (K lr) - c``, and keeps ``c_i <- c_i + d_i``.

The server takes the mean y as x, and ``c <- c + |S| / N`` times the mean d_i of the cohort S. With fp32 a round costs
``8 (P + R)`` bytes a client down and up, an evaluation ``4 (P + R)``; control variates travel as `scaffold.values`,
rounded to the nearest, and c_i adds what the server read.

Departures: both means are weighted by samples (run.weighting); the paper's are plain. Gradients are clipped
(local.clip) before they are corrected, and contain the weight decay. Buffers have no control variates: they are 0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from ssfl_app.core.aggregation import Aggregator
from ssfl_app.core.algorithm import ClientAlgorithm, Payload, Reply, ServerContext, SparseStrategy, shared_buffers
from ssfl_app.core.means import WeightedMean
from ssfl_app.core.options import ConfigError, FromSettings, Section, choice
from ssfl_app.core.robust import distance
from ssfl_app.core.validation import stored
from ssfl_app.sparsity.layout import Layout, Vector, state_of
from ssfl_app.sparsity.values import VALUE_TYPES, Allowed, Arrays, SecondVector


@dataclass(frozen=True)
class ScaffoldOptions(Section):
    """Keys of the section ``scaffold``."""

    section = "scaffold"

    values: str = choice(*VALUE_TYPES, about="how control variates travel, both ways")

    def vector(self, layout: Layout) -> SecondVector:
        """Return how a control variate is written beside a model."""
        return SecondVector("control", self.values, layout.size)


class ScaffoldClient(ClientAlgorithm):
    """Corrects its gradients, and remembers its control variate."""

    stateful = True
    options = FromSettings(ScaffoldOptions)

    def train(self, payload: Payload) -> Payload:
        """Train with corrected gradients; return the model and the change of the control variate."""
        layout, model = self.context.layout, self.context.model
        mask, vector = self.load(payload), self.options.vector(layout)
        x, c, kept = layout.flatten(state_of(model)), vector.read(payload.arrays), self.load_client_state(payload)
        own = np.zeros_like(c) if kept is None else kept["control"]
        shift, steps = layout.unflatten(c - own), 0
        shifts = [(p, shift[name].to(p.device)) for name, p in model.named_parameters() if p.requires_grad]

        def correct(_: nn.Module) -> None:
            nonlocal steps
            steps += 1
            for parameter, by in shifts:
                if parameter.grad is not None:
                    parameter.grad += by

        loss = self.fit(payload.round, mask, before_step=correct)
        length = np.float32(steps * self.settings.local.rate(payload.round))
        change = (x - layout.flatten(state_of(model))) / length - c
        trained = dict(model.named_parameters(remove_duplicate=False))
        for name, span in layout.spans.items():
            if name not in trained:
                change[span] = 0
        reply, arrays = self.reply(payload, mask, loss), vector.write(change)
        self.save_client_state(payload, {"control": own + vector.read(arrays)})
        return Payload({**reply.arrays, **arrays}, reply.metadata)


class Scaffold(SparseStrategy):
    """Keeps the mean control variate beside the model."""

    name = "scaffold"
    client = ScaffoldClient
    options = FromSettings(ScaffoldOptions)
    uses_density = False

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        momentum = self.settings.local.momentum
        if momentum:
            raise ConfigError(f"local.momentum is {momentum}; it is 0 with strategy scaffold: c_i is a mean gradient")
        self._vector = self.options.vector(self.layout)
        self.control: Vector = np.zeros(self.layout.size, dtype=np.float32)
        self._down: tuple[Vector, Arrays] | None = None  # what was encoded, once for all clients

    def train_payload(self, round_: int, client: int) -> Payload:
        """Return the model and the control variate."""
        if self._down is None or self._down[0] is not self.control:
            self._down = self.control, shared_buffers(self._vector.write(self.control))
        return Payload({**super().train_payload(round_, client).arrays, **self._down[1]})

    def eval_payload(self, round_: int, client: int) -> Payload:
        """Return the model alone."""
        return super().train_payload(round_, client)

    def aggregator(self, round_: int) -> Aggregator:
        """Take the means of models and of changes."""
        models, changes, count = super().aggregator(round_), WeightedMean(self.layout.size), 0

        def add(reply: Reply) -> None:
            nonlocal count
            models.add(reply)
            changes.add(self._vector.read(reply.arrays), self.weight(reply))
            count += 1

        def finish() -> None:
            models.finish()
            self.control = self.control + np.float32(count / len(self.present(round_))) * changes.value()

        return Aggregator(add, finish)

    def answers(self, round_: int, question: str | None = None) -> Allowed:
        """Return the model and the change of the control variate."""
        return {**super().answers(round_, question), **self._vector.allowed()}

    def update_norm(self, reply: Reply) -> float | None:
        """Return the length of the model's update and of what the change of c_i does in a round's steps."""
        local = self.settings.local
        path = local.rate(reply.round) * local.epochs * math.ceil(reply.samples / local.batch_size)
        change = path * distance(self._vector.read(reply.arrays))
        return math.hypot(super().update_norm(reply) or 0.0, change)

    def check_trained(self, client: int, payload: Payload) -> None:
        """Refuse a change that is not whole or not finite, too."""
        super().check_trained(client, payload)
        self._vector.read(payload.arrays)

    def state_dict(self) -> Arrays:
        """Return all that `load_state_dict` needs: the control variate too."""
        return super().state_dict() | {"control": self.control}

    def load_state_dict(self, round_: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue after `round_`."""
        super().load_state_dict(round_, arrays)
        self.control = stored(arrays, "control", "float32", self.layout.size)
