"""SSFL's continuous refresh: every few rounds a small share of the mask moves (ssfl.refresh "continuous").

Ohib et al., TMLR 2026, arXiv 2405.09037, leave drift that goes on to future work, so the following is ours. Masks
that move while a model trains: Evci et al., "Rigging the lottery", ICML 2020.

1. In a round that moves the mask each client of the cohort scores, before it trains, all A alive weights and a sample
   of the dead ones: ``s_k = |g_k v|`` (ssfl.criterion "gradient": ``|g_k|``). ``g_k`` is its mean gradient at the
   model that came down, on minibatches that it scores in no other round; ``v`` is the alive weight, or what the dead
   one was initially. Which dead ones, floor(ssfl.refresh-sample * dead) of them, both ends draw from the seed.
2. The scores come up beside the values of the trained model. The server folds them as in discovery: weighted by
   samples, or as ssfl.saliency-weighting and ssfl.score-fold say.
3. Once the mean model is there, the weakest alive weights give way to the strongest candidates, as long as those are
   stronger, and at most floor(ssfl.refresh-share * A) of them. The mask keeps its size; with mask.scope "layer" each
   layer keeps its own, else its floor (mask.min-per-layer).

Bytes, with scores of b bytes (ssfl.score-values): a client of such a round sends ``b (A + floor(sample * (P - A)))``
more, and whoever holds the mask before gets the new one as the places that differ, 4 bytes each, where that is less
than ceil(P / 8).

What leaves the mask is gone, as its value is 0 from then on (or what it was initially, mask.dead "frozen"); nothing
of it is kept to be made up for, and the record of the round says how many they were and how long (``swapped``). A
weight that comes in, be it for the second time, starts at w0 or 0 (ssfl.refresh-weights). There is no move after the
last round: what comes in has to train.
"""

import numpy as np
import numpy.typing as npt

from ssfl_app.core.algorithm import ClientAlgorithm, Payload, Reply
from ssfl_app.core.options import ConfigError, Settings
from ssfl_app.core.robust import ScoreFold
from ssfl_app.seeding import generator
from ssfl_app.sparsity.dynamic import swap
from ssfl_app.sparsity.layout import State, Vector, state_of
from ssfl_app.sparsity.mask import Mask, keep_count
from ssfl_app.sparsity.saliency import snip
from ssfl_app.sparsity.values import Arrays, PayloadError, SecondVector
from ssfl_app.strategies.shared.scoring import SsflOptions, mean_over_batches
from ssfl_app.strategies.ssfl.refresh import reveal_dead_weights

SINGLE = ("snip", "gradient")
"""Criteria by which a client scores single weights of a network with a mask, in magnitudes that can be averaged."""


def check_continuous(settings: Settings) -> None:
    """Raise ConfigError for options that do not go with ssfl.refresh "continuous"."""
    options = SsflOptions.from_settings(settings)
    if options.refresh != "continuous":
        return
    rule = "with ssfl.refresh 'continuous'"
    if options.criterion not in SINGLE:
        raise ConfigError(f"ssfl.criterion is {options.criterion!r}; it is {' or '.join(map(repr, SINGLE))} {rule}")
    if options.refresh_weights == "restart":
        raise ConfigError(f"ssfl.refresh-weights is 'restart'; it is 'initial' or 'zero' {rule}, which never ends")
    if settings.mask.granularity != "weight":
        raise ConfigError(
            f"mask.granularity is {settings.mask.granularity!r}; it is 'weight' {rule}, which moves single weights"
        )


def scored_weights(mask: Mask, settings: Settings, round_: int) -> npt.NDArray[np.int64]:
    """Return which prunable weights a round scores: all alive ones, then a sample of the dead, each ascending."""
    dead, share = np.flatnonzero(~mask.alive), SsflOptions.from_settings(settings).refresh_sample
    rng = generator(settings.run.seed, "refresh-sample", round_)
    chosen = rng.choice(dead.size, keep_count(share, dead.size), replace=False, shuffle=False)
    return np.concatenate([np.flatnonzero(mask.alive), dead[np.sort(chosen)]])


def _vector(settings: Settings, size: int) -> SecondVector:
    return SecondVector("scores", SsflOptions.from_settings(settings).score_values, size)


def score_beside(rule: ClientAlgorithm, mask: Mask, round_: int) -> Arrays:
    """Return a client's scores of the weights that a round scores, at the model on its workbench, which stays there.

    Raises
    ------
    PayloadError
        They would be made of fewer images than this site lets be scored.
    """
    site, options = rule.context, SsflOptions.from_settings(rule.settings)
    came = state_of(site.model)
    lifted = {
        name: tensor.to(site.trainer.device)
        for name, tensor in reveal_dead_weights(mask, came, site.initial_state()).items()
    }

    def score(gradient: State) -> State:
        return snip(gradient, lifted) if options.criterion == "snip" else {n: g.abs() for n, g in gradient.items()}

    scores = mean_over_batches(
        rule, came, lambda images: score(site.trainer.gradient(site.model, images)), round_ * options.saliency_batches
    )
    places = scored_weights(mask, rule.settings, round_)
    return _vector(rule.settings, places.size).write(scores[places])


class MaskMove:
    """One move of the mask, on the server: takes the scores of a round, in any order."""

    def __init__(self, mask: Mask, settings: Settings, round_: int) -> None:
        self.before, self.round, self._settings = mask, round_, settings
        self._options = SsflOptions.from_settings(settings)
        self._places = scored_weights(mask, settings, round_)
        self._fold = ScoreFold(self._options.score_fold, self._places.size)
        self.vector = _vector(settings, self._places.size)

    def check(self, payload: Payload) -> None:
        """Raise PayloadError unless the scores are all there, finite and not negative."""
        self._read(payload)

    def _read(self, payload: Payload) -> Vector:
        scores = self.vector.read(payload.arrays)
        if scores.size and scores.min() < 0:
            rule = f"those of {self._options.criterion} must be at least 0"
            raise PayloadError(f"scores reach {scores.min():g}; {rule}")
        return scores

    def add(self, reply: Reply) -> None:
        """Add the scores of a reply."""
        weight = reply.samples if self._options.saliency_weighting == "samples" else 1
        self._fold.add(reply.client, self._read(reply), weight)

    def mask(self) -> Mask:
        """Return the mask after the move."""
        layout, wanted = self.before.layout, self._settings.mask
        scores, candidates = np.zeros(layout.prunable_size, np.float32), np.zeros(layout.prunable_size, np.bool_)
        scores[self._places] = self._fold.value()
        candidates[self._places[self.before.count :]] = True
        share = self._options.refresh_share
        return swap(self.before, scores, candidates, share, wanted.scope, wanted.min_per_layer)
