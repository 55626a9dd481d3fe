"""Local masks: FedAvg in which every client trains inside a mask of its own, fixed before round 1.

The controls of Ohib et al., TMLR 2026, arXiv 2405.09037 (version 1, section A.3): what SSFL would be without the
exchange of scores.

- `local-saliency`: client k scores its weights as in SSFL and keeps its own top, m_k; it sends the bitmap once.
- `random-local`: m_k is uniformly random, drawn from the seed by both ends; no bitmap travels.

Client k gets ``m_k * w``, trains inside m_k and sends the alive values. The server's mean of a coordinate is

- "overlap" (local-mask.mean): over the clients whose mask holds it; the old value where nobody's does;
- "zeros": over all of the cohort, a client that does not hold it counting as 0. That is what the author's code does,
  and it shrinks every weight by the share of clients that hold it.

Client k is tested with ``m_k * w``; central accuracy is that of the dense w.

Departures: layers are ranked together unless mask.scope is "layer" (the author's random masks are exact layer by
layer). A client that was lost before it told its mask gets the random one.
"""

from dataclasses import dataclass

from ssfl_app.core.aggregation import Aggregator, ReplyOverlapMean, ReplyZerosMean
from ssfl_app.core.algorithm import ClientAlgorithm, Metadata, Payload, Query, Reply
from ssfl_app.core.options import FromSettings, Section, Settings, choice
from ssfl_app.seeding import generator
from ssfl_app.sparsity.codec import BitmapOnly, MaskedValues, read_mask
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask, keep_count
from ssfl_app.sparsity.values import Allowed, PayloadError
from ssfl_app.strategies.shared.client_masks import ClientMasks
from ssfl_app.strategies.shared.scoring import ScoringClient, snip_scores


@dataclass(frozen=True)
class LocalMaskOptions(Section):
    """Keys of the section ``local-mask``."""

    section = "local-mask"

    mean: str = choice("overlap", "zeros", about="over the clients that hold a weight, or over all")


def random_mask(layout: Layout, settings: Settings, client: int) -> Mask:
    """Return the random mask of a client."""
    rng = generator(settings.run.seed, "random-local", client)
    return Mask.random(layout, settings.mask.density, rng, settings.mask.scope)


class LocalMaskClient(ClientAlgorithm):
    """Trains inside its own mask, which it draws from the seed if nobody told it another one."""

    down = MaskedValues
    up = MaskedValues

    def known_mask(self, payload: Payload, digest: str) -> Mask:
        """Return the mask with this digest; the client's random one needs no telling."""
        if "mask" not in payload.arrays and self.context.mask(digest) is None:
            own = random_mask(self.context.layout, self.settings, self.context.client_id)
            if own.digest == digest:  # if another one is meant, the held one stays
                self.context.memory.keep(own.digest, own.packed())
        return super().known_mask(payload, digest)

    def evaluate(self, payload: Payload) -> Metadata:
        """Test the client's own part of the global model."""
        self.load(payload)
        return self.tested(payload, "personal_accuracy")


class LocalSaliencyClient(ScoringClient, LocalMaskClient):
    """Finds its own mask."""

    query_types = ("own_mask",)

    def answer_query(self, question: str, payload: Payload) -> Payload:
        """Return the bitmap of the client's own top scores, and keep it."""
        if question not in self.query_types:
            return super().answer_query(question, payload)
        site, wanted, state = self.context, self.settings.mask, self.initial_weights(payload)
        scores = snip_scores(self, state)
        own = Mask.top(site.layout, scores, wanted.density, wanted.scope, min_per_layer=wanted.min_per_layer)
        site.memory.keep(own.digest, own.packed())
        return Payload(BitmapOnly().encode(site.layout, state, own), {"samples": len(site.train)})


class RandomLocal(ClientMasks):
    """A random mask for every client."""

    name = "random-local"
    client = LocalMaskClient
    options = FromSettings(LocalMaskOptions)

    def before_training(self, ask: Query) -> None:
        """Both ends draw the masks."""
        self.masks = [random_mask(self.layout, self.settings, client) for client in range(self.settings.run.clients)]
        for client, mask in enumerate(self.masks):
            self.messenger.mark_mask_held(client, mask)

    def aggregator(self, round_: int) -> Aggregator:
        """Take the mean, over those who hold a coordinate or over all."""
        mean = ReplyZerosMean(self) if self.options.mean == "zeros" else ReplyOverlapMean(self)

        def finish() -> None:
            self.state = self.layout.unflatten(mean.finish(self.state)[0])

        return Aggregator(mean.add, finish)


class LocalSaliency(RandomLocal):
    """Every client's own top scores."""

    name = "local-saliency"
    client = LocalSaliencyClient

    def alive(self) -> int:
        """Return how many weights each client's ranking leaves alive; refuse a floor that it cannot hold."""
        return self.top_count(self.settings.mask.density)

    def before_training(self, ask: Query) -> None:
        """Ask every client for its mask."""
        super().before_training(ask)

        def take(reply: Reply) -> None:
            self.masks[reply.client] = read_mask(reply.arrays, self.layout)
            self.messenger.mark_mask_held(reply.client, self.masks[reply.client])

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
