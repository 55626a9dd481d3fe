"""The server's messages to nodes, and which replies are good ones.

The mask goes down once per node, with the spec, in the first message that needs it (`Messenger` says how). A reply
whose arrays or numbers are not what they must be is refused by node and reason; it never reaches the mean.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from logging import INFO
from typing import Any, Literal

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from ssfl_app.comm.exchange import MOST_NAMED, Closes, ExchangeReport
from ssfl_app.comm.messenger import Further, Messenger, PendingMessage, Reply
from ssfl_app.comm.payload import SERIAL_TYPE, Metadata, Payload, shared_buffers
from ssfl_app.locks import RunFailed
from ssfl_app.plugin.checked_reply import CheckedReply, metrics_of, weight_of
from ssfl_app.plugin.legacy import only
from ssfl_app.plugin.mod import REPLY, SAW, SCORED_BY, TAKEN
from ssfl_app.plugin.node_sum import LEAST_NODES, NodeSum, SumOptions
from ssfl_app.plugin.secure import KEY
from ssfl_app.plugin.state_spec import StateSpec, Untied
from ssfl_app.plugin.tensor_report import NOTHING, TensorReport
from ssfl_app.privacy.keys import KEY_BYTES, check_public
from ssfl_app.sparsity.codec import Codec
from ssfl_app.sparsity.layout import Vector
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import (
    Allowed,
    PayloadError,
    allowed_values,
    check_values,
    read_array,
    read_values,
    write_values,
)
from ssfl_app.text import in_a_line, quoted

_NO_MOD = "this app has no sparse_mod; ClientApp(mods=[sparse_mod]) is the cure"
MOST_NAME = 100
"""Characters of the name of a metric or record."""

Kind = Literal["train", "evaluate", "saliency", "layer_densities"]
QUESTIONS = ("saliency", "layer_densities")


class NodeMessenger(Messenger):
    """Writes the same message to many nodes.

    `values` is the value type of training and evaluation messages, both ways; they are encoded under `mask`, the
    dense one at first, and `frozen` the values of its dead weights if they are not 0. `weight_key` is the metric that
    weighs a reply, with at most `most_examples`. `up` is the codec of replies in training if they carry other
    coordinates; `taken` the last round that one counted in, by node.
    `keys` are the public keys of nodes, by which they mask.
    """

    def __init__(self, spec: StateSpec, values: str, weight_key: str, timeout: float, most_examples: float) -> None:
        super().__init__(timeout)
        self.spec, self.mask = spec, Mask.dense(spec.layout)
        self.whole = spec.layout  # before channels are removed
        self.frozen: Vector | None = None
        self._values, self._weight_key, self._most = values, weight_key, most_examples
        self.up: Codec | None = None
        self.taken: dict[int, int] = {}
        self.keys: dict[int, bytes] = {}
        self._asked_for_keys = ExchangeReport()  # before the exchange that comes
        self._sum: NodeSum | None = None  # that the answers go into
        self._kind: Kind = "train"
        self._sent: Metadata = {}  # the same to all nodes of an exchange
        self._decoded: dict[str, CheckedReply] = {}  # message id -> what was read of a reply that `decoded` rewrote
        self._changed_by = ""  # the user's method that got what was read
        self._model: Vector | None = None  # that a question is about

    # ---- out ---------------------------------------------------------------------------------

    def build_messages(
        self,
        kind: Kind,
        round_: int,
        nodes: Iterable[int],
        model: Vector,
        config: Mapping[str, Any],
        metadata: Metadata,
        own: Mapping[int, Metadata] | None = None,
        summation: NodeSum | None = None,
    ) -> list[Message]:
        """Return one message per node, with the carried coordinates of `model`, float32, shape (layout.size,).

        A question travels as a train message in float32; "saliency" is about the whole model. `config` is the user's,
        under "server-round" and so on; `metadata` are those beside the usual ones, `own` what one node alone is told.
        The answers are handed to `take` of `receive` as summands if there is a `summation`.
        """
        mask = Mask.dense(self.spec.layout) if kind == "saliency" else self.mask
        values = "fp32" if kind in QUESTIONS else self._values
        frozen = None if mask is not self.mask else self.frozen
        digest = self.spec.digest_under(mask, frozen)
        told: Metadata = {"ssfl": kind, "round": round_, "digest": digest, "values": values}
        self._forget()
        self._kind, self._sum = kind, summation
        self._model = model if kind == "saliency" else None
        self._sent = {**told, "weight-key": self._weight_key, **metadata}
        carried = shared_buffers(write_values(model[mask.transmitted], values))
        bitmap = {} if mask.count == mask.alive.size else {"mask": mask.packed()}  # everybody knows the dense one
        kept = {} if frozen is None else {"frozen": frozen}
        once = shared_buffers({**bitmap, **kept, **self.spec.written()})
        verb, users = "evaluate" if kind == "evaluate" else "train", dict(config)  # the user's may change later
        for node in nodes:
            payload = Payload(carried, {**self._sent, **(own or {}).get(node, {})})
            payload = payload if summation is None else summation.outgoing(node, payload, users)
            self._pending[node] = PendingMessage(verb, payload, mask, {"mask": lambda: once}, users)
        knows_it = {node for node in self._pending if self._holds.get(node) == digest and kind != "saliency"}
        return [self._message(node, () if node in knows_it else ("mask",)) for node in self._pending]

    def spread(self, values: Vector) -> Vector:
        """Return the model, shape (layout.size,), whose carried coordinates are `values`."""
        return self.spec.spread(values, self.mask, self.frozen)

    def exchange(
        self, grid: Grid, messages: Sequence[Message], reply_bytes: int, closes: Closes | None = None
    ) -> Iterator[Message]:
        """Send messages that `build_messages` made; return the replies, of about this size, as they come."""
        self._decoded = {}
        # A user's subclass may address messages to other nodes, to which what was written says nothing of their own.
        known, some = self._pending, next(iter(self._pending.values()))
        self._pending = {node: known.get(node, some) for node in (each.metadata.dst_node_id for each in messages)}
        replies = super().exchange(grid, messages, reply_bytes, closes)
        before, self._asked_for_keys = self._asked_for_keys, ExchangeReport()
        self.report.asked += len(before.lost) + len(before.refused)
        self.report.lost |= before.lost
        self.report.refused |= before.refused
        self.report.down, self.report.up = self.report.down + before.down, self.report.up + before.up
        return replies

    # ---- keys, and the second exchange of secure aggregation -----------------------------------

    def summation(
        self,
        grid: Grid,
        nodes: Iterable[int],
        size: int,
        options: SumOptions,
        round_: int,
        what: str,
        uniform: bool = False,
    ) -> NodeSum:
        """Return the sum for answers of `size` values of these nodes, or under secure aggregation those with keys.

        With `uniform` each weighs 1.
        """
        nodes = self._keyed(grid, nodes, round_) if options.secure else nodes
        most = 1 if uniform else options.most_examples
        return NodeSum(self, nodes, size, options, most=most, round_=round_, what=what)

    def _keyed(self, grid: Grid, nodes: Iterable[int], round_: int) -> list[int]:
        """Return those of the nodes that told their public key, now or before; `report` will have the others.

        Whoever failed since then may have been set up anew, and is asked again.
        """
        asked = sorted(nodes)
        new = {node: Payload() for node in asked if node not in self.keys}

        def take(reply: Reply) -> None:
            self.keys[reply.client] = reply.arrays[KEY].tobytes()

        def check(node: int, payload: Payload) -> None:
            check_public(read_array(payload.arrays, KEY, np.uint8, KEY_BYTES).tobytes())

        if new:
            self._ask(grid, Further("keys", round_, new, {KEY: (np.uint8, KEY_BYTES)}, check, take))
            self._asked_for_keys = self.report
            for node, why in self.report.refused.items():
                self.report.refused[node] = f"told no public key; it needs the sparse_mod of this version ({why})"
            # Not the later one alone: chance would say who takes part.
            twins = {node: self._twins(node) for node in new if node in self.keys}
            for node, others in twins.items():
                if others:
                    named = ", ".join(map(str, others))
                    rule = (
                        "each node makes its own, or one of them lies: compare fingerprints before you remove a key"
                    )
                    self.report.refuse(node, f"has the public key of node {named}; {rule}")
                for other in set(others) - twins.keys():  # it told the key before; who lies is not known
                    self.keys.pop(other, None)
                    if other in asked:
                        self.report.refuse(other, f"has the public key of node {node}; {rule}")
            self._doubt()
        known = [node for node in asked if node in self.keys]
        if len(known) < LEAST_NODES:
            bad = {**self.report.lost, **self.report.refused} if new else {}
            why = "; ".join(f"node {node}: {bad[node]}" for node in sorted(bad)[:MOST_NAMED])
            few = f"{len(known)} of {len(asked)} nodes told a key; a masked sum is of {LEAST_NODES} at least"
            raise RunFailed(f"{few} ({why})" if why else few)
        return known

    def _twins(self, node: int) -> list[int]:
        return sorted(other for other, key in self.keys.items() if other != node and key == self.keys[node])

    def _ask(self, grid: Grid, further: Further) -> None:
        """Ask what the mod answers by itself: no function of the user's runs."""
        self._forget()
        told: Metadata = {"ssfl": further.question, "round": further.round_, "weight-key": self._weight_key}
        for node, payload in further.payloads.items():
            written = Payload(payload.arrays, {**payload.metadata, **told})
            self._pending[node] = PendingMessage("train", written, None, {})

        def read(node: int, message: Message) -> Reply:
            payload = self._opened(node, message, further.allowed)
            further.check(node, payload)
            self.report.accept(node, {})
            return Reply(payload.arrays, payload.metadata, client=node, samples=0)

        messages = [self._message(node, ()) for node in self._pending]
        for message in super().exchange(grid, messages, 0):
            self._receive(read, further.take, message)
        self._doubt()

    def _doubt(self) -> None:
        """Forget the keys of nodes that failed."""
        for node in {**self.report.lost, **self.report.refused}:
            self.keys.pop(node, None)

    # ---- in ----------------------------------------------------------------------------------

    def receive(self, replies: Iterable[Message], take: Callable[[CheckedReply], None]) -> None:
        """Hand each good reply to `take`, and let go of it before the next one is awaited.

        The others are refused by node and reason, errors that Flower reports among them, and those that `take`
        refuses by a PayloadError.
        """

        def judged(answer: CheckedReply) -> None:
            try:
                take(answer)
            except PayloadError as error:
                self.report.refuse(answer.node, str(error))

        for _ in map(functools.partial(self._take, judged), replies):
            pass
        for node, reason in self.report.refused.items():
            self.report.refused[node] = _in_our_words(reason)
        if self._sum is not None:
            self._doubt()

    def _take(self, take: Callable[[CheckedReply], None], message: Message) -> None:
        known = self._decoded.get(message.metadata.reply_to_message_id)
        if known is None:
            self._receive(self._read, take, message)
        elif (reply := self._read_again(known, message)) is not None:
            take(reply)

    def decoded(self, replies: Iterable[Message], by: str) -> list[Message]:
        """Return the good replies as Flower's strategies know them, by node id, for an `aggregate_...` of the user's.

        Each holds the records that its function returned, and in training the whole model with dead weights 0.
        `receive` reads what has become of them, and names `by` as who changed them.
        """
        self._changed_by = by
        answers = list[CheckedReply]()
        self.receive(replies, answers.append)
        answers.sort(key=lambda answer: answer.node)
        for answer in answers:
            content = RecordDict(dict(answer.records))
            if self._kind == "train":
                content[self.spec.keys[0]] = self.spec.dense(self.spread(answer.values))
            assert answer.message is not None
            answer.message.content = content
            self._decoded[answer.message.metadata.reply_to_message_id] = answer.numbers()
        return [answer.message for answer in answers if answer.message is not None]

    def _read_again(self, known: CheckedReply, message: Message) -> CheckedReply | None:
        # What a node sent was checked: names of one tensor that differ now are the subclass's doing.
        content, values = message.content, known.values
        records = RecordDict({name: own for name, own in content.items() if not isinstance(own, ArrayRecord)})
        try:
            name, metrics = metrics_of(records)
            weight = weight_of(metrics.get(self._weight_key), self._most)
            if self._kind == "train":
                values = self.spec.flatten(only(content, ArrayRecord))[self.mask.transmitted]
                check_values(values)
        except Untied as error:
            one, other = error.names
            raise RunFailed(
                f"{self._changed_by} gave {one} and {other} other values; they are two names of one tensor: change "
                "both"
            ) from error
        except ValueError as error:
            self.report.refuse(known.node, in_a_line(str(error)))
            return None
        return CheckedReply(known.node, values, weight, records, name, known.metadata, message, sent=known.sent)

    def _read(self, node: int, message: Message) -> CheckedReply:
        if "facts" not in message.content:
            raise PayloadError(f"the reply has no 'facts': {_NO_MOD}")
        payload = self._opened(node, message, self._allowed())
        metadata = payload.metadata
        records, name = RecordDict(), "metrics"
        for key, record in message.content.items():
            if key not in TAKEN and not isinstance(record, ArrayRecord):
                records[key.removeprefix(REPLY)] = record
        _check_names(records)
        if self._kind == "saliency" and metadata.get("scored-by") not in SCORED_BY:
            raise PayloadError(f"scored-by is {quoted(metadata.get('scored-by'))}; it is one of {SCORED_BY}")
        if self._sum is not None and self._kind == "saliency" and type(metadata.get(SAW)) is not bool:
            raise PayloadError(f"{SAW} is {quoted(metadata.get(SAW))}; it is true or false")
        if self._kind in QUESTIONS:
            weight = metadata.get("samples") if self._sent["weighting"] == "samples" and not self._sum else 1
        elif self._sum is not None and self._sum.secure:
            records, weight = RecordDict({name: MetricRecord()}), 1
        else:
            name, metrics = metrics_of(records)
            if self._weight_key not in metrics:
                raise PayloadError(f"no metric {self._weight_key!r} among {sorted(metrics)}; it weighs the reply")
            weight = metrics[self._weight_key]
        seen = NOTHING if self._model is None else TensorReport.read(payload.arrays, self.spec, self._model)
        if self._sum is not None:
            self._sum.check(node, payload)
        (values, sent), weight = self._vector(payload), weight_of(weight, self._most)
        if self._kind != "saliency":
            self._holds[node] = str(metadata["digest"])
        self.report.accept(node, {})
        summand = None if self._sum is None else payload
        return CheckedReply(node, values, weight, records, name, metadata, message, seen, sent, summand)

    def _allowed(self) -> Allowed:
        """Return the arrays that an answer may have."""
        if self._kind == "evaluate":
            return {}
        if self._sum is not None:
            seen = TensorReport.allowed(self.spec) if self._kind == "saliency" else {}
            return {**self._sum.allowed(), **seen}
        if self._kind == "train" and self.up is not None:
            return self.up.allowed(self.spec.layout)
        seen = TensorReport.allowed(self.spec) if self._kind == "saliency" else {}
        return {**allowed_values(str(self._sent["values"]), self._carried()), **seen}

    def _carried(self) -> int:
        if self._kind == "layer_densities":
            return len(self.spec.prunable)
        mask = self.mask
        return mask.alive.size if self._kind == "saliency" else int(np.count_nonzero(mask.transmitted))

    def _vector(self, payload: Payload) -> tuple[Vector, Mask | None]:
        if self._kind == "evaluate" or self._sum is not None:
            return np.zeros(0, dtype=np.float32), None
        sent: Mask | None = None
        if self._kind == "train" and self.up is not None:
            state, sent = self.up.decode(payload.arrays, self.spec.layout, self.mask)
            values = self.spec.layout.flatten(state)
        else:
            values = read_values(payload.arrays, str(self._sent["values"]), self._carried())
        check_values(values)
        return values, sent

    def log_failures(self, what: str) -> None:
        """Log how many answers came, and each failure by node and reason."""
        bad = {**self.report.lost, **self.report.refused}
        log(INFO, "%s: Received %s results and %s failures", what, len(self.report.ok), len(bad))
        for node, reason in sorted({**bad, **self.report.odd_metrics}.items()):
            log(INFO, "\t> node %s: %s", node, reason)


def _in_our_words(reason: str) -> str:
    """Return a reason, behind its cause if an app without the mod met our messages."""
    if not reason.startswith("raised: "):
        return reason
    if SERIAL_TYPE in reason:
        return f"{_NO_MOD} ({reason})"
    if "fitins.parameters" in reason or "evaluateins.parameters" in reason:
        return f"this app is of the old style and has no sparse_numpy_mod ({reason})"
    return reason


def _check_names(records: RecordDict) -> None:
    """Raise PayloadError unless the names that a user's function chose can stand in a log and in `SSFL.history`."""
    names = [*records, *(key for record in records.values() for key in record)]
    odd = next((name for name in names if len(name) > MOST_NAME or not name.isprintable()), None)
    if odd is not None:
        raise PayloadError(f"a record or metric is called {quoted(odd)}; it is printable, of at most {MOST_NAME}")
