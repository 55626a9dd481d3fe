"""Buffered asynchronous rounds: an update that comes late counts in the round in which it comes.

FedBuff: Nguyen et al., "Federated learning with buffered asynchronous aggregation", AISTATS 2022, arXiv 2106.06639,
algorithm 1. A round is one step of the server; it closes with the first K good updates (run.buffer), of whatever age:

    model += sum_k n_k s_k delta_k / sum_k n_k,    s_k = 1 / sqrt(1 + t_k)

``delta_k`` is what client k sent minus the model that it was sent, ``t_k`` how many rounds ago that was, ``n_k`` its
weight (run.weighting). Who is at work is asked nothing; new clients are asked when a round begins, so many that
all those at work are a cohort.

The mean stays the one of `ReplyMean`, of whole weights and exact in any order: an old update enters it as the model
that its client would have sent if it had begun from this round's and gone s_k of its way, rounded as on the wire.
With K of all clients it is FedAvg, to its bits.

Departures: the paper divides by K, which is run.weighting "uniform", and has a learning rate of the server, here 1.
Its clients begin whenever another one ends.

On real nodes `MessageExchange` goes on listening to old messages. In simulation a late reply is turned into its
difference at once, so that no old model is kept; it waits in a file until its time by the simulated clock has come.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ssfl_app.comm.exchange import Deadlines, ExchangeReport
from ssfl_app.comm.messenger import Reply
from ssfl_app.comm.payload import Payload
from ssfl_app.core.aggregation import Aggregator
from ssfl_app.core.clock import Clock
from ssfl_app.core.closing import AT_WORK, REPLAYED, Closable, Closing, Taken, check_recorded
from ssfl_app.core.options import RunOptions
from ssfl_app.core.robust import Held
from ssfl_app.core.validation import stored
from ssfl_app.options import ConfigError
from ssfl_app.sparsity.codec import LinearCodec
from ssfl_app.sparsity.layout import State, Vector
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import VALUE_TYPES, Arrays, PayloadError, write_values

FACTS = 5  # of a late reply in a checkpoint: client, round, samples, loss, length of its difference


def check_buffer(strategy: Closable) -> None:
    """Raise ConfigError unless an old update can be added to a newer model, or there is no run.buffer."""
    settings, run = strategy.settings, strategy.settings.run
    if not run.buffer:
        return
    if not (strategy.one_mask and strategy.has_default_aggregator()):
        rule = f"it is 0 with strategy {strategy.name}, which has not one mask for all and FedAvg's mean"
        raise ConfigError(f"run.buffer is {run.buffer:g}; {rule}")
    needed: dict[str, tuple[object, tuple[object, ...]]] = {
        "wire.up-values": (settings.wire.up_values, VALUE_TYPES),
        "wire.error-feedback": (settings.wire.error_feedback, (False,)),
        "privacy.level": (settings.privacy.level, ("none",)),
    }
    for key, (value, allowed) in needed.items():
        if value not in allowed:
            rule = " or ".join(map(repr, allowed))
            raise ConfigError(
                f"{key} is {value!r}; it is {rule} with run.buffer: updates are told apart by their age"
            )


def sent_values(strategy: Closable, round_: int) -> Vector:
    """Return what clients have, before they train, of the values that they send back in a round."""
    state, mask = strategy.sent_down(round_)
    return _carried(strategy, state, mask, round_)


def _carried(strategy: Closable, state: State, mask: Mask, round_: int) -> Vector:
    codec = strategy.codec_up(round_)
    assert isinstance(codec, LinearCodec)  # `check_buffer`: the default mean takes no other
    return strategy.layout.flatten(state)[codec.index(strategy.layout, mask)]


def difference(strategy: Closable, reply: Reply, began: Vector) -> Vector:
    """Return what a client changed, float32, of the values `began` that it got."""
    codec = strategy.codec_up(reply.round)
    assert isinstance(codec, LinearCodec)
    return codec.vector(reply.arrays, strategy.layout, strategy.mask) - began


def check_mask(strategy: Closable, reply: Payload) -> None:
    """Raise PayloadError if a reply is one under a mask that was replaced meanwhile."""
    if reply.metadata["digest"] != strategy.mask.digest:
        raise PayloadError("it is an update under an older mask")


def renewed_on_nodes(strategy: Closable, reply: Reply, now: Vector, round_: int) -> Reply:
    """Return the late reply of a real node as `renewed` does, by the model in the message that it answers."""
    codec, sent = strategy.codec_down(reply.round), strategy.messenger.sent(reply.client)
    state, mask = codec.decode(sent.arrays, strategy.layout, strategy.mask)
    change = difference(strategy, reply, _carried(strategy, state, mask, reply.round))
    return renewed(strategy, reply, change, now, round_)


def renewed(strategy: Closable, reply: Reply, change: Vector, now: Vector, round_: int) -> Reply:
    """Return a late reply as if its client had begun from the values `now`, and note its age in the report.

    Raises
    ------
    PayloadError
        The model has moved, and the two together are beyond what a mean takes.
    """
    codec, age = strategy.codec_up(round_), round_ - reply.round
    values = now + change.astype(np.float64) / math.sqrt(1 + age)
    arrays = write_values(values.astype(np.float32), codec.values)
    codec.check(arrays, strategy.layout, strategy.mask)
    strategy.messenger.report.stale[reply.client] = age
    return replace(reply, arrays=arrays)


class Buffer(Closing):
    """Says which updates of simulated clients make a round, and holds the others until theirs."""

    def __init__(
        self,
        run: RunOptions,
        clock: Clock | None,
        replay: Mapping[int, Taken] | None,
        deadlines: Deadlines | None = None,
    ) -> None:
        super().__init__(run, clock, replay, deadlines)
        # Of those who are at work: differences, and replies without arrays.
        self._held, self._late = Held(), dict[int, Reply]()

    def busy(self, round_: int) -> dict[int, str]:
        """Return who is asked nothing in a round, and why."""
        return super().busy(round_) if self._replay else dict.fromkeys(sorted(self._late), AT_WORK)

    def on_time(self, strategy: Closable, aggregator: Aggregator, round_: int) -> Aggregator:
        """Return an aggregator of the updates that make the round, old ones among them."""
        fresh, came = Held(), dict[int, Reply]()

        def add(reply: Reply) -> None:
            fresh.put(reply.client, reply.arrays)
            came[reply.client] = replace(reply, arrays={})

        def finish() -> None:
            report, began = strategy.messenger.report, sent_values(strategy, round_)
            counted = self._counted(report, round_)
            for client in sorted(counted):
                if client in came:
                    aggregator.add(replace(came[client], arrays=fresh.get(client)))
                    continue
                late = self._late[client]
                try:
                    check_mask(strategy, late)
                    reply = renewed(strategy, late, self._held.get(client)["change"], began, round_)
                except PayloadError as error:
                    report.refuse(client, str(error))
                    continue
                report.ok.append(client)
                norm = strategy.update_norm(reply)
                assert norm is not None  # of a linear codec
                strategy.update_norms[client] = norm
                aggregator.add(reply)
            self._keep(strategy, {c: r for c, r in {**self._late, **came}.items() if c not in counted}, fresh, began)
            what = f"training in round {round_}"
            report.require(strategy.settings.failures.min_ok_fraction, what)
            aggregator.finish()

        return Aggregator(add, finish)

    def _counted(self, report: ExchangeReport, round_: int) -> set[int]:
        """Return whose updates make the round; name those that are late, and note how long they are."""
        seconds = dict.fromkeys(report.ok, 0.0) if self._clock is None else self._clock.client_seconds(report)
        due = {client: float(self.left[client]) for client in self._late} | {c: seconds[c] for c in report.ok}
        order = sorted(due, key=lambda client: (due[client], client))
        counted = self._recorded(report, round_) if self._replay else set(order[: report.asked])
        end = max((due[client] for client in counted), default=0.0)
        if self._clock is not None:
            report.seconds = end
        self.left[:] = 0
        for client in due.keys() - counted:
            self.left[client] = max(0.0, due[client] - end)
        for client in [client for client in report.ok if client not in counted]:
            why = f"{due[client]:.4g} s; {len(counted)} updates closed the round at {end:.4g} s"
            report.come_late(client, REPLAYED if self._replay else why)
        return counted

    def _recorded(self, report: ExchangeReport, round_: int) -> set[int]:
        assert self._replay is not None
        taken = self._replay[round_]
        there = {c for c in report.ok if c not in taken.stale}
        there |= {c for c, age in taken.stale.items() if c in self._late and self._late[c].round == round_ - age}
        check_recorded(taken.ok - there, round_)
        return set(taken.ok)

    def _keep(self, strategy: Closable, late: Mapping[int, Reply], fresh: Held, began: Vector) -> None:
        """Hold the differences of those that are still at work, in a file that has no others."""
        held = Held()
        for client, reply in sorted(late.items()):
            if client in self._late and reply is self._late[client]:
                held.put(client, self._held.get(client))
            else:
                strategy.update_norms.pop(client, None)
                answer = replace(reply, arrays=fresh.get(client))
                held.put(client, {"change": difference(strategy, answer, began)})
        self._held, self._late = held, dict(late)

    def state_dict(self) -> Arrays:
        """Return what `load_state_dict` needs: who is at work for how long, on what, and what it will add."""
        told, masks, changes = list[float](), b"", [np.zeros(0, dtype=np.float32)]
        for client, reply in sorted(self._late.items()):
            change = self._held.get(client)["change"]
            told += [client, reply.round, reply.samples, float(reply.metadata["loss"]), change.size]
            masks += bytes.fromhex(str(reply.metadata["digest"]))
            changes.append(change)
        late: Arrays = {"late": np.array(told, dtype=np.float64), "late-masks": np.frombuffer(masks, dtype=np.uint8)}
        return {**super().state_dict(), **late, "late-changes": np.concatenate(changes)}

    def load_state_dict(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from there; KeyError or ValueError if these are other arrays."""
        super().load_state_dict(arrays)
        count = arrays["late"].size // FACTS
        rows = stored(arrays, "late", "float64", FACTS * count).reshape(count, FACTS)
        masks = stored(arrays, "late-masks", "uint8", 32 * count).reshape(count, 32)
        ends = np.cumsum(rows[:, -1]).astype(np.int64)
        changes = np.split(stored(arrays, "late-changes", "float32", int(ends[-1]) if count else 0), ends[:-1])
        self._held, self._late = Held(), {}
        for (number, round_, samples, loss, _), mask, change in zip(rows.tolist(), masks, changes, strict=False):
            facts = {"round": int(round_), "samples": int(samples), "loss": loss, "digest": mask.tobytes().hex()}
            client = int(number)
            self._late[client] = Reply({}, facts, client=client, samples=int(samples))
            self._held.put(client, {"change": change})
