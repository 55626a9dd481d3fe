"""Gaussian noise on whole numbers, from a key that is never written.

A value is a whole number of public steps, and its noise is a Gaussian rounded to whole steps. Rounding the noise of a
whole number is rounding the noisy number, which the accounting of the continuous Gaussian covers, whatever the
standard deviation. Floating point tells nothing of a value either: the two are added as integers (Mironov, "On
significance of the least significant bits for differential privacy", CCS 2012).

From the discrete Gaussian of Kairouz et al., "The distributed discrete Gaussian mechanism for federated learning with
secure aggregation", ICML 2021, the rounded one differs by a total variation of 0.020 / sigma**2 a value: 2.0e-8 at
1000 steps.

In shares. As there, each of m clients adds noise of variance sigma**2 / m. The sum of m rounded Gaussians is the
rounded sum of one Gaussian of variance sigma**2 and m - 1 independent uniform numbers in (-1/2, 1/2): more noise than
is counted, never less. What that leaves out is of the order of m exp(-pi**2 sigma**2 / m) in the probability of each
whole number (as in their theorem 1), below 1e-35 where a share has `LEAST_SHARE` steps.

What is not exact. A normal number is made of 64 bits, a sign and a tail probability in steps of 2**-64. So none lies
beyond 9.2 standard deviations, where a Gaussian lies with probability 5e-20; and the probability of a single whole
number is off by a share of about sigma * 2**-52, since a double has 53 bits. A vector of d values then differs from
the ideal one by a total variation of about sqrt(d) * sigma * 2**-53: 1.2e-7 for a million values at 2**20 steps.
That is not in delta.
"""

import math
import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from ssfl_app.options import ConfigError

Stream = Callable[[int], bytes]
"""Returns the next so many bytes of a stream."""

BLOCK = 1 << 16
"""Values that are made at a time."""
LEAST_SHARE = 3.0
"""Least standard deviation of a share, in steps."""
MOST = 2.0**31
"""Largest standard deviation, in steps."""


def key_stream(key: bytes) -> Stream:
    """Return the ChaCha20 key stream of a key of 32 bytes, which is used once."""
    encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    return lambda count: encryptor.update(bytes(count))


def gaussian(sigma: float, size: int, stream: Stream | None = None) -> npt.NDArray[np.int64]:
    """Return rounded Gaussian noise, int64, shape (size,).

    Parameters
    ----------
    sigma : float
        Standard deviation in steps, in (0, `MOST`].
    size : int
        How many values.
    stream : callable, optional
        Bytes to make them of. In a run there is none: the key is drawn from the operating system and forgotten. A
        stream that can be repeated is for tests only; noise that somebody can repeat protects nobody.
    """
    from scipy.special import ndtri  # of the extra "app"

    if not 0 < sigma <= MOST:
        raise ValueError(f"sigma is {sigma}; it is in (0, {MOST:g}]")
    read = stream or key_stream(os.urandom(32))
    noise = np.empty(size, dtype=np.int64)
    for start in range(0, size, BLOCK):
        part = noise[start : start + BLOCK]
        words = np.frombuffer(read(8 * part.size), dtype="<u8")
        tail = ((words >> 1).astype(np.float64) + 0.5) * 2.0**-64  # in (0, 1/2], fine where it is small
        part[:] = np.rint(np.where(words & 1, sigma, -sigma) * ndtri(tail))
    return noise


def shares(sigma: float, least: int) -> float:
    """Return the standard deviation of a client's share, with which `least` shares sum to `sigma`.

    Raises
    ------
    ConfigError
        It is below `LEAST_SHARE` steps, where the sum of rounded shares is not what is counted.
    """
    if least < 1:
        raise ValueError(f"least is {least}; it is at least 1")
    share = sigma / math.sqrt(least)
    if share < LEAST_SHARE:
        rule = f"it is at least {LEAST_SHARE:g} steps: take finer steps, or more noise"
        raise ConfigError(f"the noise of a client is {share:.3g} steps of its values; {rule}")
    return share
