"""How many cores this process may use: taskset, Slurm and cpusets give it fewer than the machine has."""

import os


def usable_cores() -> int:
    """Return the number of cores that this process may run on, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS binds nobody
