"""The mean of a round: right to the last bit of float32, in whatever order the replies come."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.core.means import MAX_WEIGHT, OverlapMean, WeightedMean
from ssfl_app.sparsity.values import PayloadError

law = settings(deadline=None, derandomize=True, max_examples=80)

# 2**-32 and above a float32 is held exactly; zeros and both signs are among them.
EXACT = st.one_of(
    st.sampled_from([0.0, -0.0, 2.0**15, -(2.0**15), 2.0**-32, -(2.0**-32), 1 / 3]),
    st.floats(2.0**-32, 2.0**15, width=32),
    st.floats(-(2.0**15), -(2.0**-32), width=32),
).map(np.float32)
WEIGHTS = st.integers(1, 1000)


def mean_of(terms):
    mean = WeightedMean(len(terms[0][0]))
    for values, weight in terms:
        mean.add(np.array(values, dtype=np.float32), weight)
    return mean


def exact(terms, i=0):
    """The rational mean of coordinate i."""
    return sum(Fraction(float(v[i])) * w for v, w in terms) / sum(w for _, w in terms)


def rounded(fraction):
    """The float32 nearest to a fraction, by comparing neighbours exactly."""
    near = np.float32(float(fraction))
    ways = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    return min(ways, key=lambda x: abs(Fraction(float(x)) - fraction))


@given(st.lists(st.tuples(st.tuples(EXACT), WEIGHTS), min_size=1, max_size=8))
@law
def test_the_mean_is_the_rational_one_within_an_ulp(terms):
    (got,) = mean_of(terms).value()
    nearest = rounded(exact(terms))
    assert abs(Fraction(float(got)) - Fraction(float(nearest))) <= Fraction(float(np.spacing(np.abs(nearest))))


@given(st.lists(st.tuples(st.tuples(st.floats(-1, 1, width=32)), WEIGHTS), min_size=1, max_size=8))
@law
def test_smaller_values_are_off_by_less_than_two_to_the_minus_63(terms):
    (got,) = mean_of(terms).value()
    wanted = exact(terms)
    ulp = Fraction(float(np.spacing(np.abs(np.float32(float(wanted))))))
    assert abs(Fraction(float(got)) - wanted) <= Fraction(1, 2**63) + ulp


def test_many_magnitudes_at_once():
    rng = np.random.default_rng(1)
    # More coordinates than are worked on at a time.
    size = (1 << 18) + 1000
    terms = [
        ((rng.choice([-1, 1], size) * np.exp2(rng.uniform(-38, 15, size))).astype(np.float32), int(weight))
        for weight in rng.integers(1, 5000, size=5)
    ]
    got = mean_of(terms).value()
    assert got.dtype == np.float32
    assert got.shape == (size,)
    for i in [*range(300), *range(size - 300, size)]:
        nearest = rounded(exact(terms, i))
        assert abs(got[i] - nearest) <= np.spacing(np.abs(nearest))


@given(st.lists(st.tuples(st.lists(EXACT, min_size=5, max_size=5), WEIGHTS), min_size=2, max_size=7), st.randoms())
@law
def test_any_order_of_arrival_gives_the_same_bits(terms, random):
    other = terms.copy()
    random.shuffle(other)
    assert mean_of(terms).value().tobytes() == mean_of(other).value().tobytes()


def test_floating_point_addition_would_depend_on_the_order():
    big, small = [np.float32(2**15)], [np.float32(2**-12)]
    minus = [np.float32(-(2**15))]
    assert (np.float32(big[0] + small[0]) + minus[0]) != (np.float32(big[0] + minus[0]) + small[0])
    for order in ([big, small, minus], [big, minus, small], [small, minus, big]):
        assert mean_of([(values, 1) for values in order]).value()[0] == np.float32(2**-12 / 3)


def test_weights_by_hand():
    mean = WeightedMean(3)
    mean.add(np.array([1, 2, -4], np.float32))
    assert mean.value().tolist() == [1, 2, -4]
    mean.add(np.array([5, 2, 0], np.float32), 3)
    assert mean.weight == 4
    assert mean.value().tolist() == [4, 2, -1]
    mean.add(np.array([0, 2, 1], np.float32), 4)
    assert mean.value().tolist() == [2, 2, 0]


@given(EXACT, st.integers(1, MAX_WEIGHT))
@law
def test_the_mean_of_one_value_is_that_value_at_any_weight(value, weight):
    assert mean_of([([value], weight)]).value()[0] == value


def test_the_largest_values_at_the_largest_weight_do_not_overflow():
    mean = WeightedMean(2)
    mean.add(np.array([2**15, -(2**15)], np.float32), MAX_WEIGHT - 1)
    mean.add(np.array([2**15, -(2**15)], np.float32), 1)
    assert mean.value().tolist() == [2**15, -(2**15)]
    with pytest.raises(ValueError, match="a weight is 1 after 8388608; at least 1, together at most 8388608"):
        mean.add(np.zeros(2, np.float32), 1)


@pytest.mark.parametrize(
    ("values", "weight", "error", "message"),
    [
        ([1.0, np.nan], 1, PayloadError, "1 values are NaN or Inf"),
        ([-np.inf, 1.0], 1, PayloadError, "1 values are NaN or Inf"),
        ([32769.0, 1.0], 1, PayloadError, "magnitude"),
        ([1.0, -32769.0], 1, PayloadError, "magnitude"),
        ([1.0], 1, ValueError, r"shape \(1,\); this mean needs \(2,\)"),
        ([[1.0, 2.0]], 1, ValueError, r"shape \(1, 2\); this mean needs \(2,\)"),
        ([1.0, 1.0], 0, ValueError, "a weight is 0 after 3"),
        ([1.0, 1.0], -1, ValueError, "a weight is -1 after 3"),
        ([1.0, 1.0], MAX_WEIGHT - 2, ValueError, "together at most"),
    ],
)
def test_what_is_refused_leaves_the_mean_as_it_was(values, weight, error, message):
    mean = WeightedMean(2)
    mean.add(np.array([1 / 3, -7.0], np.float32), 3)
    before = mean.value().tobytes()
    with pytest.raises(error, match=message):
        mean.add(np.array(values, np.float32), weight)
    assert mean.weight == 3
    assert mean.value().tobytes() == before


@pytest.mark.parametrize("weights", [[60, 70, 80], [0.5, 2.25, 1e-3], [10**9, 3, 12_345_678], [2**39 + 1, 0.125, 7]])
def test_means_with_any_positive_weights(weights: list[float]) -> None:
    vectors = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    forward, backward = WeightedMean(50, 3), WeightedMean(50, 3)
    for vector, weight in zip(vectors, weights, strict=True):
        forward.add(vector, weight)
    for vector, weight in reversed(list(zip(vectors, weights, strict=True))):
        backward.add(vector, weight)
    assert forward.value().tobytes() == backward.value().tobytes()
    exact = np.average(vectors.astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(forward.value(), exact, rtol=1e-5, atol=1e-6)


def test_a_mean_with_any_weights_refuses_nothing_and_no_weight() -> None:
    with pytest.raises(ValueError, match="a mean of nothing"):
        WeightedMean(3, 2).value()
    with pytest.raises(ValueError, match="a weight is 0"):
        WeightedMean(3, 2).add(np.zeros(3, np.float32), 0)
    with pytest.raises(ValueError, match=r"a weight is 0\.5; it is a whole number"):
        WeightedMean(3).add(np.zeros(3, np.float32), 0.5)


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a mean of nothing"):
        WeightedMean(2).value()


def test_adding_does_not_write_to_the_vector_and_value_does_not_share_memory():
    mean, values = WeightedMean(2), np.array([0.1, 0.2], np.float32)
    values.flags.writeable = False  # as they come off the wire
    mean.add(values, 2)
    first = mean.value()
    first[:] = 9
    assert mean.value().tolist() == values.tolist()


# ---- the mean over owners -------------------------------------------------------------------------

FIVE = st.lists(EXACT, min_size=5, max_size=5)
OWNED = st.lists(st.booleans(), min_size=5, max_size=5)
SHARED = st.lists(st.tuples(FIVE, OWNED, WEIGHTS), max_size=7)


def overlap_of(terms, size=5):
    mean = OverlapMean(size)
    for values, owned, weight in terms:
        mean.add(np.array(values, np.float32), np.array(owned, np.bool_), weight)
    return mean


def test_overlap_by_hand():
    mean = OverlapMean(4)
    old = np.array([10, 20, 30, 40], np.float32)
    assert mean.value(old).tolist() == [10, 20, 30, 40]
    mean.add(np.array([1, 2, 3, 4], np.float32), np.array([True, True, False, False]))
    mean.add(np.array([5, 6, 7, 8], np.float32), np.array([True, False, True, False]), 3)
    # (1 + 3 * 5) / 4, 2 / 1, 3 * 7 / 3, nobody
    assert mean.value(old).tolist() == [4, 2, 7, 40]
    assert mean.weights().tolist() == [4, 1, 3, 0]
    assert mean.weight == 4


@given(SHARED, FIVE)
@law
def test_each_coordinate_is_the_mean_of_its_owners_alone_or_the_old_value(terms, old):
    mean = overlap_of(terms)
    old = np.array(old, np.float32)
    got = mean.value(old)
    assert got.dtype == np.float32
    for i in range(5):
        own = [([values[i]], weight) for values, owned, weight in terms if owned[i]]
        wanted = mean_of(own).value()[0] if own else old[i]
        assert got[i].tobytes() == wanted.tobytes()
        assert mean.weights()[i] == sum(weight for _, weight in own)


@given(SHARED, st.randoms())
@law
def test_any_order_of_arrival_gives_the_same_bits_of_the_overlap_mean(terms, random):
    other, old = terms.copy(), np.full(5, 7, np.float32)
    random.shuffle(other)
    one, two = overlap_of(terms), overlap_of(other)
    assert one.value(old).tobytes() == two.value(old).tobytes()
    assert one.weights().tobytes() == two.weights().tobytes()


def test_overlap_of_more_coordinates_than_are_worked_on_at_a_time():
    rng = np.random.default_rng(1)
    size = (1 << 18) + 1000
    vectors = [(rng.choice([-1, 1], size) * np.exp2(rng.uniform(-38, 15, size))).astype(np.float32) for _ in range(3)]
    everything, all_own = WeightedMean(size), OverlapMean(size)
    parted, wanted = OverlapMean(size), [WeightedMean(size), WeightedMean(size)]
    third = np.arange(size) % 3 == 0
    for k, values in enumerate(vectors):
        everything.add(values, k + 5)
        all_own.add(values, np.ones(size, np.bool_), k + 5)
        parted.add(values, third if k < 2 else ~third, k + 5)
        wanted[k == 2].add(values, k + 5)
    old = np.zeros(size, np.float32)
    assert all_own.value(old).tobytes() == everything.value().tobytes()
    assert parted.value(old).tobytes() == np.where(third, wanted[0].value(), wanted[1].value()).tobytes()


@pytest.mark.parametrize("foreign", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_owned_is_ignored_whatever_it_is(foreign):
    mean = OverlapMean(2)
    mean.add(np.array([foreign, 1.5], np.float32), np.array([False, True]))
    assert mean.value(np.array([9, 9], np.float32)).tolist() == [9, 1.5]


@pytest.mark.parametrize(
    ("values", "owned", "weight", "error", "message"),
    [
        ([np.nan, 1.0], [True, False], 1, PayloadError, "1 values are NaN or Inf"),
        ([1.0, 32769.0], [False, True], 1, PayloadError, "magnitude"),
        ([1.0], [True, True], 1, ValueError, r"a vector has shape \(1,\); this mean needs \(2,\)"),
        ([1.0, 1.0], [True], 1, ValueError, r"a vector of owned bits has shape \(1,\); this mean needs \(2,\)"),
        ([1.0, 1.0], [1, 0], 1, TypeError, "owned is int64; it must be bool"),
        ([1.0, 1.0], [True, True], 0, ValueError, "a weight is 0 after 3"),
        ([1.0, 1.0], [True, True], MAX_WEIGHT - 2, ValueError, "together at most"),
    ],
)
def test_what_is_refused_leaves_the_overlap_mean_as_it_was(values, owned, weight, error, message):
    mean, old = OverlapMean(2), np.zeros(2, np.float32)
    mean.add(np.array([1 / 3, -7.0], np.float32), np.array([True, False]), 3)
    before = mean.value(old).tobytes(), mean.weights().tobytes()
    with pytest.raises(error, match=message):
        mean.add(np.array(values, np.float32), np.array(owned), weight)
    assert mean.weight == 3
    assert (mean.value(old).tobytes(), mean.weights().tobytes()) == before


def test_an_old_state_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"a vector of old values has shape \(3,\); this mean needs \(2,\)"):
        OverlapMean(2).value(np.zeros(3, np.float32))


def test_the_overlap_mean_shares_no_memory():
    mean, old = OverlapMean(2), np.array([1, 2], np.float32)
    values, owned = np.array([3, 4], np.float32), np.array([True, False])
    for array in (values, owned, old):
        array.flags.writeable = False
    mean.add(values, owned, 2)
    mean.value(old)[:] = 9
    mean.weights()[:] = 9
    assert mean.value(old).tolist() == [3, 2]
    assert mean.weights().tolist() == [2, 0]


def test_the_largest_values_at_the_largest_weight_do_not_overflow_the_overlap_mean():
    mean, both = OverlapMean(2), np.ones(2, np.bool_)
    mean.add(np.array([2**15, -(2**15)], np.float32), both, MAX_WEIGHT - 1)
    mean.add(np.array([2**15, -(2**15)], np.float32), both, 1)
    assert mean.value(np.zeros(2, np.float32)).tolist() == [2**15, -(2**15)]
    assert mean.weights().tolist() == [MAX_WEIGHT, MAX_WEIGHT]
