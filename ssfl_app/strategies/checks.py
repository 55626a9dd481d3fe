"""What an answer must be before an algorithm sees it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from ssfl_app.options import ConfigError
from ssfl_app.sparsity.codec import LinearCodec
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.wire import Parcel

if TYPE_CHECKING:
    from ssfl_app.strategies.base import SparseStrategy

LARGEST = 2.0**128
"""Above every float32; a sum over clients and samples of such numbers stays far below the end of float64."""


def check_feedback(strategy: "type[SparseStrategy]", base: "type[SparseStrategy]") -> None:
    """Raise ConfigError unless a strategy can make up for rounding.

    It can where both ends know which coordinates travel, the same ones for all clients, and where a client has no
    other state that it remembers between rounds.
    """
    client = strategy.client
    linear = issubclass(client.down, LinearCodec) and issubclass(client.up, LinearCodec)
    own = strategy.send is not base.send or strategy.mask_for is not base.mask_for or strategy.fold is not base.fold
    if client.remembers or own or not linear:
        raise ConfigError(
            f"wire.error-feedback is true; it is false with strategy {strategy.name}, where clients have masks, "
            "models or memories of their own"
        )


def check_number(parcel: Parcel, name: str) -> None:
    """Raise PayloadError unless the fact is a finite number, and one that a float32 can be."""
    value = parcel.facts.get(name)
    if not isinstance(value, float) or not abs(value) <= LARGEST:
        raise PayloadError(f"{name} is {value!r}; it must be a finite number")


def check_samples(parcel: Parcel, most: int) -> None:
    """Raise PayloadError unless the reply's samples can weigh it in a mean over all clients."""
    samples = parcel.facts["samples"]
    if not isinstance(samples, int) or not 1 <= samples <= most:
        raise PayloadError(f"samples is {samples!r}; it must be from 1 to {most}")


def check_tested(client: int, parcel: Parcel) -> None:
    """Raise PayloadError unless the loss is finite and the accuracies, at least one of them, are within 0 to 1."""
    if not parcel.facts["samples"]:
        return
    check_number(parcel, "loss")
    known = [name for name in ("accuracy", "personal_accuracy") if name in parcel.facts]
    for name in known or ["accuracy"]:
        check_number(parcel, name)
        if not 0 <= float(parcel.facts[name]) <= 1:
            raise PayloadError(f"{name} is {parcel.facts[name]!r}; it must be from 0 to 1")


def stored(arrays: Mapping[str, npt.NDArray[Any]], name: str, dtype: str, size: int) -> npt.NDArray[Any]:
    """Return an array of a snapshot.

    Raises
    ------
    KeyError, ValueError
        It is missing, or is not flat, of this type and size.
    """
    array = arrays[name]
    if array.dtype != dtype or array.shape != (size,):
        raise ValueError(f"array {name!r} is {array.dtype} of shape {array.shape}; it is {dtype} of shape ({size},)")
    return array
