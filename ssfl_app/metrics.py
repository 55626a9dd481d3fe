"""The headline metric of a task: its name, its form in tables and plots, and which values are better."""

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

    @property
    def unit(self) -> str:
        """What stands behind a value that is shown: " %" or nothing."""
        return " %" if self.share else ""

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
