"""Which metrics all replies of a round have, and which replies have odd ones."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from flwr.app import MetricRecord, RecordDict

from ssfl_app.plugin.checked_reply import CheckedReply


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
