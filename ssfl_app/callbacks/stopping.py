"""Early stopping, and which round was the best: both follow from the records of the rounds, and from nothing else.

So a run that is resumed, whose records are those of its checkpoint, stops where it would have stopped.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ssfl_app.metrics import Metric
from ssfl_app.options import anything, at_least, choice

KEYS = {"central": "central_accuracy", "local": "local_accuracy_mean", "personal": "personal_accuracy_mean"}


@dataclass(frozen=True)
class StopOptions:
    """Keys of the section ``stop``."""

    patience: int = at_least(0, 0, "evaluated rounds in a row without a better value that end a run; 0: none do")
    min_delta: float = at_least(0, 0.0, "a value is better if it is by more than this; accuracies are in [0, 1]")
    metric: str = choice("auto", *KEYS, about="whose headline metric; auto: the first of these that a round has")
    keep_best: bool = anything("true or false", False, "write the model of the best round to best.safetensors")


class Progress(NamedTuple):
    """The best round, the first of equals (0: none), its value, and for how many evaluated rounds none was better."""

    best: int = 0
    value: float = math.nan
    since: int = 0


def progress(records: Iterable[Mapping[str, Any]], options: StopOptions, metric: Metric) -> Progress:
    """Return how a run stands after these records; `since` counts values that are not better by stop.min-delta."""
    best, value, since, bar = 0, math.nan, 0, math.nan
    keys = [KEYS[options.metric]] if options.metric in KEYS else list(KEYS.values())
    step = options.min_delta if metric.higher else -options.min_delta
    for record in records:
        new = next((record[key] for key in keys if record.get(key) is not None), None)
        if new is None:  # not evaluated
            continue
        since += 1
        if math.isfinite(new) and (not best or metric.better(new, value)):
            best, value = record["round"], new
        if math.isfinite(new) and (math.isnan(bar) or metric.better(new, bar + step)):
            bar, since = new, 0
    return Progress(best, value, since)
