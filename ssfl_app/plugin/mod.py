"""`sparse_mod`, the client side: Masked values <-> the dense arrays that an unmodified train function knows.

On the wire an SSFL message holds "arrays" (one flat vector of values; with the first message of a mask also the
bitmap and the spec), "config" (the user's own) and "facts": its kind "ssfl" (`Kind` of `messenger`), its
"round", the "digest" of what both ends share, the type of "values", the "weight-key" that counts examples, and what
`Discovery` asks for or `TopK` wants; what
messages of secure aggregation hold, `secure` reads. The mod gives the user's function a message with a complete state
dict under the names it expects, and packs the alive values of the reply. Records of the reply that hold no arrays
pass through under their names, so that mods in front of this one find the metrics; "reply.<name>" is what those are
called whose names are taken. Under secure aggregation those of training stay here.

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

from ssfl_app.comm.payload import ClientState, Metadata, Payload, PayloadEncoder, decode_payload
from ssfl_app.core.options import MaskOptions
from ssfl_app.core.summand import EXCHANGE, UNIT
from ssfl_app.plugin.gradient_probe import GradientProbe, difference_scores, own_scores, scales_of
from ssfl_app.plugin.gradients import under_mask
from ssfl_app.plugin.legacy import as_message_api, only
from ssfl_app.plugin.secure import KIND, READS, NodeSummands, public_key, whole_weight
from ssfl_app.plugin.state_spec import StateSpec
from ssfl_app.plugin.tensor_report import changed_together, check_untied, told_together
from ssfl_app.seeding import generator
from ssfl_app.sparsity.codec import MaskedValues
from ssfl_app.sparsity.layout import Layout, Vector
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Arrays, PayloadError, read_array, read_values, write_values

STATE = "ssfl-plugin"
"""Record of Flower's `Context.state` that holds a node's mask (packed), the spec, frozen weights and their digest."""

KEPT = {"sheet": np.uint8, "fixed": np.uint8, "mask": np.uint8, "frozen": np.float32}
"""What a node keeps under `STATE`, as bytes, and the types of these arrays."""

SCORED_BY = ("own", "scores", "gradient", "difference")
"""How a node may say that it found its scores; "own" are gradients that a function of the user tells."""

TAKEN, REPLY = ("arrays", "facts"), "reply."
"""Records of ours on their way up, and the prefix of a user's own that would be called like them."""

SAW = "saw"
"""Fact of an answer with scores that are only added: whether one of them is not 0."""

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
    secure_only : bool
        Answer with values and scores masked only (``SSFL(secure_aggregation=True)``): training messages of any other
        kind, those of other strategies too, are refused.

    Raises
    ------
    ValueError
        `returns` is none of the two.
    PayloadError
        By a call: `secure_only`, and the message asks for an answer in the clear.
    """

    def __init__(
        self,
        saliency: Saliency | None = None,
        *,
        returns: Literal["gradients", "scores"] = "gradients",
        numpy_client: bool = False,
        secure_only: bool = False,
    ) -> None:
        if returns not in ("gradients", "scores"):
            raise ValueError(f"returns is {returns!r}; it is gradients or scores")
        self._saliency, self._gradients, self._numpy = saliency, returns == "gradients", numpy_client
        self._secure_only = secure_only

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Work on one message; errors of the user's function, and replies that do not fit, are raised."""
        metadata: Any = message.content.get("facts")
        ours = isinstance(metadata, ConfigRecord) and "ssfl" in metadata
        weight_key = str(metadata["weight-key"]) if ours else "num-examples"
        inner = as_message_api(call_next, weight_key) if self._numpy else call_next
        if self._secure_only:
            check_masked(message)
        if not ours:
            return inner(message, context)
        payload = decode_payload(message.content)
        if payload.metadata["ssfl"] == "keys":
            return _answer(message, _in_round(payload, public_key(context)))
        if payload.metadata["ssfl"] == "unmask":
            return _answer(message, _in_round(payload, NodeSummands(payload, context, {}).unmask(payload)))
        known = _known(payload, context)
        if known is None:
            told = {name: payload.metadata[name] for name in ("round", "digest")}
            return _answer(message, Payload(metadata={**told, "need": "mask"}))
        if payload.metadata["ssfl"] == "saliency":
            return self._score(message, context, inner, payload, *known)
        if payload.metadata["ssfl"] == "layer_densities":
            return _learn_densities(message, context, inner, payload, *known)
        return _work(message, context, inner, payload, *known)

    def _score(
        self,
        message: Message,
        context: Context,
        inner: ClientAppCallable,
        payload: Payload,
        spec: StateSpec,
        mask: Mask,
        frozen: Vector | None,
    ) -> Message:
        """Answer with a score for each prunable weight; all weights came, so that none is `frozen`."""
        summands = NodeSummands(payload, context, _config(message)) if UNIT in payload.metadata else None
        weights, metadata = _values(payload, spec, mask), payload.metadata
        scales = None if metadata["criterion"] == "pooled-snip" else scales_of(spec.layout, weights)
        if metadata["criterion"] == "gradient":
            scales = np.ones_like(weights)
        dense = _dense(message, spec, weights)
        counted = metadata["weighting"] == "samples"
        context = _trial(context)
        samples: float | None = None
        if self._saliency is not None:
            if scales is None and not self._gradients:
                raise ValueError('SparseMod(returns="scores") tells scores; criterion "pooled-snip" takes gradients')
            told = self._saliency(dense, context)
            told, samples = told if isinstance(told, tuple) else (told, None)
            seen = told_together(spec.layout, weights, told)
            scores = own_scores(spec.layout, told, scales if self._gradients else None, seen.ties)
            by = "own" if self._gradients else "scores"
        else:
            reply: Message | None = None
            batches = int(metadata["batches"])
            with under_mask(None), GradientProbe(spec, weights, batches, not counted, scales) as watch:
                reply = inner(dense, context)
            if reply is not None and reply.has_error():
                return reply
            if reply is not None and counted:
                samples = _examples(reply, payload)
            if watch.stepped or reply is None:
                scores, seen, by = watch.scores(), watch.seen, "gradient"
            else:
                trained = spec.flatten(only(reply.content, ArrayRecord))
                scores, by = difference_scores(spec.layout, weights, trained, scales), "difference"
                seen = changed_together(spec.layout, weights, trained)
        answer: Metadata = {"round": metadata["round"], "digest": metadata["digest"], "scored-by": by}
        if counted and samples is None:
            raise ValueError("the mean of scores is weighted by samples: return (arrays, number of examples)")
        if summands is not None:
            answer[SAW] = bool(scores.any())
            weight = 1 if samples is None or not counted else whole_weight(samples)
            arrays = summands.write(payload, scores, KIND, weight, reads=READS)
        else:
            arrays = write_values(scores, "fp32")
            answer |= {"samples": samples} if counted and samples is not None else {}
        return _answer(message, Payload({**arrays, **seen.written(spec)}, answer))


def check_masked(message: Message) -> None:
    """Raise PayloadError if a message has the client tell values or scores in the clear, whatever it is called."""
    facts: Any = message.content.get("facts") or {}
    verb = message.metadata.message_type.partition(".")[0]
    kind = facts.get("ssfl", verb)
    if kind in ("keys", "unmask") or kind == verb == "evaluate":
        return
    if kind not in ("train", "saliency") or not {"ssfl", UNIT, EXCHANGE} <= set(facts):
        raise PayloadError("this node has SparseMod(secure_only=True) and answers masked only")


def _work(
    message: Message,
    context: Context,
    inner: ClientAppCallable,
    payload: Payload,
    spec: StateSpec,
    mask: Mask,
    frozen: Vector | None,
) -> Message:
    """Have the user's function train or evaluate, and pack what it returns."""
    metadata = payload.metadata
    summands = NodeSummands(payload, context, _config(message)) if UNIT in metadata else None
    given = _values(payload, spec, mask, frozen)
    with under_mask(mask, frozen is not None):
        reply = inner(_dense(message, spec, given), context)
    if reply.has_error():
        return reply
    arrays = {}
    if metadata["ssfl"] == "train":
        flat = spec.flatten(only(reply.content, ArrayRecord))
        check_untied(spec.layout, given, flat)
        if summands is not None:
            update = (flat - given)[mask.transmitted]
            weight = whole_weight(_examples(reply, payload))
            arrays = summands.write(payload, update, KIND, weight, reads=READS)
        elif "of" in metadata:
            arrays = _largest(spec.layout, flat - given if metadata["of"] == "update" else flat, payload, context)
        else:
            arrays = write_values(flat[mask.transmitted], str(metadata["values"]))
    record = PayloadEncoder().record(Payload(arrays, {"round": metadata["round"], "digest": metadata["digest"]}))
    hidden = (
        metadata["ssfl"] == "train" and EXCHANGE in metadata
    )  # what the function tells of its training stays here
    for name, own in reply.content.items():
        if not isinstance(own, ArrayRecord) and not hidden:
            record[REPLY + name if name in TAKEN or name.startswith(REPLY) else name] = own
    reply.content = record
    return reply


def _config(message: Message) -> dict[str, Any]:
    config: Any = message.content.get("config")
    return dict(config or {})


def _largest(layout: Layout, values: Vector, payload: Payload, context: Context) -> Arrays:
    """Return what goes up under `TopK`; what error feedback keeps is in the node's state, as of this round."""
    from ssfl_app.strategies.topk import TopkOptions, split  # with all strategies, which other clients need not

    told: Any = payload.metadata
    codec = TopkOptions(index=told["index"]).codec(told["values"])
    memory = ClientState(context, 0) if told["error-feedback"] else None
    if memory is not None and (kept := memory.load(told["since"])) is not None:
        values = values + kept["residual"]
    arrays, left = split(layout, values, MaskOptions(told["density"], told["scope"], told["min-per-layer"]), codec)
    if memory is not None:
        memory.save(payload.round, {"residual": left}, told["since"])
    return arrays


def _learn_densities(
    message: Message,
    context: Context,
    inner: ClientAppCallable,
    payload: Payload,
    spec: StateSpec,
    mask: Mask,
    frozen: Vector | None,
) -> Message:
    """Answer with the layer densities that FLASH's sparse learning ends with; a training is the user's function."""
    from ssfl_app.strategies.flash import learned, shares_of

    told: Any = payload.metadata
    flat, context, samples = _values(payload, spec, mask), _trial(context), 0.0

    def train(done: int, moved: Mask) -> Vector:
        nonlocal flat, samples
        flat = spec.spread(flat[moved.transmitted], moved)  # without `mask_gradients` dead weights were trained
        with under_mask(moved):
            reply = inner(_dense(message, spec, flat), context)
        trained = spec.flatten(only(reply.content, ArrayRecord))
        check_untied(spec.layout, flat, trained)
        flat, samples = spec.spread(trained[moved.transmitted], moved), _examples(reply, payload)
        return np.abs(flat[spec.layout.is_prunable])

    rng = generator(told["seed"], "flash-stage", 0, told["place"])
    found = learned(mask, told["epochs"], told["prune-rate"], rng, train)
    answer: Metadata = {"round": told["round"], "digest": told["digest"], "samples": samples}
    return _answer(message, Payload(write_values(shares_of(found), "fp32"), answer))


def _trial(context: Context) -> Context:
    """Return a context for a training that is no round: whatever the function notes in it has not happened."""
    context = copy.copy(context)
    context.state = copy.deepcopy(context.state)
    return context


def _examples(reply: Message, payload: Payload) -> float:
    metrics: Any = only(reply.content, MetricRecord)
    key = payload.metadata["weight-key"]
    if key not in metrics:
        raise ValueError(f"no metric {key!r} among {sorted(metrics)}; it weighs this client's answer")
    return metrics[key]  # type: ignore[no-any-return]


def _known(payload: Payload, context: Context) -> tuple[StateSpec, Mask, Vector | None] | None:
    """Return spec, mask and frozen weights that the message needs, from itself or the node's memory; None: lost."""
    digest, held = payload.metadata["digest"], context.state.get(STATE)
    if "sheet" not in payload.arrays:
        if not isinstance(held, ConfigRecord) or held["digest"] != digest:
            return None
        told: dict[str, Any] = {name: held[name] for name in KEPT if held[name]}
        arrays: Mapping[str, Any] = {name: np.frombuffer(value, KEPT[name]) for name, value in told.items()}
    else:
        arrays = payload.arrays
    spec = StateSpec.read(arrays)
    mask = Mask.unpack(spec.layout, arrays["mask"]) if "mask" in arrays else Mask.dense(spec.layout)
    frozen = None
    if "frozen" in arrays:
        frozen = read_array(arrays, "frozen", np.float32, int(np.count_nonzero(~mask.transmitted)))
    if arrays is payload.arrays:
        if spec.digest_under(mask, frozen) != digest:
            stated = spec.digest_under(mask, frozen)
            raise ValueError(f"spec, mask and frozen weights have digest {stated}; the message says {digest!r}")
        if payload.metadata["ssfl"] != "saliency":
            kept = {name: arrays[name].tobytes() if name in arrays else b"" for name in KEPT}
            context.state[STATE] = ConfigRecord({"digest": digest, **kept})
    return spec, mask, frozen


def _values(payload: Payload, spec: StateSpec, mask: Mask, frozen: Vector | None = None) -> Vector:
    """Return the model of a message, float32, shape (layout.size,), dead weights at 0 or `frozen`."""
    size = int(np.count_nonzero(MaskedValues().positions(spec.layout, mask)))
    return spec.spread(read_values(payload.arrays, str(payload.metadata["values"]), size), mask, frozen)


def _dense(message: Message, spec: StateSpec, flat: Vector) -> Message:
    """Return the message that the user's function expects. A copy: other mods may hold the one that came."""
    arrays_key, config_key = spec.keys
    dense = copy.copy(message)
    dense.content = RecordDict({arrays_key: spec.dense(flat), config_key: ConfigRecord(_config(message))})
    return dense


def _in_round(asked: Payload, answer: Payload) -> Payload:
    return Payload(answer.arrays, {"round": asked.metadata["round"]})


def _answer(message: Message, payload: Payload) -> Message:
    return Message(PayloadEncoder().record(payload), reply_to=message)


sparse_mod = SparseMod()
"""The mod for ``@app.train(mods=[sparse_mod])`` and ``@app.evaluate(mods=[sparse_mod])``, or
``ClientApp(mods=[...])``."""

sparse_numpy_mod = SparseMod(numpy_client=True)
"""The mod for an old-style ``ClientApp(client_fn=client_fn, mods=[sparse_numpy_mod])``."""
