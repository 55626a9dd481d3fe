"""Old-style clients: Message API <-> the FitIns, FitRes, EvaluateIns, EvaluateRes that a NumPyClient speaks.

Flower serves ``ClientApp(client_fn=...)`` only if records have the names of those days, "fitins.parameters" and so
on, and fails with a KeyError under every Message-API strategy. Arrays keep their bytes both ways: a NumPy array is
the same ``.npy`` in either form, so nothing is copied or decoded here.
"""

import copy
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable

_KINDS = {"train": "fit", "evaluate": "evaluate"}


def as_message_api(call_next: ClientAppCallable, weight_key: str) -> ClientAppCallable:
    """Return a callable that takes Message-API messages and has `call_next`, an old-style client, work on them.

    It is what a ``ClientApp(client_fn=...)`` gives to a mod. Under `weight_key` the number of examples of FitRes and
    EvaluateRes is told.
    """

    def speak(message: Message, context: Context) -> Message:
        kind = _KINDS.get(message.metadata.message_type)
        if kind is None or f"{kind}ins.parameters" in message.content:
            return call_next(message, context)
        arrays, config = only(message.content, ArrayRecord), only(message.content, ConfigRecord)
        asked = copy.copy(message)
        asked.content = RecordDict({f"{kind}ins.parameters": arrays, f"{kind}ins.config": config})
        reply = call_next(asked, context)
        if not reply.has_error():
            reply.content = _modern(reply.content, kind, list(arrays), weight_key)
        return reply

    return speak


def _modern(content: RecordDict, kind: str, names: list[str], weight_key: str) -> RecordDict:
    status: Any = content[f"{kind}res.status"]
    if status["code"]:
        raise RuntimeError(f"the client answered with status {status['code']}: {status['message']}")
    told: Any = content[f"{kind}res.metrics"]
    examples: Any = content[f"{kind}res.num_examples"]
    # A MetricRecord holds numbers only; what else the client tells travels beside it.
    numbers = {key: value for key, value in told.items() if isinstance(value, int | float)}
    metrics: dict[str, Any] = {key: int(v) if isinstance(v, bool) else v for key, v in numbers.items()}
    if kind == "evaluate":
        loss: Any = content["evaluateres.loss"]
        metrics = {"loss": float(loss["loss"]), **metrics}
    metrics.setdefault(weight_key, examples["num_examples"])
    records = RecordDict({"metrics": MetricRecord(metrics)})
    if rest := {key: value for key, value in told.items() if key not in numbers}:
        records["notes"] = ConfigRecord(rest)
    if kind == "fit":
        arrays: Any = content["fitres.parameters"]
        if len(arrays) != len(names):
            raise ValueError(f"fit returned {len(arrays)} arrays; it was given {len(names)}")
        records["arrays"] = ArrayRecord(dict(zip(names, arrays.values(), strict=True)))
    return records


def only(content: RecordDict, kind: type[Any]) -> Any:
    """Return the one record of this kind; ValueError if there is none, or more than one."""
    found = [record for record in content.values() if isinstance(record, kind)]
    if len(found) != 1:
        raise ValueError(f"a message holds {len(found)} records of type {kind.__name__}; it must hold exactly 1")
    return found[0]
