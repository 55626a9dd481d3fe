"""One checked answer of a node, and what its metrics must be like."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict

from ssfl_app.comm.payload import Metadata, Payload
from ssfl_app.plugin.tensor_report import NOTHING, TensorReport
from ssfl_app.sparsity.layout import Vector
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import PayloadError

MOST = 2**40
"""Largest weight of a reply unless `SSFL` is told a smaller one: more examples are no count, and silence all."""


@dataclass(frozen=True)
class CheckedReply:
    """A checked answer of one node.

    `values` is float32: carried values of training, scores of a question, empty for an evaluation. `records` are the
    user's own, without arrays; `metrics` is the one of them that holds numbers. `seen` comes with scores; `sent` says
    which coordinates came where that is the client's choice, `values` then has all, 0 at the others. Of an answer
    that is only added, `summand` has the arrays, and `values` is empty.
    """

    node: int
    values: Vector
    weight: float
    records: RecordDict
    metrics_name: str
    metadata: Metadata
    message: Message | None
    seen: TensorReport = NOTHING
    sent: Mask | None = None
    summand: Payload | None = None

    def numbers(self) -> "CheckedReply":
        """Return the answer without its arrays, which are a model's size."""
        return replace(self, values=np.zeros(0, dtype=np.float32), message=None, summand=None)

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The user's metrics."""
        found: Any = self.records.get(self.metrics_name, {})
        return found  # type: ignore[no-any-return]


def metrics_of(records: RecordDict) -> tuple[str, Mapping[str, Any]]:
    """Return name and content of the one MetricRecord of a reply; PayloadError if there is none, or more than one."""
    found = [(name, record) for name, record in records.items() if isinstance(record, MetricRecord)]
    if len(found) != 1:
        raise PayloadError(f"a reply holds {len(found)} MetricRecords; it must hold exactly 1, as under FedAvg")
    return found[0]


def weight_of(value: Any, most: float) -> float:
    """Return the weight of a reply; PayloadError if it is no number above 0 and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:  # NaN is not
        raise PayloadError(f"the weight of a reply is {value!r}; it must be a number above 0, at most {most}")
    return value
