"""Secure aggregation on five SuperNodes, one of which is killed in each of the two exchanges of a round."""

import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.drills.faults import finished, told
from benchmarks.drills.field import KEYS, Field, Run, federation, until
from ssfl_app.config import merge
from ssfl_app.sparsity.layout import state_digest
from ssfl_app.testing.grid import answer_error, play

SUPERNODES = 5
FIRST, SECOND, SLOW = "node-1", "node-2", "node-0"
TIMEOUT, TURNS = 300.0, 2
TRAIN = "Receiving: train message"  # what a SuperNode's log says
RUN = KEYS | {"run.clients": SUPERNODES, "run.cohort": SUPERNODES, "run.rounds": 5, "run.evaluate-every": 5}
RUN |= {"run.round-timeout": TIMEOUT, "run.join-timeout": 2 * TIMEOUT}
MASKED = {"privacy.secure-aggregation": True}
CLEAR = {"wire.up-values": "fixed32", "ssfl.score-values": "fixed32"}
"""The run without masks that has the bits of a masked one."""


def killed_in_each_exchange(work: Path) -> dict[str, Any]:
    """Kill a SuperNode before it uploads masked values, and later one that did, before it helps to unmask the sum.

    Returns
    -------
    dict
        A row of the table. `same_bits` compares with the run in one process, in the clear, that loses the same
        replies of training.
    """
    with federation(work, SUPERNODES) as place:
        run = place.start(work / "run", **RUN, **MASKED)
        run.wait_for("discovery")
        place.client_app(FIRST)
        place.kill(FIRST)
        until("all nodes answer again", lambda: _whole(run))
        _kill_between(place, run)
        ends = finished(run)
    return _row(run, ends)


def _kill_between(place: Field, run: Run) -> None:
    """Kill SECOND when it has uploaded its masked values and the exchange is not over, since SLOW is held.

    It is started again at once, and could still answer: it is killed again until the round is over.
    """
    slow = place.client_app(SLOW)
    asked, over = place.log(SLOW).count(TRAIN), len(run.records)
    until(f"{SECOND} has uploaded", lambda: _held(slow, _uploaded(place.log(SECOND), asked)))

    def ended() -> bool:
        place.kill(SECOND)
        return len(run.records) > over

    until("the round ends", ended)


def _uploaded(log: str, asked: int) -> bool:
    """Return whether a node was asked to train so often, and has sent the last answer."""
    return log.count(TRAIN) >= asked and "Sent successfully" in log.rpartition(TRAIN)[2]


def _row(run: Run, ends: str) -> dict[str, Any]:
    clear = state_digest(*_clear(run))
    result = told(run, "", ends, {"model_sha256": clear}, TIMEOUT)
    notes = [
        (record["round"], client, why) for record in run.records for client, why in record.get("notes", {}).items()
    ]
    return asdict(result) | {
        "what": "A SuperNode and its processes are killed (-9) before it uploads masked values; in a later round, "
        "another one after it did, before it helps to unmask the sum.",
        "waited_too_long": result.waited_too_long,
        "rounds": len(run.records) - 1,
        "not_unmasking": [f"round {round_}, client {client}: {why}" for round_, client, why in notes],
    }


def seconds_a_round(work: Path) -> dict[str, Any]:
    """Play runs in the clear and under secure aggregation in turns; return seconds of their rounds, and medians."""
    kinds = {"clear": CLEAR, "masked": MASKED}
    rounds = {kind: list[float]() for kind in kinds}
    loads = []
    with federation(work, SUPERNODES) as place:
        for turn in range(TURNS):
            for kind, keys in kinds.items():
                loads.append(os.getloadavg()[0])
                run = place.start(work / f"{kind}-{turn}", **RUN, **keys)
                code, errors = run.end()
                if code:
                    raise RuntimeError(errors)
                # Not those in which clients are tested as well.
                rounds[kind] += [record["seconds"] for record in run.records[1:-1]]
    medians = {kind: statistics.median(each) for kind, each in rounds.items()}
    return {
        "median": medians,
        "more": medians["masked"] - medians["clear"],
        "rounds": rounds,
        "load": loads,
    }


def _held(process: psutil.Process, enough: bool) -> bool:
    """Let a process hardly go on, so that the exchange waits for it; it tells Flower that it lives."""
    if not enough:
        process.suspend()
        time.sleep(5)
        process.resume()
        time.sleep(0.3)
    return enough


def _whole(run: Run) -> bool:
    """Return whether the last round was one with all clients, after one without some."""
    records = [record for record in run.records if record["round"]]
    return any(record["lost"] for record in records) and not records[-1]["lost"]


def _clear(run: Run) -> tuple[Any, Any]:
    """Play the same run in this process, in the clear, with the same replies lost; return its layout and model."""
    lost = {
        ("train", record["round"], int(client)): answer_error(3)
        for record in run.records
        for client in record["lost"]
    }
    played = play(merge({"strategy": "ssfl", **RUN, **CLEAR}), faults=lost)
    return played.layout, played.strategy.model()
