"""SpaFL: clients keep their weights, and only thresholds travel, one for each filter, under which it is pruned.

Kim, Saad, Debbah and Hong, "SpaFL: Communication-efficient federated learning with sparse models and low
computational overhead", NeurIPS 2024, arXiv 2406.00431. A filter is what makes one output of a layer: a channel of a
convolution, a unit of a linear layer. It computes if the mean |w| of its weights is above its threshold, else as if
they were 0 (`filter_thresholds`). All clients start from the same w0, with thresholds 0. Client k of the cohort

1. gets the global thresholds tau and moves each of its weights by how much that of its filter rose since the client
   saw them last: ``w_ij <- w_ij - sign(sum_j w_ij) (change of tau_i) / n``, with n the size of a kernel, or in a
   linear layer the inputs;
2. trains weights and thresholds together, from tau, on the loss + spafl.penalty * sum(exp(-tau));
3. sends its thresholds; the server takes their mean.

Each client is tested with its own weights, moved as in step 1, under the thresholds that it trained last. The density
is that of these models, as clients count their alive weights.

With F filters in all prunable tensors 4 F bytes travel a client each way, and 4 F down for a test, fp32.

Departures: of the paper we have the abstract and summaries; the rules above are those of its public code. That moves
the weights of all clients after each round; here a client makes up for what it missed when it next trains or is
tested, which is the same unless the sign of a sum changes in between. Its thresholds get no gradient of the loss in
the code for CIFAR-10 (what passes is more than 1 away from the step); here it goes straight through, as in that for
FMNIST. Means weigh by samples (run.weighting "uniform": as published). spafl.penalty does not rise over rounds, as
for CIFAR-10. A layer of which at most a hundredth of the filters is alive has its thresholds set to 0 after the step
(there: before the next one). Biases and norms stay at the client too, and dead filters keep them. There is no global
model: the one that a run leaves is w0, moved and pruned by the global thresholds, which nobody uses.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ssfl_app.core.aggregation import Aggregator
from ssfl_app.core.algorithm import (
    ClientAlgorithm,
    Metadata,
    Payload,
    Reply,
    ServerContext,
    SparseStrategy,
    shared_buffers,
)
from ssfl_app.core.means import WeightedMean
from ssfl_app.core.options import FromSettings, Section, at_least
from ssfl_app.core.robust import distance
from ssfl_app.core.validation import stored
from ssfl_app.sparsity.codec import ArrayMap, Codec
from ssfl_app.sparsity.layout import Layout, State, Vector, load_state, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import (
    Allowed,
    Arrays,
    PayloadError,
    allowed_values,
    check_values,
    read_values,
    write_values,
)
from ssfl_app.training.reparam import alive_filters, filter_thresholds, originals

COLLAPSED = 0.01
"""A layer of which no larger share of the filters is alive starts anew with thresholds of 0."""


@dataclass(frozen=True)
class SpaFlOptions(Section):
    """Keys of the section ``spafl``."""

    section = "spafl"

    penalty: float = at_least(0, 0.002, "alpha: weight of sum(exp(-threshold)) in the loss")


class Thresholds(Codec):
    """A threshold for each filter of each prunable tensor: a state of vectors (out,), by the tensors' names."""

    name = "thresholds"

    def encode(self, layout: Layout, state: State, mask: Mask) -> Arrays:
        """Return the thresholds, one tensor after the other."""
        return write_values(joined(layout, state), self.values, self.rng)

    def decode(self, arrays: ArrayMap, layout: Layout, mask: Mask) -> tuple[State, Mask]:
        """Return the thresholds, and the mask as it was."""
        return parted(layout, self.vector(arrays, layout)), mask

    def vector(self, arrays: ArrayMap, layout: Layout) -> Vector:
        """Return them as a vector, float32, shape (filters,)."""
        return read_values(arrays, self.values, filter_count(layout))

    def allowed(self, layout: Layout) -> Allowed:
        """Return the arrays that `encode` writes."""
        return allowed_values(self.values, filter_count(layout))

    def check(self, arrays: ArrayMap, layout: Layout, mask: Mask) -> None:
        """Raise PayloadError unless there is a finite threshold for each filter."""
        check_values(self.vector(arrays, layout))


def filters(layout: Layout) -> dict[str, int]:
    """Return how many filters each prunable tensor has."""
    shapes = dict(layout.shapes)
    return {name: shapes[name][0] for name in layout.prunable}


def filter_count(layout: Layout) -> int:
    """Return how many filters there are."""
    return sum(filters(layout).values())


def joined(layout: Layout, thresholds: Mapping[str, torch.Tensor]) -> Vector:
    """Return thresholds by tensor as one vector, float32, shape (filters,)."""
    return np.concatenate([thresholds[name].detach().cpu().numpy() for name in layout.prunable])


def parted(layout: Layout, thresholds: Vector) -> State:
    """Return a vector of thresholds, shape (filters,), by tensor."""
    counts = filters(layout)
    return dict(zip(counts, torch.split(torch.from_numpy(thresholds.copy()), list(counts.values())), strict=True))


def moved(weights: State, change: State) -> State:
    """Return a state whose filters went against the change of their thresholds, (out,) by tensor.

    ``w - sign(sum w) change / n`` for each filter; the paper's importance of parameters, as the public code has it.
    """
    found = dict(weights)
    for name, by in change.items():
        weight = weights[name]
        size = math.prod(weight.shape[2:]) if weight.ndim > 2 else weight.shape[1]
        direction = weight.flatten(1).sum(dim=1).sign()
        found[name] = weight - (direction * by / size).view(-1, *[1] * (weight.ndim - 1))
    return found


@torch.no_grad()
def restart_collapsed(weights: Mapping[str, torch.Tensor], thresholds: Mapping[str, torch.Tensor]) -> None:
    """Set the thresholds of layers that have collapsed to 0, in place."""
    for name, threshold in thresholds.items():
        threshold *= alive_filters(weights[name], threshold).float().mean() > COLLAPSED


class SpaFlClient(ClientAlgorithm):
    """Keeps its weights and trains them with the thresholds."""

    down = Thresholds
    up = Thresholds
    stateful = True
    reparametrises = True
    options = FromSettings(SpaFlOptions)

    def train(self, payload: Payload) -> Payload:
        """Move the weights, train them and the thresholds that came down, and return the thresholds."""
        site, layout = self.context, self.context.layout
        tau, mask = self.received(payload)
        weights, _ = self._own_model(payload, tau)
        seen = joined(layout, tau)
        restart_collapsed(weights, tau)
        load_state(site.model, weights)
        with filter_thresholds(site.model, tau) as trained:
            tensors = list(trained.values())

            def penalty(_: nn.Module) -> torch.Tensor:
                return self.options.penalty * torch.stack([torch.exp(-each).sum() for each in tensors]).sum()

            def restart(model: nn.Module) -> None:
                restart_collapsed(originals(model), trained)

            loss = self.fit(payload.round, penalty=penalty, after_step=restart)
        weights, thresholds = state_of(site.model), joined(layout, trained)
        alive = sum(
            int(alive_filters(weights[name], each).sum()) * weights[name][0].numel() for name, each in trained.items()
        )
        kept = {"model": layout.flatten(weights), "thresholds": thresholds, "seen": seen}
        self.save_client_state(payload, kept)
        reply = self.reply(payload, mask, loss, trained)
        return Payload(reply.arrays, {**reply.metadata, "alive": alive})

    def evaluate(self, payload: Payload) -> Metadata:
        """Test the client's own model."""
        tau, _ = self.received(payload)
        weights, thresholds = self._own_model(payload, tau)
        restart_collapsed(weights, thresholds)
        load_state(self.context.model, weights)
        with filter_thresholds(self.context.model, thresholds):
            return self.tested(payload, "personal_accuracy")

    def _own_model(self, payload: Payload, tau: State) -> tuple[State, State]:
        """Return the client's weights, moved by the change of the thresholds, and its own thresholds."""
        layout, kept = self.context.layout, self.load_client_state(payload)
        if kept is None:
            nothing = {name: torch.zeros_like(each) for name, each in tau.items()}
            return moved(self.context.initial_state(), tau), nothing
        seen = parted(layout, kept["seen"])
        change = {name: each - seen[name] for name, each in tau.items()}
        return moved(layout.unflatten(kept["model"]), change), parted(layout, kept["thresholds"])


class SpaFl(SparseStrategy):
    """Averages thresholds; `state` stays w0.

    Attributes
    ----------
    thresholds : float32 ndarray, shape (filters,)
        The global ones.
    counts : int64 ndarray, shape (clients,)
        Alive weights of each client's model when it last trained.
    """

    name = "spafl"
    client = SpaFlClient
    options = FromSettings(SpaFlOptions)
    uses_density = False
    has_global_model = False

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        self.thresholds: Vector = np.zeros(filter_count(self.layout), dtype=np.float32)
        self.counts = np.full(self.settings.run.clients, self.layout.prunable_size, dtype=np.int64)
        self._down: tuple[Vector, Arrays] | None = None  # what was encoded, once for all clients

    def train_payload(self, round_: int, client: int) -> Payload:
        """Return the global thresholds."""
        if self._down is None or self._down[0] is not self.thresholds:
            arrays = self.codec_down(round_).encode(self.layout, parted(self.layout, self.thresholds), self.mask)
            self._down = self.thresholds, shared_buffers(arrays)
        return Payload(self._down[1])

    def aggregator(self, round_: int) -> Aggregator:
        """Take the mean of the thresholds."""
        mean, counts = WeightedMean(self.thresholds.size), self.counts.copy()

        def add(reply: Reply) -> None:
            mean.add(self._sent(reply), self.weight(reply))
            counts[reply.client] = int(reply.metadata["alive"])

        def finish() -> None:
            self.thresholds, self.counts = mean.value(), counts

        return Aggregator(add, finish)

    def update_norm(self, reply: Reply) -> float | None:
        """Return how far thresholds are from the global ones."""
        return distance(self._sent(reply), [self.thresholds])

    def check_trained(self, client: int, payload: Payload) -> None:
        """Refuse as ever, and a number of alive weights that there cannot be."""
        super().check_trained(client, payload)
        alive, most = payload.metadata.get("alive"), self.layout.prunable_size
        if type(alive) is not int or not 0 <= alive <= most:
            raise PayloadError(f"alive is {alive!r}; it must be a whole number from 0 to {most}")

    def model(self) -> State:
        """Return w0 moved and pruned by the global thresholds, which nobody uses."""
        tau = parted(self.layout, self.thresholds)
        found = moved(self.state, tau)
        for name, threshold in tau.items():
            bits = alive_filters(found[name], threshold)
            found[name] = found[name] * bits.view(-1, *[1] * (found[name].ndim - 1))
        return found

    def densities(self) -> tuple[float, float]:
        """Return the means over the clients that take part."""
        layout = self.layout
        alive = float(self.counts[list(self.present(self._made_in_round))].mean())
        rest = layout.size - layout.prunable_size
        return alive / max(1, layout.prunable_size), (alive + rest) / max(1, layout.size)

    def state_dict(self) -> Arrays:
        """Return all that `load_state_dict` needs: thresholds and counts too."""
        return super().state_dict() | {"thresholds": self.thresholds, "alive": self.counts}

    def load_state_dict(self, round_: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue after `round_`."""
        super().load_state_dict(round_, arrays)
        self.thresholds = stored(arrays, "thresholds", "float32", self.thresholds.size)
        self.counts = stored(arrays, "alive", "int64", self.counts.size).copy()

    def _sent(self, reply: Reply) -> Vector:
        codec = self.codec_up(reply.round)
        assert isinstance(codec, Thresholds)
        return codec.vector(reply.arrays, self.layout)
