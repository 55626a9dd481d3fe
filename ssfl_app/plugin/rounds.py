"""Plays the rounds of a run: discovery, training and evaluation; each round becomes one record."""

import time
from collections.abc import Callable, Iterable, Iterator
from logging import INFO, WARNING
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

if TYPE_CHECKING:
    from ssfl_app.plugin.strategy import SSFL

Record = dict[str, Any]
Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


class RoundLoop:
    """Plays the rounds of one strategy on one grid.

    Parameters
    ----------
    strategy : SSFL
        With its model and its mail.
    grid : Grid
        Flower's.
    configs : pair of ConfigRecord
        The user's, of training and evaluation.
    evaluate_fn : callable, optional
        Flower's central evaluation.
    """

    def __init__(
        self, strategy: "SSFL", grid: Grid, configs: tuple[ConfigRecord, ConfigRecord], evaluate_fn: Evaluate | None
    ) -> None:
        self._strategy, self._grid, self._configs, self._evaluate_fn = strategy, grid, configs, evaluate_fn
        self._result = Result()

    def run(self, initial_arrays: ArrayRecord, num_rounds: int) -> Result:
        """Play round 0, which is discovery, and all others.

        Raises
        ------
        RunFailed
            Too few nodes connected, or answered well, or Ray lost an actor. `SSFL.history` ends with that round.
        """
        began = time.monotonic()
        strategy = self._strategy
        self._central(0, initial_arrays)
        del initial_arrays  # a model's size
        if strategy.base.fraction_train and strategy.discovery.density < 1:
            self._discover()
        for round_ in range(1, num_rounds + 1):
            log(INFO, "")
            log(INFO, "[ROUND %s/%s]", round_, num_rounds)
            start, record = time.monotonic(), Record(round=round_)
            strategy.history.append(record)
            record |= self._train(round_)
            strategy.mail.need(strategy.min_ok_fraction, f"training in round {round_}")
            record |= self._evaluate(round_)
            record["central"] = self._central(round_, None)
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
        nodes = strategy.sample(self._grid, "saliency", 0, strategy.discovery.share, strategy.base.min_train_nodes)
        sheet, mask = strategy.discovery.find(
            strategy.mail, self._grid, nodes, strategy.model, config, record, strategy.inner
        )
        if len(record["scored_by"]) > 1:
            log(
                WARNING,
                "\t> scores were found in different ways (%s), have different units and were averaged all the same; "
                "where a client trains without a torch optimizer, or without data, say SparseMod(saliency=...)",
                ", ".join(f"{count} by {how}" for how, count in record["scored_by"].items()),
            )
        strategy.model = sheet.narrowed(strategy.model, strategy.mail.sheet)
        strategy.mail.sheet, strategy.mail.mask = sheet, mask
        strategy.model[~mask.transmitted] = 0
        record["seconds"] = time.monotonic() - start
        log(INFO, "\t└──> %s of %s prunable weights stay alive", mask.count, mask.alive.size)

    def _train(self, round_: int) -> Record:
        strategy, mail = self._strategy, self._strategy.mail
        model = self._model("configure_train")
        messages = list(strategy.configure_train(round_, model, self._configs[0], self._grid))
        if messages:
            log(INFO, "configure_train: Sampled %s nodes", len(messages))
        replies = mail.exchange(self._grid, messages, 4 * int(np.count_nonzero(mail.mask.transmitted)))
        arrays, metrics = strategy.aggregate_train(round_, self._heard("aggregate_train", replies))
        if messages:
            mail.log_failures("aggregate_train")
        self._note(metrics, self._result.train_metrics_clientapp, round_)
        report, mask = mail.report, mail.mask
        return {
            **mail.names(),
            "aggregated": arrays is not None,
            "metrics": dict(metrics or {}),
            "messages_train_down": report.sent,
            "messages_train_up": len(report.ok) + len(report.refused),
            "bytes_train_down": report.down,
            "bytes_train_up": report.up,
            "bytes_mask_down": report.mask_down,
            "density": mask.density,
            "density_all": int(np.count_nonzero(mask.transmitted)) / mask.transmitted.size,
        }

    def _evaluate(self, round_: int) -> Record:
        strategy, mail = self._strategy, self._strategy.mail
        model = self._model("configure_evaluate")
        messages = list(strategy.configure_evaluate(round_, model, self._configs[1], self._grid))
        if not messages:
            return {"bytes_evaluate_down": 0}
        log(INFO, "configure_evaluate: Sampled %s nodes", len(messages))
        replies = self._heard("aggregate_evaluate", mail.exchange(self._grid, messages, 0))
        metrics = strategy.aggregate_evaluate(round_, replies)
        mail.log_failures("aggregate_evaluate")
        self._note(metrics, self._result.evaluate_metrics_clientapp, round_)
        return {
            **{f"evaluate_{name}": value for name, value in mail.names().items()},
            "evaluate_metrics": dict(metrics or {}),
            "bytes_evaluate_down": mail.report.down,
            "bytes_evaluate_mask_down": mail.report.mask_down,
        }

    def _model(self, method: str) -> ArrayRecord:
        """Return what a method of the strategy is given as the model: `SSFL`'s own read none."""
        return self._strategy.arrays() if self._strategy.changes(method) else ArrayRecord()

    def _heard(self, method: str, replies: Iterator[Message]) -> Iterable[Message]:
        """Return the replies one at a time, or, to a method that is the user's own, as Flower gives them."""
        return (
            self._strategy.mail.decoded(replies, f"{type(self._strategy).__name__}.{method}")
            if self._strategy.changes(method)
            else replies
        )

    def _note(self, metrics: MetricRecord | None, book: dict[int, MetricRecord], round_: int) -> None:
        if metrics is not None:
            log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
            book[round_] = metrics

    def _central(self, round_: int, arrays: ArrayRecord | None) -> Record | None:
        if self._evaluate_fn is None:
            return None
        metrics = self._evaluate_fn(round_, self._strategy.arrays() if arrays is None else arrays)
        if metrics is None:
            return None
        log(INFO, "Global evaluation: %s", metrics)
        self._result.evaluate_metrics_serverapp[round_] = metrics
        return dict(metrics)
