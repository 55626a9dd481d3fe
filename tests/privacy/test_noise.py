"""Rounded Gaussian noise: its distribution, from a fixed stream, and the sum of shares."""

import math

import numpy as np
import pytest
from scipy import stats

from ssfl_app.options import ConfigError
from ssfl_app.privacy.noise import BLOCK, LEAST_SHARE, gaussian, key_stream, shares

COUNT = 200_000


def fixed(number):
    return key_stream(number.to_bytes(32, "little"))


def test_the_key_stream_is_that_of_chacha20():
    # RFC 8439, appendix A.1, test vector 1: key, nonce and counter all 0.
    assert fixed(0)(16).hex() == "76b8e0ada0f13d90405d6ae55386bd28"
    together, apart = fixed(0)(100), fixed(0)
    assert together == apart(30) + apart(70)


def test_it_is_a_gaussian():
    noise = gaussian(1000.0, COUNT, fixed(1))
    assert noise.dtype == np.int64
    assert stats.kstest(noise / 1000, stats.norm.cdf).pvalue > 0.01
    assert abs(noise.mean()) < 4 * 1000 / math.sqrt(COUNT)
    assert noise.var() == pytest.approx(1e6, rel=4 * math.sqrt(2 / COUNT))
    for far in (2, 3, 4):
        seen, chance = np.count_nonzero(np.abs(noise) > far * 1000), 2 * stats.norm.sf(far)
        assert abs(seen - COUNT * chance) < 4 * math.sqrt(COUNT * chance)


def test_each_whole_number_has_the_probability_of_its_interval():
    noise, cells = gaussian(1.5, COUNT, fixed(2)), np.arange(-5, 6)
    wanted = stats.norm.cdf((cells + 0.5) / 1.5) - stats.norm.cdf((cells - 0.5) / 1.5)
    seen = np.array([np.count_nonzero(noise == cell) for cell in cells])
    rest = COUNT - seen.sum(), COUNT * (1 - wanted.sum())
    assert stats.chisquare(np.append(seen, rest[0]), np.append(COUNT * wanted, rest[1])).pvalue > 0.01


def test_the_sum_of_shares_has_the_wanted_variance():
    share = shares(1000.0, 16)
    assert share == 250.0
    total = sum(gaussian(share, COUNT, fixed(10 + client)) for client in range(16))
    assert total.var() == pytest.approx(1e6, rel=4 * math.sqrt(2 / COUNT))
    assert stats.kstest(total / 1000, stats.norm.cdf).pvalue > 0.01


def test_values_do_not_depend_on_blocks():
    long, short = gaussian(50.0, BLOCK + 7, fixed(3)), gaussian(50.0, BLOCK, fixed(3))
    np.testing.assert_array_equal(long[:BLOCK], short)
    assert len(set(long[BLOCK:])) > 1


def test_the_ends_of_what_64_bits_can_say():
    assert gaussian(1000.0, 1, lambda count: bytes(count)).tolist() == [9155]  # the smallest tail, 2**-65
    assert gaussian(1000.0, 1, lambda count: b"\xff" * count).tolist() == [0]  # the middle
    words = np.array([(1 << 62) | 1, 1 << 62], dtype="<u8")  # a tail of 1/8 on both sides
    assert gaussian(1000.0, 2, lambda count: words.tobytes()).tolist() == [-1150, 1150]


def test_the_rounded_gaussian_is_as_far_from_the_discrete_one_as_is_said():
    cells, sigma = np.arange(-9500, 9501), 1000.0
    rounded = stats.norm.cdf((cells + 0.5) / sigma) - stats.norm.cdf((cells - 0.5) / sigma)
    discrete = np.exp(-(cells**2) / (2 * sigma**2))
    assert np.abs(rounded - discrete / discrete.sum()).sum() / 2 == pytest.approx(0.0202 / sigma**2, rel=0.01)


def test_noise_of_a_run_is_new_each_time():
    assert gaussian(1e6, 8).tolist() != gaussian(1e6, 8).tolist()


def test_what_cannot_be_is_refused():
    for sigma in (0.0, -1.0, math.nan, math.inf, 2.0**32):
        with pytest.raises(ValueError, match="sigma is"):
            gaussian(sigma, 3)
    with pytest.raises(ValueError, match="least is 0"):
        shares(10.0, 0)
    assert shares(LEAST_SHARE * 2, 4) == LEAST_SHARE
    with pytest.raises(ConfigError, match=r"noise of a client is 2 steps of its values; it is at least 3 steps"):
        shares(10.0, 25)
