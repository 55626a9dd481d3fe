"""Scores of a client's weights for the strategies that look for masks before training."""

from ssfl_app.aggregate import WeightedMean
from ssfl_app.seeding import generator
from ssfl_app.sparsity.layout import State, Vector, load_state, state_of
from ssfl_app.sparsity.saliency import balanced_batch, snip
from ssfl_app.strategies.rule import ClientRule


def snip_scores(rule: ClientRule, state: State, batches: int, batch_size: int) -> Vector:
    """Return |dL/dw * w| at `state`, float32, shape (prunable,): the mean over class-balanced minibatches."""
    site = rule.site
    load_state(site.model, state)
    mean = WeightedMean(site.layout.prunable_size)
    labels = site.train.labels.numpy()
    for batch in range(batches):
        rng = generator(rule.settings.run.seed, "saliency", site.number, batch)
        chosen = site.train.take(balanced_batch(labels, batch_size, rng))
        scores = snip(site.trainer.gradient(site.model, chosen), state_of(site.model))
        mean.add(site.layout.flatten_prunable(scores))
    return mean.value()
