"""The headline metric of a task: its name, its form in tables and plots, and which values are better."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """What tells how good a model is, as a mean over samples.

    On the wire and in records its values are called accuracy, whatever it is.

    Attributes
    ----------
    name : str
        As tables and plots call it.
    share : bool
        Whether values are from 0 to 1, and shown in percent; otherwise they are finite, in units of the target.
    higher : bool
        Whether a higher value is a better one.
    """

    name: str = "accuracy"
    share: bool = True
    higher: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name and type(self.share) is type(self.higher) is bool):
            raise ValueError(f"{self} is no metric; it has a name, and whether it is a share and higher is better")

    @property
    def unit(self) -> str:
        """What stands behind a value that is shown: " %" or nothing."""
        return " %" if self.share else ""

    @property
    def column(self) -> str:
        """What stands behind the title of a column; a percentage is an accuracy where nothing else is said."""
        return "%" if self == ACCURACY else f"({self.name}{self.unit})"

    @property
    def title(self) -> str:
        """The name with a capital, for titles."""
        return self.name[0].upper() + self.name[1:]

    def axis(self, of: str = "") -> str:
        """Return what an axis of its values is called: `of` says of what they are."""
        notes = ["%"] * self.share + ["lower is better"] * (not self.higher)
        return f"{self.title} {of}".rstrip() + (f" ({', '.join(notes)})" if notes else "")

    @property
    def scale(self) -> float:
        """What a value is multiplied by before it is shown."""
        return 100.0 if self.share else 1.0

    def better(self, one: float, other: float) -> bool:
        """Return whether one value is better than another one; NaN is not."""
        return one > other if self.higher else one < other

    def metadata(self) -> dict[str, Any]:
        """Return this metric for a JSON file; `Metric(**...)` reads it."""
        return asdict(self)


ACCURACY = Metric()


def common(metrics: Iterable[Metric]) -> Metric:
    """Return the metric that all have, accuracy if there are none; if they differ, one that is called "metric"."""
    found = set(metrics) or {ACCURACY}
    return found.pop() if len(found) == 1 else Metric("metric", share=False)
