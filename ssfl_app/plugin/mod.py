"""`sparse_mod`: the client's half. Masked values <-> the dense arrays that an unmodified train function knows.

On the wire an SSFL message holds "arrays" (one flat vector of values; with the first message of a mask also the
bitmap and the sheet), "facts" (a few scalars, see `FACTS`) and "config" (the user's own). The mod gives the user's
function a message with a complete state dict under the names it expects, and packs the alive values of the reply.
Records of the reply that hold no arrays pass through under their names, so that mods in front of this one find the
metrics; "reply.<name>" is what those are called whose names are taken.

Everything arrives as ``train`` or ``evaluate``, the question for saliency too: Flower calls mods only for message
types that the app has a function for, app-wide ones included, and the question needs the train function anyway.
Messages of any other strategy go by untouched.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from ssfl_app.plugin.gradients import working_under
from ssfl_app.plugin.legacy import only, spoken_to
from ssfl_app.plugin.question import GradientProbe, difference_scores, own_scores
from ssfl_app.plugin.seen import changed_together, check_untied, told_together
from ssfl_app.plugin.sheet import Sheet
from ssfl_app.sparsity.codec import SharedMask
from ssfl_app.sparsity.layout import Vector
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import read_values, write_values
from ssfl_app.wire import Facts, Packer, Parcel, read_record

FACTS = ("ssfl", "round", "digest", "values", "weight-key", "batches", "weighting")
"""Of a message down: its kind ("train", "evaluate", "saliency"), the round, what both ends share, the value type,
which metric counts examples; and, of a question, how many minibatches and how a client's scores are weighed."""

STATE = "ssfl-plugin"
"""Record of Flower's `Context.state` that holds a node's mask (packed), sheet and their digest."""

SCORED_BY = ("own", "scores", "gradient", "difference")
"""How a node may say that it found its scores; "own" are gradients that a function of the user tells."""

TAKEN, REPLY = ("arrays", "facts"), "reply."
"""Records of ours on their way up, and the prefix of a user's own that would be called like them."""

QUESTION = "ssfl-question"
"""Key of the config that the train function gets: True while weights are scored, and missing in every round."""

Told = Mapping[str, Any] | tuple[Mapping[str, Any], float]
Saliency = Callable[[Message, Context], Told]


class SparseMod:
    """A Flower mod that puts an unmodified ClientApp under `SSFL`.

    Parameters
    ----------
    saliency : callable, optional
        ``saliency(message, context)`` returns arrays or tensors by name of the prunable tensors, or a pair of that
        and the number of examples. ``message`` holds the initial weights as the train function would get them. Use
        it for gradients of class-balanced minibatches, which the paper asks for, or for other scores. Default: the
        gradients that the train function itself hands to its torch optimizer, on the first minibatches of its
        loader.
    returns : {"gradients", "scores"}
        What `saliency` tells: gradients g, scored as |g * w|, or scores, larger = keep.
    numpy_client : bool
        Serve an old-style ``ClientApp(client_fn=...)``.

    Raises
    ------
    ValueError
        `returns` is none of the two.
    """

    def __init__(
        self,
        saliency: Saliency | None = None,
        *,
        returns: Literal["gradients", "scores"] = "gradients",
        numpy_client: bool = False,
    ) -> None:
        if returns not in ("gradients", "scores"):
            raise ValueError(f"returns is {returns!r}; it is gradients or scores")
        self._saliency, self._gradients, self._numpy = saliency, returns == "gradients", numpy_client

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Work on one message; errors of the user's function, and replies that do not fit, are raised."""
        facts: Any = message.content.get("facts")
        ours = isinstance(facts, ConfigRecord) and "ssfl" in facts
        weight_key = str(facts["weight-key"]) if ours else "num-examples"
        inner = spoken_to(call_next, weight_key) if self._numpy else call_next
        if not ours:
            return inner(message, context)
        parcel = read_record(message.content)
        known = _known(parcel, context)
        if known is None:
            told = {name: parcel.facts[name] for name in ("round", "digest")}
            return _answer(message, Parcel(facts={**told, "need": "mask"}))
        if parcel.facts["ssfl"] == "saliency":
            return self._score(message, context, inner, parcel, *known)
        return _work(message, context, inner, parcel, *known)

    def _score(
        self, message: Message, context: Context, inner: ClientAppCallable, parcel: Parcel, sheet: Sheet, mask: Mask
    ) -> Message:
        """Answer with a score for each prunable weight."""
        weights, facts = _values(parcel, sheet, mask), parcel.facts
        dense = _dense(message, sheet, weights)
        counted = facts["weighting"] == "samples"
        # The function runs for its gradients only: whatever it notes in its state has not happened.
        context = copy.copy(context)
        context.state = copy.deepcopy(context.state)
        samples: float | None = None
        if self._saliency is not None:
            told = self._saliency(dense, context)
            told, samples = told if isinstance(told, tuple) else (told, None)
            seen = told_together(sheet.layout, weights, told)
            scores = own_scores(sheet.layout, weights, told, self._gradients, seen.ties)
            by = "own" if self._gradients else "scores"
        else:
            reply: Message | None = None
            with working_under(None), GradientProbe(sheet, weights, int(facts["batches"]), not counted) as watch:
                reply = inner(dense, context)
            if reply is not None and reply.has_error():
                return reply
            if reply is not None and counted:
                metrics, key = only(reply.content, MetricRecord), facts["weight-key"]
                if key not in metrics:
                    raise ValueError(f"no metric {key!r} among {sorted(metrics)}; it weighs this client's scores")
                samples = metrics[key]
            if watch.stepped or reply is None:
                scores, seen, by = watch.scores(), watch.seen, "gradient"
            else:
                trained = sheet.flatten(only(reply.content, ArrayRecord))
                scores, by = difference_scores(sheet.layout, weights, trained), "difference"
                seen = changed_together(sheet.layout, weights, trained)
        answer: Facts = {"round": facts["round"], "digest": facts["digest"], "scored-by": by}
        if counted:
            if samples is None:
                raise ValueError("the mean of scores is weighted by samples: return (arrays, number of examples)")
            answer["samples"] = samples
        return _answer(message, Parcel({**write_values(scores, "fp32"), **seen.written(sheet)}, answer))


def _work(
    message: Message, context: Context, inner: ClientAppCallable, parcel: Parcel, sheet: Sheet, mask: Mask
) -> Message:
    """Have the user's function train or evaluate, and pack what it returns."""
    facts = parcel.facts
    given = _values(parcel, sheet, mask)
    with working_under(mask):
        reply = inner(_dense(message, sheet, given), context)
    if reply.has_error():
        return reply
    arrays = {}
    if facts["ssfl"] == "train":
        flat = sheet.flatten(only(reply.content, ArrayRecord))
        check_untied(sheet.layout, given, flat)
        arrays = write_values(flat[mask.transmitted], str(facts["values"]))
    record = Packer().record(Parcel(arrays, {"round": facts["round"], "digest": facts["digest"]}))
    for name, own in reply.content.items():
        if not isinstance(own, ArrayRecord):
            record[REPLY + name if name in TAKEN or name.startswith(REPLY) else name] = own
    reply.content = record
    return reply


def _known(parcel: Parcel, context: Context) -> tuple[Sheet, Mask] | None:
    """Return sheet and mask that the message needs, from itself or from the node's memory; None if it lost them."""
    digest, held = parcel.facts["digest"], context.state.get(STATE)
    if "sheet" not in parcel.arrays:
        if not isinstance(held, ConfigRecord) or held["digest"] != digest:
            return None
        told: dict[str, Any] = {name: held[name] for name in ("sheet", "fixed", "mask") if held[name]}
        arrays: Mapping[str, Any] = {name: np.frombuffer(value, np.uint8) for name, value in told.items()}
    else:
        arrays = parcel.arrays
    sheet = Sheet.read(arrays)
    mask = Mask.unpack(sheet.layout, arrays["mask"]) if "mask" in arrays else Mask.dense(sheet.layout)
    if arrays is parcel.arrays:
        if sheet.digest_under(mask) != digest:
            raise ValueError(f"sheet and mask have digest {sheet.digest_under(mask)}; the message says {digest!r}")
        if parcel.facts["ssfl"] != "saliency":
            kept = {name: arrays[name].tobytes() if name in arrays else b"" for name in ("sheet", "fixed", "mask")}
            context.state[STATE] = ConfigRecord({"digest": digest, **kept})
    return sheet, mask


def _values(parcel: Parcel, sheet: Sheet, mask: Mask) -> Vector:
    """Return the model of a message, float32, shape (layout.size,), dead weights at 0."""
    size = int(np.count_nonzero(SharedMask().positions(sheet.layout, mask)))
    return sheet.spread(read_values(parcel.arrays, str(parcel.facts["values"]), size), mask)


def _dense(message: Message, sheet: Sheet, flat: Vector) -> Message:
    """Return the message that the user's function expects. A copy: other mods may hold the one that came."""
    arrays_key, config_key = sheet.keys
    config: Any = message.content.get("config")
    dense = copy.copy(message)
    dense.content = RecordDict({arrays_key: sheet.dense(flat), config_key: ConfigRecord(dict(config or {}))})
    return dense


def _answer(message: Message, parcel: Parcel) -> Message:
    return Message(Packer().record(parcel), reply_to=message)


sparse_mod = SparseMod()
"""The mod for ``@app.train(mods=[sparse_mod])`` and ``@app.evaluate(mods=[sparse_mod])``, or
``ClientApp(mods=[...])``."""

sparse_numpy_mod = SparseMod(numpy_client=True)
"""The mod for an old-style ``ClientApp(client_fn=client_fn, mods=[sparse_numpy_mod])``."""
