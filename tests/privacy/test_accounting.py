"""Epsilon against the formula of one Gaussian, another accountant's published numbers, and the library by itself."""

import math
import sys
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.stats import binom, norm

from ssfl_app.options import ConfigError
from ssfl_app.privacy import accounting
from ssfl_app.privacy.accounting import LEAST_NOISE, Plan, budget, epsilon, failure_chance, noise_multiplier
from ssfl_app.privacy.options import PrivacyOptions

TEN_OF_HUNDRED = Plan(200, 0.1)


def test_one_module_accounts_for_clients_and_for_records():
    files = {file.name: file.read_text() for file in Path(accounting.__file__).parents[1].rglob("*.py")}
    assert [name for name, text in files.items() if "dp_accounting" in text] == ["accounting.py"]
    steps, rounds = accounting.steps_epsilon(2.0, 0.1, 30, 1e-4), epsilon(Plan(30, 0.1), 2.0, 1e-4)
    assert steps == rounds
    assert accounting.steps_noise(0.1, 30, rounds, 1e-4) == noise_multiplier(Plan(30, 0.1), rounds, 1e-4)


def gaussian_delta(epsilon_, noise):
    """Delta of one Gaussian release, by Balle and Wang, ICML 2018, theorem 8: the sum moves by 1."""
    mu = 1 / noise
    return norm.cdf(mu / 2 - epsilon_ / mu) - math.exp(epsilon_) * norm.cdf(-mu / 2 - epsilon_ / mu)


def rounds_event(noise, probability, count):
    each = dp_accounting.PoissonSampledDpEvent(probability, dp_accounting.GaussianDpEvent(noise))
    return dp_accounting.SelfComposedDpEvent(each, count)


# ---- epsilon --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [0.5, 2.0])
@pytest.mark.parametrize(("noise", "rounds"), [(2.0, 1), (4.0, 9)])
def test_with_all_clients_it_is_the_formula_of_one_gaussian(wanted, noise, rounds):
    # Nine releases are one with a third of the noise. The library rounds up only.
    told = epsilon(Plan(rounds, 1.0), noise, gaussian_delta(wanted, noise / math.sqrt(rounds)))
    assert wanted - 1e-9 <= told <= wanted * 1.002


@pytest.mark.parametrize(
    ("noise", "probability", "published"), [(2.0, 0.01, 0.010224911209191894), (2.0, 0.02, 0.14991732969314892)]
)
def test_it_agrees_with_the_published_numbers_of_another_tight_accountant(noise, probability, published):
    # Fourier Accountant of Koskela et al. (DPBayes/PLD-Accountant, tests/test_compute_delta.py): its delta at
    # epsilon 1 for 10^4 releases and neighbours that add or remove one.
    assert epsilon(Plan(10_000, probability), noise, published) == pytest.approx(1.0, rel=1e-3)


def test_neighbours_are_those_with_a_client_more_not_those_with_another_one():
    # The same accountant's delta of (2.0, 0.01) where a client is replaced, and the sum moves by 2 C, is 12 times
    # that of add or remove.
    replaced = 0.1282093857106282
    assert epsilon(Plan(10_000, 0.01), 2.0, replaced) < 0.5
    mine = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(rounds_event(2.0, 0.1, 30))
    assert epsilon(Plan(30, 0.1), 2.0, 1e-4) == pytest.approx(mine.get_epsilon(1e-4), rel=1e-3)


def test_a_search_for_the_mask_is_composed_with_the_rounds_as_the_library_does():
    plan = Plan(20, 0.2, discovery_multiplier=3.0, discovery_probability=0.5)
    accountant = PLDAccountant().compose(rounds_event(3.0, 0.5, 1)).compose(rounds_event(2.0, 0.2, 20))
    assert epsilon(plan, 2.0, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=2e-3)
    both = Plan(20, 0.2, discovery_multiplier=3.0, discovery_probability=0.5, discoveries=2)
    assert epsilon(plan, 2.0, 1e-5) < epsilon(both, 2.0, 1e-5) == epsilon(plan, 2.0, 1e-5, 20, 2)


def test_it_is_below_what_bounds_by_moments_tell():
    # Abadi et al., "Deep learning with differential privacy", CCS 2016, section 3.2: 1.26 for sampling 0.01, noise 4,
    # 10^4 steps and delta 1e-5.
    assert 0.9 < epsilon(Plan(10_000, 0.01), 4.0, 1e-5) < 1.26
    renyi = RdpAccountant(orders=range(2, 64)).compose(rounds_event(2.46, 0.1, 200)).get_epsilon(1e-3)
    assert renyi == pytest.approx(2.0, rel=0.01)  # the project's notes had their 2.46 for epsilon 2 from it
    assert epsilon(TEN_OF_HUNDRED, 2.46, 1e-3) == pytest.approx(1.73, abs=0.005)  # docs/privacy.md tells both


def test_it_grows_with_what_was_released():
    plan = Plan(40, 0.2, discovery_multiplier=4.0)
    assert epsilon(plan, 2.0, 1e-4, 0, 0) == 0.0
    curve = [epsilon(plan, 2.0, 1e-4, done) for done in (0, 1, 10, 40, 41)]
    assert curve == sorted(curve)
    assert len(set(curve)) == 5
    assert curve[0] == pytest.approx(epsilon(Plan(1, 1.0), 4.0, 1e-4), rel=0.01)  # the search alone
    assert curve[3] == epsilon(plan, 2.0, 1e-4)


def test_so_little_noise_that_it_hides_nobody_is_refused():
    with pytest.raises(ConfigError, match=r"privacy\.noise-multiplier is 0\.01; it is a number of at least 0\.1"):
        epsilon(TEN_OF_HUNDRED, 0.01, 1e-3)
    with pytest.raises(ConfigError, match=r"noise multiplier of the discovery is 0\.05; it is a number of at least"):
        Plan(200, 0.1, discovery_multiplier=0.05)


def test_a_plan_is_checked():
    for wrong, words in ((Plan(1, 1.0), {"probability": 0.0}), (Plan(1, 1.0), {"rounds": -1})):
        with pytest.raises(ValueError, match=next(iter(words))):
            Plan(**(vars(wrong) | words))


def test_the_extra_is_named_where_the_library_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r'dp-accounting is not installed here: pip install "ssfl-app\[privacy\]"'):
        epsilon(Plan(3, 0.123), 7.0, 1e-3)


# ---- noise of a budget ----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [TEN_OF_HUNDRED, Plan(200, 0.1, discovery_multiplier=4.0)])
def test_the_noise_is_the_least_that_keeps_the_budget(plan):
    noise = noise_multiplier(plan, 2.0, 1e-3)
    assert epsilon(plan, noise, 1e-3) <= 2.0 < epsilon(plan, noise - 2e-4, 1e-3)
    assert noise == round(noise, 4)


def test_a_search_with_much_noise_costs_little():
    alone, with_search = (noise_multiplier(Plan(200, 0.1, each), 2.0, 1e-3) for each in (0.0, 4.0))
    assert alone < with_search < 1.1 * alone


def test_a_large_budget_has_the_least_noise_that_is_taken(monkeypatch):
    assert LEAST_NOISE == 0.1
    monkeypatch.setattr(accounting, "LEAST_NOISE", 0.4)  # with 0.1 the library takes seconds
    assert noise_multiplier(Plan(1, 0.1), 1e6, 1e-3) == 0.4
    assert noise_multiplier(Plan(1, 0.1), 1.0, 0.5) == 0.4  # delta alone does


def test_a_budget_that_no_noise_keeps_is_refused():
    with pytest.raises(ConfigError, match=r"epsilon is 0\.5; the discovery alone, with noise multiplier 2, spends 1"):
        noise_multiplier(Plan(200, 0.1, discovery_multiplier=2.0), 0.5, 1e-3)
    with pytest.raises(ConfigError, match=r"epsilon is 1e-06; no noise multiplier up to 10000 keeps 5 rounds within"):
        noise_multiplier(Plan(5, 0.1), 1e-6, 1e-5)


# ---- the budget of a run --------------------------------------------------------------------------


def test_one_of_epsilon_and_noise_is_given_and_the_other_follows():
    plan = Plan(20, 0.2)
    given = budget(PrivacyOptions(level="client", epsilon=2.0, delta=1e-3), plan)
    assert (given.epsilon, given.delta) == (2.0, 1e-3)
    assert given.noise_multiplier == noise_multiplier(plan, 2.0, 1e-3)
    follows = budget(PrivacyOptions(level="client", noise_multiplier=1.5, delta=1e-3), plan)
    assert (follows.epsilon, follows.noise_multiplier) == (epsilon(plan, 1.5, 1e-3), 1.5)


def test_both_or_neither_of_them_is_refused():
    with pytest.raises(ConfigError, match=r"epsilon and privacy\.noise-multiplier are both given; one is given"):
        budget(PrivacyOptions(epsilon=1.0, noise_multiplier=1.0), TEN_OF_HUNDRED)
    with pytest.raises(ConfigError, match=r"epsilon and privacy\.noise-multiplier are 0 both; one is given"):
        budget(PrivacyOptions(), TEN_OF_HUNDRED)


def test_the_chance_of_too_few_clients_is_taken_out_of_delta():
    options = PrivacyOptions(level="client", noise_multiplier=1.5, delta=1e-3)
    spent = budget(options, Plan(20, 0.2), failure=1e-4)
    assert spent.delta == pytest.approx(9e-4)
    assert spent.epsilon == epsilon(Plan(20, 0.2), 1.5, spent.delta)
    with pytest.raises(ConfigError, match=r"delta is 0\.001; with chance 0\.00011 a round has too few clients"):
        budget(options, Plan(20, 0.2), failure=1.1e-4)


# ---- too few clients ------------------------------------------------------------------------------


def test_the_chance_by_hand():
    # Of 3 others with chance 1/2 each: none in 1 of 8, one in 3 of 8.
    assert failure_chance(4, 0.5, 2, 1) == pytest.approx(0.5)
    assert failure_chance(4, 0.5, 1, 2) == pytest.approx(1 - (7 / 8) ** 2)
    assert failure_chance(3, 1.0, 2, 100) == 0.0
    assert failure_chance(3, 1.0, 3, 100) == 1.0  # without one of them there are two
    assert failure_chance(200, 0.2, 3, 1000) == pytest.approx(
        1000 * binom.cdf(2, 199, 0.2), rel=1e-6
    )  # small: no 1 - x


def test_cohorts_must_be_large_for_the_chance_to_be_small():
    # What docs/privacy.md tells: a tenth of delta 1e-5, 200 rounds, at least 3 clients.
    for clients, least in ((1000, 25), (200, 24)):
        few, enough = (failure_chance(clients, each / clients, 3, 200) for each in (least - 1, least))
        assert enough <= 1e-6 < few


@pytest.mark.parametrize("wanted", [0.2, 1.0, 2.0])
@pytest.mark.parametrize("fewest", [1, 2, 4])
def test_a_round_that_may_fail_keeps_epsilon_with_that_much_more_delta(wanted, fewest):
    # One release by clients that all send 1, exactly: rounded noise of deviation 1 on a grid, or the word "failed".
    clients, chance, grid = 7, 0.4, np.arange(-12, 20)

    def outcomes(members, least):
        table, failed = np.zeros(grid.size), 0.0
        for drawn, weight in enumerate(binom.pmf(np.arange(members + 1), members, chance)):
            noise = norm.cdf(grid + 0.5 - drawn) - norm.cdf(grid - 0.5 - drawn)
            table, failed = (table + weight * noise, failed) if drawn >= least else (table, failed + weight)
        return np.append(table, failed)

    def delta(least):
        one, other = outcomes(clients, least), outcomes(clients - 1, least)
        pairs = ((one, other), (other, one))
        return max(float(np.maximum(0, a - math.exp(wanted) * b).sum()) for a, b in pairs)

    assert delta(fewest) <= delta(0) + failure_chance(clients, chance, fewest, 1)


def test_caches_do_not_mix_plans():
    plan, other = Plan(5, 0.2), Plan(5, 0.4)
    told = epsilon(plan, 2.0, 1e-3), epsilon(other, 2.0, 1e-3)
    accounting._composed.cache_clear()
    assert told == (epsilon(plan, 2.0, 1e-3), epsilon(other, 2.0, 1e-3))
    assert told[0] < told[1]
