"""Lets a process that trains on a CPU keep freed memory: what a step gives back, the next step gets again.

A training step frees the buffers that its next step needs. By its defaults glibc hands that memory back to the system
after each step, or not, by what happens to lie behind it; coming back, every page costs a fault and is zeroed. Where
that happens, a step of ResNet-20 on CIFAR-10 takes a fifth longer (``benchmarks/heap.py``). Where buffers lie changes
no bit of what is computed.
"""

import ctypes
import functools

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From malloc.h."""

LARGEST = 32 * 2**20
"""Bytes of the largest buffers that are kept, the most that glibc allows. Larger ones still go back one by one."""


@functools.cache
def keep_heap() -> bool:
    """Let this process keep memory that it frees, up to its peak; return whether this C library can.

    For processes that train, not for a server, where what a message took is to go back. C libraries other than glibc
    are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; not POSIX
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
