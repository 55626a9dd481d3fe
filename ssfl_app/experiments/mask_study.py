"""How many minibatches a mask needs: the error of SSFL's mask against masks that saw more data.

Ohib et al., "SSFL: Discovering Sparse Unified Subnetworks at Initialization for Efficient Federated Learning",
TMLR 2026, arXiv 2405.09037, figure 4. Its formulas of the error and of the oracle are not public, so here are several
of both: `distances`, `oracle_scores` and `study_masks`; ``docs/studies.md`` says what to expect of each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssfl_app import config as configuration
from ssfl_app.core.means import MAX_WEIGHT, WeightedMean
from ssfl_app.core.options import MaskOptions
from ssfl_app.options import ConfigError
from ssfl_app.partitions import Indices
from ssfl_app.results.study_plots import DRAWS, GRADIENT, MEASURES, SCORES, Errors
from ssfl_app.runtime import Runtime, check, get_runtime
from ssfl_app.seeding import generator
from ssfl_app.sparsity.layout import Layout, Vector, load_state, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.saliency import pooled_snip
from ssfl_app.strategies.shared.scoring import SsflOptions

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MAX_CACHE = 1e9
"""Bytes of scores that are kept; more are computed again for every repeat."""

Draw = tuple[int, int]  # client, batch


@dataclass(frozen=True)
class MaskStudy:
    """Errors of masks from few minibatches.

    `errors` has arrays of shape (repeats, len(batches)) by oracle (`SCORES`, `GRADIENT`, `DRAWS`), then by measure
    (`MEASURES`): fractions in [0, 1].
    """

    batches: tuple[int, ...]
    errors: Errors
    clients: int
    batch_size: int
    drawn: int  # minibatches of the oracle DRAWS
    cut: int  # and of the two others
    kept: int  # k, the alive weights of each mask
    prunable: int  # d, of how many
    flat: configuration.Flat

    def record(self) -> dict[str, Any]:
        """Return all numbers as JSON has them."""
        known = {name: getattr(self, name) for name in ("clients", "batch_size", "drawn", "cut", "kept", "prunable")}
        errors = {o: {m: _summary(table) for m, table in tables.items()} for o, tables in self.errors.items()}
        return {"study": "masks", "batches": list(self.batches), **known, "errors": errors, "config": self.flat}


def _summary(table: NDArray[np.float64]) -> dict[str, Any]:
    ends = {"mean": table.mean(axis=0), "low": table.min(axis=0), "high": table.max(axis=0), "repeats": table}
    return {name: values.tolist() for name, values in ends.items()}


def read_batches(text: str) -> tuple[int, ...]:
    """Return the numbers in "1,2,4", each once, rising; raise ConfigError if one is no whole number from 1 on."""
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(piece.isdecimal() and 1 <= int(piece) <= MAX_WEIGHT for piece in pieces):
        raise ConfigError(f"--batches is {text!r}; it is whole numbers of 1 to {MAX_WEIGHT} with commas: '1,2,4,8'")
    return tuple(sorted({int(piece) for piece in pieces}))


def distances(mask: Mask, oracle: Mask) -> dict[str, float]:
    """Return how far a mask A is from an oracle B, as fractions in [0, 1] by measure.

    - error: |A xor B| / (|A| + |B|), that is |A xor B| / 2k = 1 - |A & B| / k where both keep k;
    - jaccard: 1 - |A & B| / |A | B|;
    - flip-rate: |A xor B| / d over all d prunable weights, the measure of OFF.

    Raises
    ------
    ValueError
        Both masks are empty, or they have different layouts.
    """
    both, either = (mask & oracle).count, (mask | oracle).count
    if not either:
        raise ValueError("both masks are empty; at least one keeps a weight")
    values = ((either - both) / (either + both), mask.jaccard_distance(oracle), mask.hamming(oracle))
    return dict(zip(MEASURES, values, strict=True))


def sequence(seed: int, clients: int, depth: int, repeat: int, count: int) -> list[Draw]:
    """Return the first `count` of clients x depth minibatches, in the order of one repeat.

    Clients come in random order, each with one batch, then in the same order each with its next one. Repeat r starts
    with batch r: so repeat 0 has at n = clients just what SSFL asks for, and other repeats have other images there.
    """
    order = generator(seed, "study-masks", repeat).permutation(clients)
    return [(int(order[i % clients]), (repeat + i // clients) % depth) for i in range(count)]


def cut(images: Indices, size: int, rng: np.random.Generator) -> list[Indices]:
    """Return all images in random order, in ceil(n / size) pieces whose sizes differ by at most one."""
    return np.array_split(rng.permutation(images), -(-len(images) // size))


class Scorer:
    """Gradients and scores at the initial weights, which the model of `runtime`, a workbench, has from now on.

    The scores of `drawn` of SSFL's minibatches will be asked for, and are kept if all fit into MAX_CACHE.
    """

    def __init__(self, runtime: Runtime, drawn: int) -> None:
        load_state(runtime.model, runtime.initial_state())
        self.weights = runtime.layout.flatten_prunable(state_of(runtime.model))
        self._runtime, self._options = runtime, SsflOptions.from_settings(runtime.config.settings)
        self._labels = runtime.data.train.labels.cpu().numpy()
        self._seed = runtime.config.settings.run.seed
        self._kept: dict[Draw, Vector] | None = {} if self.weights.nbytes * drawn < MAX_CACHE else None

    def gradient(self, images: Indices) -> Vector:
        """Return dL/dw of the mean loss over some training images, shape (prunable,)."""
        runtime = self._runtime
        return runtime.layout.flatten_prunable(
            runtime.trainer.gradient(runtime.model, runtime.data.train.take(images))
        )

    def score(self, gradient: Vector) -> Vector:
        """Return |g * w|, shape (prunable,)."""
        return pooled_snip(gradient, self.weights)

    def drawn(self, place: Draw) -> Vector:
        """Return the scores of a client's minibatch, the one that SSFL draws."""
        if self._kept and place in self._kept:
            return self._kept[place]
        own, rng = self._runtime.partition.train[place[0]], generator(self._seed, "saliency", *place)
        scores = self.score(self.gradient(own[self._options.minibatch(self._labels[own], rng)]))
        if self._kept is not None:
            self._kept[place] = scores
        return scores


def oracle_scores(scorer: Scorer, minibatches: Sequence[Indices]) -> dict[str, Vector]:
    """Return the scores of the two oracles that see every training image, each of shape (prunable,).

    `SCORES` is mean_b |g_b * w|; `GRADIENT` is |mean_b g_b * w|, where signs cancel. Every minibatch has weight 1.
    """
    scores, gradients = WeightedMean(scorer.weights.size), WeightedMean(scorer.weights.size)
    for images in minibatches:
        gradient = scorer.gradient(images)
        gradients.add(gradient)
        scores.add(scorer.score(gradient))
    return {SCORES: scores.value(), GRADIENT: scorer.score(gradients.value())}


def study_masks(
    flat: Mapping[str, Any],
    batches: Sequence[int] = BATCHES,
    repeats: int = 5,
    say: Callable[[str], object] = lambda _: None,
) -> MaskStudy:
    """Measure how far the mask of the mean score of n minibatches is from the masks of three oracles.

    Two see all training images (`oracle_scores`); the third is the mean score of all of SSFL's minibatches that the n
    are drawn from, so the error against it is exactly 0 with all of them. Every minibatch has weight 1.

    Parameters
    ----------
    flat : mapping
        The configuration; its strategy and cohort are of no matter.
    batches, repeats : sequence of int, int
        n, each at least 1, rising; and orders of the minibatches.

    Raises
    ------
    ConfigError
        The configuration cannot be had, the mask would keep nothing, or `batches` or `repeats` is below 1.
    """
    if repeats < 1:
        raise ConfigError(f"--repeats is {repeats}; it is a whole number of at least 1")
    if not batches or min(batches) < 1 or list(batches) != sorted(set(batches)):
        raise ConfigError(f"--batches is {list(batches)}; it is rising whole numbers of at least 1")
    own = dict(flat) | {"strategy": "ssfl", "run.cohort": 1}
    config = configuration.parse(own)
    rank = _ranking(check(config, keep=True), config.settings.mask)
    runtime, run, size = get_runtime(config.flat), config.settings.run, int(own["ssfl.saliency-batch-size"])
    depth = max(repeats, -(-max(batches) // run.clients))
    drawn = [(client, batch) for batch in range(depth) for client in range(run.clients)]
    parts = enumerate(runtime.partition.train)
    pieces = [piece for k, part in parts for piece in cut(part, size, generator(run.seed, "study-oracle", k))]
    scorer = Scorer(runtime, len(drawn))
    say(f"two oracles of all training images: {len(pieces)} minibatches")
    scores = oracle_scores(scorer, pieces)
    say(f"one of SSFL's minibatches: {len(drawn)}, {depth} a client")
    scores[DRAWS] = next(_means(scorer, drawn, [len(drawn)]))
    oracles = {name: rank(vector) for name, vector in scores.items()}
    found = []  # by repeat and n: measures by oracle
    for repeat in range(repeats):
        say(f"repeat {repeat + 1} of {repeats}")
        order = sequence(run.seed, run.clients, depth, repeat, max(batches))
        masks = map(rank, _means(scorer, order, batches))
        found.append([{name: distances(mask, best) for name, best in oracles.items()} for mask in masks])
    errors = {
        name: {key: np.array([[cell[name][key] for cell in row] for row in found]) for key in MEASURES}
        for name in oracles
    }
    sizes = oracles[DRAWS].count, scorer.weights.size
    return MaskStudy(tuple(batches), errors, run.clients, size, len(drawn), len(pieces), *sizes, own)


def _means(scorer: Scorer, places: Sequence[Draw], counts: Sequence[int]) -> Iterator[Vector]:
    """Yield the mean scores of the first n of SSFL's minibatches for each n in `counts`."""
    mean = WeightedMean(scorer.weights.size)
    for n, place in enumerate(places, start=1):
        mean.add(scorer.drawn(place))
        if n in counts:
            yield mean.value()


def _ranking(layout: Layout, wanted: MaskOptions) -> Callable[[Vector], Mask]:
    """Return what makes a mask of scores; raise ConfigError if there is no such mask."""

    def rank(scores: Vector) -> Mask:
        return Mask.top(layout, scores, wanted.density, wanted.scope, min_per_layer=wanted.min_per_layer)

    try:
        rank(np.zeros(layout.prunable_size, dtype=np.float32))
    except ValueError as error:
        raise ConfigError(f"mask.{error}") from error
    return rank
