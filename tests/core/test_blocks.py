"""Long vectors in several threads: the bits of one thread."""

import threading

import numpy as np
import pytest

from ssfl_app.core.blocks import BLOCK, block_threads, by_blocks
from ssfl_app.core.means import OverlapMean, WeightedMean
from ssfl_app.core.robust import distance
from tests.in_process_grid import WHOLE, play

SIZES = (0, 5, BLOCK, 7 * BLOCK + 3)


def numbers(size, seed):
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


def sums(size):
    """Return what means and lengths come to, as bytes."""
    mean, overlap = WeightedMean(size, vectors=4), OverlapMean(size)
    for seed, weight in ((1, 3), (2, 250), (3, 2.5)):
        mean.add(numbers(size, seed), weight)
        overlap.add(numbers(size, seed), numbers(size, seed + 9) > 0, int(weight))
    old = np.array_split(numbers(size, 4), 3)
    lengths = [distance(numbers(size, 1), old), distance(numbers(size, 1))]
    return mean.value().tobytes(), overlap.value(numbers(size, 5)).tobytes(), lengths


@pytest.mark.parametrize("size", SIZES)
def test_the_bits_are_those_of_one_thread(size):
    alone = sums(size)
    for threads in (1, 2, 3, 20):
        with block_threads(threads):
            assert sums(size) == alone


def test_each_block_is_worked_on_once_by_several_threads():
    seen, both_there = [], threading.Barrier(2, timeout=30)

    def work(blocks):
        both_there.wait()  # one thread alone would wait for ever
        seen.extend(blocks)
        return len(blocks)

    with block_threads(2):
        assert sorted(by_blocks(work, range(7))) == [3, 4]
    assert sorted(seen) == list(range(7))
    assert by_blocks(len, range(7)) == [7]  # and as before afterwards


def test_an_error_of_a_thread_comes_out():
    def fail(blocks):
        raise ValueError(f"no {len(blocks)}")

    with block_threads(2), pytest.raises(ValueError, match="no 2"):
        by_blocks(fail, range(4))


def test_a_run_has_the_same_bits():
    keys = {"strategy": "fedavg", "run.rounds": 1, **WHOLE}
    alone = play(keys)
    with block_threads(3):
        assert play(keys | {"failures.norm-factor": 1000.0}).bits() == alone.bits()
