"""Rounds that close before their last reply: who counts on the simulated clock, and in a run that is played again.

More clients are asked than a round needs (run.over-select), it closes with some good replies (run.close-after), and
what comes later is named and not taken: Bonawitz et al., "Towards federated learning at scale: system design",
MLSys 2019. Departure: nobody is told to stop, so a late client works on and is asked nothing until it is ready.
With run.deadline it closes when nobody is left who may be waited for (`Deadlines`), and enough have answered well.

On real nodes replies come when they come, and the exchange ends (`MessageExchange`). In simulation each reply has
its time by the simulated clock: all wait in a file, and the first ones count, of equally early ones the lower number.
What the model becomes depends on arrival by who counts alone: the record names them, and a replay takes the same.
"""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from ssfl_app.comm.exchange import Deadlines, ExchangeReport
from ssfl_app.comm.messenger import ClientMessenger, Reply
from ssfl_app.core.aggregation import Aggregator, held_back
from ssfl_app.core.clock import Clock
from ssfl_app.core.options import RunOptions, Settings
from ssfl_app.core.validation import stored
from ssfl_app.locks import RunFailed
from ssfl_app.sparsity.codec import Codec
from ssfl_app.sparsity.layout import Layout, State
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Arrays

REPLAYED = "did not count in the run that is played again"
AT_WORK = "was not asked: it is still at work on the message of a round that closed without it"


@dataclass(frozen=True)
class Taken:
    """Whose replies a recorded round took, who was not asked, and how many rounds old those were that came late."""

    ok: frozenset[int]
    busy: frozenset[int]
    stale: Mapping[int, int] = field(default_factory=dict)


class Closable(Protocol):
    """What is used of a strategy here and in `buffering` (`SparseStrategy` says what each part means)."""

    name: ClassVar[str]
    one_mask: ClassVar[bool]
    layout: Layout
    settings: Settings
    mask: Mask
    messenger: ClientMessenger
    update_norms: dict[int, float]

    def has_default_aggregator(self) -> bool:
        """Return whether the mean of a round is the default one."""
        ...

    def sent_down(self, round_: int) -> tuple[State, Mask]:
        """Return the model as clients get it in a round, and the mask."""
        ...

    def codec_down(self, round_: int) -> Codec:
        """Return the codec of models sent to clients."""
        ...

    def codec_up(self, round_: int) -> Codec:
        """Return the codec of models sent back."""
        ...

    def update_norm(self, reply: Reply) -> float | None:
        """Return the length of an update."""
        ...


class Closing:
    """Says which replies of simulated clients come too late.

    Parameters
    ----------
    run : RunOptions
    clock : Clock or None
        The simulated clock; None in a replay of a run without one.
    replay : mapping of int to Taken, optional
        By round: what was recorded counts, whatever a clock says.
    deadlines : Deadlines, optional
        With run.deadline.
    """

    def __init__(
        self,
        run: RunOptions,
        clock: Clock | None,
        replay: Mapping[int, Taken] | None,
        deadlines: Deadlines | None = None,
    ) -> None:
        self._run, self._clock, self._replay, self._deadlines = run, clock, replay, deadlines
        self.left = np.zeros(run.clients)
        """Seconds for which each client is still at work, after the last round."""

    def busy(self, round_: int) -> dict[int, str]:
        """Return who is asked nothing in a round, and why."""
        who = sorted(self._replay[round_].busy) if self._replay else np.flatnonzero(self.left).tolist()
        return dict.fromkeys(who, AT_WORK)

    def on_time(self, strategy: Closable, aggregator: Aggregator, round_: int) -> Aggregator:
        """Return an aggregator of the replies that count; the others are named in the report when it finishes."""

        def choose(replies: list[Reply]) -> list[Reply]:
            report = strategy.messenger.report
            share = strategy.settings.failures.min_ok_fraction
            late = self._unwanted(report, round_) if self._replay else self._by_clock(report, share)
            for client, why in late.items():
                report.come_late(client, why)
                strategy.update_norms.pop(client, None)
            return [reply for reply in replies if reply.client not in late]

        return held_back(aggregator, choose)

    def _by_clock(self, report: ExchangeReport, share: float) -> dict[int, str]:
        assert self._clock is not None
        seconds, count = self._clock.client_seconds(report), self._run.closes_at(report.asked)
        order = sorted(report.ok, key=lambda client: (seconds[client], client))
        end = seconds[order[:count][-1]] if order else 0.0
        why = dict.fromkeys(order[count:], f"{count} good replies closed the round at {end:.4g} s")
        if self._deadlines is not None and order:
            least = seconds[order[: math.ceil(share * report.asked)][-1]]
            last = max(least, *(min(seconds[client], self._deadlines.of(client)) for client in order))
            if last < end:
                end = last
                why = {client: self._deadlines.passed(client) for client in order if seconds[client] > end}
            for client in order:
                self._deadlines.note(client, seconds[client])
            report.seconds = end
        self.left = np.maximum(self.left - end, 0)
        for client in why:
            self.left[client] = seconds[client] - end
        return {client: f"{seconds[client]:.4g} s; {reason}" for client, reason in why.items()}

    def _unwanted(self, report: ExchangeReport, round_: int) -> dict[int, str]:
        assert self._replay is not None
        wanted, came = self._replay[round_].ok, set(report.ok)
        check_recorded(wanted - came, round_)
        return dict.fromkeys(sorted(came - wanted), REPLAYED)

    def state_dict(self) -> Arrays:
        """Return what `load_state_dict` needs."""
        return {"left": self.left}

    def load_state_dict(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from there; KeyError or ValueError if these are other arrays."""
        self.left = stored(arrays, "left", "float64", self._run.clients).copy()


def check_recorded(missing: Set[int], round_: int) -> None:
    """Raise RunFailed if replies are missing that a recorded round took."""
    if missing:
        who = f"clients {sorted(missing)} counted in round {round_} of that run"
        raise RunFailed(f"run.replay: {who} and do not in this")
