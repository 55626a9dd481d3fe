"""Peers without a server: who takes whose model in a round, and the relay that stands in for their network.

The methods of peers run here as every other one does, between a server and its clients. The server keeps the last
model of each client and hands them on; what it says with `peer_bytes` is what the peers would pay among themselves.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ssfl_app.core.aggregation import Aggregator
from ssfl_app.core.algorithm import Query, Reply, ServerContext, SparseStrategy
from ssfl_app.core.options import Section, Settings, at_least, choice
from ssfl_app.seeding import generator
from ssfl_app.sparsity.codec import Dense
from ssfl_app.sparsity.layout import Vector
from ssfl_app.sparsity.values import Arrays


@dataclass(frozen=True)
class GossipOptions(Section):
    """Keys of the section ``gossip``."""

    section = "gossip"

    topology: str = choice(
        "random", "ring", "full", about="whose models a client takes; random: others in every round"
    )
    neighbours: int = at_least(1, 10, 'how many with "random"; at most all others')


def neighbours(settings: Settings, round_: int, client: int) -> list[int]:
    """Return the clients whose models this one takes in a round: ascending, without itself, of those who take part.

    "random" draws gossip.neighbours of the others anew in every round (all of them if they are fewer), each client
    for itself: that i takes from j does not mean that j takes from i. "ring" is the clients before and after, "full"
    everybody; neither reads gossip.neighbours.
    """
    options, run = GossipOptions.from_settings(settings), settings.run
    present = settings.shift.present(run.clients, round_)
    others = [other for other in range(present) if other != client]
    if options.topology == "full":
        return others
    if options.topology == "ring":
        return sorted({(client - 1) % present, (client + 1) % present} - {client})
    chosen = generator(run.seed, "gossip", round_, client).permutation(others)[: options.neighbours]
    return sorted(int(other) for other in chosen)


class PeerModelServer(SparseStrategy):
    """A server that keeps the last dense model of every client; `state` is their uniform mean, the consensus.

    A client's last model is the one of its last accepted reply, as the encoded arrays that came; before any, w0.

    Notes
    -----
    Memory: one encoded model a client (4 bytes a coordinate with fp32), in the server and in each snapshot, so 4.5 GB
    for 100 times ResNet-18, and once more while a snapshot is written; beside it what the messages of a round carry.
    """

    full_participation = True
    uses_density = False

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        self._codec = Dense(self.settings.wire.up_values)  # of clients' models
        self._first: Arrays = {}  # w0
        self._last: dict[int, Arrays] = {}  # of the clients that were heard of

    def before_training(self, ask: Query) -> None:
        """Nobody is asked: all clients start from w0."""
        self._first = self._codec.encode(self.layout, self.state, self.mask)

    @property
    def heard(self) -> list[int]:
        """The clients that have sent a model, ascending."""
        return sorted(self._last)

    def last(self, client: int) -> Arrays:
        """Return the client's last model, as it came up."""
        return self._last.get(client, self._first)

    def last_vector(self, client: int) -> Vector:
        """Return the client's last model, float32, shape (layout.size,)."""
        return self._codec.vector(self.last(client), self.layout, self.mask)

    def keep(self, reply: Reply) -> None:
        """Keep the model of a reply, and no arrays beside it, in place of the client's last one."""
        self._last[reply.client] = {name: reply.arrays[name] for name in self._first}

    def aggregator(self, round_: int) -> Aggregator:
        """Keep the models; the state becomes their mean."""

        def finish() -> None:
            self.state = self.layout.unflatten(self.mean(self.present(round_)))

        return Aggregator(self.keep, finish)

    def mean(self, clients: Iterable[int]) -> Vector:
        """Return the uniform mean of last models, float32, shape (layout.size,), summed in float64.

        Ascending, so that its bits depend on nothing but who they are.
        """
        total, chosen = np.zeros(self.layout.size), sorted(clients)
        for client in chosen:
            total += self.last_vector(client)
        total /= len(chosen)
        return total.astype(np.float32)

    def state_dict(self) -> Arrays:
        """Return all that `load_state_dict` needs: the models too."""
        models = {"first": self._first, **{str(client): self._last[client] for client in self.heard}}
        return super().state_dict() | {
            f"model/{k}/{name}": a for k, model in models.items() for name, a in model.items()
        }

    def load_state_dict(self, round_: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue after `round_`."""
        super().load_state_dict(round_, arrays)
        models: dict[str, Arrays] = {}
        for key in arrays:
            if key.startswith("model/"):
                _, whose, name = key.split("/")
                models.setdefault(whose, {})[name] = np.asarray(arrays[key])
        self._first = models.pop("first")
        self._last = {int(client): model for client, model in models.items()}
        for model in (self._first, *self._last.values()):
            self._codec.check(model, self.layout, self.mask)
