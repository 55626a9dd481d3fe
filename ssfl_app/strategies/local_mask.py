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

from ssfl_app.core.aggregation import ReplyOverlapMean, ReplyZerosMean
from ssfl_app.core.options import FromSettings, Section, choice
from ssfl_app.sparsity.layout import State, Vector
from ssfl_app.strategies.shared.client_masks import LocalMasks, RankedMasks, RankingClient
from ssfl_app.strategies.shared.scoring import snip_scores


@dataclass(frozen=True)
class LocalMaskOptions(Section):
    """Keys of the section ``local-mask``."""

    section = "local-mask"

    mean: str = choice("overlap", "zeros", about="over the clients that hold a weight, or over all")


class LocalSaliencyClient(RankingClient):
    """Finds its own mask."""

    def scores(self, state: State) -> Vector:
        """Return SSFL's scores."""
        return snip_scores(self, state)


class RandomLocal(LocalMasks):
    """A random mask for every client."""

    name = "random-local"
    options = FromSettings(LocalMaskOptions)

    def mean(self) -> ReplyOverlapMean | ReplyZerosMean:
        """Return the mean over those who hold a coordinate, or over all."""
        return ReplyZerosMean(self) if self.options.mean == "zeros" else super().mean()


class LocalSaliency(RankedMasks, RandomLocal):
    """Every client's own top scores."""

    name = "local-saliency"
    client = LocalSaliencyClient
