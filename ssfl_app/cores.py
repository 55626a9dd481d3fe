"""How many cores this process may use: taskset, Slurm and cpusets give it fewer than the machine has."""

import os

ACTORS = "SSFL_ACTORS"
"""Environment variable of a server: how many actors train for it on a Ray cluster, on cores that others have."""


def usable_cores() -> int:
    """Return the number of cores that this process may run on, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS binds nobody


def training_cores() -> int:
    """Return the number of cores that simulated clients train on: of this process, or of a Ray cluster if more."""
    return max(usable_cores(), int(os.environ.get(ACTORS, "0")))
