"""Clipping on whole numbers: one client more moves the sum by at most C, exactly."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.privacy.clipping import clipped

law = settings(deadline=None, derandomize=True, max_examples=60)

numbers = st.floats(-1e6, 1e6, width=32)


@st.composite
def federations(draw):
    """Vectors of some clients, a limit and a step."""
    size, clients = draw(st.integers(1, 30)), draw(st.integers(1, 4))
    rows = [draw(st.lists(numbers, min_size=size, max_size=size)) for _ in range(clients)]
    step = 2.0 ** -draw(st.integers(0, 20))
    clip = draw(st.floats(1.0, 1000.0))
    return np.array(rows, dtype=np.float32), clip, step


def square(vector):
    return sum(int(value) ** 2 for value in vector)


@given(federations(), st.integers(0, 3))
@law
def test_the_sum_of_neighbouring_federations_differs_by_at_most_the_clip(federation, number):
    rows, clip, step = federation
    whole = [clipped(row, clip, step) for row in rows]
    left = number % len(rows)
    one, other = sum(whole), sum(whole[:left] + whole[left + 1 :], np.zeros_like(whole[0]))
    assert square(one - other) * Fraction(step) ** 2 <= Fraction(clip) ** 2


@given(federations())
@law
def test_a_short_vector_is_only_rounded(federation):
    rows, clip, step = federation
    for row in rows:
        exact = np.rint(row.astype(np.float64) / step)
        if square(exact) * Fraction(step) ** 2 <= Fraction(clip) ** 2 and np.linalg.norm(row) <= clip * (1 - 1e-6):
            np.testing.assert_array_equal(clipped(row, clip, step), exact)


def test_rounding_up_does_not_make_it_too_long():
    # 100 times 0.6: length 6, but 10 if each becomes 1.
    found = clipped(np.full(100, 0.6), 6.0)
    assert square(found) <= 36
    assert square(clipped(np.array([3.0, 4.0]), 5.0)) == 25
    assert clipped(np.array([30.0, 40.0]), 5.0).tolist() == [3, 4]


def test_the_direction_stays_where_steps_are_fine():
    vector = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    found = clipped(vector, 1.0, 2.0**-20)
    assert found.dtype == np.int64
    assert np.linalg.norm(found) == pytest.approx(2**20, rel=1e-6)
    cosine = found @ vector.astype(float) / np.linalg.norm(found) / np.linalg.norm(vector.astype(float))
    assert cosine > 1 - 1e-8


def test_whole_numbers_are_taken_in_steps():
    assert clipped(np.array([3, -4], dtype=np.int64), 5.0).tolist() == [3, -4]
    assert clipped(np.array([300, -400], dtype=np.int64), 5.0).tolist() == [3, -4]
    assert clipped(np.zeros(3), 2.0).tolist() == [0, 0, 0]


def test_what_has_no_length_and_limits_that_cannot_be_are_refused():
    for bad in (np.nan, np.inf, 1e300):
        with pytest.raises(ValueError, match="NaN or Inf"):
            clipped(np.array([bad, bad]), 1.0)
    with pytest.raises(ValueError, match=r"clip is 0\.5 steps; it is at least 1"):
        clipped(np.ones(2), 0.5)
    with pytest.raises(ValueError, match=r"steps; it is at least 1 and below 2\.14748e\+09"):
        clipped(np.ones(2), 1.0, 2.0**-31)
