"""Checks answers before an algorithm sees them."""

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from ssfl_app.comm.payload import Payload
from ssfl_app.metrics import Metric
from ssfl_app.sparsity.values import PayloadError

LARGEST = 2.0**20
"""Of a loss. A model whose mean loss is a million has diverged, and would hide what all others say of theirs."""


def check_number(payload: Payload, name: str, called: str = "") -> None:
    """Raise PayloadError unless the fact, `called` so, is a finite number, at most LARGEST in magnitude."""
    value = payload.metadata.get(name)
    if not isinstance(value, float) or not abs(value) <= LARGEST:
        rule = f"it must be a finite number, at most {LARGEST:g} in magnitude"
        raise PayloadError(f"{called or name} is {value!r}; {rule}")


def check_epsilon(payload: Payload) -> None:
    """Raise PayloadError unless the fact "epsilon" is a number of at least 0; it may be infinite."""
    value = payload.metadata.get("epsilon")
    if not isinstance(value, float) or not value >= 0:
        raise PayloadError(f"epsilon is {value!r}; it must be a number of at least 0")


def check_samples(payload: Payload, most: int) -> None:
    """Raise PayloadError unless the reply's samples can weigh it in a mean over all clients."""
    samples = payload.metadata["samples"]
    if not isinstance(samples, int) or not 1 <= samples <= most:
        raise PayloadError(f"samples is {samples!r}; it must be from 1 to {most}")


def check_tested(metric: Metric, client: int, payload: Payload) -> None:
    """Raise PayloadError unless the loss is finite, and the metric, global or personal; a share is within 0 to 1."""
    if not payload.metadata["samples"]:
        return
    check_number(payload, "loss")
    known = [name for name in ("accuracy", "personal_accuracy") if name in payload.metadata]
    for name in known or ["accuracy"]:
        called = name.replace("_", " ").replace("accuracy", metric.name)
        check_number(payload, name, called)
        if metric.share and not 0 <= float(payload.metadata[name]) <= 1:
            raise PayloadError(f"{called} is {payload.metadata[name]!r}; it must be from 0 to 1")


def stored(arrays: Mapping[str, npt.NDArray[Any]], name: str, dtype: str, size: int) -> npt.NDArray[Any]:
    """Return an array of a checkpoint.

    Raises
    ------
    KeyError, ValueError
        It is missing, or is not flat, of this type and size.
    """
    array = arrays[name]
    if array.dtype != dtype or array.shape != (size,):
        raise ValueError(f"array {name!r} is {array.dtype} of shape {array.shape}; it is {dtype} of shape ({size},)")
    return array
