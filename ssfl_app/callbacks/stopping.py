"""Early stopping, and which round was the best: both follow from the records of the rounds, and from nothing else.

So a run that is resumed, whose records are those of its checkpoint, stops where it would have stopped.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ssfl_app.metrics import Metric
from ssfl_app.options import anything, at_least, choice

KEYS = {"central": "central_accuracy", "local": "local_accuracy_mean", "personal": "personal_accuracy_mean"}
"""Where records have the means of the headline metric."""


@dataclass(frozen=True)
class StopOptions:
    """Keys of the section ``stop``."""

    patience: int = at_least(0, 0, "evaluated rounds in a row without a better value that end a run; 0: none do")
    min_delta: float = at_least(0, 0.0, "a value is better if it is by more than this; accuracies are in [0, 1]")
    metric: str = choice("auto", *KEYS, about="whose headline metric; auto: the first of these that a round has")
    keep_best: bool = anything("true or false", False, "write the model of the best round to best.safetensors")


@dataclass(frozen=True)
class Progress:
    """How a run stands after some rounds.

    Attributes
    ----------
    best, value : int, float
        The best round, the first of equals, and its value; round 0 if no round had a finite value.
    since : int
        Evaluated rounds since the last that was better by more than ``stop.min-delta``.
    """

    best: int = 0
    value: float = math.nan
    since: int = 0


def value_of(record: Mapping[str, Any], metric: str) -> float | None:
    """Return the value that a round is judged by, NaN included; None if it was not evaluated."""
    keys = list(KEYS.values()) if metric == "auto" else [KEYS[metric]]
    return next((record[key] for key in keys if record.get(key) is not None), None)


def progress(records: Iterable[Mapping[str, Any]], options: StopOptions, metric: Metric) -> Progress:
    """Return how a run stands after these records."""
    best, value, since, bar = 0, math.nan, 0, math.nan
    step = options.min_delta if metric.higher else -options.min_delta
    for record in records:
        new = value_of(record, options.metric)
        if new is None:
            continue
        since += 1
        if math.isfinite(new) and (not best or metric.better(new, value)):
            best, value = record["round"], new
        if math.isfinite(new) and (math.isnan(bar) or metric.better(new, bar + step)):
            bar, since = new, 0
    return Progress(best, value, since)
