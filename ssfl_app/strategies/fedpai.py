"""FedPaI: pruning at initialization, by every client for itself or by the server for all.

Wang, Liu, Hoshino, Zhang, Walters and Crago, "FedPaI: Achieving extreme sparsity in federated learning via pruning at
initialization", arXiv 2504.00308, 2025. What is found before round 1 stays; mask.granularity says which of its two
forms is played:

- "weight", FedPaI-U: client k ranks its weights by GraSP at the common w0 on minibatches of its own, ``w (H_k g_k)``,
  keeps its top mask.density, m_k, and sends the bitmap once. It trains ``m_k * w`` inside m_k and sends the alive
  values; the server takes each coordinate's mean over the clients that hold it, the old value where nobody does.
  Client k is tested with ``m_k * w``; central accuracy is that of the dense w.
- "channel", FedPaI-S: the server removes channels of w0, and FedAvg trains the smaller network (docs/structure.md).

GraSP: Wang, Zhang and Grosse, "Picking winning tickets before training by preserving gradient flow", ICLR 2020.

Bytes with fp32, A alive of P prunable weights and R others: FedPaI-U once ceil(P / 8) up, then ``4 (A + R)`` a client
and direction. FedPaI-S nothing before round 1; with p parameters and L inner layers left ``4 (p + L)`` down, 4 p up.

Departures: there is no public code, and of the paper we have the abstract and summaries. They name the two forms, who
prunes in which, GraSP in the first, personal masks, and an aggregation that knows of them. The mean over owners is
our reading of that. By what the server prunes channels is our choice: it has no data, so by synaptic flow at w0
(Tanaka et al., NeurIPS 2020) in one step, summed over the weights that a channel touches, and ranked as all channels
are here. g and H of GraSP are of the same minibatches (``ssfl.saliency-*``), of the client's data alone.
"""

import numpy as np

from ssfl_app.core.algorithm import Metadata, Payload, Query
from ssfl_app.core.options import Settings
from ssfl_app.sparsity.channels import Widths, unit_scores
from ssfl_app.sparsity.layout import State, Vector
from ssfl_app.sparsity.saliency import grasp
from ssfl_app.strategies.shared.client_masks import RankedMasks, RankingClient
from ssfl_app.strategies.shared.narrowing import NarrowingClient, NarrowingStrategy
from ssfl_app.strategies.shared.scoring import SsflOptions, flow_scores, mean_over_batches


class FedPaiClient(NarrowingClient, RankingClient):
    """Finds its own mask by GraSP; or trains the smaller network that came down."""

    @classmethod
    def work(cls, settings: Settings, images: int) -> int:
        """Return a gradient of the minibatches beside their curvature too."""
        options = SsflOptions.from_settings(settings)
        return super().work(settings, images) + options.saliency_batches * options.saliency_batch_size

    def scores(self, state: State) -> Vector:
        """Return ``w (H g)`` of the client's minibatches."""
        layout, trainer, model = self.context.layout, self.context.trainer, self.context.model
        temperature = self.scoring.grasp_temperature if trainer.task.classes else 1.0
        gradient = mean_over_batches(self, state, lambda images: trainer.gradient(model, images, temperature))
        length = np.linalg.norm(gradient.astype(np.float64)) or 1.0
        direction = layout.scatter((gradient / length).astype(np.float32), layout.is_prunable)
        curvature = mean_over_batches(
            self, state, lambda images: trainer.curvature(model, images, direction, temperature)
        )
        return grasp(curvature, layout.flatten_prunable(state))

    def evaluate(self, payload: Payload) -> Metadata:
        """Test the client's own part of the global model; where channels were removed, the model of all."""
        self.load(payload)
        own = self.settings.mask.granularity == "weight"
        return self.tested(payload, "personal_accuracy" if own else "accuracy")


class FedPai(NarrowingStrategy, RankedMasks):
    """The server asks for masks, or removes channels."""

    name = "fedpai"
    client = FedPaiClient

    @classmethod
    def feeds_ones(cls, settings: Settings) -> str:
        """Return the key by which the server looks at synaptic flow."""
        return "mask.granularity is 'channel'" if settings.mask.granularity == "channel" else ""

    def before_training(self, ask: Query) -> None:
        """Ask every client for its mask; or keep the channels through which most flows."""
        if not self.by_channel:
            super().before_training(ask)
            return
        flow = flow_scores(self.context, "strategy fedpai with mask.granularity 'channel'")
        scores = unit_scores(self.layout, flow(self.state))
        self.narrow(self.kept_units(self.ranks(scores)))

    def become(self, widths: Widths) -> None:
        """Go on with the network of these widths, of which every client has all."""
        super().become(widths)
        self.masks = [self.mask] * len(self.masks)
