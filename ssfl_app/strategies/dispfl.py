"""DisPFL: peers with sparse models of their own, who take the mean of their neighbours' and move their masks.

Dai, Shen, He, Tian and Tao, "DisPFL: Towards communication-efficient personalized federated learning via
decentralized sparse training", ICML 2022, algorithm 1. There is no server: every client trains in every round. Client
i starts with ``w0`` under a random mask m_i of its own, with Erdos-Renyi-Kernel densities. In round t of T it

1. takes the models w_j and masks m_j with which its neighbours (section ``gossip``) and itself last trained, and
   starts from ``m_i * sum_j w_j / sum_j m_j``, 0 where nobody owns a coordinate;
2. trains inside m_i: that is the model it is tested with;
3. moves its mask: of the n alive weights of each layer the ``ceil(d n)`` of smallest magnitude die and as many dead
   ones come alive, ``d = 0.25 (1 + cos(pi (t - 1) / T))``. Who has just died may come back at once, so a layer that
   was dense stays dense. The new mask counts from the next round on.

The server here only relays. It keeps every client's last model and mask, takes the mean for each client and sends it
under the client's mask; what the exchange would cost between peers is counted as ``bytes_peer``. Up go the values
under the old mask, which the server knows, and the bitmap of the new one: arrays and bytes of `BitmapAndValues`.

With A alive of P prunable coordinates and R others, per client and round, fp32: down = up = evaluation =
``4 (A + R) + ceil(P / 8)`` bytes, and between peers as much from each neighbour.

Departures: who comes alive is drawn at random (dispfl.regrow "random"), as in all published scripts; the paper ranks
by the gradient of one minibatch ("gradient"; the minibatch is not augmented). mask.density is over the prunable
weights, as everywhere here, and the rest is dense; the public code counts biases and norms in. The mean is unweighted
whatever run.weighting says: peers do not tell each other how much they hold. The accuracy after the mean and before
training, which that code logs too, is not measured. There is no global model, and only personal accuracy; the model
that a run leaves is the mean over the owners among all clients, which nobody uses. A client whose answer is lost
takes part with the last model the server took.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ssfl_app.core.aggregation import Aggregator
from ssfl_app.core.algorithm import Payload, Query, Reply, ServerContext
from ssfl_app.core.options import FromSettings, Section, anything, choice
from ssfl_app.core.robust import distance, there
from ssfl_app.core.validation import check_number
from ssfl_app.seeding import generator
from ssfl_app.sparsity.codec import BitmapAndValues, MaskedValues, nbytes, read_mask
from ssfl_app.sparsity.densities import Counts, erk, uniform
from ssfl_app.sparsity.dynamic import cosine_drop, drop, grow, random_mask
from ssfl_app.sparsity.layout import Layout, State, Vector, state_of
from ssfl_app.sparsity.mask import Mask, keep_count
from ssfl_app.sparsity.values import Arrays, PayloadError
from ssfl_app.strategies.shared.client_masks import ClientMasks, OwnMaskClient
from ssfl_app.strategies.shared.gossip import GossipOptions, neighbours

FIRST_DROP = 0.5
"""Share of the alive weights that die in round 1."""


@dataclass(frozen=True)
class DisPflOptions(Section):
    """Keys of the section ``dispfl``."""

    section = "dispfl"

    densities: str = choice("erk", "uniform", about="how mask.density is spread over the layers of a client's mask")
    same_initial: bool = anything("true or false", False, "true: all clients start with the same mask")
    regrow: str = choice(
        "random", "gradient", about="which dead weights come alive, as published code or paper have it"
    )
    static: bool = anything("true or false", False, "true: masks stay as they were drawn")


class DisPflClient(OwnMaskClient):
    """Trains inside the mask that came down, and says under which one it wants to train next."""

    down = BitmapAndValues
    up = BitmapAndValues
    options = FromSettings(DisPflOptions)

    def train(self, payload: Payload) -> Payload:
        """Return the trained values under the mask that came down, and the bitmap of the next mask."""
        round_ = payload.round
        mask = self.load(payload)
        reply = self.reply(payload, mask, self.fit(round_, mask))
        return Payload({**reply.arrays, "mask": self._moved(round_, mask).packed()}, reply.metadata)

    def _moved(self, round_: int, mask: Mask) -> Mask:
        """Return the next mask, by the weights on the workbench."""
        options, run = self.options, self.settings.run
        if options.static:
            return mask
        site, drop_fraction = self.context, cosine_drop(FIRST_DROP, round_ - 1, run.rounds)
        counts = {name: math.ceil(drop_fraction * alive) for name, alive, _ in mask.layers()}
        left = drop(mask, np.abs(site.layout.flatten_prunable(state_of(site.model))), counts)
        rng = generator(run.seed, "regrow", round_, site.client_id)
        if options.regrow == "random":
            return grow(left, counts, rng)
        size = min(self.settings.local.batch_size, len(site.train))
        batch = site.train.take(rng.choice(len(site.train), size, replace=False))
        gradient = site.trainer.gradient(site.model, batch)
        return grow(left, counts, np.abs(site.layout.flatten_prunable(gradient)))


class DisPfl(ClientMasks):
    """Relays. `masks` are those of the next training; `models` carry the ones they were trained under."""

    name = "dispfl"
    client = DisPflClient
    options = FromSettings(DisPflOptions)
    gossip = FromSettings(GossipOptions)
    full_participation = True
    has_global_model = False

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        self._counts = layer_counts(self.layout, self.settings.mask.density, self.options.densities)
        self._codec = BitmapAndValues(self.settings.wire.up_values)  # of `models`
        self._values = MaskedValues(self.settings.wire.up_values)
        self.models: list[Arrays] = []
        self._sent: dict[int, Mask] = {}  # client -> mask of its last message
        self._present = self.present(0)
        self._consensus: State | None = None

    def alive(self) -> int:
        """Return the sum over the layers."""
        return sum(layer_counts(self.layout, self.settings.mask.density, self.options.densities).values())

    def before_training(self, ask: Query) -> None:
        """Draw every client's mask, and give it its part of the initial weights."""
        layout, run, same = self.layout, self.settings.run, self.options.same_initial
        drawn = [0 if same else client for client in range(run.clients)]
        self.masks = [random_mask(layout, self._counts, generator(run.seed, "dispfl-mask", k)) for k in drawn]
        self._sent = dict(enumerate(self.masks))
        self.models = [self._codec.encode(self.layout, self.state, mask) for mask in self.masks]

    def train_payload(self, round_: int, client: int) -> Payload:
        """Return the mean over the owners among the client and its neighbours, under the client's mask."""
        peers = neighbours(self.settings, round_, client)
        self.peer_bytes += sum(nbytes(self.models[peer]) for peer in peers)
        mean = self.layout.unflatten(self._mean(sorted([client, *peers])))
        return self._under(round_, client, mean, self.masks[client])

    def eval_payload(self, round_: int, client: int) -> Payload:
        """Return the client's own model under the mask it was trained in."""
        state, mask = self._codec.decode(self.models[client], self.layout, self.mask)
        return self._under(round_, client, state, mask)

    def mask_for(self, client: int) -> Mask:
        """Return the mask of the client's last message: the next one for training, the old one for a test."""
        return self._sent[client]

    def check_trained(self, client: int, payload: Payload) -> None:
        """Raise PayloadError unless values fit the old mask and the new one has as many alive in each layer."""
        check_number(payload, "loss")
        self.check_samples(payload)
        old, new = self.masks[client], read_mask(payload.arrays, self.layout)
        self._values.check(payload.arrays, self.layout, old)
        for (name, before, _), (_, after, _) in zip(old.layers(), new.layers(), strict=True):
            if after != before:
                raise PayloadError(f"the new mask has {after} alive weights in {name}; it must keep {before}")

    def update_norm(self, reply: Reply) -> float | None:
        """Return how far a model is from the mean of all, under the mask that it was trained in."""
        old = self.masks[reply.client]
        mean = there(self.layout, self.model(), old.transmitted)
        return distance(self._values.vector(reply.arrays, self.layout, old), mean)

    def aggregator(self, round_: int) -> Aggregator:
        """Keep each client's model under its old mask, and its new mask."""

        def add(reply: Reply) -> None:
            client, old = reply.client, self.masks[reply.client].packed()
            self.models[client] = {name: reply.arrays[name] for name in self.models[client]} | {"mask": old}
            self.masks[client] = read_mask(reply.arrays, self.layout)

        def finish() -> None:
            self._present, self._consensus = self.present(round_), None

        return Aggregator(add, finish)

    def model(self) -> State:
        """Return the mean over the owners among all clients that take part."""
        if self._consensus is None:
            self._consensus = self.layout.unflatten(self._mean(self._present))
        return self._consensus

    def state_dict(self) -> Arrays:
        """Return all that `load_state_dict` needs: the models too."""
        models = {f"model/{k}/{n}": array for k, arrays in enumerate(self.models) for n, array in arrays.items()}
        return super().state_dict() | models

    def load_state_dict(self, round_: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue after `round_`."""
        super().load_state_dict(round_, arrays)
        self.models = [
            {key.rpartition("/")[2]: array for key, array in arrays.items() if key.startswith(f"model/{k}/")}
            for k in range(self.settings.run.clients)
        ]
        for model, mask in zip(self.models, self.masks, strict=True):
            self._codec.check(model, self.layout, mask)
        self._sent = dict(enumerate(self.masks))
        self._present, self._consensus = self.present(round_), None

    def _under(self, round_: int, client: int, state: State, mask: Mask) -> Payload:
        self._sent[client] = mask
        return Payload(self.codec_down(round_).encode(self.layout, state, mask))

    def _mean(self, clients: Iterable[int]) -> Vector:
        """Return the unweighted mean over the owners of each coordinate, 0 where there are none.

        `clients` is ascending: the sum, in float64, does not depend on who answered first.
        """
        total, owners = np.zeros(self.layout.size), np.zeros(self.layout.size, dtype=np.int32)
        for client in clients:
            mask = read_mask(self.models[client], self.layout)
            model = np.zeros(self.layout.size, dtype=np.float32)
            model[mask.transmitted] = self._values.vector(self.models[client], self.layout, mask)
            total += model
            owners += mask.transmitted
        return np.asarray(total / np.maximum(owners, 1), dtype=np.float32)


def layer_counts(layout: Layout, density: float, how: str) -> Counts:
    """Return how many weights of each prunable tensor are alive; `density` is over all of these."""
    if how == "uniform":
        return uniform(layout, density)
    dense = layout.size - layout.prunable_size
    # `erk` counts the dense remainder in.
    return erk(layout, (keep_count(density, layout.prunable_size) + dense) / layout.size)
