"""The course of a run: greet, set up, then rounds of training and evaluation, each told as one record."""

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from ssfl_app.exchange import Outcome
from ssfl_app.sparsity.codec import Dense
from ssfl_app.sparsity.layout import state_digest
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Arrays
from ssfl_app.strategies.post import Check, Post, Reply
from ssfl_app.wire import Parcel, freeze

if TYPE_CHECKING:
    from ssfl_app.strategies.base import SparseStrategy

Ask = Callable[[str, Iterable[int], Check], Iterator[Reply]]
"""ask(question, clients, check) -> replies, as they come. The question is about the weights of this moment."""

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]
Record = dict[str, Any]


class Course:
    """Plays the rounds of one strategy on one grid.

    Parameters
    ----------
    strategy : SparseStrategy
        Whose hooks are called.
    post : Post
        The strategy's post room.
    grid : Grid
        Flower's.
    configs : pair of ConfigRecord
        Further facts of training and evaluation messages.
    evaluate_fn : callable, optional
        Flower's central evaluation.
    """

    def __init__(
        self,
        strategy: "SparseStrategy",
        post: Post,
        grid: Grid,
        configs: tuple[ConfigRecord, ConfigRecord],
        evaluate_fn: Evaluate | None,
    ) -> None:
        self._strategy, self._post, self._grid = strategy, post, grid
        self._configs, self._evaluate_fn = configs, evaluate_fn
        self._result = Result()
        # An upper bound of what a client sends back: a dense model, or a score for each of its weights.
        self._reply_bytes = 4 * strategy.layout.size

    def play(self, first: int, last: int) -> Result:
        """Play rounds `first` to `last`; 0 is setup.

        Raises
        ------
        RunFailed
            Clients are missing, too few answered, or Ray lost an actor.
        """
        sites = self._post.meet(self._grid)
        if self._strategy.watch is not None:
            self._strategy.watch.met(sites)
        if first == 0:
            self._tell(self._setup())
        for round_ in range(max(1, first), last + 1):
            began = time.monotonic()
            record = self._train(round_) | self._evaluate(round_)
            record["bytes_mask_down"] += record.pop("bytes_mask_evaluate_down")
            self._tell(record | {"seconds": time.monotonic() - began})
        self._result.arrays = ArrayRecord(dict(self._strategy.state))
        return self._result

    def _tell(self, record: Record) -> None:
        if self._strategy.watch is not None:
            self._strategy.watch.round(record, self._strategy)

    def _setup(self) -> Record:
        began, outcomes = time.monotonic(), list[Outcome]()

        def ask(question: str, clients: Iterable[int], check: Check) -> Iterator[Reply]:
            parcel = Parcel(facts={"weights": state_digest(self._strategy.layout, self._strategy.state)})
            weights = {"weights": functools.cache(self._weights)}
            pairs = ((client, parcel) for client in clients)
            messages = self._post.write(f"query.{question}", 0, pairs, None, {}, weights)
            replies = self._post.carry(self._grid, messages, self._reply_bytes)
            outcomes.append(self._post.outcome)
            share = self._strategy.settings.failures.min_ok_fraction
            yield from self._post.open(replies, check, share, f"the question {question!r}")

        self._strategy.setup(ask)
        return {
            "round": 0,
            "strategy": self._strategy.name,
            "asked": sorted({c for o in outcomes for c in [*o.ok, *o.lost, *o.refused]}),
            **_names(*outcomes),
            "bytes_discovery_down": sum(o.down for o in outcomes),
            "bytes_discovery_up": sum(o.up for o in outcomes),
            "seconds": time.monotonic() - began,
        }

    def _weights(self) -> Arrays:
        layout = self._strategy.layout
        return freeze(Dense().encode(layout, self._strategy.state, Mask.dense(layout)))

    def _train(self, round_: int) -> Record:
        strategy = self._strategy
        messages = strategy.configure_train(round_, ArrayRecord(), self._configs[0], self._grid)
        replies = self._post.carry(self._grid, messages, self._reply_bytes)
        _, metrics = strategy.aggregate_train(round_, replies)
        self._result.train_metrics_clientapp[round_] = metrics
        outcome = self._post.outcome
        return {
            "round": round_,
            "cohort": strategy.cohort(round_),
            **_names(outcome),
            "train_loss": metrics["loss"],
            "messages_train_down": outcome.sent,
            "messages_train_up": len(outcome.ok) + len(outcome.refused),
            "bytes_train_down": outcome.down,
            "bytes_train_up": outcome.up,
            "bytes_mask_down": outcome.mask_down,
        }

    def _evaluate(self, round_: int) -> Record:
        strategy = self._strategy
        record: Record = dict.fromkeys(("central_loss", "central_accuracy", "local_accuracy_mean"))
        record |= {"bytes_evaluate_down": 0, "bytes_mask_evaluate_down": 0}
        messages = strategy.configure_evaluate(round_, ArrayRecord(), self._configs[1], self._grid)
        if not messages:
            return record
        local = strategy.aggregate_evaluate(round_, self._post.carry(self._grid, messages, 0))
        if local is not None:
            self._result.evaluate_metrics_clientapp[round_] = local
            record["local_accuracy_mean"] = local["accuracy"]
            record["local_accuracy"] = {str(c): strategy.accuracy[c] for c in sorted(strategy.accuracy)}
        central = None
        if self._evaluate_fn is not None:
            central = self._evaluate_fn(round_, ArrayRecord(dict(strategy.state)))
        if central is not None:
            self._result.evaluate_metrics_serverapp[round_] = central
            record |= {f"central_{name}": central[name] for name in ("loss", "accuracy")}
        outcome, failed = self._post.outcome, _names(self._post.outcome)
        record |= {"evaluate_lost": failed["lost"], "evaluate_refused": failed["refused"]}
        return record | {"bytes_evaluate_down": outcome.down, "bytes_mask_evaluate_down": outcome.mask_down}


def _names(*outcomes: Outcome) -> Record:
    lost = {c: why for o in outcomes for c, why in o.lost.items()}
    refused = {c: why for o in outcomes for c, why in o.refused.items()}
    return {
        "ok": sorted({client for o in outcomes for client in o.ok}),
        "lost": {str(c): lost[c] for c in sorted(lost)},
        "refused": {str(c): refused[c] for c in sorted(refused)},
    }
