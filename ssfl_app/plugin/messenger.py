"""The server's messages to nodes, and which answers are good ones.

The mask goes down once per node, with the sheet, in the first message that needs it; every message carries the
digest of both. A node that does not hold them (restarted, joined late, state cleared) answers "need mask" and gets
the message again with them, in the same round. An answer for another round or digest, or whose arrays or numbers
are not what they must be, is refused by node and reason; it never reaches the mean.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from logging import INFO
from typing import Any, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from ssfl_app.comm.exchange import ExchangeReport, MessageExchange
from ssfl_app.comm.payload import SERIAL_TYPE, Metadata, Payload, PayloadEncoder, decode_payload, shared_buffers
from ssfl_app.locks import RunFailed
from ssfl_app.plugin.checked_reply import MOST, CheckedReply, metrics_of, weight_of
from ssfl_app.plugin.legacy import only
from ssfl_app.plugin.mod import REPLY, SCORED_BY, TAKEN
from ssfl_app.plugin.state_spec import StateSpec, Untied
from ssfl_app.plugin.tensor_report import NOTHING, TensorReport
from ssfl_app.sparsity.layout import Vector
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import (
    Allowed,
    Arrays,
    PayloadError,
    allowed_values,
    check_values,
    read_values,
    write_values,
)
from ssfl_app.text import in_a_line, quoted

_NO_MOD = "this app has no sparse_mod; ClientApp(mods=[sparse_mod]) is the cure"
_MOST = 8
"""Nodes that a reason names."""
MOST_NAME = 100
"""Characters of the name of a metric or record."""

Kind = Literal["train", "evaluate", "saliency"]
ONCE = ("mask", "sheet", "fixed")
"""Arrays that go down once per node; their bytes are counted apart."""


class Messenger:
    """Writes messages to nodes, carries them, and opens the replies one at a time.

    Parameters
    ----------
    sheet : StateSpec
        Of the model.
    values : str
        Value type of training and evaluation messages, both ways.
    weight_key : str
        The metric that weighs a reply, "num-examples" by default in Flower.
    timeout : float
        Seconds an exchange may take; also the messages' time to live.
    most_examples : float
        Largest weight of a reply.

    Attributes
    ----------
    mask : Mask
        Under which training and evaluation messages are encoded; the dense one at first.
    outcome : ExchangeReport
        Of the exchange that is going on, or the last one.
    odd : dict of int to str
        Nodes whose values count there and whose metrics do not, and why.
    """

    def __init__(
        self, sheet: StateSpec, values: str, weight_key: str, timeout: float, most_examples: float = MOST
    ) -> None:
        self.sheet, self.mask, self.report = sheet, Mask.dense(sheet.layout), ExchangeReport()
        self._values, self._weight_key, self._timeout, self._most = values, weight_key, timeout, most_examples
        self.odd: dict[int, str] = {}
        self._encoder = PayloadEncoder()
        self._holds: dict[int, str] = {}  # node -> digest it answered under
        self._node_of: dict[str, int] = {}  # message id -> node
        self._kind: Kind = "train"
        self._letter = Payload()  # the same for all nodes of an exchange
        self._once: Arrays = {}
        self._config: dict[str, Any] = {}
        self._asked = 0
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
    ) -> list[Message]:
        """Return one message per node.

        Parameters
        ----------
        kind : {"train", "evaluate", "saliency"}
            The question "saliency" travels as a train message and is about the whole `model` in float32.
        model : array of float32, shape (layout.size,)
            Of which the carried coordinates travel.
        config : mapping
            The user's, under "server-round" and so on.
        facts : dict
            Beside the usual ones.
        """
        mask = Mask.dense(self.sheet.layout) if kind == "saliency" else self.mask
        values = "fp32" if kind == "saliency" else self._values
        digest = self.sheet.digest_under(mask)
        told: Metadata = {"ssfl": kind, "round": round_, "digest": digest, "values": values}
        self._kind, self._encoder, self._config = (
            kind,
            PayloadEncoder(),
            dict(config),
        )  # the user's own may change later
        self._model = model if kind == "saliency" else None
        self._letter = Payload(
            shared_buffers(write_values(model[mask.transmitted], values)),
            {**told, "weight-key": self._weight_key, **metadata},
        )
        bitmap = {} if mask.count == mask.alive.size else {"mask": mask.packed()}  # everybody knows the dense one
        self._once = shared_buffers({**bitmap, **self.sheet.written()})
        knows_it = {node for node in nodes if self._holds.get(node) == digest and kind != "saliency"}
        return [self._message(node, node not in knows_it) for node in nodes]

    def _message(self, node: int, bring: bool) -> Message:
        arrays = {**self._letter.arrays, **(self._once if bring else {})}
        record = self._encoder.record(Payload(arrays, self._letter.metadata))
        record["config"] = ConfigRecord(self._config)  # its own: in one process a client may change it
        kind = "evaluate" if self._kind == "evaluate" else "train"
        return Message(record, node, kind, ttl=self._timeout, group_id=str(self._letter.metadata["round"]))

    def exchange(self, grid: Grid, messages: Sequence[Message], reply_bytes: int) -> Iterator[Message]:
        """Send messages that `write` made; return the replies, of about this size, as they come."""
        exchange = MessageExchange(grid, self._timeout, reply_bytes)
        self.report, self.odd, self._decoded, self._asked = exchange.report, {}, {}, len(messages)
        self._push(exchange, {message.metadata.dst_node_id: message for message in messages})
        return self._replies(exchange)

    def _replies(self, exchange: MessageExchange) -> Iterator[Message]:
        again: set[int] = set()
        for node, reply in exchange.replies():
            self.report.up += sum(_sizes(reply).values())
            if _needs_mask(reply) and node not in again:
                again.add(node)
                self._push(exchange, {node: self._message(node, bring=True)})
                continue
            self._node_of[reply.metadata.reply_to_message_id] = node
            yield reply
            del reply
        for node, reason in self.report.refused.items():
            self.report.refused[node] = _in_our_words(reason)

    def _push(self, exchange: MessageExchange, messages: dict[int, Message]) -> None:
        for message in messages.values():
            sizes = _sizes(message)
            self.report.mask_down += sum(sizes.pop(name, 0) for name in ONCE)
            self.report.down += sum(sizes.values())
        exchange.send(messages)

    # ---- in ----------------------------------------------------------------------------------

    def accepted_replies(self, replies: Iterable[Message]) -> Iterator[CheckedReply]:
        """Yield the good replies; refuse the others by node and reason, errors that Flower reports among them."""
        for message in replies:
            if (known := self._decoded.get(message.metadata.reply_to_message_id)) is not None:
                yield from self._read_again(known, message)
                continue
            node = self._node_of.pop(message.metadata.reply_to_message_id)
            try:
                answer = self._read(node, message)
            except PayloadError as error:
                self.report.refused[node] = str(error)
                continue
            self.report.ok.append(node)
            if self._kind != "saliency":
                self._holds[node] = str(answer.metadata["digest"])
            yield answer
            del message, answer

    def decoded(self, replies: Iterable[Message], by: str) -> list[Message]:
        """Return the good replies as Flower's strategies know them, by node id, for an `aggregate_...` of the user's.

        Each holds the records that its function returned, and in training the whole model with dead weights 0. `open`
        reads what has become of them, and names `by` as who changed them.
        """
        self._changed_by = by
        answers = sorted(self.accepted_replies(replies), key=lambda answer: answer.node)
        for answer in answers:
            content = RecordDict(dict(answer.records))
            if self._kind == "train":
                content[self.sheet.keys[0]] = self.sheet.dense(self.sheet.spread(answer.values, self.mask))
            assert answer.message is not None
            answer.message.content = content
            self._decoded[answer.message.metadata.reply_to_message_id] = answer.numbers()
        return [answer.message for answer in answers if answer.message is not None]

    def _read_again(self, known: CheckedReply, message: Message) -> Iterator[CheckedReply]:
        # What a node sent was checked: names of one tensor that differ now are the subclass's doing.
        content, values = message.content, known.values
        records = RecordDict({name: own for name, own in content.items() if not isinstance(own, ArrayRecord)})
        try:
            name, metrics = metrics_of(records)
            weight = weight_of(metrics.get(self._weight_key), self._most)
            if self._kind == "train":
                values = self.sheet.flatten(only(content, ArrayRecord))[self.mask.transmitted]
                check_values(values)
        except Untied as error:
            one, other = error.names
            raise RunFailed(
                f"{self._changed_by} gave {one} and {other} other values; they are two names of one tensor: change "
                "both"
            ) from error
        except ValueError as error:
            self.refuse({known.node: str(error)})
            return
        yield CheckedReply(known.node, values, weight, records, name, known.metadata, message)

    def _read(self, node: int, message: Message) -> CheckedReply:
        if "facts" not in message.content:
            raise PayloadError(f"the reply has no 'facts': {_NO_MOD}")
        payload = decode_payload(message.content, self._allowed())
        metadata, sent = payload.metadata, self._letter.metadata
        if metadata.get("need"):
            raise PayloadError(f"asks for {quoted(metadata['need'])} again")
        for name in ("round", "digest"):
            if metadata.get(name) != sent[name]:
                raise PayloadError(f"{name} is {quoted(metadata.get(name))}; it must be {sent[name]!r}")
        records, name = RecordDict(), "metrics"
        for key, record in message.content.items():
            if key not in TAKEN and not isinstance(record, ArrayRecord):
                records[key.removeprefix(REPLY)] = record
        _check_names(records)
        if self._kind == "saliency":
            if metadata.get("scored-by") not in SCORED_BY:
                raise PayloadError(f"scored-by is {quoted(metadata.get('scored-by'))}; it is one of {SCORED_BY}")
            weight = metadata.get("samples") if sent["weighting"] == "samples" else 1
        else:
            name, metrics = metrics_of(records)
            if self._weight_key not in metrics:
                raise PayloadError(f"no metric {self._weight_key!r} among {sorted(metrics)}; it weighs the reply")
            weight = metrics[self._weight_key]
        seen = NOTHING if self._model is None else TensorReport.read(payload.arrays, self.sheet, self._model)
        return CheckedReply(
            node, self._vector(payload), weight_of(weight, self._most), records, name, metadata, message, seen
        )

    def _allowed(self) -> Allowed:
        """Return the arrays that an answer may have."""
        if self._kind == "evaluate":
            return {}
        seen = TensorReport.allowed(self.sheet) if self._kind == "saliency" else {}
        return {**allowed_values(str(self._letter.metadata["values"]), self._carried()), **seen}

    def _carried(self) -> int:
        mask = self.mask
        return mask.alive.size if self._kind == "saliency" else int(np.count_nonzero(mask.transmitted))

    def _vector(self, payload: Payload) -> Vector:
        if self._kind == "evaluate":
            return np.zeros(0, dtype=np.float32)
        values = read_values(payload.arrays, str(self._letter.metadata["values"]), self._carried())
        check_values(values)
        return values

    def refuse(self, odd: Mapping[int, str]) -> None:
        """Take back that these replies are good ones: beside the others they are none."""
        for node, reason in odd.items():
            self.report.ok.remove(node)
            self.report.refused[node] = in_a_line(reason)

    def names(self) -> dict[str, Any]:
        """Return who answered well, who was lost and who was refused, and why, as `SSFL.history` has it."""
        report = self.report
        bad = {"lost": report.lost, "refused": report.refused} | ({"odd_metrics": self.odd} if self.odd else {})
        return {"ok": sorted(report.ok), **{k: {str(n): v[n] for n in sorted(v)} for k, v in bad.items()}}

    def log_failures(self, what: str) -> None:
        """Log how many answers came, and each failure by node and reason."""
        bad = {**self.report.lost, **self.report.refused}
        log(INFO, "%s: Received %s results and %s failures", what, len(self.report.ok), len(bad))
        for node, reason in sorted({**bad, **self.odd}.items()):
            log(INFO, "\t> node %s: %s", node, reason)

    def enough(self, share: float) -> bool:
        """Return whether at least `share` of the nodes that were asked answered well."""
        return len(self.report.ok) >= share * self._asked

    def need(self, share: float, what: str) -> None:
        """Raise RunFailed unless at least `share` of the nodes that were asked answered well."""
        if self.enough(share):
            return
        bad = {**self.report.lost, **self.report.refused}
        raise RunFailed(
            f"{what}: {len(self.report.ok)} of {self._asked} nodes answered well; min_ok_fraction is {share} "
            f"({_once(bad)})"
        )


def _once(reasons: Mapping[int, str]) -> str:
    """Return each reason once, with the nodes that it is of."""
    nodes: dict[str, list[str]] = {}
    for node, why in sorted(reasons.items()):
        nodes.setdefault(why, []).append(str(node))
    return ", ".join(f"{_nodes(of)}: {why}" for why, of in nodes.items())


def _nodes(names: list[str]) -> str:
    if len(names) == 1:
        return f"node {names[0]}"
    return f"{len(names)} nodes ({', '.join(names[:_MOST])}{', ...' if len(names) > _MOST else ''})"


def _in_our_words(reason: str) -> str:
    """Return a reason, behind its cause if an app without the mod met our messages."""
    if SERIAL_TYPE in reason and reason.startswith("raised: "):
        return f"{_NO_MOD} ({reason})"
    if "fitins.parameters" in reason or "evaluateins.parameters" in reason:
        return f"this app is of the old style and has no sparse_numpy_mod ({reason})"
    return reason


def _sizes(message: Message) -> dict[str, int]:
    # Counted on the encoded payload itself. By key: `.array_records` would build a reference cycle.
    arrays: Any = message.content.get("arrays")
    return {name: len(array.data) for name, array in arrays.items()} if isinstance(arrays, ArrayRecord) else {}


def _check_names(records: RecordDict) -> None:
    """Raise PayloadError unless the names that a user's function chose can stand in a log and in `SSFL.history`."""
    names = [*records, *(key for record in records.values() for key in record)]
    odd = next((name for name in names if len(name) > MOST_NAME or not name.isprintable()), None)
    if odd is not None:
        raise PayloadError(f"a record or metric is called {quoted(odd)}; it is printable, of at most {MOST_NAME}")


def _needs_mask(message: Message) -> bool:
    metadata = message.content.get("facts")
    return isinstance(metadata, ConfigRecord) and metadata.get("need") == "mask"
