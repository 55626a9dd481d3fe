"""What methods share in which every client has a mask of its own that starts dense and only loses weights.

Client k gets ``m_k * w`` and sends its weights with the bitmap of the mask that they carry, which may be smaller than
the one that came down. The server takes each coordinate's mean over the clients whose weights carry it, keeps the old
value where there are none, and knows m_k from then on. Masks go down only to clients that lost theirs; the first one,
under which everything is alive, never does.
"""

import math
from fractions import Fraction

import numpy as np

from ssfl_app.core.aggregation import Aggregator, ReplyOverlapMean
from ssfl_app.core.algorithm import Payload, Reply, ServerContext
from ssfl_app.core.options import ConfigError
from ssfl_app.sparsity.codec import BitmapAndValues, MaskedValues, read_mask
from ssfl_app.sparsity.dynamic import drop
from ssfl_app.sparsity.layout import state_of
from ssfl_app.sparsity.mask import Mask, keep_count
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.strategies.shared.client_masks import ClientMasks, OwnMaskClient


class IterativePruningClient(OwnMaskClient):
    """Holds its own mask. Subclasses say when weights are pruned."""

    down = MaskedValues
    up = BitmapAndValues

    def pruned(self, mask: Mask, step: float) -> Mask:
        """Return `mask` without the share `step` of its weights in each layer: the smallest on the workbench.

        Rounded down in each layer. Near mask.density the share shrinks, so that the mask never falls below it. What
        rounding then leaves over, less than a weight a layer, stays: nobody prunes, or rewinds, for that little.
        """
        layout = self.context.layout
        spare = mask.count - keep_count(self.settings.mask.density, layout.prunable_size)
        if spare < len(layout.prunable):
            return mask
        share = min(Fraction(repr(step)), Fraction(spare, mask.count))
        counts = {name: math.floor(share * alive) for name, alive, _ in mask.layers()}
        return drop(mask, np.abs(layout.flatten_prunable(state_of(self.context.model))), counts)

    def training_accuracy(self) -> float:
        """Return the workbench's accuracy on the client's training images."""
        return self.context.trainer.evaluate(self.context.model, self.context.train)[1]

    def answer(self, payload: Payload, mask: Mask, loss: float) -> Payload:
        """Return the workbench's weights under `mask`, the client's own from now on."""
        self.context.memory.keep(mask.digest, mask.packed())
        return self.reply(payload, mask, loss)


class IterativePruning(ClientMasks):
    """The server's half: a mask for every client."""

    client = IterativePruningClient

    def __init__(self, context: ServerContext) -> None:
        metric = context.metric
        if not (metric.share and metric.higher):
            rule = f"{self.name}.accuracy is a share that a good model is above, and {metric.name} is none"
            raise ConfigError(f"strategy is {self.name!r}; {rule}")
        super().__init__(context)

    def check_trained(self, client: int, payload: Payload) -> None:
        """Raise PayloadError unless the mask that came up is part of the old one, and none below mask.density."""
        super().check_trained(client, payload)
        old, new = self.masks[client], read_mask(payload.arrays, self.layout)
        revived = np.count_nonzero(new.alive & ~old.alive)
        if revived:
            raise PayloadError(f"a mask brings {revived} dead weights back; masks of {self.name} only shrink")
        least = keep_count(self.settings.mask.density, self.layout.prunable_size)
        if new.count < least:
            raise PayloadError(f"a mask has {new.count} alive weights; mask.density leaves at least {least}")

    def aggregator(self, round_: int) -> Aggregator:
        """Take the mean over the clients whose weights carry a coordinate, and note their masks."""
        mean = ReplyOverlapMean(self)

        def add(reply: Reply) -> None:
            self.masks[reply.client] = read_mask(reply.arrays, self.layout)
            self.messenger.mark_mask_held(reply.client, self.masks[reply.client])
            mean.add(reply)

        def finish() -> None:
            self.state = self.layout.unflatten(mean.finish(self.state)[0])

        return Aggregator(add, finish)
