"""Chooses the one global mask of SSFL: `find_mask` is the server side, `score_weights` the client side.

==============  ======================================  =====================================================
ssfl.criterion  weights that stay                       what a client is asked for, and its bytes (down, up)
==============  ======================================  =====================================================
snip            largest mean ``|g_k w|``                scores: 0, 4 P
pooled-snip     largest ``|mean g_k| |w|``              gradients: 0, 4 P
gradient        largest mean ``|g_k|``                  scores: 0, 4 P
grasp           lowest ``-w (H g)``                     gradients, then ``H_k v``: 4 P, 8 P
synflow         largest synaptic flow, in T steps       nothing
iterative-snip  snip on the masked net, in T steps;     scores of the A_t weights alive before each step:
                what is removed stays out               (T - 1) ceil(P / 8), 4 sum A_t
force           the same with ``|g w0|``: removed       scores of all weights in each step:
                weights can come back                   (T - 1) ceil(P / 8), 4 P T
magnitude       largest ``|w0|``                        nothing
==============  ======================================  =====================================================

With ssfl.score-values bf16 or log8 a value costs 2 or 1 bytes instead of 4. log8 has no sign: it is for the criteria
that ask for magnitudes, snip, gradient, iterative-snip and force.

Where clients may lie, ssfl.score-fold takes another fold than the mean in every exchange of this page (`ScoreFold`,
docs/robustness.md); the bytes are the same.

P prunable weights; step t of T keeps the density d ** (t / T), so A_1 = P; the first step needs no bitmap. Means are
weighted by samples (ssfl.saliency-weighting). g_k is client k's mean gradient over its minibatches, which are
class-balanced (ssfl.saliency-sampling), at weights w that both ends know.

With mask.dead "frozen" a mask says what is updated and removes nothing, so that criteria of what is left once
weights are gone are refused. |g| is "gradient" in Liu et al., "Refining Salience-Aware Sparse Fine-Tuning Strategies
for Language Models", ACL 2025, arXiv 2412.13488.

SNIP: Lee et al., ICLR 2019. GraSP: Wang et al., ICLR 2020. SynFlow: Tanaka et al., NeurIPS 2020. FORCE and iterative
SNIP: de Jorge et al., "Progressive skeletonization: trimming more fat from a network at initialization", ICLR 2021.

Departures: GraSP takes the direction v = g / ||g|| and the loss T * (cross-entropy of logits / T): positive factors,
the same ranking. Each step of iterative-snip and force takes other minibatches. As for snip, scores of clients are
averaged after the magnitude is taken, except for pooled-snip and grasp, which average what is linear.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ssfl_app.core.algorithm import ClientAlgorithm, Payload, Query, Reply, SparseStrategy
from ssfl_app.core.options import ConfigError, Settings
from ssfl_app.core.robust import ScoreFold
from ssfl_app.core.sums import Release, Summation
from ssfl_app.privacy.densities import densities, drawn_mask, own_shares, tiny_layers
from ssfl_app.sparsity.channels import Ranks, level_ranks, ranks_in_layers, unit_count, unit_scores
from ssfl_app.sparsity.codec import Dense, read_mask
from ssfl_app.sparsity.layout import State, Vector, state_digest
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.saliency import grasp, pooled_snip, snip
from ssfl_app.sparsity.values import (
    SUMMED_TYPES,
    Arrays,
    PayloadError,
    check_values,
    read_array,
    read_values,
    write_values,
)
from ssfl_app.strategies.shared.narrowing import NarrowingStrategy
from ssfl_app.strategies.shared.scoring import (
    CRITERIA,
    SsflOptions,
    flow_scores,
    mean_over_batches,
    patterned,
    snip_scores,
)

QUESTIONS = ("saliency", "curvature")
DENSITIES = "layer_shares"
"""The question of ssfl.discovery "private-densities"."""
CHANNELS = "channel_ranks"
"""The question of ssfl.discovery "private-channels"."""
MAGNITUDES = ("snip", "gradient", "iterative-snip", "force")
"""Criteria whose clients answer with magnitudes; the others ask for gradients."""
SIGNED = ("pooled-snip", "grasp")
"""Criteria whose clients answer with numbers that may be negative."""
OF_UPDATES = ("snip", "pooled-snip", "gradient", "magnitude")
"""Criteria that can tell which weights to update where the others are frozen."""
STEPS = {"synflow": 100, "iterative-snip": 5, "force": 5}
"""Steps of the criteria that have some, unless ssfl.steps says otherwise."""


def steps_of(settings: Settings) -> int:
    """Return the number of steps of the criterion; raise ConfigError if it does not fit the other options."""
    options = SsflOptions.from_settings(settings)
    if options.steps and options.criterion not in STEPS:
        raise ConfigError(f"ssfl.steps is {options.steps}; it is 0 with ssfl.criterion {options.criterion}")
    if options.discovery == "private-densities" and (options.criterion != "snip" or options.refresh != "never"):
        key = "criterion" if options.criterion != "snip" else "refresh"
        rule = f"it is {'snip' if key == 'criterion' else 'never'!r} with ssfl.discovery 'private-densities'"
        raise ConfigError(f"ssfl.{key} is {getattr(options, key)!r}; {rule}")
    if options.discovery == "private-densities" and settings.mask.scope != "global":
        rule = "it is 'global' with ssfl.discovery 'private-densities', which finds the layers' densities"
        raise ConfigError(f"mask.scope is {settings.mask.scope!r}; {rule}")
    if settings.mask.frozen:
        rule = "with mask.dead 'frozen'"
        if options.criterion not in OF_UPDATES:
            found = f"it is one of {', '.join(OF_UPDATES)} {rule}: others score what is left without dead weights"
            raise ConfigError(f"ssfl.criterion is {options.criterion!r}; {found}")
        if options.warmup_rounds:
            found = f"it is 0 {rule}: dead weights stay at the start, and dense rounds move them"
            raise ConfigError(f"ssfl.warmup-rounds is {options.warmup_rounds}; {found}")
        if options.refresh != "never" and options.refresh_weights == "zero":
            raise ConfigError(f"ssfl.refresh-weights is 'zero'; it is 'initial' or 'restart' {rule}")
    if options.score_values == "log8" and options.criterion in SIGNED:
        rule = f"it is fp32 or bf16 with ssfl.criterion {options.criterion}, whose values have signs"
        raise ConfigError(f"ssfl.score-values is 'log8'; {rule}")
    return options.steps or STEPS.get(options.criterion, 1)


# ---- the server side -----------------------------------------------------------------------------


def find_mask(
    strategy: SparseStrategy,
    ask: Query,
    clients: Iterable[int],
    state: State | None = None,
    carry: Payload | None = None,
    round_: int = 0,
) -> Mask:
    """Return the mask that ssfl.criterion chooses; the client of `strategy` hands `QUESTIONS` to `score_weights`.

    Parameters
    ----------
    clients : iterable of int
        Who is asked, in every exchange.
    state : State, optional
        The weights w that are scored; default `strategy.state`, which clients make from the seed or ask for.
    carry : Payload, optional
        What every question takes along so that a client can make `state`; default, with a `state`: all of it, as
        `Dense` writes it, 4 bytes a coordinate, which `score_weights` then reads by itself.
    round_ : int
        Before which training it is found; 0: before all.

    Raises
    ------
    RunFailed, RuntimeError
        Too few clients answered well; the criterion is synflow, and the strategy's context has no `workbench`.
    """
    layout = strategy.layout
    if state is None:
        state = strategy.state
        carry = carry or Payload(metadata={"weights": state_digest(layout, state)})
    elif carry is None:
        carry = Payload(Dense().encode(layout, state, Mask.dense(layout)))
    collector = _ScoreCollector(strategy, ask, tuple(clients), state, carry, round_)
    options = SsflOptions.from_settings(strategy.settings)
    if options.discovery == "private-densities":
        return _by_private_densities(collector)
    return _RULES[options.criterion](collector)


def check_granularity(settings: Settings) -> None:
    """Raise ConfigError for options that do not go with mask.granularity."""
    options, kind = SsflOptions.from_settings(settings), settings.mask.granularity
    allowed: dict[str, tuple[object, ...]] = {"discovery": ("scores",)}
    if kind == "weight":
        allowed["discovery"] = ("scores", "private-densities")
    elif kind == "channel":
        allowed = {"criterion": ("snip",), "refresh": ("never",), "warmup_rounds": (0,)}
        allowed["discovery"] = ("scores", "private-channels")
    elif kind == "2:4":
        allowed["criterion"] = tuple(name for name in CRITERIA if name not in STEPS)
    for name, values in allowed.items():
        if getattr(options, name) not in values:
            rule = f"it is {' or '.join(map(repr, values))} with mask.granularity {kind!r}"
            raise ConfigError(f"ssfl.{name.replace('_', '-')} is {getattr(options, name)!r}; {rule}")


def channel_means(strategy: NarrowingStrategy, ask: Query, clients: Iterable[int]) -> Ranks:
    """Return by what units are ranked, float64, shape (units,), of the scores that clients have at w0.

    With ssfl.discovery "private-channels" it is the noisy mean of the clients' own ranks, each vector scaled to
    length 1; else the ranks of the mean score.
    """
    layout, scope = strategy.layout, strategy.settings.mask.scope
    carry = Payload(metadata={"weights": state_digest(layout, strategy.state)})
    collector = _ScoreCollector(strategy, ask, tuple(clients), strategy.state, carry, 0)
    if SsflOptions.from_settings(strategy.settings).discovery == "private-channels":
        mean = collector.released(CHANNELS, unit_count(layout))
        return ranks_in_layers(layout, mean) if scope == "layer" else mean
    return strategy.ranks(collector.mean("saliency", unit_count(layout)))


@dataclass(frozen=True)
class _ScoreCollector:
    """Asks the same clients about the same weights as often as a criterion needs."""

    strategy: SparseStrategy
    ask: Query
    clients: tuple[int, ...]
    state: State
    carry: Payload
    round: int

    @property
    def weights(self) -> Vector:
        return self.strategy.layout.flatten_prunable(self.state)

    def mean(self, question: str, size: int | None = None, arrays: Arrays | None = None, step: int = 0) -> Vector:
        """Return the weighted mean of the vectors that the clients answer with, or what ssfl.score-fold says."""
        count = self.strategy.layout.prunable_size if size is None else size
        options = SsflOptions.from_settings(self.strategy.settings)
        fold, by_samples = ScoreFold(options.score_fold, count), options.saliency_weighting == "samples"
        metadata = {**self.carry.metadata, "step": step} if step else self.carry.metadata
        payload = Payload({**self.carry.arrays, **(arrays or {})}, metadata)
        if options.score_values in SUMMED_TYPES:
            return self._summed(question, count, payload, step)

        def check(client: int, payload: Payload) -> None:
            self.strategy.check_samples(payload)
            values = read_values(payload.arrays, options.score_values, count)
            check_values(values)
            # Below 0 an alive weight would rank behind one that an earlier step removed.
            if options.criterion in MAGNITUDES and values.size and values.min() < 0:
                raise PayloadError(f"scores reach {values.min():g}; those of {options.criterion} must be at least 0")

        def take(reply: Reply) -> None:
            values = read_values(reply.arrays, options.score_values, count)
            fold.add(reply.client, values, reply.samples if by_samples else 1)

        self.ask(question, self.clients, check, take, payload)
        return fold.value()

    def _summed(self, question: str, count: int, payload: Payload, step: int) -> Vector:
        """Return the weighted mean of vectors that come as summands, masked where that is asked for."""
        options = SsflOptions.from_settings(self.strategy.settings)
        summation = Summation(
            self.strategy,
            self.clients,
            count,
            options.score_values,
            by_samples=options.saliency_weighting == "samples",
            round_=self.round,
            what=f"the question {question!r}, step {step}",
            question=question,
        )
        asked = functools.partial(summation.outgoing, payload=payload)
        self.ask(question, self.clients, summation.check, summation.add, asked, summation.allowed())
        found = summation.finish()
        self.strategy.clipped += found.clipped
        mean = found.mean.astype(np.float32)
        # Rounding aside no honest sum of magnitudes is below 0.
        return np.maximum(mean, 0) if options.criterion in MAGNITUDES else mean

    def released(self, question: str, size: int) -> Ranks:
        """Return the mean of vectors of `size` numbers, at most 1 long, with the noise of privacy.level "client"."""
        strategy, ledger = self.strategy, self.strategy.ledger
        multiplier = 0.0 if ledger is None else strategy.settings.privacy.discovery_multiplier
        if ledger is not None:
            ledger.begin("discovery")
        summation = Summation(
            strategy,
            self.clients,
            size,
            "fixed32",
            by_samples=False,
            round_=self.round,
            what=f"the question {question!r}",
            question=question,
            release=Release(1.0, multiplier, len(self.clients)),
        )
        asked = functools.partial(summation.outgoing, payload=self.carry)
        self.ask(question, self.clients, summation.check, summation.add, asked, summation.allowed())
        return summation.finish().mean

    def top(self, scores: Vector, density: float | None = None) -> Mask:
        """Return the mask of the largest scores, of mask.density by default."""
        return patterned(self.strategy.layout, scores, self.strategy.settings.mask, density)

    def steps(self, score: Callable[[int, Mask], Vector], returning: bool) -> Mask:
        """Return the mask after all steps; `score` gets the step, from 0, and the mask before; it is not negative."""
        count, mask = steps_of(self.strategy.settings), Mask.dense(self.strategy.layout)
        for step in range(count):
            scores = score(step, mask)
            if not returning:
                scores = np.where(mask.alive, scores, np.float32(-1))  # an alive weight may score 0
            # With the last step the exponent is exactly 1.
            mask = self.top(scores, self.strategy.settings.mask.density ** ((step + 1) / count))
        return mask


def _by_mean_score(collector: _ScoreCollector) -> Mask:
    return collector.top(collector.mean("saliency"))


def _by_pooled_snip(collector: _ScoreCollector) -> Mask:
    return collector.top(pooled_snip(collector.mean("saliency"), collector.weights))


def _by_grasp(collector: _ScoreCollector) -> Mask:
    gradient = collector.mean("saliency")
    length = np.linalg.norm(gradient.astype(np.float64))
    direction = (gradient / (length or 1.0)).astype(np.float32)
    return collector.top(grasp(collector.mean("curvature", arrays={"direction": direction}), collector.weights))


def _by_magnitude(collector: _ScoreCollector) -> Mask:
    return collector.top(np.abs(collector.weights))


def _by_synflow(collector: _ScoreCollector) -> Mask:
    flow = flow_scores(collector.strategy.context, "ssfl.criterion synflow")
    return collector.steps(lambda step, mask: flow(mask.apply(collector.state)), returning=False)


def _by_iterative_snip(collector: _ScoreCollector) -> Mask:
    def score(step: int, mask: Mask) -> Vector:
        scores = np.zeros(mask.alive.size, dtype=np.float32)
        scores[mask.alive] = collector.mean("saliency", mask.count, _net(step, mask), step)
        return scores

    return collector.steps(score, returning=False)


def _by_force(collector: _ScoreCollector) -> Mask:
    return collector.steps(
        lambda step, mask: collector.mean("saliency", None, _net(step, mask), step), returning=True
    )


def _by_private_densities(collector: _ScoreCollector) -> Mask:
    """Return the mask that is drawn inside the layers, of densities that a noisy sum tells (`privacy.densities`)."""
    layout, settings = collector.strategy.layout, collector.strategy.settings
    size = len(layout.prunable) - len(tiny_layers(layout, settings.mask.density))
    counts = densities(collector.released(DENSITIES, size), layout, settings.mask.density)
    return drawn_mask(layout, counts, settings.run.seed)


def _net(step: int, mask: Mask) -> Arrays:
    # Before the first step everything is alive, and both ends know it.
    return {"net": mask.packed()} if step else {}


_RULES: Mapping[str, Callable[[_ScoreCollector], Mask]] = {
    "snip": _by_mean_score,
    "gradient": _by_mean_score,
    "pooled-snip": _by_pooled_snip,
    "grasp": _by_grasp,
    "synflow": _by_synflow,
    "iterative-snip": _by_iterative_snip,
    "force": _by_force,
    "magnitude": _by_magnitude,
}


# ---- the client side -----------------------------------------------------------------------------


def score_weights(rule: ClientAlgorithm, question: str, payload: Payload, state: State | None = None) -> Payload:
    """Return a client's answer to one of `QUESTIONS`: "values", one for each weight that is asked about.

    They travel as ssfl.score-values says.

    Parameters
    ----------
    state : State, optional
        The weights the question is about; default: those that came along as "values", or w0 if they are meant.

    Raises
    ------
    Need
        w0 is meant, and this machine makes other weights from the seed than the server did.
    PayloadError
        The criterion has no such question, or what came along is malformed.
    """
    options, site = SsflOptions.from_settings(rule.settings), rule.context
    # `initial_weights` holds those that come along against the digest of "weights", if the message states one.
    checked = ("values",) if state is None and "weights" in payload.metadata else ()
    reads = {"question", "weights", "values"}
    reads |= {"direction"} if question == "curvature" else set()
    reads |= {"net", "step"} if options.criterion in ("iterative-snip", "force") else set()
    if state is not None and "weights" not in payload.metadata:  # made by the caller, of what it knows
        reads |= payload.arrays.keys()
    if question == DENSITIES and options.discovery == "private-densities":
        scores = snip_scores(rule, rule.initial_weights(payload) if state is None else state)
        told = own_shares(scores, site.layout, rule.settings.mask.density).astype(np.float32)
        return Payload(
            site.summands.write(payload, told, "fixed32", 1, checked=checked, reads=reads),
            {"samples": len(site.train)},
        )
    if question == CHANNELS and options.discovery == "private-channels":
        scores = unit_scores(
            site.layout, snip_scores(rule, rule.initial_weights(payload) if state is None else state)
        )
        # Noise is as large in each unit: ranks that are small in a whole layer would drown in it.
        ranks = level_ranks(site.layout, scores)
        told = (ranks / (np.linalg.norm(ranks) or 1.0)).astype(np.float32)
        return Payload(
            site.summands.write(payload, told, "fixed32", 1, checked=checked, reads=reads),
            {"samples": len(site.train)},
        )
    if question not in QUESTIONS or (question == "curvature" and options.criterion != "grasp"):
        raise PayloadError(f"question is {question!r}; ssfl.criterion is {options.criterion}")
    state = rule.initial_weights(payload) if state is None else state
    temperature = options.grasp_temperature if options.criterion == "grasp" and site.trainer.task.classes else 1.0
    if options.criterion in ("iterative-snip", "force"):
        values = _on_masked_net(rule, state, payload)
    elif options.criterion == "snip":
        values = snip_scores(rule, state)
    elif options.criterion == "gradient":
        values = mean_over_batches(
            rule, state, lambda i: {n: g.abs() for n, g in site.trainer.gradient(site.model, i).items()}
        )
    elif question == "curvature":
        flat = read_array(payload.arrays, "direction", np.float32, site.layout.prunable_size)
        direction = site.layout.scatter(flat, site.layout.is_prunable)
        values = mean_over_batches(
            rule, state, lambda i: site.trainer.curvature(site.model, i, direction, temperature)
        )
    else:
        values = mean_over_batches(rule, state, lambda i: site.trainer.gradient(site.model, i, temperature))
    if rule.settings.mask.granularity == "channel":
        values = unit_scores(site.layout, values)
    samples = len(site.train)
    if options.score_values in SUMMED_TYPES:
        weight = samples if options.saliency_weighting == "samples" else 1
        arrays = site.summands.write(payload, values, options.score_values, weight, checked=checked, reads=reads)
        return Payload(arrays, {"samples": samples})
    return Payload(write_values(values, options.score_values), {"samples": samples})


def _on_masked_net(rule: ClientAlgorithm, state: State, payload: Payload) -> Vector:
    """Return |g w| of the masked net: of its alive weights, or with force, with the dense w, of all."""
    options, site = SsflOptions.from_settings(rule.settings), rule.context
    net = read_mask({"mask": payload.arrays["net"]}, site.layout) if "net" in payload.arrays else site.dense
    step = payload.metadata.get("step", 0)
    if not isinstance(step, int) or step < 0:
        raise PayloadError(f"step is {step!r}; it must be a whole number of at least 0")
    weights, first = {n: t.to(site.trainer.device) for n, t in state.items()}, step * options.saliency_batches
    scores = mean_over_batches(
        rule, net.apply(state), lambda i: snip(site.trainer.gradient(site.model, i), weights), first
    )
    return scores if options.criterion == "force" else scores[net.alive]
