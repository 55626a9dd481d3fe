"""Who takes part: draws that depend on the seed, the round and the connected nodes, and on nothing else."""

import time

from flwr.serverapp import Grid

from ssfl_app.locks import RunFailed
from ssfl_app.seeding import generator

POLL = 0.1
"""Seconds between looks at who is connected."""


def wait_for(grid: Grid, least: int, timeout: float) -> list[int]:
    """Return the ids of all connected nodes, sorted, once there are at least so many.

    Raises
    ------
    RunFailed
        There are not after `timeout` seconds. Flower's own strategies would wait for ever.
    """
    end = time.monotonic() + timeout
    while len(connected := sorted(grid.get_node_ids())) < least:
        if time.monotonic() > end:
            raise RunFailed(f"{len(connected)} nodes connected within {timeout:g} s; {least} are needed")
        time.sleep(POLL)
    return connected


def sample(nodes: list[int], seed: int, what: str, round_: int, count: int) -> list[int]:
    """Return `count` of the nodes, whose ids are sorted, for `what`: "saliency", "train" or "evaluate"; sorted.

    Flower draws ids anew for every run, so equal seeds repeat a run's cohorts only where the ids repeat.
    """
    chosen = generator(seed, what, round_).choice(len(nodes), count, replace=False)
    return [nodes[i] for i in sorted(chosen)]
