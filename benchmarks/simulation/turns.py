"""Contestants taking turns, so that the speed of the host, which changes within minutes, meets all of them alike."""

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

Run = dict[str, Any]

TURNS = 3
"""Times that everybody runs: a median of three outlasts one disturbed turn."""

LEFT_OUT = ("summary", "environment", "bytes_down", "bytes_up")


def take(contestants: Mapping[str, Callable[[], Run]], turns: int) -> dict[str, list[Run]]:
    """Let everybody run once a turn, every other time in reversed order; return the runs by name.

    Each run has "typical", seconds of a round; what is the same in all of them is left out.
    """
    found: dict[str, list[Run]] = {name: [] for name in contestants}
    for turn in range(turns):
        for name in list(contestants)[:: -1 if turn % 2 else 1]:
            run = contestants[name]()
            found[name].append({key: value for key, value in run.items() if key not in LEFT_OUT})
            print(f"turn {turn + 1} of {turns}, {name}: {run['typical']:.3f} s a round", flush=True)
    return found


def middle(runs: list[Run], key: str = "typical") -> float:
    """Return the median over the turns."""
    return median(run[key] for run in runs)


def fastest(found: Mapping[str, list[Run]], kind: str, without: str = "-") -> list[Run]:
    """Return the runs of the fastest of the contestants whose name begins with `kind`."""
    named = [runs for name, runs in found.items() if name.startswith(kind) and without not in name]
    return min(named, key=middle)


def quotient(over: list[Run], under: list[Run], key: str = "typical") -> dict[str, float]:
    """Return over / under as median, least and most of the quotients within each turn.

    `key` is what `under` is measured by; `over` is always measured by "typical".
    """
    each = [a["typical"] / b[key] for a, b in zip(over, under, strict=True)]
    return {"median": median(each), "least": min(each), "most": max(each)}
