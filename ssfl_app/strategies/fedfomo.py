"""FedFomo: every client mixes the models of the peers that lower its own validation loss.

Zhang, Sapra, Fidler, Yeung and Alvarez, "Personalized federated learning with first order model optimization", ICLR
2021; in the form of the public code of DisPFL. Client i holds out a part V of its images. In a round it

1. trains its own model t on the others: t';
2. gives each candidate j, t' and the peers' models of the round before, the weight
   ``w_j = (L_V(t) - L_V(j)) / ||j - t||``, 0 at distance 0, and takes ``t + sum_j w_j+ (j - t) / sum_j w_j+`` with
   ``w+ = max(0, w)`` as its model;
3. adds the peers' w_j to its preferences p_i.

With probability 1 - fedfomo.epsilon its fedfomo.peers peers are those it prefers most, else random ones. There is no
global model, and only personal accuracy; the model that a run leaves is the uniform mean of all models.

The server relays: it keeps all models and p, chooses the peers, and sends their models; a client returns its model
and the peers' w_j. With n peers that is ``4 (P + R) n`` bytes down and ``4 (P + R) + 4 n`` up a client and round with
fp32, and nothing down for a test. `peer_bytes` is what went down. p has 8 K**2 bytes beside the models.

Departures: if no candidate helps, the client keeps t' (fedfomo.keep-local; false is the published rule: it keeps t,
and the training of that round is lost). A peer is one that the server has a model of, so nobody is sent anything in
round 1, where all peers hold w0 and weigh 0. p starts at 0 and grows by this round's weights only (that code adds the
last known weights of all clients again in every round), and ties are broken by chance. epsilon stays constant, as
there; the authors' own code lowers it. A weight that is no finite number, of a model whose loss overflows, counts as
0. run.weighting changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ssfl_app.core.aggregation import Aggregator
from ssfl_app.core.algorithm import ClientAlgorithm, Metadata, Payload, Reply, Samples, ServerContext, shared_buffers
from ssfl_app.core.options import FromSettings, Section, Settings, anything, at_least, fraction, option
from ssfl_app.seeding import generator
from ssfl_app.sparsity.codec import Dense
from ssfl_app.sparsity.layout import Vector, load_state, state_of
from ssfl_app.sparsity.values import Allowed, Arrays, PayloadError, read_array
from ssfl_app.strategies.shared.fine_tuning import held_out, held_out_of
from ssfl_app.strategies.shared.gossip import PeerModelServer


@dataclass(frozen=True)
class FedFomoOptions(Section):
    """Keys of the section ``fedfomo``."""

    section = "fedfomo"

    peers: int = at_least(1, 10, "whose models a client gets to judge; at most all others")
    epsilon: float = option(
        "a number from 0 to 1",
        lambda value: 0 <= value <= 1,
        0.5,
        "how often its peers are random ones rather than those it prefers",
    )
    validation: float = fraction(0.1, "share of a client's images that it judges models on and does not train on")
    keep_local: bool = anything(
        "true or false", True, "no model helps: keep what was trained; false, as published: the model before that"
    )


class FedFomoClient(ClientAlgorithm):
    """Keeps its own model, and judges those of its peers."""

    stateful = True
    options = FromSettings(FedFomoOptions)

    @classmethod
    def uses(cls, settings: Settings) -> int:
        """Return the tests of the peers' models too."""
        return super().uses(settings) + FedFomoOptions.from_settings(settings).peers

    @classmethod
    def trained(cls, settings: Settings, images: int) -> int:
        """Return the images that are not held out."""
        return images - held_out_of(images, FedFomoOptions.from_settings(settings).validation)

    def train(self, payload: Payload) -> Payload:
        """Train the client's model, mix it with what came down, and return it with the peers' weights."""
        site, options = self.context, self.options
        training, validation = held_out(self, options.validation)
        site.enough(len(validation), "a judgement of other models (fedfomo.validation)")
        start = site.layout.flatten(self.personal_model(payload))
        before = self._loss(start, validation)  # and `start` is on the workbench
        loss = self.fit(payload.round, data=training)
        candidates = [site.layout.flatten(state_of(site.model)), *self._peers(payload)]
        weights = [weight(start, before, other, self._loss(other, validation)) for other in candidates]
        own = mixed(start, candidates, weights)
        if own is None:
            own = candidates[0] if options.keep_local else start
        self.save_client_state(payload, {"model": own})
        reply = self.reply(payload, site.dense, loss, site.layout.unflatten(own))
        return Payload({**reply.arrays, "preference": np.array(weights[1:], dtype=np.float32)}, reply.metadata)

    def evaluate(self, payload: Payload) -> Metadata:
        """Test the client's own model."""
        load_state(self.context.model, self.personal_model(payload))
        return self.tested(payload, "personal_accuracy")

    def _loss(self, model: Vector, validation: Samples) -> float:
        load_state(self.context.model, self.context.layout.unflatten(model))
        return self.context.trainer.evaluate(self.context.model, validation)[0]

    def _peers(self, payload: Payload) -> list[Vector]:
        codec, models = Dense(self.settings.wire.down_values), dict[int, Arrays]()
        for key, array in payload.arrays.items():
            name, _, place = key.rpartition(".")
            models.setdefault(int(place), {})[name] = array
        return [codec.vector(models[place], self.context.layout, self.context.dense) for place in sorted(models)]


def weight(start: Vector, loss: float, other: Vector, other_loss: float) -> float:
    """Return by how much the loss falls from `start` to the other model, for each unit of distance."""
    distance = float(np.linalg.norm(other.astype(np.float64) - start))
    slope = (loss - other_loss) / distance if distance else 0.0
    return slope if np.isfinite(slope) else 0.0


def mixed(start: Vector, others: list[Vector], weights: list[float]) -> Vector | None:
    """Return `start` moved towards the models of positive weight; None if there is none."""
    total = sum(max(0.0, w) for w in weights)
    if not total:
        return None
    moved = start.astype(np.float64)
    for other, w in zip(others, weights, strict=True):
        if w > 0:
            moved += w / total * (other.astype(np.float64) - start)
    return moved.astype(np.float32)


class FedFomo(PeerModelServer):
    """The network of the peers, and their preferences."""

    name = "fedfomo"
    client = FedFomoClient
    has_global_model = False
    options = FromSettings(FedFomoOptions)

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        self.preferences = np.zeros((self.settings.run.clients, self.settings.run.clients))
        self._sent: dict[int, list[int]] = {}  # client -> whose models it got in this round
        self._relayed: dict[int, Arrays] = {}

    def peers(self, round_: int, client: int) -> list[int]:
        """Return the clients whose models this one gets, ascending."""
        rng = generator(self.settings.run.seed, "fedfomo", round_, client)
        explores = rng.random() < self.options.epsilon
        others = rng.permutation([other for other in self.heard if other != client]).astype(np.int64)
        if not explores:
            others = others[np.argsort(-self.preferences[client, others], kind="stable")]
        return sorted(int(other) for other in others[: self.options.peers])

    def train_payload(self, round_: int, client: int) -> Payload:
        """Return the peers' models, one after the other."""
        self._sent[client] = self.peers(round_, client)
        models = [self._encoded_last(round_, other) for other in self._sent[client]]
        payload = Payload({f"{name}.{i}": array for i, model in enumerate(models) for name, array in model.items()})
        self.peer_bytes += payload.nbytes
        return payload

    def aggregator(self, round_: int) -> Aggregator:
        """Keep the models and add up the preferences; the state becomes the mean of the models."""
        self._relayed, kept = {}, super().aggregator(round_)

        def add(reply: Reply) -> None:
            kept.add(reply)
            self.preferences[reply.client, self._sent[reply.client]] += reply.arrays["preference"]

        return Aggregator(add, kept.finish)

    def eval_payload(self, round_: int, client: int) -> Payload:
        """Return nothing: the client tests its own model."""
        return Payload()

    def answers(self, round_: int, question: str | None = None) -> Allowed:
        """Return the model and a weight for each peer."""
        return {**super().answers(round_, question), "preference": (np.float32, self.settings.run.clients)}

    def check_trained(self, client: int, payload: Payload) -> None:
        """Raise PayloadError unless a finite weight came for each peer."""
        super().check_trained(client, payload)
        preference = read_array(payload.arrays, "preference", np.float32, len(self._sent[client]))
        if not np.isfinite(preference).all():
            raise PayloadError("preference must be finite")

    def state_dict(self) -> Arrays:
        """Return all that `load_state_dict` needs: the preferences too."""
        return super().state_dict() | {"preferences": self.preferences.ravel()}

    def load_state_dict(self, round_: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue after `round_`."""
        super().load_state_dict(round_, arrays)
        self.preferences = np.array(arrays["preferences"], dtype=np.float64).reshape(self.preferences.shape)

    def _encoded_last(self, round_: int, client: int) -> Arrays:
        # Passed on as it came if both directions have one value type; each is serialised once, whoever gets it.
        if self.settings.wire.up_values == self.settings.wire.down_values:
            return self.last(client)
        if client not in self._relayed:
            state = self.layout.unflatten(self.last_vector(client))
            self._relayed[client] = shared_buffers(self.codec_down(round_).encode(self.layout, state, self.mask))
        return self._relayed[client]
