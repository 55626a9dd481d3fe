"""The mean of a round: right to the last bit of float32, in whatever order the replies come."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.aggregate import MAX_WEIGHT, WeightedMean
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
