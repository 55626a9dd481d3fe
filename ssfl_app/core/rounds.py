"""Plays the rounds of a run: handshake, queries, training and evaluation; each round becomes one record."""

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from ssfl_app.callbacks.base import RunCallback
from ssfl_app.comm.exchange import Closes, ExchangeReport, names
from ssfl_app.comm.messenger import Check, ClientMessenger, Messenger, Reply
from ssfl_app.comm.payload import Payload, shared_buffers
from ssfl_app.core.clock import Clock
from ssfl_app.core.closing import AT_WORK
from ssfl_app.core.options import Settings
from ssfl_app.privacy.ledger import Ledger
from ssfl_app.sparsity.codec import Dense
from ssfl_app.sparsity.layout import Layout, State, state_digest
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Allowed, Arrays


class Query(Protocol):
    """Asks clients a question; what it costs is counted as discovery."""

    def __call__(
        self,
        question: str,
        clients: Iterable[int],
        check: Check,
        take: Callable[[Reply], None],
        payload: Payload | Callable[[int], Payload] | None = None,
        allowed: Allowed | None = None,
    ) -> None:
        """Hand each good reply to `take` when it comes.

        `payload` may be one for each client; `allowed` are the arrays of answers, if not those of the strategy.
        Without a payload the question is about the weights of this moment: it states their digest as the entry
        "weights", and a client that makes others from the seed asks for them. A payload may state it as well.
        """


Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]
Record = dict[str, Any]


S = TypeVar("S")
M = TypeVar("M", bound=Messenger)


class RoundLoop(Generic[S, M]):
    """The parts that every round has; a subclass puts them in order and writes the records.

    `configs` are those of training and evaluation messages; `evaluate_fn` is Flower's central evaluation.
    """

    def __init__(
        self,
        strategy: S,
        messenger: M,
        grid: Grid,
        configs: tuple[ConfigRecord, ConfigRecord],
        evaluate_fn: Evaluate | None,
    ) -> None:
        self._strategy, self._messenger, self._grid = strategy, messenger, grid
        self._flower = cast(Strategy, strategy)  # as Flower knows it; no protocol can be derived from this class
        self._configs, self._evaluate_fn = configs, evaluate_fn
        self._result = Result()

    def _given(self, method: str) -> ArrayRecord:
        """Return what a method is given as the model. Default: nothing, the strategy has its own."""
        return ArrayRecord()

    def _closes(self, asked: int) -> Closes | None:
        """Return when a round of training closes; None: with its last reply."""
        return None

    def _heard(self, method: str, replies: Iterator[Message]) -> Iterable[Message]:
        """Return the replies as a method is given them. Default: one at a time."""
        return replies

    def _training(self, round_: int, reply_bytes: int) -> tuple[ArrayRecord | None, MetricRecord | None, Record]:
        """Have clients train; return arrays, metrics, and how many messages and bytes that took."""
        given = self._given("configure_train")
        messages = list(self._flower.configure_train(round_, given, self._configs[0], self._grid))
        replies = self._messenger.exchange(self._grid, messages, reply_bytes, self._closes(len(messages)))
        arrays, metrics = self._flower.aggregate_train(round_, self._heard("aggregate_train", replies))
        if metrics is not None:
            self._result.train_metrics_clientapp[round_] = metrics
        report = self._messenger.report
        counts = {
            "messages_train_down": report.sent,
            "messages_train_up": len(report.examples) + len(report.refused),
            "bytes_train_down": report.down,
            "bytes_train_up": report.up,
            "bytes_mask_down": report.mask_down,
        }
        return arrays, metrics, counts

    def _evaluation(self, round_: int) -> tuple[bool, MetricRecord | None]:
        """Have clients evaluate; return whether there was anything to send, and metrics."""
        given = self._given("configure_evaluate")
        messages = list(self._flower.configure_evaluate(round_, given, self._configs[1], self._grid))
        if not messages:
            return False, None
        replies = self._heard("aggregate_evaluate", self._messenger.exchange(self._grid, messages, 0))
        metrics = self._flower.aggregate_evaluate(round_, replies)
        if metrics is not None:
            self._result.evaluate_metrics_clientapp[round_] = metrics
        return True, metrics

    def _central(self, round_: int, model: Callable[[], ArrayRecord]) -> MetricRecord | None:
        """Return what the server's own evaluation finds, if there is one."""
        metrics = None if self._evaluate_fn is None else self._evaluate_fn(round_, model())
        if metrics is not None:
            self._result.evaluate_metrics_serverapp[round_] = metrics
        return metrics


class _Algorithm(Protocol):
    """What `ClientRoundLoop` uses of a strategy (`SparseStrategy` says what each part means)."""

    name: ClassVar[str]
    has_floor: ClassVar[bool]
    has_global_model: ClassVar[bool]
    layout: Layout
    settings: Settings
    state: State
    mask: Mask
    callback: RunCallback | None
    clock: Clock | None
    peer_bytes: int
    clipped: int
    swapped: dict[str, float]
    accuracy: dict[int, float]
    personal_accuracy: dict[int, float]
    update_norms: dict[int, float]

    @property
    def epsilon(self) -> float | None: ...
    @property
    def ledger(self) -> Ledger | None: ...
    def before_training(self, ask: Query) -> None: ...
    def before_round(self, round_: int, ask: Query) -> None: ...
    def cohort(self, round_: int) -> list[int]: ...
    def evaluated(self, round_: int) -> bool: ...
    def closes(self, asked: int) -> Closes | None: ...
    def model(self) -> State: ...
    def answers(self, round_: int, question: str | None = None) -> Allowed: ...
    def densities(self) -> tuple[float, float]: ...
    def expected_counts(self, round_: int) -> Record: ...


class ClientRoundLoop(RoundLoop[_Algorithm, ClientMessenger]):
    """Plays the rounds of a `SparseStrategy`."""

    _empty: tuple[str, ...] = ()  # layers without an alive weight
    _clipped = False  # whether it was said that values were clipped

    @property
    def _reply_bytes(self) -> int:
        """An upper bound of what a client sends back: a dense model, or a score for each of its weights."""
        return 4 * self._strategy.layout.size

    def _closes(self, asked: int) -> Closes | None:
        return self._strategy.closes(asked)

    def run(self, first: int, last: int) -> Result:
        """Play rounds `first` to `last`, or until a callback ends the run; 0 is setup."""
        sites = self._messenger.registry.wait_for_clients(self._grid)
        if self._strategy.callback is not None:
            self._strategy.callback.met(sites)
        if first == 0:
            began = time.monotonic()
            found = self._discover(0, "", self._strategy.before_training)
            record = {"round": 0, "strategy": self._strategy.name} | found | self._empty_layers()
            self._tell(record | {"seconds": time.monotonic() - began})
        for round_ in range(max(1, first), last + 1):
            began = time.monotonic()
            back = self._messenger.readmit(self._grid)
            self._strategy.peer_bytes, before = 0, self._strategy.mask
            found = self._discover(round_, "setup_", functools.partial(self._strategy.before_round, round_))
            self._empty_layers()
            record = _sum(found, self._train(round_), self._empty_layers(), self._evaluate(round_)) | back
            record["bytes_peer"] = self._strategy.peer_bytes
            record["density"], record["density_all"] = self._strategy.densities()
            if found:  # the strategy asked: how far is its mask from the one before?
                record["mask_distance"] = before.jaccard_distance(self._strategy.mask)
            if self._strategy.swapped:
                record["swapped"], self._strategy.swapped = self._strategy.swapped, {}
            if self._tell(record | {"seconds": time.monotonic() - began}):
                break
        self._result.arrays = ArrayRecord(dict(self._strategy.model()))
        return self._result

    def _tell(self, record: Record) -> str | None:
        callback, clipped = self._strategy.callback, self._strategy.clipped
        if clipped:
            record["clipped"], self._strategy.clipped = clipped, 0
            if callback is not None and not self._clipped:
                callback.warn(
                    f"clients clipped {clipped} values to wire.range, {self._strategy.settings.wire.range:g}"
                )
            self._clipped = True
        return None if callback is None else callback.round(record, self._strategy)

    def _empty_layers(self) -> Record:
        """Return what a record says of layers without an alive weight; warn when there are others than before."""
        strategy, before = self._strategy, self._empty
        self._empty = tuple(name for name, alive, _ in strategy.mask.layers() if not alive)
        if self._empty and self._empty != before and strategy.callback is not None:
            cure = "set mask.min-per-layer to 1 or more" if strategy.has_floor else "choose a higher mask.density"
            empty = ", ".join(self._empty[:5]) + (f" and {len(self._empty) - 5} more" if len(self._empty) > 5 else "")
            strategy.callback.warn(f"the mask leaves no weight alive in {empty}: {cure}")
        return {"empty_layers": list(self._empty)} if self._empty else {}

    def _discover(self, round_: int, prefix: str, hook: Callable[[Query], None]) -> Record:
        """Let the strategy ask what it must know; return what that cost and who failed."""
        strategy, reports = self._strategy, list[ExchangeReport]()

        def ask(
            question: str,
            clients: Iterable[int],
            check: Check,
            take: Callable[[Reply], None],
            payload: Payload | Callable[[int], Payload] | None = None,
            allowed: Allowed | None = None,
        ) -> None:
            if payload is None:
                payload = Payload(metadata={"weights": state_digest(strategy.layout, strategy.state)})
            busy = dict.fromkeys(self._messenger.still_at_work(), AT_WORK)
            asked = [client for client in clients if client not in busy]
            outgoing = [(client, payload(client) if callable(payload) else payload, None) for client in asked]
            stated = any("weights" in sent.metadata for _, sent, _ in outgoing)
            weights = {"weights": functools.cache(self._weights)} if stated else {}
            messages = self._messenger.build_messages(f"query.{question}", round_, outgoing, {}, weights)
            replies = self._messenger.exchange(self._grid, messages, self._reply_bytes)
            report = self._messenger.report
            report.lost, report.asked = dict(busy), report.asked + len(busy)
            reports.append(report)
            share = strategy.settings.failures.min_ok_fraction
            what = f"the question {question!r}"
            allowed = strategy.answers(round_, question) if allowed is None else allowed
            self._messenger.receive(replies, allowed, check, take, share, what)

        hook(ask)
        if prefix and not reports:
            return {}
        hidden = strategy.ledger is not None
        return {
            f"{prefix}asked": [] if hidden else sorted({c for o in reports for c in [*o.ok, *o.lost, *o.refused]}),
            **{prefix + name: value for name, value in names(*([] if hidden else reports)).items()},
            "bytes_discovery_down": sum(o.down for o in reports),
            "bytes_discovery_up": sum(o.up for o in reports),
            "image_passes": 0 if hidden else sum(o.train_examples for o in reports),
            "validation_passes": 0 if hidden else sum(o.eval_examples for o in reports),
            **self._simulated(*reports),
        }

    def _simulated(self, *reports: ExchangeReport) -> Record:
        """Return how long exchanges took by the simulated clock, if there is one."""
        clock = self._strategy.clock
        return {} if clock is None else {"simulated_seconds": math.fsum(map(clock.seconds, reports))}

    def _client_seconds(self, report: ExchangeReport) -> Record:
        """Return how long each client took by the simulated clock, if there is one."""
        clock = self._strategy.clock
        return (
            {} if clock is None else {"client_seconds": {str(c): s for c, s in clock.client_seconds(report).items()}}
        )

    def _weights(self) -> Arrays:
        layout = self._strategy.layout
        return shared_buffers(Dense().encode(layout, self._strategy.state, Mask.dense(layout)))

    def _train(self, round_: int) -> Record:
        strategy = self._strategy
        _, metrics, counts = self._training(round_, self._reply_bytes)
        assert metrics is not None
        report, norms = self._messenger.report, strategy.update_norms
        if strategy.ledger is not None:  # who took part is what the noise hides, and how many would tell of it
            counts = strategy.expected_counts(round_)
            bad = len(report.lost) + len(report.refused)
            told = {"round": round_, "cohort": [], **names(ExchangeReport()), "train_loss": None}
            told |= {"bad_replies": bad} if bad else {}
            return {**told, "epsilon": strategy.epsilon, **counts, "image_passes": 0, "validation_passes": 0}
        return {
            "round": round_,
            "cohort": strategy.cohort(round_),
            **names(report),
            "train_loss": metrics.get("loss"),
            **({} if strategy.epsilon is None else {"epsilon": strategy.epsilon}),
            **({"update_norms": {str(c): norms[c] for c in sorted(norms)}} if norms else {}),
            **counts,
            "image_passes": report.train_examples,
            "validation_passes": report.eval_examples,
            **self._simulated(report),
            **self._client_seconds(report),
        }

    def _evaluate(self, round_: int) -> Record:
        strategy = self._strategy
        means = ("local_accuracy_mean", "personal_accuracy_mean")
        record: Record = dict.fromkeys(("central_loss", "central_accuracy", *means)) | {"bytes_evaluate_down": 0}
        sent, clients = self._evaluation(round_)
        if not sent and not strategy.evaluated(round_):
            return record
        if clients is not None:
            for name, known in (("local", strategy.accuracy), ("personal", strategy.personal_accuracy)):
                if known:
                    record[f"{name}_accuracy_mean"] = math.fsum(known.values()) / len(known)
                    record[f"{name}_accuracy"] = {str(c): known[c] for c in sorted(known)}
        tested = strategy.has_global_model
        central = self._central(round_, lambda: ArrayRecord(dict(strategy.model()))) if tested else None
        if central is not None:
            record |= {f"central_{name}": central[name] for name in ("loss", "accuracy")}
        if not sent:
            return record
        report, failed = self._messenger.report, names(self._messenger.report)
        record |= {f"evaluate_{name}": failed[name] for name in ("lost", "refused", "notes") if name in failed}
        record |= {"bytes_evaluate_down": report.down, "bytes_mask_down": report.mask_down}
        return record | {"image_passes": report.train_examples}


def _sum(*records: Record) -> Record:
    # Entries of the parts of a round; what several parts count is added up.
    merged: Record = {name: value for record in records for name, value in record.items()}
    counts = ["bytes_mask_down", "image_passes", "validation_passes"]
    counts += ["simulated_seconds"] if "simulated_seconds" in merged else []
    return merged | {name: sum(record.get(name, 0) for record in records) for name in counts}
