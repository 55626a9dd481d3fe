"""What an answer must be before an algorithm sees it."""

from ssfl_app.sparsity.values import PayloadError
from ssfl_app.wire import Parcel

LARGEST = 2.0**128
"""Above every float32; a sum over clients and samples of such numbers stays far below the end of float64."""


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
