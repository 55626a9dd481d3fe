"""What a codec is given that it did not write: a PayloadError, whatever the arrays are."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.sparsity.codec import CODECS, Indexed
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import VALUE_TYPES, PayloadError, check_values

LAYOUT = Layout((("a", (4, 3)), ("bias", (2,)), ("b", (2, 2))), ("a", "b"))
MASK = Mask(LAYOUT, np.isin(np.arange(16), [0, 2, 3, 8, 11, 12, 15]))
STATE = LAYOUT.unflatten(np.arange(1, 19, dtype=np.float32))

CASES = [(name, values) for name in CODECS for values in VALUE_TYPES if name != "bits-only" or values == "fp32"]
ARRAYS = [
    (name, values, array) for name, values in CASES for array in CODECS[name](values).encode(LAYOUT, STATE, MASK)
]


def good(name, values="fp32"):
    return CODECS[name](values).encode(LAYOUT, STATE, MASK)


def refused(name, arrays, message=None, values="fp32"):
    codec = CODECS[name](values)
    with pytest.raises(PayloadError, match=message):
        codec.check(arrays, LAYOUT, MASK)
    with pytest.raises(PayloadError, match=message):
        codec.decode(arrays, LAYOUT, MASK)


@pytest.mark.parametrize(("name", "values", "array"), ARRAYS)
def test_missing_wrongly_typed_and_wrongly_long_arrays_are_refused(name, values, array):
    arrays = good(name, values)
    right = arrays[array]
    refused(name, {n: a for n, a in arrays.items() if n != array}, f"no array '{array}'", values)
    wider = {1: np.int16, 2: np.int32, 4: np.float64}[right.itemsize]
    for wrong in (right.astype(wider), right.astype(right.dtype.newbyteorder()) if right.itemsize > 1 else right > 0):
        refused(name, arrays | {array: wrong}, f"{array} is .* it must be flat", values)
    for wrong in (right[None], right[0]):
        refused(name, arrays | {array: np.asarray(wrong)}, f"{array} is .* of rank", values)
    for wrong in (right[:-1], np.concatenate([right, right[-1:]]), right[:0]):
        refused(name, arrays | {array: wrong}, values=values)


@pytest.mark.parametrize(("name", "values"), [case for case in CASES if case[0] != "bits-only"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 40000.0])
def test_values_that_are_not_finite_or_too_large_are_refused(name, values, bad):
    arrays = good(name, values)
    if values == "int8":
        arrays["scales"] = np.array([bad], np.float32)
    elif values == "bf16":
        arrays["values"][3] = np.float32(bad).view(np.uint32) >> 16
    else:
        arrays["values"][3] = bad
    with pytest.raises(PayloadError, match="must be finite and at most 32768"):
        CODECS[name](values).check(arrays, LAYOUT, MASK)


def test_check_values_names_what_is_wrong():
    check_values(np.zeros(0, np.float32))
    check_values(np.array([-(2.0**15), 2.0**15], np.float32))
    with pytest.raises(PayloadError, match="3 values are NaN or Inf"):
        check_values(np.array([1, np.nan, np.inf, -np.inf], np.float32))
    for sign in (1, -1):
        with pytest.raises(PayloadError, match=re.escape("values reach 3.28e+04 in magnitude")):
            check_values(np.array([0, sign * np.nextafter(np.float32(2**15), np.float32(np.inf))], np.float32))


@pytest.mark.parametrize(
    "index",
    [
        [-1, 2, 3, 8, 11, 12, 15],  # below
        [0, 2, 3, 8, 11, 12, 16],  # above
        [0, 3, 2, 8, 11, 12, 15],  # falls
        [0, 2, 2, 8, 11, 12, 15],  # twice
        [2**31 - 1, 2, 3, 8, 11, 12, 15],
    ],
)
def test_positions_must_rise_within_the_layout(index):
    arrays = good("indexed") | {"index": np.array(index, np.int32)}
    refused("indexed", arrays, "index must rise strictly within 0..15")


def test_positions_whose_differences_overflow_are_refused():
    index = np.array([0, 2**31 - 1, -(2**31), -1, 5], np.int32)
    refused("indexed", {"values": np.zeros(7, np.float32), "index": index})


# ---- whatever the arrays are ------------------------------------------------------------------

NUMBERS = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 15, 16, 127, -1, -2, 255, 2**31 - 1, -(2**31), 1e30])
DTYPES = st.sampled_from(["<f4", ">f4", "<f2", "<f8", "u1", "i1", "<u2", "<i4", "<i8", "?"])


@st.composite
def any_arrays(draw):
    arrays = {}
    for name in draw(st.sets(st.sampled_from(["values", "scales", "mask", "index"]))):
        numbers = draw(st.lists(NUMBERS, max_size=20))
        with np.errstate(all="ignore"):
            array = np.array(numbers, np.float64).astype(draw(DTYPES))
        arrays[name] = array.reshape(draw(st.sampled_from([(-1,), (-1,), (-1,), (1, -1)])))
    return arrays


@st.composite
def damaged(draw, name, values):
    """The right arrays with some entries overwritten, dropped or repeated."""
    arrays = {n: a.copy() for n, a in good(name, values).items()}
    for _ in range(draw(st.integers(1, 4))):
        array = draw(st.sampled_from(sorted(arrays)))
        place = draw(st.integers(0, max(0, arrays[array].size - 1)))
        how = draw(st.sampled_from(["set", "set", "set", "drop", "repeat"]))
        if how == "drop":
            arrays[array] = np.delete(arrays[array], slice(place, place + 1))
        elif how == "repeat":
            arrays[array] = np.insert(arrays[array], place, arrays[array][place : place + 1])
        elif arrays[array].size:
            word = draw(st.binary(min_size=8, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8]))
            arrays[array][place] = np.frombuffer(word, arrays[array].dtype)[0]
    return arrays


def survive(name, values, arrays):
    for method in ("check", "decode"):
        try:
            getattr(CODECS[name](values), method)(arrays, LAYOUT, MASK)
        except PayloadError:
            continue


@pytest.mark.parametrize(("name", "values"), CASES)
@given(data=st.data())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_no_arrays_raise_anything_but_a_payload_error(name, values, data):
    survive(name, values, data.draw(any_arrays()))


@pytest.mark.parametrize(("name", "values"), CASES)
@given(data=st.data())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_no_damage_raises_anything_but_a_payload_error(name, values, data):
    survive(name, values, data.draw(damaged(name, values)))


@given(data=st.data())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_a_structure_that_is_accepted_is_the_one_that_is_written(data):
    arrays = data.draw(damaged("indexed", "fp32"))
    try:
        state, mask = Indexed().decode(arrays, LAYOUT, MASK)
    except PayloadError:
        return
    again = Indexed().encode(LAYOUT, state, mask)
    assert {n: a.tobytes() for n, a in again.items()} == {n: a.tobytes() for n, a in arrays.items()}
