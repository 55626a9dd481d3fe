"""Whatever a client answers: the server goes on, names it, and the model is the one without that client.

Damage that is invalid by construction must change nothing more than silence would; an addition that nobody reads must
change nothing at all; of arbitrary garbage the server must only survive, with a finite model. Answers are damaged in
every exchange of every strategy. The server is the real one; the other clients answer what real ones did (`replay`).
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from google.protobuf.message import DecodeError
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ssfl_app.client_app import app
from ssfl_app.comm.exchange import ExchangeReport, MessageExchange
from ssfl_app.comm.payload import DEFLATED, SERIAL_TYPE
from ssfl_app.core.means import MAX_WEIGHT
from ssfl_app.simulation.in_process import InlineGrid
from ssfl_app.strategies import REGISTRY
from tests.in_process_grid import Where
from tests.replay import Answers, Recorded, Replayed, record

# Beside every strategy as it is: keys under which it asks more, moves masks, or writes values in another way.
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in sorted(REGISTRY)} | {
    "ssfl-grasp": ("ssfl", {"ssfl.criterion": "grasp"}),
    "ssfl-pooled": ("ssfl", {"ssfl.criterion": "pooled-snip"}),
    "ssfl-iterative": ("ssfl", {"ssfl.criterion": "iterative-snip", "ssfl.steps": 2}),
    "ssfl-force": ("ssfl", {"ssfl.criterion": "force", "ssfl.steps": 2}),
    "ssfl-refresh": ("ssfl", {"ssfl.refresh": "scheduled", "ssfl.refresh-round": 2, "run.rounds": 2}),
    "ssfl-continuous": ("ssfl", {"ssfl.refresh": "continuous", "ssfl.refresh-every": 1, "run.rounds": 2}),
    "ssfl-int8": ("ssfl", {"wire.up-values": "int8"}),
    "local-layers": ("local-saliency", {"mask.scope": "layer", "mask.min-per-layer": 100}),
    "topk-int32": ("topk", {"topk.index": "int32", "topk.of": "update", "topk.error-feedback": True}),
    "zerofl-fp16": ("zerofl", {"wire.up-values": "fp16", "zerofl.uplink": "top-diff"}),
    "dispfl-bf16": ("dispfl", {"wire.up-values": "bf16", "wire.down-values": "bf16"}),
    "fedfomo-2": ("fedfomo", {"run.rounds": 2}),  # in round 1 nobody has peers
    "feddst-2": ("feddst", {"run.rounds": 2, "run.evaluate-every": 2}),  # masks rest in round 2
    "prunefl-early": ("prunefl", {"prunefl.every": 1}),
}
pytestmark = [
    pytest.mark.narrow,
    pytest.mark.filterwarnings("error::RuntimeWarning"),  # NumPy's: the server meets no NaN unprepared
]

FEW = {"prunefl.checks": 1, "flash.stage-epochs": 2, "flash.stage-clients": 1.0}

EXCHANGES = [(case, kind) for case in CASES for kind in ("train", "evaluate")] + [
    (case, "query") for case, (name, _) in CASES.items() if REGISTRY[name].client.query_types
]

MOST_SAMPLES = MAX_WEIGHT // 3  # of three clients
LONGEST = 400
"""Characters of a reason: it is a line in a table and not the payload."""

BOMB = zlib.compress(bytes(2**28))
"""261 kB that unfold to 256 MB."""

_MISSING: Any = object()


def recorded(case: str) -> Recorded:
    name, keys = CASES[case]
    return record(name, *sorted({**FEW, **keys}.items()))


def instead(*contents: RecordDict | Error) -> Answers:
    return lambda message, good: [Message(content, reply_to=message) for content in contents]


@functools.cache
def silent(case: str, target: Where) -> Replayed:
    """The run in which the client's node is gone."""
    return recorded(case).replay(target, instead(Error(5)))


@functools.cache
def undisturbed(case: str, target: Where) -> Replayed:
    return recorded(case).replay(target, lambda message, good: [Message(good, reply_to=message)])


def assert_as_without(case: str, target: Where, got: Replayed) -> None:
    """The client is refused or lost by name, in a line, and has changed nothing."""
    client, without = target[2], silent(case, target)
    bad = {**got.report.lost, **got.report.refused}
    assert list(bad) == [client]
    assert 0 < len(bad[client]) <= LONGEST
    assert bad[client].isprintable()
    assert sorted(got.report.ok) == sorted(without.report.ok)
    assert (got.failure is None) == (without.failure is None)  # a question to one client only
    assert got.bits() == without.bits()


def assert_undisturbed(case: str, target: Where, got: Replayed) -> None:
    assert (got.report.lost, got.report.refused, got.failure) == ({}, {}, None)
    assert got.bits() == undisturbed(case, target).bits()


# ---- an answer in pieces -----------------------------------------------------------------------


class Draft:
    """A good answer of which pieces are changed; the good one stays as it is."""

    def __init__(self, case: str, target: Where) -> None:
        self.case, self.target, self.kind = case, target, target[0].partition(".")[0]
        self.name = CASES[case][0]
        good = recorded(case).answered[target]
        self.metadata: dict[str, Any] = dict(good["facts"].items())
        self.arrays: dict[str, Array] = dict(good["arrays"].items())
        self.records: dict[str, Any] = {"arrays": None, "facts": None}

    def content(self) -> RecordDict:
        metadata = {name: value for name, value in self.metadata.items() if value is not _MISSING}
        mine = {"arrays": ArrayRecord(self.arrays), "facts": ConfigRecord(metadata)}
        known = {name: mine[name] if what is None else what for name, what in self.records.items()}
        return RecordDict({name: what for name, what in known.items() if what is not _MISSING})

    def vector(self, name: str) -> Any:
        return np.frombuffer(self.arrays[name].data, self.arrays[name].dtype).copy()

    def put(self, name: str, vector: Any) -> None:
        self.arrays[name] = Array(vector.dtype.name, vector.shape, SERIAL_TYPE, vector.tobytes())

    def is_read(self, fact: str, value: Any) -> bool:
        """Return whether this value of one fact is as good as any; the facts that others have stay as they are."""
        if isinstance(value, list):
            return False  # facts are scalars, whatever their names
        number = type(value) is float and math.isfinite(value)
        match fact:
            case "round" | "digest":
                # 1.0 and True are 1.
                return value is not _MISSING and bool(value == self.metadata[fact])
            case "samples" if self.kind == "evaluate":
                return type(value) is int and value >= 0
            case "samples":
                return type(value) is int and 1 <= value <= MOST_SAMPLES
            case "loss":
                return number and abs(value) <= 2.0**128  # of float32
            case "accuracy" | "personal_accuracy":
                others = {"accuracy", "personal_accuracy"} & (set(self.metadata) - {fact})
                return bool(others) if value is _MISSING else number and 0 <= value <= 1
            case "alive":
                return type(value) is int and 0 <= value <= recorded(self.case).runtime.layout.prunable_size
            case "passes" | "looks":
                return value is _MISSING or (type(value) is int and 0 <= value < 2**40)
            case "need":
                return value is _MISSING or not value
        return True

    def known_facts(self) -> list[str]:
        """Return the facts that the server reads in this exchange."""
        own = ["loss", *(n for n in ("accuracy", "personal_accuracy") if n in self.metadata)]
        return ["round", "samples", "passes", "looks", "need"] + {
            "query": [],
            "train": ["digest", "loss", *(["alive"] if "alive" in self.metadata else [])],
            "evaluate": ["digest", *own],
        }[self.kind]


WORDS = st.sampled_from(["", "mask", "weights", "values", "ja\nnein", "\x1b[2Jü→", "0" * 16, "nan"])
SCALARS = st.one_of(
    st.sampled_from([_MISSING, True, False, math.nan, math.inf, -math.inf, -0.0, 1e-320, 1e300, 1.7e308, 0.5, 1.5]),
    st.sampled_from([0, 1, -1, 2, 3, 7, 2**23, 2**40, 2**53 + 1, 2**63 - 1, -(2**63), 2**64, 10**40]),
    WORDS,
    st.sampled_from([b"", b"mask", b"\0" * 9]),
    st.sampled_from([[], [1], [1.5, math.nan], ["mask"], [b""], [True] * 1000]),
)


# ---- damage that is invalid by construction ----------------------------------------------------

Draw = Callable[[st.SearchStrategy[Any]], Any]
Damage = Callable[[Draft, Draw], None]


def bad_fact(draft: Draft, draw: Draw) -> None:
    name = draw(st.sampled_from(draft.known_facts()))
    draft.metadata[name] = draw(SCALARS.filter(lambda value: not draft.is_read(name, value)))


def missing_record(draft: Draft, draw: Draw) -> None:
    # An answer that has no arrays is whole without the record of them.
    for name in draw(st.sampled_from([["facts"], ["arrays", "facts"], *([["arrays"]] if draft.arrays else [])])):
        draft.records[name] = _MISSING


def facts_of_another_kind(draft: Draft, draw: Draw) -> None:
    draft.records["facts"] = draw(st.sampled_from([MetricRecord({"samples": 3}), ArrayRecord(dict(draft.arrays))]))


def arrays_of_another_kind(draft: Draft, draw: Draw) -> None:
    draft.records["arrays"] = draw(st.sampled_from([ConfigRecord(), MetricRecord()]))


def lying_array(draft: Draft, draw: Draw) -> None:
    """An array, one that nobody asked for too, whose description and bytes do not go together."""
    name = draw(st.sampled_from([*sorted(draft.arrays), "extra", ""]))
    old = draft.arrays.get(name, Array("float32", (2,), SERIAL_TYPE, b"\0" * 8))
    size = len(old.data)
    dtype = draw(st.sampled_from(["float64", "bool", "object", ">f4", "", "int4"]))
    shapes = [(), (old.shape[0], 1), (1, old.shape[0]), (old.shape[0] + 1,), (-1,), (2**62,)]
    draft.arrays[name] = draw(
        st.sampled_from(
            [
                Array(dtype, old.shape, SERIAL_TYPE, old.data),
                *(Array(old.dtype, shape, SERIAL_TYPE, old.data) for shape in shapes),
                *(Array(old.dtype, old.shape, kind, old.data) for kind in ("numpy.ndarray", "", "ß")),
                Array(old.dtype, old.shape, SERIAL_TYPE, old.data + b"\0"),
                Array(old.dtype, (size + 1,), SERIAL_TYPE, old.data),
            ]
        )
    )


def another_array(draft: Draft, draw: Draw) -> None:
    """An array that is well formed, but not the one that is wanted; or none."""
    name = draw(st.sampled_from(sorted(draft.arrays)))
    old = draft.vector(name)
    kind = draw(st.sampled_from(["float32", "float16", "uint16", "uint8", "int8", "int32", "int64"]))
    how = draw(
        st.sampled_from(["drop", "shorter", "longer", "empty", "rename"] + ["retype"] * (kind != old.dtype.name))
    )
    if how == "retype":
        draft.put(name, np.ones(old.size, kind))
    elif how == "longer":
        draft.put(name, np.concatenate([old, old[:1] if old.size else np.zeros(1, old.dtype)]))
    elif how in ("shorter", "empty") and old.size:
        draft.put(name, old[: old.size - 1 if how == "shorter" else 0])
    else:
        array = draft.arrays.pop(name)
        if how == "rename":
            draft.arrays[name + "s"] = array


def strange_array(draft: Draft, draw: Draw) -> None:
    """A well-formed array that an answer of this kind does not have; a deflated one would fill the memory."""
    name = draw(st.sampled_from(["", "extra", "values.0", "a,b", "indptr", "net", "x\n2026 INFO\x1b[2J"]))
    kind, size = draw(st.sampled_from(["float32", "int64", "uint8"])), draw(st.sampled_from([0, 8, 800]))
    raw = Array(kind, (size // np.dtype(kind).itemsize,), SERIAL_TYPE, b"\xff" * size)
    draft.arrays[name] = draw(st.sampled_from([raw, Array("uint8", (2**28,), DEFLATED, BOMB)]))


def bomb(draft: Draft, draw: Draw) -> None:
    """An array that an answer has, of more bytes than any answer's."""
    draft.arrays[draw(st.sampled_from(sorted(draft.arrays)))] = Array("uint8", (2**28,), DEFLATED, BOMB)


def poison(draft: Draft, draw: Draw) -> None:
    """A number that no mean can take."""
    name = draw(st.sampled_from([n for n in sorted(draft.arrays) if n != "mask" and draft.vector(n).size]))
    vector, at = draft.vector(name), draw(st.integers(0, 2**20))
    if name == "index":
        worst = [-1, 2**31 - 1, -(2**31), recorded(draft.case).runtime.layout.prunable_size]
        # Twice the same, or a step down, too.
        vector[at % (vector.size - 1) + 1] = draw(st.sampled_from([*worst, int(vector[at % (vector.size - 1)]), 0]))
    elif vector.dtype == np.uint16:
        vector[at % vector.size] = draw(st.sampled_from([0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0x4780]))  # bf16
    elif vector.dtype == np.int8:
        name, vector = "scales", draft.vector("scales")
        vector[at % vector.size] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    else:
        too_large = [] if name in ("preference", "scales") else [40000, -32770]
        vector[at % vector.size] = draw(st.sampled_from([np.nan, np.inf, -np.inf, *too_large]))
    draft.put(name, vector)


def negative(draft: Draft, draw: Draw) -> None:
    """A magnitude or a share below 0."""
    name = next(name for name in ("squares", "scores.values", "values") if name in draft.arrays)
    vector = draft.vector(name)
    vector[draw(st.integers(0, vector.size - 1))] = draw(st.sampled_from([-1e-30, -1.0, -30000.0]))
    draft.put(name, vector)


def another_bit(draft: Draft, draw: Draw) -> None:
    """A mask of one weight more or less."""
    mask, bit = draft.vector("mask"), draw(st.integers(0, 7))
    mask[draw(st.integers(0, mask.size - 1))] ^= 1 << bit
    draft.put("mask", mask)


def another_layer(draft: Draft, draw: Draw) -> None:
    """A mask of as many weights, of which one moved to another layer."""
    bits = np.unpackbits(draft.vector("mask"))
    spans = list(recorded(draft.case).runtime.layout.prunable_spans.values())
    dead = [span.start + np.flatnonzero(bits[span] == 0) for span in spans]
    to = draw(st.sampled_from([i for i, places in enumerate(dead) if places.size]))  # a layer may be full
    lost = draw(st.sampled_from([i for i, span in enumerate(spans) if i != to and bits[span].any()]))
    alive = spans[lost].start + np.flatnonzero(bits[spans[lost]])
    for places, bit in ((alive, 0), (dead[to], 1)):
        bits[places[draw(st.integers(0, places.size - 1))]] = bit
    draft.put("mask", np.packbits(bits))


def no_density(draft: Draft, draw: Draw) -> None:
    """Layer densities of which no layer has a weight."""
    draft.put("values", np.full(4, draw(st.sampled_from([0.0, 1e-45, 1e-20, 1e-9])), np.float32))


def damages(draft: Draft) -> list[Damage]:
    """Return what invalidates this answer."""
    found: list[Damage] = [bad_fact, bad_fact, missing_record, facts_of_another_kind, lying_array, strange_array]
    found.append(arrays_of_another_kind)
    if draft.arrays:
        found += [another_array, bomb]
    if set(draft.arrays) - {"mask"}:
        found += [poison, poison]
    if "mask" in draft.arrays and draft.name != "fedpm":  # there every mask is as good as any
        found.append(another_bit)
    layerwise = draft.name in ("dispfl", "feddst") or draft.case == "local-layers"
    if "mask" in draft.arrays and layerwise:
        found.append(another_layer)
    told = {"squares", "scores.values"} & set(draft.arrays)
    if told or draft.target[0] == "query.layer_densities" or scores_magnitudes(draft):
        found.append(negative)
    if draft.target[0] == "query.layer_densities":
        found.append(no_density)
    return found


def scores_magnitudes(draft: Draft) -> bool:
    return draft.target[0].startswith("query.saliency") and draft.case not in ("ssfl-grasp", "ssfl-pooled")


def rotated(items: list[Any], *by: Any) -> list[Any]:
    # Derandomized examples are the same for every parameter: here equal draws mean something else in each.
    start = zlib.crc32(repr(by).encode()) % len(items)
    return items[start:] + items[:start]


def fuzz(examples: int) -> Any:
    # Not shrunk: an example is a few draws long, and each try plays a run.
    phases = (Phase.explicit, Phase.generate)
    return settings(deadline=None, derandomize=True, max_examples=examples, database=None, phases=phases)


@pytest.mark.parametrize(("case", "kind"), EXCHANGES)
@given(data=st.data())
@fuzz(5)
def test_a_damaged_answer_changes_no_more_than_silence(case: str, kind: str, data: st.DataObject) -> None:
    target = data.draw(st.sampled_from(recorded(case).targets(kind)[::-1]))
    draft = Draft(case, target)
    damage = data.draw(st.sampled_from(rotated(damages(draft), case, kind)))
    damage(draft, data.draw)
    assert_as_without(case, target, recorded(case).replay(target, instead(draft.content())))


@pytest.mark.parametrize(("case", "kind"), [(case, kind) for case, kind in EXCHANGES if kind != "evaluate"])
@given(data=st.data())
@fuzz(1)
def test_every_damage_that_only_the_strategy_can_see_is_seen(case: str, kind: str, data: st.DataObject) -> None:
    """The flat arrays and the facts are well formed; each kind once, whatever the examples above happen to hold."""
    special = (poison, negative, another_bit, another_layer, no_density)
    for target in recorded(case).targets(kind):
        for damage in [damage for damage in special if damage in damages(Draft(case, target))]:
            draft = Draft(case, target)
            damage(draft, data.draw)
            assert_as_without(case, target, recorded(case).replay(target, instead(draft.content())))


# ---- errors, and answers that are none or too many ----------------------------------------------

REASONS = ["", None, "x" * 1_000_000, "Zeile\nzwei, ü\r\n\x1b[2J\0", "\n" * 9, " '>'", "a\\nb", "\u2028\u202e"]
SOME = ["ssfl", "dispfl", "local-saliency", "prunefl"]


def any_target(case: str) -> st.SearchStrategy[Where]:
    return st.sampled_from(
        [where for kind in ("train", "query", "evaluate") for where in recorded(case).targets(kind)]
    )


@pytest.mark.parametrize("case", SOME)
@given(data=st.data())
@fuzz(8)
def test_an_error_is_told_in_a_line(case: str, data: st.DataObject) -> None:
    target, code = data.draw(any_target(case)), data.draw(st.sampled_from([1, 2, 3, 5, 8, 99, -1, 2**31 - 1]))
    error = Error(code, data.draw(st.sampled_from(REASONS) | st.text(max_size=500)))
    assert_as_without(case, target, recorded(case).replay(target, instead(error)))


@pytest.mark.parametrize("case", SOME)
def test_an_answer_with_neither_content_nor_an_error_is_refused(case: str) -> None:
    def nothing(message: Message, good: RecordDict) -> list[Message]:
        reply = Message(good, reply_to=message)
        reply.__dict__["_content"] = None
        return [reply]

    for kind in ("train", "evaluate"):
        target = recorded(case).targets(kind)[0]
        got = recorded(case).replay(target, nothing)
        assert_as_without(case, target, got)
        assert "neither" in got.report.refused[target[2]]


@pytest.mark.parametrize("case", SOME)
@given(data=st.data())
@fuzz(6)
def test_of_two_answers_to_one_message_the_first_counts(case: str, data: st.DataObject) -> None:
    target = data.draw(any_target(case))
    draft = Draft(case, target)
    bad_fact(draft, data.draw)
    good, bad = recorded(case).answered[target], draft.content()
    if data.draw(st.booleans()):
        assert_as_without(case, target, recorded(case).replay(target, instead(bad, good)))
    else:
        second = data.draw(st.sampled_from([bad, good, Error(2, "late")]))
        assert_undisturbed(case, target, recorded(case).replay(target, instead(good, second)))


# ---- additions that nobody reads ---------------------------------------------------------------


@pytest.mark.parametrize(("case", "kind"), EXCHANGES)
@given(data=st.data())
@fuzz(2)
def test_what_nobody_reads_changes_nothing(case: str, kind: str, data: st.DataObject) -> None:
    target = data.draw(st.sampled_from(recorded(case).targets(kind)[::-1]))
    draft = Draft(case, target)
    names = st.sampled_from(["", "extra", "client", "folder", "question", "arrays", "since", "weights", "step"])
    for name in data.draw(st.lists(names, max_size=3)):
        draft.metadata[name] = data.draw(SCALARS.filter(lambda value: draft.is_read("extra", value)))
    draft.metadata["need"] = data.draw(st.sampled_from([_MISSING, "", 0, False, 0.0, b""]))
    for name in data.draw(st.lists(st.sampled_from(["", "more", "metrics"]), max_size=1)):
        draft.records[name] = data.draw(st.sampled_from([ArrayRecord(), MetricRecord({"loss": math.nan})]))
    assert_undisturbed(case, target, recorded(case).replay(target, instead(draft.content())))


# ---- arrays that nobody asked for ----------------------------------------------------------------


@pytest.mark.parametrize(("case", "kind"), EXCHANGES)
def test_arrays_of_no_such_answer_are_refused_before_they_are_unfolded(
    case: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the good ones, raw and deflated, and in the place of each."""
    unfolded: list[int] = []
    inflate = zlib.decompressobj

    class Counting:
        def __init__(self) -> None:
            self._inner = inflate()

        def decompress(self, data: bytes, most: int) -> bytes:
            unfolded.append(most)
            return self._inner.decompress(data, most)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    monkeypatch.setattr("ssfl_app.comm.payload.zlib.decompressobj", Counting)
    target = recorded(case).targets(kind)[0]
    bombs = Array("uint8", (2**28,), DEFLATED, BOMB), Array("float32", (2,), SERIAL_TYPE, bytes(8))
    places = [("extra", bombs[1]), *((name, bombs[0]) for name in ["extra", *Draft(case, target).arrays])]
    for name, array in places:
        draft = Draft(case, target)
        draft.arrays[name] = array
        got = recorded(case).replay(target, instead(draft.content()))
        assert_as_without(case, target, got)
        assert got.report.up >= len(array.data)  # what came is counted all the same
    assert sum(unfolded) == 0


# ---- garbage -----------------------------------------------------------------------------------

NAMES = st.sampled_from(["values", "values", "mask", "scales", "index", "squares", "preference", "extra"])
PATTERNS = [
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\1\0\0\0",
    b"\0\0\0\x80",
    b"\0\0\0\x47",
    b"\0\0\xc8\xc2",
    b"\xaa\xaa\xaa\x2a",
]
"""Words that are 0, NaN, denormal, -0.0, 32768, -100 and a small number as float32, or bits of a mask."""


@pytest.mark.parametrize(("case", "kind"), EXCHANGES)
@given(data=st.data())
@fuzz(3)
def test_garbage_is_survived_with_a_finite_model(case: str, kind: str, data: st.DataObject) -> None:
    target = data.draw(st.sampled_from(recorded(case).targets(kind)[::-1]))
    draft, layout = Draft(case, target), recorded(case).runtime.layout
    for _ in range(data.draw(st.integers(0, 2))):
        name = data.draw(NAMES)
        usual = [len(draft.arrays[name].data)] * 3 if name in draft.arrays else []
        size = data.draw(st.sampled_from([*usual, 0, 4, -(-layout.prunable_size // 8), 4 * layout.size]))
        word = data.draw(st.sampled_from(PATTERNS) | st.binary(min_size=4, max_size=4))
        kept = [draft.arrays[name].dtype] * 3 if name in draft.arrays else []
        dtype = data.draw(st.sampled_from([*kept, "float32", "float16", "uint16", "uint8", "int8", "int32", "int64"]))
        raw = (word * (size // 4 + 1))[: size - size % np.dtype(dtype).itemsize]
        draft.arrays[name] = Array(dtype, (len(raw) // np.dtype(dtype).itemsize,), SERIAL_TYPE, raw)
    for name in data.draw(st.lists(st.sampled_from([*draft.known_facts(), "accuracy", "extra"]), max_size=2)):
        draft.metadata[name] = data.draw(SCALARS)
    got = recorded(case).replay(target, instead(draft.content()))
    strategy, names = got.strategy, [*got.report.ok, *got.report.lost, *got.report.refused]
    assert sorted(names) == sorted(undisturbed(case, target).report.ok)
    assert np.isfinite(layout.flatten(strategy.model())).all()
    assert all(np.isfinite(array).all() for array in strategy.state_dict().values() if array.dtype.kind == "f")
    assert all(map(math.isfinite, strategy.losses.values()))
    if target[2] not in got.report.ok:
        assert_as_without(case, target, got)


# ---- what takes more than one damaged fact --------------------------------------------------------


def changed(case: str, target: Where, change: Callable[[Draft], Any]) -> Replayed:
    draft = Draft(case, target)
    change(draft)
    return recorded(case).replay(target, instead(draft.content()))


LONG = "x" * 1_000_000
LONG_ARRAY = Array("float32", (1,), "y" * 100_000, b"\0" * 4)


@pytest.mark.parametrize(
    "change",
    [
        lambda draft: draft.metadata.update(digest=LONG),
        lambda draft: draft.metadata.update(round=LONG),
        lambda draft: draft.metadata.update(samples=LONG),
        lambda draft: draft.metadata.update(samples=10**400),
        lambda draft: draft.metadata.update(loss=LONG),
        lambda draft: draft.metadata.update(need=LONG),
        lambda draft: draft.metadata.update({LONG: [1]}),
        lambda draft: draft.arrays.update({"z" * 100_000: LONG_ARRAY}),
        lambda draft: draft.arrays.update({"a\nb\x1b[2J": LONG_ARRAY}),
        lambda draft: draft.arrays.update(values=Array("float32", (1,) * 10_000, SERIAL_TYPE, b"\0" * 4)),
    ],
)
def test_a_reason_quotes_no_more_than_a_line(change: Callable[[Draft], Any]) -> None:
    target = recorded("ssfl").targets("train")[0]
    assert_as_without("ssfl", target, changed("ssfl", target, change))


@pytest.mark.parametrize("kind", ["train", "query", "evaluate"])
@pytest.mark.parametrize("other", [ConfigRecord({"values": b"1234"}), MetricRecord({"values": 0.5})])
def test_numbers_in_place_of_arrays_are_refused(kind: str, other: Any) -> None:
    target = recorded("ssfl").targets(kind)[0]
    got = changed("ssfl", target, lambda draft: draft.records.update(arrays=other))
    assert_as_without("ssfl", target, got)
    assert "it must be ArrayRecord" in got.report.refused[target[2]]


def test_scales_whose_product_overflows_are_refused_without_a_warning() -> None:
    target = recorded("ssfl-int8").targets("train")[0]
    got = changed("ssfl-int8", target, lambda d: d.put("scales", np.full_like(d.vector("scales"), 3e38)))
    assert_as_without("ssfl-int8", target, got)


def test_losses_of_several_clients_that_no_sum_can_hold_are_refused() -> None:
    """Each is a finite float; their sum is none, and math.fsum raises OverflowError."""
    run, target = recorded("fedavg"), recorded("fedavg").targets("train")[0]
    for client in (0, 1):
        draft = Draft("fedavg", (*target[:2], client))
        draft.metadata |= {"loss": 1.7e308, "samples": 1}
        run = dataclasses.replace(run, answered={**run.answered, draft.target: draft.content()})
    got = run.replay(target, lambda message, good: [Message(good, reply_to=message)])
    assert sorted(got.report.refused) == [0, 1]
    assert got.failure is not None
    assert "1 of 3 clients answered well" in got.failure


# ---- messages that Flower cannot build, and errors of SuperNodes ---------------------------------


class Deployed(InlineGrid):
    """Two nodes that are no simulation; of the first one's answer Flower makes what the test says."""

    in_process = False

    def __init__(self, answer: Error | Exception) -> None:
        super().__init__(app, {}, {1: 0, 2: 1})
        self._first = answer

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message in [self._waiting.pop(i) for i in message_ids if i in self._waiting]:
            if message.metadata.dst_node_id == 2:
                return [Message(RecordDict(), reply_to=message)]
            if isinstance(self._first, Exception):
                raise self._first
            return [Message(self._first, reply_to=message)]
        return []


def carried(answer: Error | Exception) -> tuple[list[int], ExchangeReport]:
    grid = Deployed(answer)
    exchange = MessageExchange(grid, 5.0)
    exchange.send({k: Message(RecordDict(), k + 1, "train", ttl=5.0) for k in (0, 1)})
    return [client for client, _ in exchange.replies()], exchange.report


@pytest.mark.parametrize(
    "error", [ValueError("a\nb" * 1000), KeyError("chunk"), IndexError(), DecodeError("wire type")]
)
def test_a_message_that_flower_cannot_build_is_its_senders_fault(error: Exception) -> None:
    answered, report = carried(error)
    assert answered == [1]
    assert list(report.refused) == [0]
    assert report.refused[0].startswith(f"no message: {type(error).__name__}")
    assert len(report.refused[0]) <= LONGEST
    assert report.refused[0].isprintable()


def test_a_connection_that_breaks_is_no_clients_fault() -> None:
    with pytest.raises(OSError, match="SuperLink"):
        carried(ConnectionError("the SuperLink is gone"))


def test_a_supernode_whose_app_failed_is_lost_and_no_ray_actor() -> None:
    """Flower's code 0; in simulation it ends the run (`test_faults`), since Flower would go on with a dead actor."""
    answered, report = carried(Error(0, "AgentApp failed before replying."))
    assert answered == [1]
    assert report.lost == {0: "Flower error 0: AgentApp failed before replying."}
