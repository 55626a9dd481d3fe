"""Parcels and Flower records: nothing is lost, little is added, and what others send is checked."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.app.metadata import Metadata
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.comm import payload as payload_module
from ssfl_app.comm.payload import (
    JOINED,
    SERIAL_TYPE,
    ClientState,
    Payload,
    PayloadEncoder,
    decode_metadata,
    decode_payload,
    encoded_sizes,
)
from ssfl_app.sparsity.values import PayloadError

law = settings(deadline=None, derandomize=True, max_examples=80)

SIZES = {"float32": 4, "float16": 2, "uint16": 2, "uint8": 1, "int8": 1, "int32": 4, "int64": 8}
FACTS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=20),
)


@st.composite
def payloads(draw):
    arrays = {}
    for name in draw(st.sets(st.sampled_from(["values", "scales", "mask", "index"]))):
        dtype = draw(st.sampled_from(sorted(SIZES)))
        count = draw(st.integers(0, 9))
        raw = draw(st.binary(min_size=count * SIZES[dtype], max_size=count * SIZES[dtype]))
        arrays[name] = np.frombuffer(raw, dtype)  # any bits, NaN too
    return Payload(arrays, draw(st.dictionaries(st.text(max_size=8), FACTS, max_size=4)))


def record_of(arrays=None, metadata=None):
    return RecordDict({"arrays": ArrayRecord(arrays or {}), "facts": ConfigRecord(metadata or {})})


def over_the_wire(record):
    """Deflate every object of a record and build the record again from the bytes alone."""
    objects = get_all_nested_objects(record)
    built = {}
    for name, item in objects.items():
        content = item.deflate()
        built[name] = type(item).inflate(content, {child: built[child] for child in (item.children or {})})
    return built[record.object_id]


def assert_same(got, sent):
    assert list(got.arrays) == list(sent.arrays)
    for name, array in sent.arrays.items():
        assert (got.arrays[name].dtype, got.arrays[name].shape) == (array.dtype, array.shape)
        assert got.arrays[name].tobytes() == array.tobytes()
    assert list(got.metadata) == list(sent.metadata)
    for name, fact in sent.metadata.items():
        assert type(got.metadata[name]) is type(fact)
        assert got.metadata[name] == fact or fact != fact


@given(payloads())
@law
def test_what_is_packed_is_read(payload):
    record = PayloadEncoder().record(payload)
    assert_same(decode_payload(record), payload)
    assert_same(decode_payload(over_the_wire(record)), payload)
    assert payload.nbytes == sum(len(array.tobytes()) for array in payload.arrays.values())


def test_bytes_on_the_wire_are_little_endian_and_bare():
    array = PayloadEncoder().record(Payload({"index": np.array([1, -2, 258], np.int32)}))["arrays"]["index"]
    assert (array.dtype, array.shape, array.stype) == ("int32", (3,), "ssfl.raw.v1")
    assert array.data == b"\x01\0\0\0" + b"\xfe\xff\xff\xff" + b"\x02\x01\0\0"


def test_arrays_that_are_read_are_views_that_cannot_be_written_to():
    record = PayloadEncoder().record(Payload({"values": np.arange(5, dtype=np.float32)}))
    got = decode_payload(record).arrays["values"]
    assert np.shares_memory(got, np.frombuffer(record["arrays"]["values"].data, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        got[0] = 1


def test_every_second_entry_of_an_array_is_packed_as_if_it_were_copied():
    array = np.arange(10, dtype=np.int32)[::2]
    assert decode_payload(PayloadEncoder().record(Payload({"index": array}))).arrays["index"].tolist() == [
        0,
        2,
        4,
        6,
        8,
    ]


def test_an_array_that_payloads_share_is_serialised_once():
    packer, model = PayloadEncoder(), np.arange(1000, dtype=np.float32)
    records = [packer.record(Payload({"values": model}, {"round": i})) for i in range(3)]
    one, *others = [record["arrays"]["values"] for record in records]
    assert all(other.data is one.data for other in others)
    assert len({record["arrays"].object_id for record in records}) == 1
    assert packer.record(Payload({"values": model.copy()}))["arrays"]["values"].data is not one.data


def test_a_packer_never_takes_one_array_for_another_whose_memory_is_gone():
    packer = PayloadEncoder()
    for i in range(200):
        record = packer.record(Payload({"values": np.full(3, i, np.float32)}))
        assert decode_payload(record).arrays["values"].tolist() == [i] * 3


@pytest.mark.parametrize(
    "array", [np.zeros(3), np.zeros(3, np.uint64), np.zeros(3, bool), np.zeros((2, 2), np.float32)]
)
def test_arrays_that_no_codec_writes_are_not_packed(array):
    with pytest.raises(TypeError, match=r"the wire takes flat \['float32', "):
        PayloadEncoder().record(Payload({"values": array}))


def test_a_big_endian_array_is_refused_or_arrives_as_it_was():
    try:
        record = PayloadEncoder().record(Payload({"values": np.array([1.0], ">f4")}))
    except TypeError:
        return
    assert decode_payload(record).arrays["values"].tolist() == [1.0]


def size_of_message(payload):
    """Bytes of all objects that Flower stores and sends for a message, chunks of arrays included."""
    big, day = 2**63 - 1, 86_400.0
    metadata = Metadata(big, "0" * 64, big, big, "0" * 64, "1000", 2e9, day, "train.fast", big, big)
    message = Message(content=PayloadEncoder().record(payload), metadata=metadata)
    return sum(len(item.deflate()) for item in get_all_nested_objects(message).values())


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"values": ("f4", 1000), "mask": ("u1", 500)},
        # ResNet-18: at density 0.5, with its bitmap, as int8, and dense
        {"values": ("f4", 5_591_786)},
        {"values": ("f4", 5_591_786), "mask": ("u1", 1_395_544)},
        {"values": ("i1", 5_591_786), "scales": ("f4", 5461), "mask": ("u1", 1_395_544)},
        {"values": ("f4", 11_173_962)},
    ],
)
def test_a_whole_message_is_at_most_2_kb_larger_than_its_payload(sizes):
    # All bytes differ from chunk to chunk: Flower would send equal chunks once.
    raw = np.random.default_rng(1).bytes(44_695_848)
    arrays = {name: np.frombuffer(raw, dtype, count) for name, (dtype, count) in sizes.items()}
    metadata = {"round": 1000, "digest": "0123456789abcdef", "samples": 50_000, "loss": 1 / 3, "client": 99}
    payload = Payload(arrays, metadata)
    assert payload.nbytes == sum(count * int(dtype[1]) for dtype, count in sizes.values())
    assert 0 < size_of_message(payload) - payload.nbytes <= 2000


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (RecordDict(), "record 'arrays' is not there"),
        (RecordDict({"arrays": ArrayRecord()}), "record 'facts' is not there"),
        (RecordDict({"arrays": ConfigRecord(), "facts": ConfigRecord()}), "record 'arrays' is ConfigRecord"),
        (RecordDict({"arrays": ArrayRecord(), "facts": MetricRecord({"a": 1})}), "record 'facts' is MetricRecord"),
        (record_of(metadata={"samples": [1, 2]}), "fact samples is list; it must be a scalar"),
        (record_of({"x": Array(np.zeros(2, np.float32))}), "array x is float32 in 'numpy.ndarray'; it must be"),
        (record_of({"x": Array("float64", (1,), SERIAL_TYPE, bytes(8))}), "array x is float64"),
        (record_of({"x": Array("object", (1,), SERIAL_TYPE, bytes(8))}), "array x is object"),
        (record_of({"x": Array("float32", (2,), SERIAL_TYPE, bytes(4))}), r"array x has shape \(2,\) and 4 bytes"),
        (record_of({"x": Array("float32", (1,), SERIAL_TYPE, bytes(5))}), r"array x has shape \(1,\) and 5 bytes"),
        (record_of({"x": Array("float32", (1, 1), SERIAL_TYPE, bytes(4))}), r"array x has shape \(1, 1\)"),
        (record_of({"x": Array("float32", (), SERIAL_TYPE, bytes(4))}), r"array x has shape \(\)"),
        (record_of({"x": Array("float32", (-1,), SERIAL_TYPE, b"")}), r"array x has shape \(-1,\)"),
    ],
)
def test_malformed_records_are_refused(record, message):
    with pytest.raises(PayloadError, match=message):
        decode_payload(record)


@given(
    st.sampled_from([*SIZES, "float64", "object", "", "<f4", "f4"]),
    st.lists(st.integers(-2, 5) | st.just(2**62), max_size=3).map(tuple),
    st.sampled_from([SERIAL_TYPE, SERIAL_TYPE, SERIAL_TYPE, "numpy.ndarray", ""]),
    st.binary(max_size=24),
    st.dictionaries(st.text(max_size=3), FACTS | st.lists(st.integers(0, 3), max_size=2), max_size=2),
)
@law
def test_any_metadata_is_read_right_or_refused(dtype, shape, stype, data, metadata):
    good = stype == SERIAL_TYPE and dtype in SIZES and shape == (len(data) / SIZES[dtype],)
    good = good and not any(isinstance(fact, list) for fact in metadata.values())
    record = record_of({"x": Array(dtype, shape, stype, data)}, metadata)
    if not good:
        with pytest.raises(PayloadError):
            decode_payload(record)
        return
    got = decode_payload(record)
    assert got.arrays["x"].tobytes() == data
    assert got.arrays["x"].dtype.name == dtype


@given(st.sampled_from(sorted(SIZES)), st.integers(0, 6), FACTS)
@law
def test_right_metadata_is_never_refused(dtype, count, fact):
    record = record_of({"x": Array(dtype, (count,), SERIAL_TYPE, bytes(count * SIZES[dtype]))}, {"a": fact})
    assert decode_payload(record).arrays["x"].tolist() == [0] * count


class TestMemory:
    @pytest.fixture
    def context(self):
        return Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})

    def test_it_starts_empty(self, context):
        assert ClientState(context, 0).bitmap("d1") is None
        assert ClientState(context, 0).bitmap("") is None

    def test_it_keeps_one_mask_under_its_digest(self, context):
        ClientState(context, 0).keep("d1", np.array([1, 0, 255], np.uint8))
        held = ClientState(context, 0).bitmap("d1")
        assert held.dtype == np.uint8
        assert held.tolist() == [1, 0, 255]
        assert ClientState(context, 0).bitmap("d2") is None

    def test_another_mask_replaces_the_one_before(self, context):
        memory = ClientState(context, 0)
        memory.keep("d1", np.array([1, 2, 3, 4], np.uint8))
        memory.keep("d2", np.array([9], np.uint8))
        assert memory.bitmap("d1") is None
        assert memory.bitmap("d2").tolist() == [9]
        assert list(context.state) == ["ssfl"]

    def test_it_survives_the_way_to_a_worker_and_back(self, context):
        ClientState(context, 0).keep("d1", np.arange(256).astype(np.uint8))
        context.state = over_the_wire(context.state)
        assert ClientState(context, 0).bitmap("d1").tolist() == list(range(256))

    def test_a_foreign_record_of_its_name_is_no_mask(self, context):
        context.state["ssfl"] = MetricRecord({"digest": 1})
        assert ClientState(context, 0).bitmap("d1") is None


class TestTwoProcesses:
    """What two ClientApps of one node do at once happens one after the other. An flock holds between threads, too."""

    @pytest.fixture
    def states(self, tmp_path, monkeypatch):
        """Return the states of eight processes, which take their time between reading and writing."""
        write = payload_module.sealed

        def slow(*given):
            time.sleep(0.05)
            return write(*given)

        monkeypatch.setattr(payload_module, "sealed", slow)
        contexts = [Context(0, 0, {}, RecordDict(), {}) for _ in range(8)]
        return [
            ClientState(context, 0, tmp_path, survives=True, journal=tmp_path / "exchanges" / "x")
            for context in contexts
        ]

    def test_one_answers_an_exchange(self, states):
        states[0].note_masked(5, 1)

        def answers(state):
            try:
                state.note_unmasked(5, 2)
            except PayloadError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(answers, states)) == 1

    def test_a_sum_is_told_of_the_last_question_only(self, states):
        """One process reads exchange 5, another masks 6: no sum of 5 is noted under the question of 6."""
        states[0].note_masked(5, 111)
        assert states[0].masked(5)["asked"] == 111
        states[1].note_masked(6, 222)
        with pytest.raises(PayloadError, match="exchange is 5; this client sent no masked answer"):
            states[0].note_unmasked(5, 1000)
        states[1].note_unmasked(6, 2000)

    def test_each_round_that_is_begun_is_paid_for(self, states):
        def begin(state):
            return state.change_ledger(lambda held: {"begun": held.get("begun", 0) + 1})["begun"]

        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(begin, states)) == list(range(1, 9))
        assert states[0].ledger() == {"begun": 8}


class TestPersonalState:
    """What was made in a reply that the server never took did not happen; what a checkpoint needs is kept."""

    @pytest.fixture(params=["files", "records"])
    def memory(self, request, tmp_path):
        context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
        return ClientState(context, 3, tmp_path if request.param == "files" else None)

    def save(self, memory, round_, back_to=0):
        memory.save(round_, {"model": np.full(3, round_, np.float32)}, back_to)

    def load(self, memory, since):
        kept = memory.load(since)
        return None if kept is None else int(kept["model"][0])

    def test_it_starts_empty(self, memory):
        assert memory.load(5) is None

    def test_it_returns_the_last_round_that_was_accepted(self, memory):
        self.save(memory, 2)
        self.save(memory, 4)
        assert self.load(memory, 4) == 4
        assert memory.load(4)["model"].dtype == np.float32

    def test_what_came_after_never_happened(self, memory):
        self.save(memory, 2)
        self.save(memory, 4)
        assert self.load(memory, 3) == 2
        assert self.load(memory, 4) == 2
        assert self.load(memory, 1) is None

    def test_versions_that_nobody_can_go_back_to_are_deleted(self, memory):
        for round_ in (1, 2, 3, 4):
            self.save(memory, round_)
        self.save(memory, 5, back_to=3)  # 1 and 2 go: a run can be taken up after 3 at the earliest
        assert self.load(memory, 3) == 3
        assert self.load(memory, 2) is None

    def test_clients_do_not_see_each_other(self, tmp_path):
        context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
        self.save(ClientState(context, 3, tmp_path), 1)
        assert ClientState(context, 4, tmp_path).load(1) is None
        assert not context.state  # no model in what Flower sends to a worker and back

    def test_it_survives_the_way_to_a_worker_and_back(self):
        context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
        self.save(ClientState(context, 0), 7)
        context.state = over_the_wire(context.state)
        assert self.load(ClientState(context, 0), 7) == 7


# ---- one object ---------------------------------------------------------------------------------


@given(payloads(), st.sampled_from(["plain", "zlib"]))
@law
def test_small_arrays_travel_in_one_object_with_the_facts_and_are_the_same(payload, bitmaps):
    alone, joined = PayloadEncoder(bitmaps).record(payload), PayloadEncoder(bitmaps, join=True).record(payload)
    assert_same(decode_payload(over_the_wire(joined), unfolded=10**6), payload)
    assert encoded_sizes(joined) == encoded_sizes(alone)  # what is counted
    assert len(get_all_nested_objects(joined)) == 2


def test_the_records_of_a_message_are_two_objects_instead_of_five_up_to_a_size():
    for size, objects in ((JOINED, 2), (JOINED + 1, 5)):
        payload = Payload({"values": np.zeros(size, np.uint8)}, {"round": 1})
        record = PayloadEncoder(join=True).record(payload)
        assert len(get_all_nested_objects(record)) == objects
        assert_same(decode_payload(record), payload)
        assert len(get_all_nested_objects(PayloadEncoder().record(payload))) == 5


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"ssfl.raw.v1 float32 1": b"abcd"}, "is no array, or another one has its name"),
        ({"ssfl.raw.v1 float32 -1 values": b"abcd"}, "is no array, or another one has its name"),
        ({"ssfl.raw.v1 float32 ¹ values": b"abcd"}, "is no array, or another one has its name"),
        ({"ssfl.raw.v1 float32 1 values": "abcd"}, "is no array, or another one has its name"),
        (
            {"ssfl.raw.v1 float32 1 values": b"abcd", "ssfl.raw.v1 int32 1 values": b"abcd"},
            "another one has its name",
        ),
        ({"ssfl.raw.v1 float32 2 values": b"abcd"}, r"values has shape \(2,\) and 4 bytes of float32"),
        ({"ssfl.raw.v1 float32 1 values": b"abcde"}, r"values has shape \(1,\) and 5 bytes of float32"),
        ({"ssfl.raw.v1 float64 1 values": b"abcdefgh"}, "values is float64 in"),
        ({"ssfl.zlib.v1 float32 1 values": b"abcd"}, "values is float32 in 'ssfl.zlib.v1'"),
        ({"ssfl.zlib.v1 uint8 999 mask": b"abcd"}, "deflated arrays have 999 bytes"),
        ({"ssfl.raw.v1 float32 1 other": b"abcd"}, "array other is none of this message's"),
        ({"ssfl.raw.v1 float32 3 values": bytes(12)}, "values has length 3; it has at most 2"),
    ],
)
def test_arrays_among_the_facts_are_checked_as_others_are(facts, reason):
    allowed = {"values": (np.float32, 2)} if "at most 2" in reason or "none of" in reason else None
    with pytest.raises(PayloadError, match=reason):
        decode_payload(RecordDict({"facts": ConfigRecord(facts)}), allowed, unfolded=998)


def test_an_array_among_the_facts_is_no_fact_and_what_is_no_message_has_no_size():
    record = PayloadEncoder(join=True).record(Payload({"values": np.ones(2, np.float32)}, {"round": 3, "a b": 1}))
    assert decode_metadata(record) == {"round": 3, "a b": 1}
    assert encoded_sizes(record) == {"values": 8}
    odd = ConfigRecord({f"{SERIAL_TYPE} ": 1})
    for other in ({}, {"arrays": ConfigRecord()}, {"facts": MetricRecord()}, {"facts": odd}):
        assert encoded_sizes(RecordDict(other)) == {}
