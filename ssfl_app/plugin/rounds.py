"""Plays the rounds of a run: discovery, training and evaluation; each round becomes one record."""

import time
from collections.abc import Callable, Iterable, Iterator
from logging import INFO, WARNING
from typing import Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from ssfl_app.comm.exchange import names
from ssfl_app.core.rounds import Record, RoundLoop
from ssfl_app.plugin.discovery import Discovery
from ssfl_app.plugin.messenger import NodeMessenger
from ssfl_app.plugin.node_sum import SumOptions
from ssfl_app.sparsity.layout import Vector


class _Algorithm(Protocol):
    """What is used of a strategy here (`SSFL` says what each part means)."""

    inner: FedAvg | None
    base: FedAvg
    discovery: Discovery
    history: list[Record]
    model: Vector
    min_ok_fraction: float
    clipped: int
    sums: SumOptions | None

    def arrays(self) -> ArrayRecord: ...
    def changes(self, method: str) -> bool: ...
    def question_config(self, config: ConfigRecord, grid: Grid) -> ConfigRecord: ...
    def sample(self, grid: Grid, what: str, round_: int, fraction: float, least: int) -> list[int]: ...


class NodeRoundLoop(RoundLoop[_Algorithm, NodeMessenger]):
    """Plays the rounds of an `SSFL`."""

    def run(self, initial_arrays: ArrayRecord, num_rounds: int) -> Result:
        """Play round 0, which is discovery, and all others.

        Raises
        ------
        RunFailed
            Too few nodes connected, or answered well, or Ray lost an actor. `SSFL.history` ends with that round.
        """
        began = time.monotonic()
        strategy = self._strategy
        self._tell_central(0, lambda: initial_arrays)
        if strategy.base.fraction_train and strategy.discovery.density < 1:
            self._discover()
        for round_ in range(1, num_rounds + 1):
            log(INFO, "")
            log(INFO, "[ROUND %s/%s]", round_, num_rounds)
            start, record = time.monotonic(), Record(round=round_)
            strategy.history.append(record)
            record |= self._train(round_)
            self._tell_clipped(record)
            self._messenger.report.require(strategy.min_ok_fraction, f"training in round {round_}", "node")
            record |= self._evaluate(round_)
            record["central"] = self._tell_central(round_, strategy.arrays)
            record["seconds"] = time.monotonic() - start
        self._result.arrays = strategy.arrays()
        log(INFO, "")
        log(INFO, "Strategy execution finished in %.2fs", time.monotonic() - began)
        return self._result

    def _discover(self) -> None:
        strategy = self._strategy
        start, record = time.monotonic(), Record(round=0)
        strategy.history.append(record)
        log(INFO, "")
        log(INFO, "[DISCOVERY]")
        config = strategy.question_config(self._configs[0], self._grid)

        def sample(what: str, share: float) -> list[int]:
            return strategy.sample(self._grid, what, 0, share, strategy.base.min_train_nodes)

        spec, strategy.model, mask = strategy.discovery.find(
            self._messenger, self._grid, sample, strategy.model, config, record, strategy.inner, strategy.sums
        )
        strategy.clipped += record.pop("clipped", 0)
        if len(record["scored_by"]) > 1:
            log(
                WARNING,
                "\t> scores were found in different ways (%s), have different units and were averaged all the same; "
                "where a client trains without a torch optimizer, or without data, say SparseMod(saliency=...)",
                ", ".join(f"{count} by {how}" for how, count in record["scored_by"].items()),
            )
        self._tell_clipped(record)
        self._messenger.spec, self._messenger.mask = spec, mask
        if strategy.discovery.frozen:
            self._messenger.frozen = strategy.model[~mask.transmitted]
        strategy.model[~mask.transmitted] = self._messenger.frozen if strategy.discovery.frozen else 0
        record["seconds"] = time.monotonic() - start
        log(INFO, "\t└──> %s of %s prunable weights stay alive", mask.count, self._messenger.whole.prunable_size)

    def _tell_clipped(self, record: Record) -> None:
        clipped, self._strategy.clipped = self._strategy.clipped, 0
        if clipped:
            record["clipped"] = clipped
            log(WARNING, "\t> clients clipped %s values to update_range", clipped)

    def _train(self, round_: int) -> Record:
        mask, whole = self._messenger.mask, self._messenger.whole
        carried = int(np.count_nonzero(mask.transmitted))
        arrays, metrics, counts = self._training(round_, 4 * carried)
        self._tell_metrics("aggregate_train", metrics)
        return {
            **names(self._messenger.report),
            "aggregated": arrays is not None,
            "metrics": dict(metrics or {}),
            **counts,
            "density": mask.count / max(1, whole.prunable_size),
            "density_all": carried / whole.size,
        }

    def _evaluate(self, round_: int) -> Record:
        sent, metrics = self._evaluation(round_)
        if not sent:
            return {"bytes_evaluate_down": 0}
        self._tell_metrics("aggregate_evaluate", metrics)
        return {
            **{f"evaluate_{name}": value for name, value in names(self._messenger.report).items()},
            "evaluate_metrics": dict(metrics or {}),
            "bytes_evaluate_down": self._messenger.report.down,
            "bytes_evaluate_mask_down": self._messenger.report.mask_down,
        }

    def _given(self, method: str) -> ArrayRecord:
        """Return the model for a method that is the user's own: `SSFL`'s own read none."""
        return self._strategy.arrays() if self._strategy.changes(method) else ArrayRecord()

    def _heard(self, method: str, replies: Iterator[Message]) -> Iterable[Message]:
        """Return the replies one at a time, or, to a method that is the user's own, as Flower gives them."""
        if asked := self._messenger.report.asked:
            log(INFO, "%s: Sampled %s nodes", method.replace("aggregate", "configure"), asked)
        if not self._strategy.changes(method):
            return replies
        return self._messenger.decoded(replies, f"{type(self._strategy).__name__}.{method}")

    def _tell_metrics(self, method: str, metrics: MetricRecord | None) -> None:
        if self._messenger.report.asked:
            self._messenger.log_failures(method)
        if metrics is not None:
            log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)

    def _tell_central(self, round_: int, model: Callable[[], ArrayRecord]) -> Record | None:
        metrics = self._central(round_, model)
        if metrics is None:
            return None
        log(INFO, "Global evaluation: %s", metrics)
        return dict(metrics)
