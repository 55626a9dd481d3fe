"""How much privacy a run spends: epsilon of its releases, and the noise that keeps them within a budget.

What is counted for a run (`Plan`) is differential privacy of clients under *add or remove one*: two federations are
neighbours if one has a client more. A release is a sum to which each client adds a vector of Euclidean length at most
C, plus Gaussian noise of standard deviation z C; z is the noise multiplier. Clients of a round are Poisson-sampled:
each takes part with probability q, on its own. Releases are composed by their privacy loss distributions (Google's
``dp-accounting``; Koskela et al., "Computing tight differential privacy guarantees using FFT", AISTATS 2020;
Doroshenko et al., "Connect the dots", PETS 2022), which is tight: what is told is above the true epsilon by rounding
only, never below it.

Cohorts of a fixed size are not counted here. They need *replace one*, where the sum moves by up to 2 C;
``dp-accounting`` takes the noise by C there too, and tells too small an epsilon (google/differential-privacy 378).

A site's own steps (privacy.level "record", `steps_epsilon`) are such releases too: of gradients, by records.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ssfl_app.installed import needed
from ssfl_app.options import ConfigError
from ssfl_app.privacy.options import PrivacyOptions

LEAST_NOISE, MOST_NOISE = 0.1, 10_000.0
"""Noise multipliers that are tried for a budget, and the least one that is taken: below it a release hides nobody."""
PARTS = 10_000
"""A noise multiplier that follows from a budget is a whole number of 1 / PARTS, rounded up."""
_GRID = 1e-3  # between values of a privacy loss; the bound holds for any, and is tighter for a finer one


@dataclass(frozen=True)
class Plan:
    """What a run will release.

    Attributes
    ----------
    rounds : int
        Rounds of training, a release each.
    probability : float
        That a client takes part in a round, in (0, 1].
    discovery_multiplier : float
        Noise multiplier of a search for the mask; 0: there is none.
    discoveries : int
        How often there is such a search.
    discovery_probability : float
        That a client takes part in one, in (0, 1].
    """

    rounds: int
    probability: float
    discovery_multiplier: float = 0.0
    discoveries: int = 1
    discovery_probability: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("rounds", self.rounds), ("discoveries", self.discoveries)):
            if value < 0:
                raise ValueError(f"{name} is {value}; it is at least 0")
        for name, share in (("probability", self.probability), ("discovery_probability", self.discovery_probability)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} is {share}; it is in (0, 1]")
        if self.discovery_multiplier and not LEAST_NOISE <= self.discovery_multiplier < math.inf:
            raise ConfigError(_too_little("the noise multiplier of the discovery", self.discovery_multiplier))

    @property
    def searches(self) -> int:
        """How many searches for the mask are released."""
        return self.discoveries if self.discovery_multiplier else 0


@dataclass(frozen=True)
class Budget:
    """What a run may spend, and the noise it pays with.

    Attributes
    ----------
    epsilon, delta : float
        The budget; `delta` is without the chance of a round that cannot be summed (`failure`).
    noise_multiplier : float
        Of each round of training.
    """

    epsilon: float
    delta: float
    noise_multiplier: float


def epsilon(
    plan: Plan,
    noise_multiplier: float,
    delta: float,
    done_rounds: int | None = None,
    done_discoveries: int | None = None,
) -> float:
    """Return epsilon of a plan, or of so many of its rounds and searches; 0.0 if nothing was released.

    More than the plan has may be done: rounds that were played again count again. By default all of both are done.

    Raises
    ------
    ConfigError
        The noise multiplier is below `LEAST_NOISE`, or ``dp-accounting`` is not installed.
    """
    rounds = plan.rounds if done_rounds is None else done_rounds
    searches = plan.searches if done_discoveries is None else done_discoveries
    if not LEAST_NOISE <= noise_multiplier < math.inf:
        raise ConfigError(_too_little("privacy.noise-multiplier", noise_multiplier))
    return _epsilon(plan, noise_multiplier, delta, rounds, searches)


@lru_cache(maxsize=64)
def steps_epsilon(noise_multiplier: float, probability: float, steps: int, delta: float) -> float:
    """Return epsilon of `steps` releases of one kind with any noise above 0: the steps of DP-SGD.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation of the noise, by the largest length of what one record adds.
    probability : float
        That a record is in a step, in (0, 1].
    """
    # A step's loss grows by the square of 1 / noise, and on one grid for all so would the memory.
    interval = _GRID * max(1.0, 1 / (2 * noise_multiplier) ** 2)
    return _composed(((noise_multiplier, probability, steps),), delta, interval)


def _epsilon(plan: Plan, noise_multiplier: float, delta: float, rounds: int, searches: int) -> float:
    # Rounding a loss up costs epsilon about root(rounds) times the interval: 1 % of what is told at most.
    interval = min(_GRID, 1e-2 / math.sqrt(max(1, plan.rounds)))
    search = plan.discovery_multiplier, plan.discovery_probability, searches
    return _composed((search, (noise_multiplier, plan.probability, rounds)), delta, interval)


@lru_cache(maxsize=64)
def _composed(releases: tuple[tuple[float, float, int], ...], delta: float, interval: float) -> float:
    # Noise multiplier, probability and count of each kind.
    parts = [_release(noise, share, interval).self_compose(count) for noise, share, count in releases if count]
    if not parts:
        return 0.0
    whole = parts[0] if len(parts) == 1 else parts[0].compose(parts[1])
    return float(whole.get_epsilon_for_delta(delta))


@lru_cache(maxsize=16)
def _release(noise_multiplier: float, probability: float, interval: float) -> Any:
    # One Gaussian release; the standard deviation is in units of what a client or record adds at most.
    relation = needed("dp_accounting").NeighboringRelation
    return needed("dp_accounting.pld.privacy_loss_distribution").from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        sampling_prob=probability,
        value_discretization_interval=interval,
        neighboring_relation=relation.ADD_OR_REMOVE_ONE,
    )


def noise_multiplier(plan: Plan, epsilon: float, delta: float) -> float:
    """Return the least noise multiplier of the rounds that keeps a plan within a budget, in 1 / `PARTS`.

    Raises
    ------
    ConfigError
        No noise does: the discovery alone spends the budget.
    """
    alone = _epsilon(plan, 1.0, delta, 0, plan.searches)
    if alone >= epsilon:
        rule = f"the discovery alone, with noise multiplier {plan.discovery_multiplier:g}, spends {alone:.3g}"
        raise ConfigError(f"privacy.epsilon is {epsilon:g}; {rule}")
    cost = functools.partial(_epsilon, plan, delta=delta, rounds=plan.rounds, searches=plan.searches)
    return _least_noise(cost, epsilon, LEAST_NOISE, f"{plan.rounds} rounds")


@lru_cache(maxsize=64)
def steps_noise(probability: float, steps: int, epsilon: float, delta: float) -> float:
    """Return the least noise multiplier of which `steps_epsilon` is at most `epsilon`, in 1 / `PARTS`."""
    cost = functools.partial(steps_epsilon, probability=probability, steps=steps, delta=delta)
    return _least_noise(cost, epsilon, 0.0, f"{steps} steps")


def _least_noise(cost: Callable[[float], float], epsilon: float, least: float, what: str) -> float:
    from scipy.optimize import brentq

    def excess(noise: float) -> float:
        return math.log(max(cost(noise), 1e-9) / epsilon)  # 0 where delta alone does

    high = 1.0
    while excess(high) > 0:
        high *= 2
        if high > MOST_NOISE:
            rule = f"no noise multiplier up to {MOST_NOISE:g} keeps {what} within it"
            raise ConfigError(f"privacy.epsilon is {epsilon:g}; {rule}")
    low = high / 2
    while excess(low) <= 0:
        if low <= least:
            return least
        low, high = max(low / 2, least), low
    parts = math.ceil(PARTS * float(brentq(excess, low, high, xtol=0.25 / PARTS)))
    while excess(parts / PARTS) > 0:
        parts += 1
    return parts / PARTS


def budget(options: PrivacyOptions, plan: Plan, failure: float = 0.0) -> Budget:
    """Return what a run under these options may spend: epsilon is given and the noise follows, or the reverse.

    `failure` is the chance that the run ends for want of clients (`failure_chance`), which is taken out of
    ``privacy.delta``.

    Raises
    ------
    ConfigError
        Both or neither of ``privacy.epsilon`` and ``privacy.noise-multiplier`` are given, no noise keeps the budget,
        or `failure` is more than a tenth of ``privacy.delta``.
    """
    if bool(options.epsilon) == bool(options.noise_multiplier):
        given = "both given" if options.epsilon else "0 both"
        raise ConfigError(
            f"privacy.epsilon and privacy.noise-multiplier are {given}; one is given, the other follows"
        )
    if failure > options.delta / 10:
        raise ConfigError(
            f"privacy.delta is {options.delta:g}; with chance {failure:.2g} a round has too few clients for a sum, "
            "and that may be a tenth of it: take more clients a round, or fewer rounds"
        )
    delta = options.delta - failure
    if options.epsilon:
        return Budget(options.epsilon, delta, noise_multiplier(plan, options.epsilon, delta))
    return Budget(epsilon(plan, options.noise_multiplier, delta), delta, options.noise_multiplier)


def failure_chance(clients: int, probability: float, fewest: int, rounds: int) -> float:
    """Return the chance that in any of so many rounds fewer than `fewest` clients are drawn, in [0, 1].

    Such a round is not summed and ends the run. That tells of a client only where the others in its federation are
    exactly ``fewest - 1``: with any other number of them the run goes on, or ends, with and without it. Cohorts of
    the others do not depend on it, and the divergence of a mixture is at most the mean of those of its parts; so the
    whole run keeps (epsilon, delta + this chance), with nothing times exp(epsilon). The chance is that of the others,
    ``clients - 1``, which is the larger one.
    """
    from scipy.stats import binom

    once = float(binom.cdf(fewest - 1, max(0, clients - 1), probability))
    return 1.0 if once >= 1 else -math.expm1(rounds * math.log1p(-once))


def _too_little(name: str, value: float) -> str:
    return f"{name} is {value:g}; it is a number of at least {LEAST_NOISE:g}: with less noise a release hides nobody"
