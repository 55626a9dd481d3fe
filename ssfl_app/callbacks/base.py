"""The callback: what sees a run go by on its server, a tracker or code of one's own."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ssfl_app.metrics import ACCURACY, Metric
from ssfl_app.options import Scalar

Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunInfo:
    """What a callback is told when a run begins or goes on.

    Attributes
    ----------
    folder : Path
        The run folder, absolute.
    config : mapping
        Key -> value, the whole configuration.
    metric : Metric
        The headline metric of the task; in records its values are called accuracy.
    next_round : int
        The first round that will be recorded: 0, the setup, unless the run is resumed.
    """

    folder: Path
    config: Mapping[str, Scalar]
    metric: Metric
    next_round: int


class RunCallback:
    """Sees a run go by; each method does nothing unless it is overridden.

    One that ``run.trackers`` names is made without arguments, in the process of the server.
    """

    library: ClassVar[str] = ""
    """The module of the library that must be installed; "": none."""

    def begin(self, run: RunInfo) -> None:
        """See the run begin, or go on."""

    def met(self, sites: Mapping[int, Any]) -> None:
        """See that all clients are connected; `sites` holds what each said of itself."""

    def warn(self, line: str) -> None:
        """See that something is wrong that the run can go on with."""

    def round(self, record: Any, strategy: Any) -> str | None:
        """See round ``record["round"]`` of this strategy end; 0 is setup.

        Returns
        -------
        str or None
            Why the run is to end with this round. After setup it is not read.
        """

    def end(self, status: str, summary: Record) -> None:
        """See the run end: finished, interrupted or failed; `summary` is empty unless it is finished."""


def points(record: Record, metric: Metric = ACCURACY) -> dict[str, float]:
    """Return the numbers of a round by name, where accuracy has the name of the metric; and how many were lost.

    Examples
    --------
    >>> points({"round": 2, "central_accuracy": 0.5, "ok": [1], "lost": {"0": "late"}}, Metric("Dice"))
    {'central_Dice': 0.5, 'lost': 1, 'refused': 0}
    """
    name = re.sub(r"[^\w.-]+", "_", metric.name)  # what all three libraries take
    named = {key.replace("accuracy", name): value for key, value in record.items()}
    found = {key: value for key, value in named.items() if type(value) in (int, float) and key != "round"}
    for kind in ("lost", "refused"):
        found[kind] = sum(len(each) for key, each in record.items() if key.rpartition("_")[2] == kind)
    return found


class Tracker(RunCallback):
    """Hands the numbers of each round to a library; `log` is called with them."""

    def begin(self, run: RunInfo) -> None:
        """Keep the metric."""
        self.metric = run.metric

    def round(self, record: Record, strategy: Any) -> None:
        """Log the round."""
        self.log(record["round"], points(record, self.metric))

    def log(self, round_: int, values: dict[str, float]) -> None:
        """Log the numbers of a round, finite or not."""
        raise NotImplementedError
