"""Scores of a client's weights for the strategies that look for masks before training, and their options."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ssfl_app.core.algorithm import ClientAlgorithm, Samples, ServerContext
from ssfl_app.core.means import WeightedMean
from ssfl_app.core.options import FromSettings, MaskOptions, Section, Settings, above, at_least, choice, fraction
from ssfl_app.core.robust import SCORE_FOLDS
from ssfl_app.seeding import generator
from ssfl_app.sparsity.layout import Layout, State, Vector, load_state, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.patterns import blocks, two_of_four
from ssfl_app.sparsity.saliency import balanced_batch, flow_net, plain_batch, snip, synflow
from ssfl_app.sparsity.values import SCORE_TYPES

CRITERIA = ("snip", "pooled-snip", "gradient", "grasp", "synflow", "iterative-snip", "force", "magnitude")


@dataclass(frozen=True)
class SsflOptions(Section):
    """Keys of the section ``ssfl``."""

    section = "ssfl"

    saliency_batches: int = at_least(1, 1, "minibatches a client scores")
    saliency_batch_size: int = at_least(1, 64, "images in each of them")
    saliency_sampling: str = choice(
        "balanced", "plain", about="balanced: equally many images of each class a client has; plain: any images"
    )
    saliency_weighting: str = choice("samples", "uniform", about="weight of a client in the mean score")
    score_fold: str = choice(
        "auto",
        *SCORE_FOLDS,
        about='docs/robustness.md; auto: mean as in the paper, but normalised with data.where "sites"',
    )
    score_values: str = choice(
        *SCORE_TYPES, about="how scores travel; log8 (8-bit logarithms) for those that are not negative"
    )
    saliency_share: float = fraction(1.0, "share of the clients that is asked for scores, in (0, 1]")
    criterion: str = choice(*CRITERIA, about="what a weight is scored by")
    discovery: str = choice(
        "scores",
        "private-densities",
        "private-channels",
        about="what clients tell: scores; or a noisy number a layer or channel (docs/privacy.md)",
    )
    steps: int = at_least(0, 0, "of synflow (0: 100), iterative-snip and force (0: 5)")
    grasp_temperature: float = above(0, 200.0, "logits are divided by it under grasp")
    warmup_rounds: int = at_least(0, 0, "dense rounds first; the mask is then found at the weights of that moment")
    refresh: str = choice(
        "never",
        "scheduled",
        "drift",
        "continuous",
        about="find the mask once more, later; or move a share of it every few rounds",
    )
    refresh_round: int = at_least(0, 0, "scheduled: before this round; drift, continuous: not before it")
    refresh_drift: float = above(0, 3.0, "drift: newcomers' training loss is above this many times the mean before")
    refresh_weights: str = choice(
        "initial", "zero", "restart", about="weights that come back start at w0 or 0; or all at w0"
    )
    refresh_every: int = at_least(1, 5, "continuous: rounds from one move of the mask to the next")
    refresh_share: float = fraction(0.05, "continuous: share of the alive weights that a move exchanges at most")
    refresh_sample: float = fraction(0.1, "continuous: share of the dead weights that is scored for a move")

    def moves(self, round_: int, rounds: int) -> bool:
        """Return whether a share of the mask moves at the end of a round, of so many."""
        first = max(self.refresh_round, self.warmup_rounds + 1)
        return self.refresh == "continuous" and first <= round_ < rounds and round_ % self.refresh_every == 0

    def minibatch(self, labels: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return the indices of a minibatch of images with these `labels`, (n >= 1,)."""
        if self.saliency_sampling == "plain":
            return plain_batch(len(labels), self.saliency_batch_size, rng)
        return balanced_batch(labels, self.saliency_batch_size, rng)


class ScoringClient(ClientAlgorithm):
    """A client that scores its weights on minibatches."""

    scoring = FromSettings(SsflOptions)

    @classmethod
    def work(cls, settings: Settings, images: int) -> int:
        """Return the images of the minibatches too, twice each for a curvature.

        A class of few images is drawn from more than once.
        """
        options = SsflOptions.from_settings(settings)
        return super().work(settings, images) + 2 * options.saliency_batches * options.saliency_batch_size


def ranked(layout: Layout, scores: Vector, wanted: MaskOptions, density: float | None = None) -> Mask:
    """Return the mask of the largest scores, shape (prunable,), as ``mask`` says, or at another density."""
    share = wanted.density if density is None else density
    return Mask.top(layout, scores, share, wanted.scope, min_per_layer=wanted.min_per_layer)


def patterned(layout: Layout, scores: Vector, wanted: MaskOptions, density: float | None = None) -> Mask:
    """Return `ranked`, or the mask of the largest scores of the pattern that mask.granularity names."""
    if wanted.granularity == "2:4":
        return two_of_four(layout, scores)
    if wanted.granularity == "block":
        share = wanted.density if density is None else density
        return blocks(layout, scores, share, wanted.scope, wanted.min_per_layer)
    return ranked(layout, scores, wanted, density)


def mean_over_batches(
    rule: ClientAlgorithm, state: State, score: Callable[[Samples], State], first: int = 0
) -> Vector:
    """Return the mean of `score` over the minibatches of ``ssfl``, float32, shape (prunable,).

    The workbench holds `state`. Minibatch number `first` is the first one; equal numbers are equal images.

    Raises
    ------
    PayloadError
        All of them together have fewer different images than this site lets be scored.
    """
    site, options = rule.context, SsflOptions.from_settings(rule.settings)
    load_state(site.model, state)
    mean = WeightedMean(site.layout.prunable_size)
    labels, seen = site.train.labels.cpu().numpy(), np.zeros(len(site.train), dtype=bool)
    for batch in range(first, first + options.saliency_batches):
        rng = generator(rule.settings.run.seed, "saliency", site.client_id, batch)
        chosen = options.minibatch(labels, rng)
        seen[chosen] = True
        mean.add(site.layout.flatten_prunable(score(site.train.take(chosen))))
    site.enough(int(np.count_nonzero(seen)), "scores")
    return mean.value()


def snip_scores(rule: ClientAlgorithm, state: State) -> Vector:
    """Return |dL/dw * w| at `state`, float32, shape (prunable,): the mean over the minibatches of ``ssfl``."""
    model, trainer = rule.context.model, rule.context.trainer
    return mean_over_batches(rule, state, lambda images: snip(trainer.gradient(model, images), state_of(model)))


def flow_scores(context: ServerContext, cause: str) -> Callable[[State], Vector]:
    """Return what computes the synaptic flow of each prunable weight of a state, float32, shape (prunable,).

    A removed weight is 0 in the state, and has score 0; the largest score is 1 (`ssfl_app.sparsity.saliency`).

    Raises
    ------
    RuntimeError
        The context has no model to compute with, and `cause` asks for it.
    """
    layout, workbench, shape = context.layout, context.workbench, context.input_shape
    if workbench is None or shape is None:
        raise RuntimeError(f"context.workbench or input_shape is None; {cause} computes with the model on the server")
    net = flow_net(workbench)

    def scores(state: State) -> Vector:
        flows = synflow(net, {name: state[name] for name in layout.prunable}, shape)
        # Path sums of a deep net leave the range of float32; their ratios do not.
        largest = max(float(flow.max()) for flow in flows.values()) or 1.0
        return layout.flatten_prunable({name: flow / largest for name, flow in flows.items()})

    return scores
