"""Another Flower strategy inside: it sees replies whose one array is the flat vector of carried values.

All nodes send the same coordinates, so what FedAdam or Krum do to arrays they do to that vector: a server optimiser
moves alive coordinates only, and distances between clients are those of their alive values. One that reads the arrays
by name, to save or to evaluate them, asks for the model's own, which hold the dead zeros as well.
"""

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from logging import INFO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from ssfl_app.core.robust import Rows, median, normalised
from ssfl_app.locks import RunFailed
from ssfl_app.plugin.checked_reply import CheckedReply
from ssfl_app.plugin.metrics import common_metrics
from ssfl_app.plugin.state_spec import StateSpec
from ssfl_app.sparsity.layout import Vector
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import check_values

VECTOR = "values"
"""Name of the one array that an inner strategy sees."""


@dataclass(frozen=True)
class AsVector:
    """One array of all values, shape (size,)."""

    size: int

    def arrays(self, values: Vector) -> ArrayRecord:
        """Return what an inner strategy is given: the vector, named."""
        return ArrayRecord({VECTOR: Array(values)})

    def values(self, arrays: ArrayRecord) -> Vector:
        """Return the one array of what it made of that; ValueError if name or shape are others."""
        if list(arrays) != [VECTOR]:
            raise ValueError(f"it has the arrays {list(arrays)}; it was given [{VECTOR!r}]")
        values = arrays[VECTOR].numpy().astype(np.float32)
        if values.shape != (self.size,):
            raise ValueError(f"it has shape {values.shape}; it must be ({self.size},)")
        return values


@dataclass(frozen=True)
class AsModel:
    """The model's arrays under their names, dead weights 0 or `frozen`."""

    spec: StateSpec
    mask: Mask
    frozen: Vector | None = None

    def arrays(self, values: Vector) -> ArrayRecord:
        """Return the whole model."""
        return self.spec.dense(self.spec.spread(values, self.mask, self.frozen))

    def values(self, arrays: ArrayRecord) -> Vector:
        """Return the carried values of a whole model; what became of dead weights and of fixed arrays is dropped."""
        return self.spec.flatten(arrays, fixed_too=False)[self.mask.transmitted]


Form = AsVector | AsModel
"""How an inner strategy sees carried values."""


def inner_round_config(
    configure: Callable[..., Iterable[Message]],
    server_round: int,
    arrays: ArrayRecord,
    config: ConfigRecord,
    grid: Grid,
    config_key: str,
) -> ConfigRecord:
    """Have an inner strategy prepare a round, and return the config it writes to its first node.

    `configure` is its `configure_train` or `configure_evaluate`. Its own choice of nodes is not used. It draws from
    Python's global generator, whose state is put back. The config is the user's, which it may change, and as it is if
    the strategy writes to nobody.
    """
    before = random.getstate()
    try:
        messages = list(configure(server_round, arrays, config, grid))
    finally:
        random.setstate(before)
    told: Any = messages[0].content[config_key] if messages else config
    return ConfigRecord(dict(told))


def aggregate_by(
    inner: FedAvg, server_round: int, answers: Sequence[CheckedReply], form: Form
) -> tuple[Vector | None, MetricRecord | None]:
    """Return what `inner` makes of the answers: the new vector of carried values, and metrics.

    Raises
    ------
    RunFailed
        It made something else of them: another name, shape, or values that are not finite.
    """
    arrays, metrics = inner.aggregate_train(server_round, _replies(answers, inner.arrayrecord_key, form))
    if arrays is None:
        return None, metrics
    try:
        values = form.values(arrays)
        check_values(values)
    except ValueError as error:
        raise RunFailed(
            f"{type(inner).__name__} in round {server_round} returned arrays that are no model: {error}"
        ) from error
    return values, metrics


def is_robust(inner: FedAvg) -> bool:
    """Return whether a strategy folds replies in another way than FedAvg's mean.

    Flower's server optimizers move from `current_arrays` towards a mean: there is nothing that one liar's say is
    bounded by, and scores are no model that they could move.
    """
    return type(inner).aggregate_train is not FedAvg.aggregate_train and not hasattr(inner, "current_arrays")


def scores_by(inner: FedAvg, answers: Sequence[CheckedReply], size: int) -> tuple[Vector, str]:
    """Return what a robust strategy makes of scores, and how: its name, or "median" where it cannot.

    Each client's scores are divided by their sum first (`normalised`), so that Krum's distances are not about how
    loud they are. A copy of the strategy does it, so that nothing it keeps for later rounds changes.
    """
    name = type(inner).__name__
    scored = [
        replace(
            answer,
            values=normalised(answer.values),
            records=RecordDict({"metrics": MetricRecord({inner.weighted_by_key: answer.weight})}),
            metrics_name="metrics",
        )
        for answer in answers
    ]
    try:
        folder = copy.deepcopy(inner)
        folder.train_metrics_aggr_fn = lambda contents, key: MetricRecord()  # the user's expects metrics of training
        values, _ = aggregate_by(folder, 0, scored, AsVector(size))
        if values is not None and values.any():
            return values, name
        log(INFO, "\t> %s makes nothing of the scores; their median is taken", name)
    except Exception as error:  # of code that is not ours, and was written for models
        log(INFO, "\t> %s cannot fold scores (%s: %s); their median is taken", name, type(error).__name__, error)
    rows = Rows(size)
    for answer in scored:
        rows.add(answer.node, answer.values)
    return median(rows), "median"


def evaluate_by(inner: FedAvg, server_round: int, answers: Sequence[CheckedReply]) -> MetricRecord | None:
    """Return what `inner` makes of the metrics of an evaluation."""
    return inner.aggregate_evaluate(server_round, _replies(answers, None, None))


def _replies(answers: Sequence[CheckedReply], arrays_key: str | None, form: Form | None) -> list[Message]:
    """Return the answers as Flower's strategies expect replies, by node id."""
    messages = []
    ordered = sorted(answers, key=lambda answer: answer.node)
    contents, odd = common_metrics(ordered)
    assert not odd  # they were refused
    for answer, content in zip(ordered, contents, strict=True):
        assert answer.message is not None
        if arrays_key is not None and form is not None:
            content[arrays_key] = form.arrays(answer.values)
        answer.message.content = content
        messages.append(answer.message)
    return messages
