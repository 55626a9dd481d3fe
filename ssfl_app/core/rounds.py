"""Plays the rounds of a run: handshake, queries, training and evaluation; each round becomes one record."""

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from ssfl_app.comm.exchange import ExchangeReport
from ssfl_app.comm.messenger import Check, Messenger, Reply
from ssfl_app.comm.payload import Metadata, Payload, shared_buffers
from ssfl_app.core.options import Settings
from ssfl_app.sparsity.codec import Dense
from ssfl_app.sparsity.layout import Layout, State, state_digest
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Allowed, Arrays


class Query(Protocol):
    """Asks clients a question; what it costs is counted as discovery."""

    def __call__(
        self, question: str, clients: Iterable[int], check: Check, payload: Payload | None = None
    ) -> Iterator[Reply]:
        """Yield the good replies as they come; take all of them.

        Without a parcel the question is about the weights of this moment: it states their digest as the entry
        "weights", and a client that makes others from the seed asks for them. A parcel may state it as well.
        """


Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]
Record = dict[str, Any]


class RunCallback(Protocol):
    """Sees a run go by: the recorder of the run folder, or a test."""

    def met(self, sites: Mapping[int, Metadata]) -> None:
        """All clients are connected; `sites` holds what each said of itself."""

    def warn(self, line: str) -> None:
        """Something is wrong that the run can go on with."""

    def round(self, record: Record, strategy: Any) -> None:
        """Round `record["round"]` of this strategy is over; 0 is setup."""


class _Algorithm(Protocol):
    """What `RoundLoop` uses of a strategy (`SparseStrategy` says what each part means)."""

    name: ClassVar[str]
    has_floor: ClassVar[bool]
    layout: Layout
    settings: Settings
    state: State
    mask: Mask
    callback: RunCallback | None
    peer_bytes: int
    accuracy: dict[int, float]
    personal_accuracy: dict[int, float]
    update_norms: dict[int, float]

    def before_training(self, ask: Query) -> None: ...
    def before_round(self, round_: int, ask: Query) -> None: ...
    def cohort(self, round_: int) -> list[int]: ...
    def model(self) -> State: ...
    def answers(self, question: str | None = None) -> Allowed: ...
    def densities(self) -> tuple[float, float]: ...
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]: ...
    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[None, MetricRecord]: ...
    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]: ...
    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None: ...


class RoundLoop:
    """Plays the rounds of one strategy on one grid.

    Parameters
    ----------
    strategy : _Algorithm
        Whose hooks are called.
    post : Messenger
        The strategy's messenger.
    grid : Grid
        Flower's.
    configs : pair of ConfigRecord
        Further metadata of training and evaluation messages.
    evaluate_fn : callable, optional
        Flower's central evaluation.
    """

    def __init__(
        self,
        strategy: _Algorithm,
        post: Messenger,
        grid: Grid,
        configs: tuple[ConfigRecord, ConfigRecord],
        evaluate_fn: Evaluate | None,
    ) -> None:
        self._strategy, self._post, self._grid = strategy, post, grid
        self._configs, self._evaluate_fn = configs, evaluate_fn
        self._result = Result()
        self._empty: list[str] = []  # layers without an alive weight
        # An upper bound of what a client sends back: a dense model, or a score for each of its weights.
        self._reply_bytes = 4 * strategy.layout.size

    def run(self, first: int, last: int) -> Result:
        """Play rounds `first` to `last`; 0 is setup.

        Raises
        ------
        RunFailed
            Clients are missing, too few answered, or Ray lost an actor.
        """
        sites = self._post.wait_for_clients(self._grid)
        if self._strategy.callback is not None:
            self._strategy.callback.met(sites)
        if first == 0:
            began = time.monotonic()
            record = {"round": 0, "strategy": self._strategy.name} | self._discover(
                0, "", self._strategy.before_training
            )
            self._tell(record | self._empty_layers() | {"seconds": time.monotonic() - began})
        for round_ in range(max(1, first), last + 1):
            began = time.monotonic()
            back = self._post.readmit(self._grid)
            self._strategy.peer_bytes, before = 0, self._strategy.mask
            found = self._discover(round_, "setup_", functools.partial(self._strategy.before_round, round_))
            self._empty_layers()
            record = _sum(found, self._train(round_), self._empty_layers(), self._evaluate(round_)) | back
            record["bytes_peer"] = self._strategy.peer_bytes
            record["density"], record["density_all"] = self._strategy.densities()
            if found:  # the strategy asked: how far is its mask from the one before?
                record["mask_distance"] = before.jaccard_distance(self._strategy.mask)
            self._tell(record | {"seconds": time.monotonic() - began})
        self._result.arrays = ArrayRecord(dict(self._strategy.model()))
        return self._result

    def _tell(self, record: Record) -> None:
        if self._strategy.callback is not None:
            self._strategy.callback.round(record, self._strategy)

    def _empty_layers(self) -> Record:
        """Return what a record says of layers without an alive weight; warn when there are others than before."""
        strategy, before = self._strategy, self._empty
        self._empty = [name for name, alive, _ in strategy.mask.layers() if not alive]
        if self._empty and self._empty != before and strategy.callback is not None:
            cure = "set mask.min-per-layer to 1 or more" if strategy.has_floor else "choose a higher mask.density"
            names = ", ".join(self._empty[:5]) + (f" and {len(self._empty) - 5} more" if len(self._empty) > 5 else "")
            strategy.callback.warn(f"the mask leaves no weight alive in {names}: {cure}")
        return {"empty_layers": self._empty} if self._empty else {}

    def _discover(self, round_: int, prefix: str, hook: Callable[[Query], None]) -> Record:
        """Let the strategy ask what it must know; return what that cost and who failed."""
        strategy, reports = self._strategy, list[ExchangeReport]()

        def ask(
            question: str, clients: Iterable[int], check: Check, payload: Payload | None = None
        ) -> Iterator[Reply]:
            if payload is None:
                payload = Payload(metadata={"weights": state_digest(strategy.layout, strategy.state)})
            weights = {"weights": functools.cache(self._weights)} if "weights" in payload.metadata else {}
            messages = self._post.build_messages(
                f"query.{question}", round_, ((client, payload, None) for client in clients), {}, weights
            )
            replies = self._post.exchange(self._grid, messages, self._reply_bytes)
            reports.append(self._post.report)
            share = strategy.settings.failures.min_ok_fraction
            yield from self._post.accepted_replies(
                replies, strategy.answers(question), check, share, f"the question {question!r}"
            )

        hook(ask)
        if prefix and not reports:
            return {}
        return {
            f"{prefix}asked": sorted({c for o in reports for c in [*o.ok, *o.lost, *o.refused]}),
            **{prefix + name: value for name, value in _names(*reports).items()},
            "bytes_discovery_down": sum(o.down for o in reports),
            "bytes_discovery_up": sum(o.up for o in reports),
            "image_passes": sum(o.train_examples for o in reports),
            "validation_passes": sum(o.eval_examples for o in reports),
        }

    def _weights(self) -> Arrays:
        layout = self._strategy.layout
        return shared_buffers(Dense().encode(layout, self._strategy.state, Mask.dense(layout)))

    def _train(self, round_: int) -> Record:
        strategy = self._strategy
        messages = strategy.configure_train(round_, ArrayRecord(), self._configs[0], self._grid)
        replies = self._post.exchange(self._grid, messages, self._reply_bytes)
        _, metrics = strategy.aggregate_train(round_, replies)
        self._result.train_metrics_clientapp[round_] = metrics
        report, norms = self._post.report, strategy.update_norms
        return {
            "round": round_,
            "cohort": strategy.cohort(round_),
            **_names(report),
            "train_loss": metrics["loss"],
            **({"update_norms": {str(c): norms[c] for c in sorted(norms)}} if norms else {}),
            "messages_train_down": report.sent,
            "messages_train_up": len(report.ok) + len(report.refused),
            "bytes_train_down": report.down,
            "bytes_train_up": report.up,
            "bytes_mask_down": report.mask_down,
            "image_passes": report.train_examples,
            "validation_passes": report.eval_examples,
        }

    def _evaluate(self, round_: int) -> Record:
        strategy = self._strategy
        means = ("local_accuracy_mean", "personal_accuracy_mean")
        record: Record = dict.fromkeys(("central_loss", "central_accuracy", *means)) | {"bytes_evaluate_down": 0}
        messages = strategy.configure_evaluate(round_, ArrayRecord(), self._configs[1], self._grid)
        if not messages:
            return record
        clients = strategy.aggregate_evaluate(round_, self._post.exchange(self._grid, messages, 0))
        if clients is not None:
            self._result.evaluate_metrics_clientapp[round_] = clients
            for name, known in (("local", strategy.accuracy), ("personal", strategy.personal_accuracy)):
                if known:
                    record[f"{name}_accuracy_mean"] = math.fsum(known.values()) / len(known)
                    record[f"{name}_accuracy"] = {str(c): known[c] for c in sorted(known)}
        central = None
        if self._evaluate_fn is not None:
            central = self._evaluate_fn(round_, ArrayRecord(dict(strategy.model())))
        if central is not None:
            self._result.evaluate_metrics_serverapp[round_] = central
            record |= {f"central_{name}": central[name] for name in ("loss", "accuracy")}
        report, failed = self._post.report, _names(self._post.report)
        record |= {f"evaluate_{name}": failed[name] for name in ("lost", "refused", "notes") if name in failed}
        record |= {"bytes_evaluate_down": report.down, "bytes_mask_down": report.mask_down}
        return record | {"image_passes": report.train_examples}


def _sum(*records: Record) -> Record:
    # Entries of the parts of a round; what several parts count is added up.
    counts = ("bytes_mask_down", "image_passes", "validation_passes")
    merged: Record = {name: value for record in records for name, value in record.items()}
    return merged | {name: sum(record.get(name, 0) for record in records) for name in counts}


def _names(*reports: ExchangeReport) -> Record:
    lost = {c: why for o in reports for c, why in o.lost.items()}
    refused = {c: why for o in reports for c, why in o.refused.items()}
    notes = {c: why for o in reports for c, why in o.notes.items()}
    return {
        "ok": sorted({client for o in reports for client in o.ok}),
        "lost": {str(c): lost[c] for c in sorted(lost)},
        "refused": {str(c): refused[c] for c in sorted(refused)},
        **({"notes": {str(c): notes[c] for c in sorted(notes)}} if notes else {}),
    }
