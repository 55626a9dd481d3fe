"""What the replies of a round become: a streamed mean, or what another Flower strategy makes of their values."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import MetricRecord, RecordDict

from ssfl_app.core.means import MAX_WEIGHT, WeightedMean
from ssfl_app.plugin.checked_reply import CheckedReply
from ssfl_app.sparsity.layout import Vector

_FRACTION = -1  # the digit behind the point


class PositionalMean:
    """The mean of vectors whose weights are any positive numbers; equal bits in every order of arrival.

    `WeightedMean` is exact for whole weights that sum to at most `MAX_WEIGHT`. Flower's weights may be larger, or
    fractions. So each is written with digits in the base ``MAX_WEIGHT // vectors``, and each digit has a mean
    of its own. Usual counts of examples have one digit, and then this is a `WeightedMean`.

    Parameters
    ----------
    size : int
        Coordinates of every vector.
    vectors : int
        How many may come, at least 1.

    Notes
    -----
    Memory: 12 bytes a coordinate and digit in use. A weight is rounded to 1 / base.
    """

    def __init__(self, size: int, vectors: int) -> None:
        self._size, self._base = size, MAX_WEIGHT // vectors
        if self._base < 2:
            raise ValueError(f"{vectors} vectors; a mean takes at most {MAX_WEIGHT // 2}")
        self._means: dict[int, WeightedMean] = {}

    def add(self, values: Vector, weight: float) -> None:
        """Add one vector of float32, shape (size,), with a positive weight.

        Raises
        ------
        ValueError
            The weight is not positive and finite. The mean is unchanged then.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"a weight is {weight}; it must be a number above 0")
        rest = max(1, round(weight * self._base)) if weight != int(weight) else int(weight) * self._base
        digit = _FRACTION
        while rest:
            rest, count = divmod(rest, self._base)
            if count:
                self._means.setdefault(digit, WeightedMean(self._size)).add(values, count)
            digit += 1

    def value(self) -> Vector:
        """Return the mean so far, float32, shape (size,).

        Raises
        ------
        ValueError
            Nothing was added.
        """
        if not self._means:
            raise ValueError("a mean of nothing; at least one vector must be added")
        if len(self._means) == 1:
            return next(iter(self._means.values())).value()
        shares = {digit: mean.weight * float(self._base) ** digit for digit, mean in sorted(self._means.items())}
        total = sum(shares.values())
        parts = (self._means[digit].value() * (share / total) for digit, share in shares.items())
        return np.asarray(sum(parts, np.zeros(self._size)), dtype=np.float32)


def common_metrics(answers: Iterable[CheckedReply]) -> tuple[list[RecordDict], dict[int, str]]:
    """Return the users' records of all answers, by node id, with the usual metrics, and who tells odd ones and why.

    Flower's means take for granted that all replies tell the same metrics, and fail or mix them up otherwise. Usual
    is what more than half of the replies tell, a finite number or a list of as many finite ones. Who does not tell it
    is left out by name, so that nobody takes a metric from all others; what few tell is left out of everybody's.
    Where that would leave out half of the replies, nobody is odd, and what all of them tell counts.
    """
    ordered = sorted(answers, key=lambda answer: answer.node)
    told = [{(key, _length(value)) for key, value in each.metrics.items() if _finite(value)} for each in ordered]
    counts = Counter(entry for entries in told for entry in entries)
    usual = {entry for entry, count in counts.items() if 2 * count > len(ordered)}
    odd = {}
    for answer, entries in zip(ordered, told, strict=True):
        if missing := usual - entries:
            key, length = min(missing)
            wanted = "a finite number" if length < 0 else f"a list of {length} finite numbers"
            odd[answer.node] = f"metric {key!r} is {str(answer.metrics.get(key))[:40]}; most others tell {wanted}"
    if 2 * len(odd) >= len(ordered):
        usual, odd = set.intersection(*told) if told else set(), {}
    keys = {key for key, _ in usual}
    contents = []
    for answer in ordered:
        if answer.node in odd:
            continue
        # One name for all: Flower's strategies look for the first reply's.
        metrics = {key: value for key, value in answer.metrics.items() if key in keys}
        others = {name: record for name, record in answer.records.items() if name != answer.metrics_name}
        contents.append(RecordDict({**others, ordered[0].metrics_name: MetricRecord(metrics)}))
    return contents, odd


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else -1


def _finite(value: Any) -> bool:
    return all(math.isfinite(number) for number in (value if isinstance(value, list) else [value]))
