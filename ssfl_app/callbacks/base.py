"""The callback: what sees a run go by on its server, a tracker or code of one's own."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ssfl_app.metrics import Metric

Record = Mapping[str, Any]


class RunInfo(NamedTuple):
    """What a callback is told of a run that begins, or goes on with `next_round`; 0 is the setup.

    `metric` is the headline metric of the task, whose values records call accuracy; `folder` is absolute.
    """

    folder: Path
    config: Mapping[str, bool | int | float | str]
    metric: Metric
    next_round: int


class RunCallback:
    """Sees a run go by; each method does nothing unless it is overridden.

    One that ``run.trackers`` names is made without arguments on the server; `library` is the module that it needs.
    """

    library: ClassVar[str] = ""

    def begin(self, run: RunInfo) -> None:
        """See the run begin, or go on."""

    def met(self, sites: Mapping[int, Any]) -> None:
        """See that all clients are connected; `sites` holds what each said of itself."""

    def warn(self, line: str) -> None:
        """See that something is wrong that the run can go on with."""

    def round(self, record: Any, strategy: Any) -> str | None:
        """See round ``record["round"]`` of this strategy end; return a reason to end the run, from round 1 on."""

    def end(self, status: str, summary: Record) -> None:
        """See the run end: finished, interrupted or failed; `summary` is empty unless it is finished."""


def points(record: Record, metric: Metric) -> dict[str, float]:
    """Return the numbers of a round by name, where accuracy has the name of the metric; and how many were lost."""
    name = re.sub(r"[^\w.-]+", "_", metric.name)  # what all three libraries take
    named = {key.replace("accuracy", name): value for key, value in record.items()}
    found = {key: value for key, value in named.items() if type(value) in (int, float) and key != "round"}
    for kind in ("lost", "refused"):
        found[kind] = sum(len(each) for key, each in record.items() if key.rpartition("_")[2] == kind)
    return found
