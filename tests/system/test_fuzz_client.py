"""Whatever comes down, a client refuses it by name or answers, and what it keeps stays what it says it is.

A damaged message is followed by the good one: the client answers that as if the damaged one had never come.
"""

import contextlib
import copy
import functools
import zlib
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from ssfl_app.client_app import handle
from ssfl_app.comm.node_config import SIMULATED
from ssfl_app.comm.payload import DEFLATED, SERIAL_TYPE, PayloadEncoder, decode_payload
from ssfl_app.config import Flat
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.strategies import REGISTRY
from tests.in_process_grid import Where
from tests.system.test_fuzz import BOMB, CASES, fuzz, recorded

pytestmark = pytest.mark.narrow

# A client of each kind: what it is asked, which mask it keeps, and what it remembers.
MINE = ["ssfl", "ssfl-refresh", "ssfl-grasp", "ssfl-force", "local-saliency", "random-local", "fedpm", "prunefl"]
MINE += ["ssfl-continuous", "ditto", "fedfomo-2", "topk-int32", "lotteryfl", "flash-joint", "dispfl"]
MINE += ["fedpai", "spafl"]


def context_before(case: str, target: Where) -> Context:
    """The client as it is when this message comes: it has had those before."""
    return copy.deepcopy(_before(case, target))


@functools.cache
def _before(case: str, target: Where) -> Context:
    run = recorded(case)
    node: Flat = {"partition-id": target[2], "num-partitions": 3, SIMULATED: True}
    context = Context(run_id=1, node_id=7, node_config=node, state=RecordDict(), run_config=dict(run.flat))
    for where, message in run.asked.items():
        if where == target:
            break
        if where[2] == target[2] and where[0] != "query.hello":
            handle(message, context)
    return context


def asked(case: str, target: Where) -> Message:
    """Return what a client was asked, its arrays in a record of their own, as large ones are."""
    message = copy.copy(recorded(case).asked[target])
    message.content = PayloadEncoder().record(decode_payload(message.content, unfolded=2**24))
    return message


def bits(content: RecordDict) -> Any:
    arrays = {name: (array.dtype, array.shape, array.data) for name, array in content["arrays"].items()}
    return arrays, dict(content["facts"].items())


def kept_masks_are_whole(case: str, context: Context) -> None:
    for held in context.state.values():
        if isinstance(held, ConfigRecord) and "mask" in held:
            mask = Mask.unpack(recorded(case).runtime.layout, np.frombuffer(bytes(held["mask"]), np.uint8))  # type: ignore[arg-type]
            assert mask.digest == held["digest"]


@st.composite
def damaged(draw: Any, good: RecordDict, turn: int) -> RecordDict:
    metadata, arrays = dict(good["facts"].items()), dict(good["arrays"].items())
    kinds = ["record", "digest", "digest", "lying", *(["drop", "cut", "bits", "retype"] if arrays else ["extra"])]
    kind = draw(st.sampled_from(kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)]))
    name = draw(st.sampled_from(sorted(arrays) or ["values"]))
    old = arrays.get(name, Array("float32", (1,), SERIAL_TYPE, b"\0" * 4))
    if kind == "record":
        lost = draw(st.sampled_from(["arrays", "facts"]))
        return RecordDict({n: record for n, record in good.items() if n != lost})
    if kind == "digest":
        metadata |= {
            n: draw(st.sampled_from(["", "0" * 16, "../../x", 7]))
            for n in ("digest", "weights", "signs")
            if n in metadata
        }
    elif kind == "lying":
        arrays[name] = Array(old.dtype, (*old.shape, 1), SERIAL_TYPE, old.data)
    elif kind == "drop":
        del arrays[name]
    elif kind == "cut":
        size = np.dtype(old.dtype).itemsize
        arrays[name] = Array(old.dtype, (old.shape[0] - 1,), SERIAL_TYPE, old.data[:-size])
    elif kind == "bits":
        at = draw(st.integers(0, len(old.data) - 1))
        at -= at % 4  # NaN in the values, other bits in a mask
        arrays[name] = Array(
            old.dtype, old.shape, SERIAL_TYPE, (old.data[:at] + b"\xff" * 4 + old.data[at + 4 :])[: len(old.data)]
        )
    elif kind == "retype":
        arrays[name] = Array("int64", (8,), SERIAL_TYPE, b"\xff" * 64)
    else:
        arrays["held"] = arrays["mask"] = Array("uint8", (3,), SERIAL_TYPE, b"\xff" * 3)
    return RecordDict({"arrays": ArrayRecord(arrays), "facts": ConfigRecord(metadata)})


@pytest.mark.parametrize("case", MINE)
@given(data=st.data())
@fuzz(4)
def test_a_damaged_message_is_refused_or_answered_and_forgotten(case: str, data: st.DataObject) -> None:
    run = recorded(case)
    kinds = ["train", "evaluate", *(["query"] if REGISTRY[CASES[case][0]].client.query_types else [])]
    target = data.draw(st.sampled_from([where for kind in kinds for where in run.targets(kind)]))
    context, message = context_before(case, target), asked(case, target)
    content = data.draw(damaged(message.content, zlib.crc32(case.encode())))
    bad = Message(content, message.metadata.dst_node_id, message.metadata.message_type, group_id="1")
    bad.metadata.__dict__["_message_id"] = "bad"
    with contextlib.suppress(PayloadError):
        handle(bad, context)
    kept_masks_are_whole(case, context)
    assert bits(handle(message, context).content) == bits(run.answered[target])


def test_a_digest_that_nobody_has_leaves_the_held_mask() -> None:
    """A local mask is not replaced by the random one, which the client could draw as well, but which is not meant."""
    target = recorded("local-saliency").targets("train")[0]
    context, message = context_before("local-saliency", target), asked("local-saliency", target)
    held = copy.deepcopy(context.state)
    metadata = ConfigRecord({**message.content["facts"], "digest": "0" * 16})
    arrays = ArrayRecord({n: array for n, array in message.content["arrays"].items() if n != "mask"})
    other = Message(RecordDict({"arrays": arrays, "facts": metadata}), 7, "train", group_id="1")
    other.metadata.__dict__["_message_id"] = "other"
    assert handle(other, context).content["facts"]["need"] == "mask"
    assert context.state == held


@pytest.mark.parametrize("case", ["ditto", "ssfl", "flash-joint"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_model_that_is_no_model_is_neither_trained_nor_remembered(case: str, bad: float) -> None:
    target = recorded(case).targets("train")[0]
    context, message = context_before(case, target), asked(case, target)
    arrays = dict(message.content["arrays"].items())
    values = np.frombuffer(arrays["values"].data, np.float32).copy()
    values[5] = bad
    arrays["values"] = Array("float32", values.shape, SERIAL_TYPE, values.tobytes())
    content = RecordDict({"arrays": ArrayRecord(arrays), "facts": message.content["facts"]})
    with pytest.raises(PayloadError, match="that came down are NaN or Inf"):
        handle(Message(content, 7, "train", group_id="1"), context)
    assert "ssfl-personal" not in context.state


def test_a_message_unfolds_to_no_more_than_a_few_bitmaps() -> None:
    """261 kB that a server sends fill no client's memory: what unfolds is bounded by the model."""
    target = recorded("ssfl").targets("train")[0]
    context, message = context_before("ssfl", target), asked("ssfl", target)
    arrays = {**message.content["arrays"], "mask": Array("uint8", (2**28,), DEFLATED, BOMB)}  # type: ignore[dict-item]
    message.content = RecordDict({"arrays": ArrayRecord(arrays), "facts": message.content["facts"]})
    with pytest.raises(PayloadError, match=r"deflated arrays have 268435456 bytes; together they have at most \d+$"):
        handle(message, context)
