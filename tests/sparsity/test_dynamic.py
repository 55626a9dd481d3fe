"""Laws of masks that move: how many die and come back in each layer, and which ones."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.sparsity.dynamic import cosine_drop, drop, grow, layer_densities, random_mask, swap, top_mask
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask, keep_count

law = settings(deadline=None, derandomize=True, max_examples=80)

LAYOUT = Layout((("a", (2, 4)), ("a.bias", (3,)), ("b", (2, 3))), ("a", "b"))
SPANS = {"a": range(8), "b": range(8, 14)}
LIVE = np.array([1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1], np.bool_)  # 5 of 8 and 3 of 6
MASK = Mask(LAYOUT, LIVE)
SEEDS = st.integers(0, 2**32)
BITS = st.lists(st.booleans(), min_size=14, max_size=14).map(lambda bits: np.array(bits, np.bool_))
# Many ties among few values.
SCORES = st.lists(
    st.one_of(st.sampled_from([0.0, -0.0, 1.0, 2.0]), st.floats(0, width=32, allow_infinity=False)),
    min_size=14,
    max_size=14,
).map(lambda scores: np.array(scores, np.float32))


def alive(mask, name):
    return {i for i in SPANS[name] if mask.alive[i]}


def best(places, scores, count):
    """The places of the largest scores, the lower index first among equals."""
    return set(sorted(places, key=lambda i: (-scores[i], i))[:count])


def drawn(data, limits):
    return {name: data.draw(st.integers(0, limit)) for name, limit in limits.items()}


# ---- births of a mask -----------------------------------------------------------------------------


@given(SCORES, st.integers(0, 8), st.integers(0, 6), SEEDS)
@law
def test_a_mask_has_the_counts_at_the_best_places_or_at_random_ones(scores, first, second, seed):
    scores = scores - np.float32(1)  # either sign
    counts = {"a": first, "b": second}
    top = top_mask(LAYOUT, scores, counts)
    for name, places in SPANS.items():
        assert alive(top, name) == best(places, scores, counts[name])
    one, other = (random_mask(LAYOUT, counts, np.random.default_rng(seed)) for _ in range(2))
    assert one == other
    assert {name: count for name, count, _ in one.layers()} == counts


def test_random_masks_are_uniform():
    rng = np.random.default_rng(1)
    times = sum(random_mask(LAYOUT, {"a": 2, "b": 3}, rng).alive.astype(int) for _ in range(2000))
    # 2 of 8 alive in the first layer (mean 500, deviation 19.4), 3 of 6 in the second (mean 1000, deviation 22.4).
    assert np.abs(times[:8] - 500).max() < 100
    assert np.abs(times[8:] - 1000).max() < 112


# ---- fire -----------------------------------------------------------------------------------------


def test_fire_by_hand():
    sizes = np.array([3, 1, 0, 1, 0, 0, 1, 2, 0, 5, 9, 0, 9, 4], np.float32)
    # Layer a has 3 1 1 1 2 at 0 1 3 6 7: of the three ones the higher two die. The dead zeros do not count.
    fired = drop(MASK, sizes, {"a": 2, "b": 1})
    assert np.flatnonzero(fired.alive).tolist() == [0, 1, 7, 9, 13]
    assert np.flatnonzero(drop(MASK, sizes, {"a": 5, "b": 0}).alive).tolist() == [9, 11, 13]
    assert drop(MASK, sizes, {"a": 0, "b": 0}) == MASK


@given(BITS, SCORES, st.data())
@law
def test_fire_takes_the_smallest_of_each_layer_the_higher_index_first(bits, sizes, data):
    mask = Mask(LAYOUT, bits)
    counts = drawn(data, {name: count for name, count, _ in mask.layers()})
    fired = drop(mask, sizes, counts)
    assert not (fired.alive & ~mask.alive).any()
    for name in SPANS:
        dying = sorted(alive(mask, name), key=lambda i: (sizes[i], -i))[: counts[name]]
        assert alive(mask, name) - alive(fired, name) == set(dying)
        assert len(alive(mask, name)) - len(alive(fired, name)) == counts[name]


# ---- regrow ---------------------------------------------------------------------------------------


def test_regrow_by_hand():
    scores = np.array([9, 9, 1, 9, 3, 3, 9, 9, -1, 9, -2, 9, -2, 9], np.float32)
    # Dead are 2 4 5 with scores 1 3 3, and 8 10 12 with -1 -2 -2.
    grown = grow(MASK, {"a": 1, "b": 2}, scores)
    assert np.flatnonzero(grown.alive & ~LIVE).tolist() == [4, 8, 10]


@given(BITS, SCORES, SEEDS, st.data())
@law
def test_regrow_takes_the_best_dead_ones_of_each_layer_or_any(bits, scores, seed, data):
    mask, scores = Mask(LAYOUT, bits), scores - np.float32(1)
    free = {name: {i for i in SPANS[name] if not bits[i]} for name in SPANS}
    counts = drawn(data, {name: len(free[name]) for name in free})
    grown = grow(mask, counts, scores)
    one, other = (grow(mask, counts, np.random.default_rng(seed)) for _ in range(2))
    assert one == other
    for name in SPANS:
        assert alive(grown, name) == alive(mask, name) | best(free[name], scores, counts[name])
        born = alive(one, name) - alive(mask, name)
        assert alive(one, name) >= alive(mask, name)
        assert born <= free[name]
        assert len(born) == counts[name]


def test_regrowth_is_uniform_among_the_dead():
    rng = np.random.default_rng(1)
    times = sum(grow(MASK, {"a": 1, "b": 2}, rng).alive.astype(int) for _ in range(1800))
    # 1 of the 3 dead in the first layer (mean 600, deviation 20), 2 of the 3 in the second (mean 1200, deviation 20).
    assert (times[LIVE] == 1800).all()
    assert np.abs(times[[2, 4, 5]] - 600).max() < 100
    assert np.abs(times[[8, 10, 12]] - 1200).max() < 100


@given(BITS, SCORES, SEEDS, st.booleans(), st.data())
@law
def test_fire_and_regrow_of_the_same_counts_keep_each_density(bits, scores, seed, by_chance, data):
    mask = Mask(LAYOUT, bits)
    counts = drawn(data, {name: count for name, count, _ in mask.layers()})
    moved = grow(drop(mask, scores, counts), counts, np.random.default_rng(seed) if by_chance else scores)
    assert layer_densities(moved) == layer_densities(mask)


def test_layer_densities_by_hand():
    assert layer_densities(MASK) == {"a": 5 / 8, "b": 3 / 6}


# ---- what is refused ------------------------------------------------------------------------------

ONES, RNG = np.ones(14, np.float32), np.random.default_rng(1)
ONE_EACH = {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_mask(LAYOUT, {"a": 9, "b": 1}, RNG), r"count of a is 9; it is in 0\.\.8"),
        (lambda: random_mask(LAYOUT, {"a": 1}, RNG), r"counts names \['b'\] do not match"),
        (lambda: random_mask(LAYOUT, {"a": 1, "b": 1, "a.bias": 1}, RNG), r"\['a.bias'\] do not match"),
        (lambda: top_mask(LAYOUT, ONES, {"a": 1, "b": -1}), r"count of b is -1; it is in 0\.\.6"),
        (lambda: top_mask(LAYOUT, ONES[:5], ONE_EACH), r"scores have shape \(5,\); this layout needs \(14,\)"),
        (lambda: drop(MASK, ONES, {"a": 1, "b": 4}), r"count of b is 4; it is in 0\.\.3"),
        (lambda: drop(MASK, ONES, {"a": -1, "b": 0}), r"count of a is -1; it is in 0\.\.5"),
        (lambda: drop(MASK, ONES[:5], ONE_EACH), r"magnitudes have shape \(5,\)"),
        (lambda: drop(MASK, -ONES, ONE_EACH), "14 magnitudes are negative; all must be at least 0"),
        (lambda: grow(MASK, {"a": 4, "b": 1}, ONES), r"count of a is 4; it is in 0\.\.3"),
        (lambda: grow(Mask.dense(LAYOUT), ONE_EACH, RNG), r"count of a is 1; it is in 0\.\.0"),
        (lambda: grow(MASK, ONE_EACH, ONES[:5]), r"scores have shape \(5,\)"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    scores = ONES.copy()
    scores[[2, 3]] = bad  # one is dead, one alive
    for call in (
        lambda: top_mask(LAYOUT, scores, ONE_EACH),
        lambda: drop(MASK, scores, ONE_EACH),
        lambda: grow(MASK, ONE_EACH, scores),
    ):
        with pytest.raises(ValueError, match=r"2 (scores|magnitudes) are NaN or Inf"):
            call()


# ---- the schedule ---------------------------------------------------------------------------------


def test_the_cosine_falls_from_alpha_to_nothing():
    # cos(pi / 3) is 1/2, cos(pi / 2) is 0, cos(2 pi / 3) is -1/2
    drops = [cosine_drop(0.4, round_, 6) for round_ in (0, 2, 3, 4, 6)]
    assert all(math.isclose(a, b, abs_tol=1e-15) for a, b in zip(drops, (0.4, 0.3, 0.2, 0.1, 0), strict=True))


# ---- both at once ----------------------------------------------------------------------------------


@given(BITS, BITS, SCORES, st.floats(0.01, 1), st.sampled_from(["global", "layer"]), st.integers(0, 4))
@law
def test_the_weakest_give_way_to_stronger_candidates_and_counts_and_floors_stay(
    live, offered, scores, share, scope, floor
):
    mask, candidates = Mask(LAYOUT, live), offered & ~live
    after = swap(mask, scores, candidates, share, scope, floor)
    assert after.count == mask.count
    come, left = after.alive & ~mask.alive, mask.alive & ~after.alive
    assert not (come & ~candidates).any()
    for group in [range(14)] if scope == "global" else SPANS.values():
        alive_before = {i for i in group if mask.alive[i]}
        safe = {i for places in SPANS.values() for i in best({i for i in places if mask.alive[i]}, scores, floor)}
        weakest = sorted(alive_before - safe, key=lambda i: (scores[i], -i))
        strongest = best(group, np.where(candidates, scores, -1), int(candidates[list(group)].sum()))
        strongest = sorted(strongest, key=lambda i: (-scores[i], i))
        pairs = list(zip(weakest, strongest, strict=False))[: keep_count(share, len(alive_before))]
        pairs = [(old, new) for old, new in pairs if scores[new] > scores[old]]
        assert {i for i in group if left[i]} == {old for old, _ in pairs}
        assert {i for i in group if come[i]} == {new for _, new in pairs}
    for name, count, _ in after.layers():
        before = int(mask.alive[list(SPANS[name])].sum())
        assert count >= min(floor, before)
        assert scope == "global" or count == before


def test_alive_candidates_are_no_candidates():
    with pytest.raises(ValueError, match=r"candidates are .*; they are dead ones of this layout"):
        swap(MASK, np.ones(14, np.float32), LIVE, 0.5)
