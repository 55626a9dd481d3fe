"""Chooses the one global mask of SSFL: `find_mask` is the server side, `score_weights` the client side.

==============  ======================================  =====================================================
ssfl.criterion  weights that stay                       what a client is asked for, and its bytes (down, up)
==============  ======================================  =====================================================
snip            largest mean ``|g_k w|``                scores: 0, 4 P
pooled-snip     largest ``|mean g_k| |w|``              gradients: 0, 4 P
grasp           lowest ``-w (H g)``                     gradients, then ``H_k v``: 4 P, 8 P
synflow         largest synaptic flow, in T steps       nothing
iterative-snip  snip on the masked net, in T steps;     scores of the A_t weights alive before each step:
                what is removed stays out               (T - 1) ceil(P / 8), 4 sum A_t
force           the same with ``|g w0|``: removed       scores of all weights in each step:
                weights can come back                   (T - 1) ceil(P / 8), 4 P T
magnitude       largest ``|w0|``                        nothing
==============  ======================================  =====================================================

With ssfl.score-values bf16 or log8 a value costs 2 or 1 bytes instead of 4. log8 has no sign: it is for the criteria
that ask for magnitudes, snip, iterative-snip and force.

Where clients may lie, ssfl.score-fold takes another fold than the mean in every exchange of this page (`ScoreFold`,
docs/robustness.md); the bytes are the same.

P prunable weights; step t of T keeps the density d ** (t / T), so A_1 = P; the first step needs no bitmap. Means are
weighted by samples (ssfl.saliency-weighting). g_k is client k's mean gradient over its minibatches, which are
class-balanced (ssfl.saliency-sampling), at weights w that both ends know.

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
from ssfl_app.sparsity.codec import Dense, read_mask
from ssfl_app.sparsity.layout import State, Vector, state_digest
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.saliency import flow_net, grasp, pooled_snip, snip, synflow
from ssfl_app.sparsity.values import (
    SUMMED_TYPES,
    Arrays,
    PayloadError,
    check_values,
    read_array,
    read_values,
    write_values,
)
from ssfl_app.strategies.shared.scoring import SsflOptions, mean_over_batches, ranked, snip_scores

QUESTIONS = ("saliency", "curvature")
DENSITIES = "layer_shares"
"""The question of ssfl.discovery "private-densities"."""
MAGNITUDES = ("snip", "iterative-snip", "force")
"""Criteria whose clients answer with magnitudes; the others ask for gradients."""
SIGNED = ("pooled-snip", "grasp")
"""Criteria whose clients answer with numbers that may be negative."""
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

    def top(self, scores: Vector, density: float | None = None) -> Mask:
        """Return the mask of the largest scores, of mask.density by default."""
        return ranked(self.strategy.layout, scores, self.strategy.settings.mask, density)

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


def _by_snip(collector: _ScoreCollector) -> Mask:
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
    strategy, layout = collector.strategy, collector.strategy.layout
    workbench, shape = strategy.context.workbench, strategy.context.input_shape
    if workbench is None or shape is None:
        rule = "ssfl.criterion synflow computes with the model on the server"
        raise RuntimeError(f"context.workbench or input_shape is None; {rule}")
    net = flow_net(workbench)

    def score(step: int, mask: Mask) -> Vector:
        alive = mask.apply(collector.state)
        flows = synflow(net, {name: alive[name] for name in layout.prunable}, shape)
        # Path sums of a deep net leave the range of float32; their ratios do not.
        largest = max(float(flow.max()) for flow in flows.values()) or 1.0
        return layout.flatten_prunable({name: flow / largest for name, flow in flows.items()})

    return collector.steps(score, returning=False)


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
    strategy, layout = collector.strategy, collector.strategy.layout
    density, run, ledger = strategy.settings.mask.density, strategy.settings.run, strategy.ledger
    multiplier = 0.0 if ledger is None else strategy.settings.privacy.discovery_multiplier
    if ledger is not None:
        ledger.begin("discovery")
    size = len(layout.prunable) - len(tiny_layers(layout, density))
    summation = Summation(
        strategy,
        collector.clients,
        size,
        "fixed32",
        by_samples=False,
        round_=collector.round,
        what=f"the question {DENSITIES!r}",
        question=DENSITIES,
        release=Release(1.0, multiplier, len(collector.clients)),
    )
    asked = functools.partial(summation.outgoing, payload=collector.carry)
    collector.ask(DENSITIES, collector.clients, summation.check, summation.add, asked, summation.allowed())
    counts = densities(summation.finish().mean, layout, density)
    return drawn_mask(layout, counts, run.seed)


def _net(step: int, mask: Mask) -> Arrays:
    # Before the first step everything is alive, and both ends know it.
    return {"net": mask.packed()} if step else {}


_RULES: Mapping[str, Callable[[_ScoreCollector], Mask]] = {
    "snip": _by_snip,
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
    if question not in QUESTIONS or (question == "curvature" and options.criterion != "grasp"):
        raise PayloadError(f"question is {question!r}; ssfl.criterion is {options.criterion}")
    state = rule.initial_weights(payload) if state is None else state
    temperature = options.grasp_temperature if options.criterion == "grasp" and site.trainer.task.classes else 1.0
    if options.criterion in ("iterative-snip", "force"):
        values = _on_masked_net(rule, state, payload)
    elif options.criterion == "snip":
        values = snip_scores(rule, state)
    elif question == "curvature":
        flat = read_array(payload.arrays, "direction", np.float32, site.layout.prunable_size)
        direction = site.layout.scatter(flat, site.layout.is_prunable)
        values = mean_over_batches(
            rule, state, lambda i: site.trainer.curvature(site.model, i, direction, temperature)
        )
    else:
        values = mean_over_batches(rule, state, lambda i: site.trainer.gradient(site.model, i, temperature))
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
