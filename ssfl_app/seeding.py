"""Random numbers with a purpose and an address.

No global generator is read or set anywhere in this package. Whoever needs chance asks for
``generator(seed, purpose, *where)``: the same arguments give the same stream on every machine, process and
Python version, and two purposes never share a stream.

Examples
--------
>>> cohort = generator(1, "cohort", 7)          # round 7
>>> int(cohort.integers(1000)) == int(generator(1, "cohort", 7).integers(1000))
True
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def _digest(seed: int, purpose: str, where: tuple[int | str, ...]) -> bytes:
    # repr keeps 1 and "1" and (1, 2) and (12,) apart; Python's hash() is salted and would not repeat.
    return hashlib.sha256(repr((int(seed), purpose, tuple(map(_plain, where)))).encode()).digest()


def _plain(place: int | str) -> int | str:
    # NumPy's integers print as np.int64(7); 7 is 7, whoever counted it.
    return place if isinstance(place, str) else int(place)


def generator(seed: int, purpose: str, *where: int | str) -> np.random.Generator:
    """Return the NumPy generator of one purpose at one place.

    Parameters
    ----------
    seed : int
        The run's seed.
    purpose : str
        What the numbers are for, e.g. ``"cohort"``.
    *where : int or str
        The address, e.g. round and client.
    """
    digest = _digest(seed, purpose, where)
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def torch_generator(
    seed: int, purpose: str, *where: int | str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return the same address as a torch generator; on a GPU its stream is another one than on a CPU."""
    import torch  # seconds, which those who need NumPy's only need not wait

    digest = _digest(seed, purpose, where)
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
