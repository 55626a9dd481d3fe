"""Scores of a client's weights for the strategies that look for masks before training."""

from collections.abc import Callable

import numpy as np

from ssfl_app.core.client import ClientAlgorithm
from ssfl_app.core.means import WeightedMean
from ssfl_app.data.dataset import Images
from ssfl_app.seeding import generator
from ssfl_app.sparsity.layout import State, Vector, load_state, state_of
from ssfl_app.sparsity.saliency import balanced_batch, snip


def mean_over_batches(
    rule: ClientAlgorithm,
    state: State,
    batches: int,
    batch_size: int,
    score: Callable[[Images], State],
    first: int = 0,
) -> Vector:
    """Return the mean of `score` over class-balanced minibatches, float32, shape (prunable,).

    The workbench holds `state`. Minibatch number `first` is the first one; equal numbers are equal images.

    Raises
    ------
    PayloadError
        All of them together have fewer different images than this site lets be scored.
    """
    site = rule.context
    load_state(site.model, state)
    mean = WeightedMean(site.layout.prunable_size)
    labels, seen = site.train.labels.cpu().numpy(), np.zeros(len(site.train), dtype=bool)
    for batch in range(first, first + batches):
        rng = generator(rule.settings.run.seed, "saliency", site.client_id, batch)
        chosen = balanced_batch(labels, batch_size, rng)
        seen[chosen] = True
        mean.add(site.layout.flatten_prunable(score(site.train.take(chosen))))
    site.enough(int(np.count_nonzero(seen)), "scores")
    return mean.value()


def snip_scores(rule: ClientAlgorithm, state: State, batches: int, batch_size: int) -> Vector:
    """Return |dL/dw * w| at `state`, float32, shape (prunable,): the mean over class-balanced minibatches."""
    model, trainer = rule.context.model, rule.context.trainer
    return mean_over_batches(
        rule, state, batches, batch_size, lambda images: snip(trainer.gradient(model, images), state_of(model))
    )
