"""Work on long vectors by blocks of coordinates, in several threads where the server's cores are free.

Where a GPU trains, the replies of a round come together, and adding them up is what the next round waits for; the
cores have nothing else to do, and NumPy lets go of Python's lock in its loops. Where clients train on the cores, one
thread works. Blocks do not depend on each other, so the bits are the same (``tests/core/test_blocks.py``).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

BLOCK = 1 << 15
"""Coordinates worked on at a time: temporaries stay in the cache."""

MOST_THREADS = 8
"""Threads that share a vector; more would wait for Python's lock."""

Block = TypeVar("Block")
Found = TypeVar("Found")

_workers: tuple[ThreadPoolExecutor, int] | None = None


@contextmanager
def block_threads(count: int) -> Iterator[None]:
    """Have this process work on blocks in so many threads inside; with 1 as ever."""
    global _workers
    before, pool = _workers, ThreadPoolExecutor(count, "blocks") if count > 1 else None
    _workers = (pool, count) if pool is not None else None
    try:
        yield
    finally:
        _workers = before
        if pool is not None:
            pool.shutdown()


def by_blocks(work: Callable[[Sequence[Block]], Found], blocks: Sequence[Block]) -> list[Found]:
    """Return what `work` makes of some of the blocks each time, of all together, in no order that means anything."""
    if _workers is None or len(blocks) == 1:
        return [work(blocks)]
    pool, count = _workers
    return list(pool.map(work, [blocks[first::count] for first in range(min(count, len(blocks)))]))
