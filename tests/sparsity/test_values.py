"""Rounding: stochastic, in 8-bit logarithms, with error feedback; and bitmaps that travel deflated."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.comm.payload import DEFLATED, Payload, PayloadEncoder, decode_payload
from ssfl_app.config import merge, parse
from ssfl_app.core.client import encode_with
from ssfl_app.core.strategy import ServerContext
from ssfl_app.options import ConfigError
from ssfl_app.sparsity.codec import MaskedValues
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import BLOCK, PayloadError, SecondVector, read_values, write_values
from ssfl_app.strategies import REGISTRY
from tests.in_process_grid import SMALL, Played, play, snapshot_of

pytestmark = pytest.mark.narrow

LOSSY = ("fp16", "bf16", "int8")
law = settings(deadline=None, derandomize=True, max_examples=60)
vectors = st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=40).map(lambda x: np.array(x, np.float32))
INT8 = {"wire.up-values": "int8", "wire.down-values": "int8"}


def rounded(flat: np.ndarray, kind: str, seed: int | None) -> np.ndarray:
    rng = None if seed is None else np.random.default_rng(seed)
    return read_values(write_values(flat, kind, rng), kind, flat.size)


def step(flat: np.ndarray, kind: str) -> np.ndarray:
    """The distance of the two neighbours between which a value is rounded, at most."""
    if kind == "int8":
        blocks = [np.abs(flat[i : i + BLOCK]).max() / 127 for i in range(0, flat.size, BLOCK)]
        return np.repeat(blocks, BLOCK)[: flat.size] * 1.001
    share, smallest = {"fp16": (2.0**-10, 2.0**-24), "bf16": (2.0**-7, 1e-38)}[kind]
    return np.maximum(np.abs(flat) * share, smallest)


@pytest.mark.parametrize("kind", LOSSY)
@given(vectors, st.integers(0, 5))
@law
def test_stochastic_rounding_goes_to_a_neighbour_and_repeats(kind: str, flat: np.ndarray, seed: int) -> None:
    once = rounded(flat, kind, seed)
    assert (np.abs(once - flat) <= step(flat, kind)).all()
    assert once.tobytes() == rounded(flat, kind, seed).tobytes()


@pytest.mark.parametrize("kind", LOSSY)
def test_stochastic_rounding_is_right_on_average(kind: str) -> None:
    flat = np.array([0.1, -0.1, 1 / 3, 3e-6, -7.77, 1.0, 0.0], dtype=np.float32)
    mean = np.mean([rounded(flat, kind, seed) for seed in range(4000)], axis=0)
    # The odds of 4,000 draws are within 4 deviations, 0.5 / sqrt(4000) of a step each.
    assert (np.abs(mean - flat) <= 4 * 0.5 / 4000**0.5 * step(flat, kind)).all()
    off = np.abs(rounded(flat, kind, None) - flat)
    assert (off > 4 * 0.5 / 4000**0.5 * step(flat, kind)).any()  # to the nearest it is not


scores = st.lists(st.one_of(st.just(0.0), st.floats(2.0**-40, 1e3, width=32)), min_size=1, max_size=600)


@given(scores)
@law
def test_logarithms_keep_the_order_zeros_and_half_a_step(drawn: list[float]) -> None:
    flat = np.array(drawn, dtype=np.float32)
    arrays = write_values(flat, "log8")
    assert arrays["values"].nbytes == flat.size
    back = read_values(arrays, "log8", flat.size)
    order = np.argsort(flat)
    assert (np.diff(back[order]) >= 0).all()
    assert ((back == 0) == (flat == 0)).all()
    low, high = (float(x) for x in arrays["scales"])
    told = flat >= low
    half = (high / low) ** (0.5 / 254) * 1.0001 if low else 1.0
    assert (back[told] <= flat[told] * half).all()
    assert (back[told] >= flat[told] / half).all()
    assert np.count_nonzero((flat > 0) & ~told) <= 0.005 * flat.size


@pytest.mark.parametrize("scales", [(0, 1), (-1, 1), (2, 1), (np.nan, 1), (1, np.inf), (1, np.nan)])
def test_scales_that_mean_nothing_are_refused(scales: tuple[float, float]) -> None:
    arrays = {"values": np.array([1], np.uint8), "scales": np.array(scales, np.float32)}
    with pytest.raises(PayloadError, match="scales are"):
        read_values(arrays, "log8", 1)


LAYOUT = Layout((("w.weight", (40, 30)), ("w.bias", (40,))), ("w.weight",))


@pytest.mark.parametrize("kind", LOSSY)
def test_what_rounding_takes_is_made_up_for(kind: str) -> None:
    """The sum of what was sent is off by one residual, however often something was sent."""
    rng = np.random.default_rng(0)
    mask = Mask.random(LAYOUT, 0.3, rng)
    state = mask.apply(LAYOUT.unflatten(rng.normal(size=LAYOUT.size).astype(np.float32)))
    flat, residual = LAYOUT.flatten(state), None
    total, plain = np.zeros((2, LAYOUT.size))
    for _ in range(50):
        arrays, residual = encode_with(MaskedValues(kind), LAYOUT, state, mask, residual)
        total += LAYOUT.flatten(MaskedValues(kind).decode(arrays, LAYOUT, mask)[0])
        arrays = MaskedValues(kind).encode(LAYOUT, state, mask)
        plain += LAYOUT.flatten(MaskedValues(kind).decode(arrays, LAYOUT, mask)[0])
    off, uncorrected = np.abs(total - 50 * flat).max(), np.abs(plain - 50 * flat).max()
    assert off <= np.abs(residual).max() * 1.01 + 1e-4
    assert off < 0.1 * uncorrected
    assert not residual[~mask.transmitted].any()


@pytest.mark.parametrize("strategy", ["ssfl", "fedavg"])
@pytest.mark.parametrize("more", [{"wire.rounding": "stochastic"}, {"wire.error-feedback": True}])
def test_a_run_whose_values_are_rounded_goes_on_to_the_same_bits(
    strategy: str, more: dict[str, Any], tmp_path: Path
) -> None:
    from flwr.app import ArrayRecord as Records

    keys = {"strategy": strategy, "run.checkpoint-every": 1} | INT8 | more
    whole = play(keys)
    arrays: dict[str, Any] = {}
    rest = play(keys, folder=tmp_path, until=2, prepare=snapshot_of(1, arrays))
    again = REGISTRY[strategy](ServerContext(whole.layout, rest.strategy.settings, folder=tmp_path))
    again.load_state_dict(1, arrays)
    finished = Played(again, whole.runtime, rest.grid)
    again.start(rest.grid, Records(whole.runtime.initial_state()), 3)
    assert finished.bits() == whole.bits() != play({"strategy": strategy} | INT8).bits()
    assert play(keys, luck=1, folder=tmp_path / "other").bits() == whole.bits()


def test_feedback_is_for_models_of_which_both_ends_know_the_places() -> None:
    able = {"ssfl", "shuffled", "random", "fedavg", "fedavg-ft", "fedprox", "flash"}
    layout = play({"strategy": "ssfl"}).layout
    for name in sorted(set(REGISTRY) - able):
        other = parse(merge(SMALL, {"strategy": name, "wire.error-feedback": True})).settings
        with pytest.raises(ConfigError, match=rf"wire.error-feedback is true; it is false with strategy {name},"):
            REGISTRY[name](ServerContext(layout, other))
    for name in sorted(able - {"ssfl", "fedavg"}):  # those are played above; none may take the key and ignore it
        keys = {"strategy": name, "run.rounds": 2, "flash.stage-epochs": 1} | INT8
        assert play(keys | {"wire.error-feedback": True}).bits() != play(keys).bits(), name


@pytest.mark.parametrize(("kind", "bytes_"), [("bf16", 2), ("log8", 1)])
def test_scores_travel_in_fewer_bytes_and_choose_nearly_the_same_weights(kind: str, bytes_: int) -> None:
    exact, other = play({"strategy": "ssfl"}), play({"strategy": "ssfl", "ssfl.score-values": kind})
    size, clients = exact.layout.prunable_size, SMALL["run.clients"]
    assert exact.records[0]["bytes_discovery_up"] == clients * 4 * size
    assert other.records[0]["bytes_discovery_up"] == clients * (bytes_ * size + (8 if kind == "log8" else 0))
    shared = (exact.strategy.mask & other.strategy.mask).count / exact.strategy.mask.count
    assert 0.97 < shared < 1


@pytest.mark.parametrize("criterion", ["pooled-snip", "grasp"])
def test_logarithms_are_refused_where_scores_have_signs(criterion: str) -> None:
    with pytest.raises(ConfigError, match=r"ssfl.score-values is 'log8'; it is fp32 or bf16"):
        play({"strategy": "ssfl", "ssfl.criterion": criterion, "ssfl.score-values": "log8"})


@given(st.integers(0, 3000), st.floats(0, 1), st.integers(0, 9))
@law
def test_deflated_bitmaps_come_back_and_are_never_larger(size: int, density: float, seed: int) -> None:
    bitmap = np.packbits(np.random.default_rng(seed).random(size) < density)
    record = PayloadEncoder("zlib").record(Payload({"mask": bitmap, "values": np.ones(3, np.float32)}))
    assert decode_payload(record, unfolded=bitmap.nbytes).arrays["mask"].tobytes() == bitmap.tobytes()
    sent = record["arrays"]["mask"]
    assert len(sent.data) <= bitmap.nbytes
    assert (sent.stype == DEFLATED) == (len(sent.data) < bitmap.nbytes)
    assert record["arrays"]["values"].stype != DEFLATED


MOST = 2000
SMALL_BITS = zlib.compress(bytes(1000))


@pytest.mark.parametrize(
    ("shape", "data", "said"),
    [
        ((999,), SMALL_BITS, "inflates to 1000 bytes or more"),
        ((1001,), SMALL_BITS, "inflates to 1000 bytes"),
        ((1000,), SMALL_BITS[:-6], "inflates to"),
        ((1000,), SMALL_BITS + b"more", "inflates to"),
        ((1000,), b"no zlib", "cannot be inflated"),
        ((MOST + 1,), SMALL_BITS, "together they have at most"),
        ((-1,), SMALL_BITS, "has shape"),
        ((10, 100), SMALL_BITS, "has shape"),
    ],
)
def test_bytes_that_do_not_inflate_to_their_shape_are_refused(shape: Any, data: bytes, said: str) -> None:
    record = RecordDict(
        {"arrays": ArrayRecord({"mask": Array("uint8", shape, DEFLATED, data)}), "facts": ConfigRecord()}
    )
    with pytest.raises(PayloadError, match=said):
        decode_payload(record, unfolded=MOST)


def test_many_deflated_arrays_are_refused_before_any_is_inflated() -> None:
    half = Array("uint8", (MOST // 2 + 1,), DEFLATED, SMALL_BITS)
    record = RecordDict({"arrays": ArrayRecord({"a": half, "b": half}), "facts": ConfigRecord()})
    with pytest.raises(PayloadError, match="together they have at most"):
        decode_payload(record, unfolded=MOST)


def test_only_bytes_travel_deflated() -> None:
    record = RecordDict(
        {"arrays": ArrayRecord({"x": Array("float32", (250,), DEFLATED, SMALL_BITS)}), "facts": ConfigRecord()}
    )
    with pytest.raises(PayloadError, match="it must be"):
        decode_payload(record, unfolded=MOST)


@pytest.mark.parametrize("strategy", ["ssfl", "topk"])
def test_a_run_with_deflated_bitmaps_is_the_same_run_for_fewer_bytes(strategy: str) -> None:
    keys = {"strategy": strategy, "mask.density": 0.02, "run.rounds": 2}
    plain, small = play(keys), play(keys | {"wire.bitmaps": "zlib"})
    assert small.bits() == plain.bits()

    def total(played: Played) -> int:
        return sum(r["bytes_mask_down"] + r["bytes_train_down"] + r["bytes_train_up"] for r in played.records[1:])

    assert total(small) < total(plain)


# ---- a second vector beside a model ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "int8"])
def test_a_second_vector_travels_beside_a_model_and_is_read_alone(kind: str) -> None:
    flat = np.linspace(-1, 1, 1500, dtype=np.float32)
    vector = SecondVector("control", kind, 1500)
    arrays = vector.write(flat)
    assert arrays.keys() == vector.allowed().keys()
    assert all(
        arrays[name].dtype == dtype and arrays[name].size <= most for name, (dtype, most) in vector.allowed().items()
    )
    model = write_values(np.zeros(3, np.float32), "fp32")
    assert not arrays.keys() & model.keys()
    np.testing.assert_array_equal(vector.read(arrays | model), read_values(write_values(flat, kind), kind, 1500))


def test_a_second_vector_that_is_none_is_refused_by_its_name() -> None:
    vector, flat = SecondVector("control", "fp32", 3), np.ones(3, np.float32)
    for arrays, reason in (
        ({"values": flat}, "control: no array 'values'"),
        ({"control.values": flat[:2]}, "control: values has length 2; it must be 3"),
        ({"control.values": flat * np.inf}, "control: 3 values are NaN or Inf"),
        ({"control.values": flat.astype(np.float16)}, "control: values is float16"),
    ):
        with pytest.raises(PayloadError, match=reason):
            vector.read(arrays)
