"""What methods share in which every client has a mask, and so a model, of its own."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ssfl_app.core.aggregation import Aggregator, ReplyOverlapMean, ReplyZerosMean
from ssfl_app.core.algorithm import ClientAlgorithm, Metadata, Payload, Query, Reply, ServerContext, SparseStrategy
from ssfl_app.core.options import Settings
from ssfl_app.core.strategy import density_pair
from ssfl_app.seeding import generator
from ssfl_app.sparsity.codec import BitmapOnly, MaskedValues, read_mask
from ssfl_app.sparsity.layout import Layout, State, Vector
from ssfl_app.sparsity.mask import Mask, keep_count
from ssfl_app.sparsity.values import Allowed, Arrays, PayloadError
from ssfl_app.strategies.shared.scoring import ScoringClient, ranked


def random_mask(layout: Layout, settings: Settings, client: int) -> Mask:
    """Return the random mask of a client."""
    rng = generator(settings.run.seed, "random-local", client)
    return Mask.random(layout, settings.mask.density, rng, settings.mask.scope)


class OwnMaskClient(ClientAlgorithm):
    """A client to whom its own model comes down."""

    def evaluate(self, payload: Payload) -> Metadata:
        """Test what came down as the client's own model."""
        self.load(payload)
        return self.tested(payload, "personal_accuracy")


class LocalMaskClient(OwnMaskClient):
    """Trains inside a mask that stays; it draws it from the seed if nobody told it another one."""

    down = MaskedValues
    up = MaskedValues

    def known_mask(self, payload: Payload, digest: str) -> Mask:
        """Return the mask with this digest; the client's random one needs no telling."""
        site = self.context
        if digest != site.dense.digest and "mask" not in payload.arrays and site.mask(digest) is None:
            own = random_mask(site.layout, self.settings, site.client_id)
            if own.digest == digest:  # if another one is meant, the held one stays
                site.memory.keep(own.digest, own.packed())
        return super().known_mask(payload, digest)


class RankingClient(ScoringClient, LocalMaskClient):
    """Finds its own mask: of the weights that it scores highest."""

    query_types = ("own_mask",)

    def scores(self, state: State) -> Vector:
        """Return a score of each prunable weight of `state`, float32, shape (prunable,): larger = keep."""
        raise NotImplementedError

    def answer_query(self, question: str, payload: Payload) -> Payload:
        """Return the bitmap of the client's own top scores, and keep it."""
        if question not in self.query_types:
            return super().answer_query(question, payload)
        site, state = self.context, self.initial_weights(payload)
        own = ranked(site.layout, self.scores(state), self.settings.mask)
        site.memory.keep(own.digest, own.packed())
        return Payload(BitmapOnly().encode(site.layout, state, own), {"samples": len(site.train)})


class ClientMasks(SparseStrategy):
    """Each client gets its part of the global model; `masks` has one a client, dense at first."""

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        self.masks = [Mask.dense(self.layout)] * self.settings.run.clients

    def mask_for(self, client: int) -> Mask:
        """Return the client's own mask."""
        return self.masks[client]

    def densities(self) -> tuple[float, float]:
        """Return the means over the clients' masks."""
        return density_pair(*self.masks)

    def state_dict(self) -> Arrays:
        """Return all that `load_state_dict` needs: the masks too."""
        return super().state_dict() | {f"mask/{k}": mask.packed() for k, mask in enumerate(self.masks)}

    def load_state_dict(self, round_: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue after `round_`."""
        super().load_state_dict(round_, arrays)
        packed = [np.asarray(arrays[f"mask/{k}"], dtype=np.uint8) for k in range(self.settings.run.clients)]
        self.masks = [Mask.unpack(self.layout, bitmap) for bitmap in packed]


class LocalMasks(ClientMasks):
    """Masks that stay as they were before round 1: random ones. The server averages over those who hold a weight."""

    client = LocalMaskClient

    def before_training(self, ask: Query) -> None:
        """Both ends draw the masks."""
        for client in range(self.settings.run.clients):
            self.give(client, random_mask(self.layout, self.settings, client))

    def give(self, client: int, mask: Mask) -> None:
        """Note the mask of a client that made it itself."""
        self.masks[client] = mask
        self.messenger.mark_mask_held(client, mask)

    def mean(self) -> ReplyOverlapMean | ReplyZerosMean:
        """Return what takes the mean of a round."""
        return ReplyOverlapMean(self)

    def aggregator(self, round_: int) -> Aggregator:
        """Take the mean of what clients hold."""
        mean = self.mean()

        def finish() -> None:
            self.state = self.layout.unflatten(mean.finish(self.state)[0])

        return Aggregator(mean.add, finish)


class RankedMasks(LocalMasks):
    """Masks that clients tell before round 1; one that was lost before it told its own has the random one."""

    client = RankingClient

    def alive(self) -> int:
        """Return how many weights each client's ranking leaves alive; refuse a floor that it cannot hold."""
        return self.top_count(self.settings.mask.density)

    def before_training(self, ask: Query) -> None:
        """Ask every client for its mask."""
        super().before_training(ask)

        def take(reply: Reply) -> None:
            self.give(reply.client, read_mask(reply.arrays, self.layout))

        ask("own_mask", range(self.settings.run.clients), self._check_mask, take)

    def answers(self, round_: int, question: str | None = None) -> Allowed:
        """Return the bitmap for a question."""
        return super().answers(round_) if question is None else BitmapOnly().allowed(self.layout)

    def _check_mask(self, client: int, payload: Payload) -> None:
        self.check_samples(payload)
        mask, wanted = read_mask(payload.arrays, self.layout), self.settings.mask
        if wanted.scope == "global" and mask.count != keep_count(wanted.density, self.layout.prunable_size):
            raise PayloadError(f"a mask has {mask.count} alive weights; mask.density is {wanted.density}")
        for name, alive, size in mask.layers() if wanted.scope == "layer" else ():
            if alive != max(keep_count(wanted.density, size), min(wanted.min_per_layer, size)):
                raise PayloadError(f"a mask has {alive} alive weights in {name}; mask.density is {wanted.density}")
