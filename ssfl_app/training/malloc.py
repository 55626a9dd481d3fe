"""What the C library does with memory that a process frees: a process that trains keeps it, a server returns it.

A training step frees the buffers that its next step needs. By its defaults glibc hands that memory back to the system
after each step, or not, by what happens to lie behind it; coming back, every page costs a fault and is zeroed. Where
that happens, a step of ResNet-20 on CIFAR-10 takes a fifth longer (``benchmarks/heap.py``). Where buffers lie changes
no bit of what is computed.
"""

import ctypes
import functools

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From malloc.h. Setting one also stops glibc from raising it."""

LARGEST = 32 * 2**20
"""Bytes of the largest buffers that are kept, the most that glibc allows. Larger ones still go back one by one."""


LARGE_BLOCK = 4 * 2**20
"""Bytes of the blocks, models and such, that a server returns at once."""


def return_freed_memory() -> bool:
    """Have this process return freed models to the system at once; return whether this C library can.

    By default glibc keeps blocks of up to 32 MB for later once one of that size was freed, and a server that holds a
    model of 45 MB at a time is seen to hold several. Setting the threshold also stops glibc from raising it.
    """
    return _set(M_MMAP_THRESHOLD, LARGE_BLOCK)


@functools.cache
def keep_heap() -> bool:
    """Let this process keep memory that it frees, up to its peak; return whether this C library can.

    For processes that train, not for a server, where what a message took is to go back.
    """
    return _set(M_MMAP_THRESHOLD, LARGEST) and _set(M_TRIM_THRESHOLD, -1)


def _set(option: int, value: int) -> bool:
    try:
        return bool(ctypes.CDLL(None).mallopt(option, value))
    except (AttributeError, OSError, TypeError):  # C libraries other than glibc are left as they are; not POSIX
        return False
