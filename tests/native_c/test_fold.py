"""Folds against exact arithmetic in plain Python, down to the bit.

The reference knows nothing of the C code: Python's floats give the sums in the stated order, its
fractions give the nearest value of each dtype.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metisfl import native_c

STRUCT_CODES = {
    "float16": "e",
    "bfloat16": "H",
    "float32": "f",
    "float64": "d",
    "int8": "b",
    "int16": "h",
    "int32": "i",
    "int64": "q",
    "uint8": "B",
    "uint16": "H",
    "uint32": "I",
    "uint64": "Q",
    "bool": "B",
}
# (significand bits with the leading one, smallest exponent of a normal value, largest exponent)
FLOAT_FORMATS = {
    "float16": (11, -14, 15),
    "bfloat16": (8, -126, 127),
    "float32": (24, -126, 127),
    "float64": (53, -1022, 1023),
}
POSITIVE_NAN = {
    "float16": "007e",
    "bfloat16": "c07f",
    "float32": "0000c07f",
    "float64": "000000000000f87f",
}

dtypes = st.sampled_from(sorted(native_c.DTYPES))
finite = st.floats(allow_nan=False, allow_infinity=False)
moderate = st.floats(min_value=-1e6, max_value=1e6)


# ---- the reference -------------------------------------------------------------------------------


def item_bytes(dtype: str) -> int:
    return struct.calcsize(f"={STRUCT_CODES[dtype]}")


def decode(data: bytes, dtype: str) -> list[float]:
    """The values of a buffer as doubles."""
    if dtype == "bfloat16":
        data = b"".join(b"\0\0" + data[at : at + 2] for at in range(0, len(data), 2))
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    values = struct.unpack(f"<{len(data) // item_bytes(dtype)}{STRUCT_CODES[dtype]}", data)
    return [float(bool(value)) if dtype == "bool" else float(value) for value in values]


def nearest_even(value: Fraction) -> int:
    return round(value)  # Python rounds a Fraction to nearest, ties to even


def encode_float(value: float, dtype: str) -> bytes:
    precision, exponent_min, exponent_max = FLOAT_FORMATS[dtype]
    if math.isnan(value):
        return bytes.fromhex(POSITIVE_NAN[dtype])
    magnitude = abs(value)
    if magnitude not in (0.0, math.inf):
        exponent = max(math.frexp(magnitude)[1] - 1, exponent_min)
        step = Fraction(2) ** (exponent - precision + 1)
        exact = nearest_even(Fraction(magnitude) / step) * step
        # Exact from here on: a float of any of these formats is a double.
        magnitude = math.inf if exact >= Fraction(2) ** (exponent_max + 1) else float(exact)
    rounded = math.copysign(magnitude, value)
    if dtype == "bfloat16":
        return struct.pack("<f", rounded)[2:]
    return struct.pack(f"<{STRUCT_CODES[dtype]}", rounded)


def encode(value: float, dtype: str) -> bytes:
    if dtype in FLOAT_FORMATS:
        return encode_float(value, dtype)
    if dtype == "bool":
        return bytes([value >= 0.5])
    bits = 8 * item_bytes(dtype)
    lowest, highest = (
        (0, 2**bits - 1) if dtype[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    )
    if math.isnan(value):
        whole = 0
    elif math.isinf(value):
        whole = highest if value > 0 else lowest
    else:
        whole = min(max(nearest_even(Fraction(value)), lowest), highest)
    return struct.pack(f"<{STRUCT_CODES[dtype]}", whole)


def reference(
    updates: Sequence[bytes], weights: Sequence[float], dtype: str, divisor: float, out_dtype: str
) -> bytes:
    sums = [0.0] * (len(updates[0]) // item_bytes(dtype))
    for update, weight in zip(updates, weights, strict=True):
        for index, value in enumerate(decode(update, dtype)):
            sums[index] += value * weight
    return b"".join(encode(total / divisor, out_dtype) for total in sums)


# ---- folds ---------------------------------------------------------------------------------------


@st.composite
def folds(draw: st.DrawFn) -> tuple[str, list[bytes], list[float]]:
    """A dtype, some updates of one length with any bits at all, their weights."""
    dtype = draw(dtypes)
    count = draw(st.integers(0, 70))
    length = count * item_bytes(dtype)
    updates = draw(st.lists(st.binary(min_size=length, max_size=length), min_size=1, max_size=4))
    weights = draw(st.lists(finite | moderate, min_size=len(updates), max_size=len(updates)))
    return dtype, updates, weights


def fold(
    updates: Sequence[bytes],
    weights: Sequence[float],
    dtype: str,
    divisor: float,
    out_dtype: str,
    *,
    cuts: Sequence[int] = (),
    at_once: bool = False,
    shift: int = 0,
) -> bytes:
    """The same through the library, in pieces, from and to an address that is off by `shift`."""
    size = item_bytes(dtype)
    count = len(updates[0]) // size
    shifted = [memoryview(bytes(shift) + update)[shift:] for update in updates]
    bounds = sorted({0, count, *(cut for cut in cuts if cut <= count)})
    out = memoryview(bytearray(shift + count * item_bytes(out_dtype)))[shift:]
    with native_c.Accumulator(capacity=count + 3) as accumulator:
        accumulator.begin(count)
        for start, end in pairwise(bounds):
            pieces = [update[start * size : end * size] for update in shifted]
            if at_once:
                accumulator.absorb_many(pieces, dtype, weights, start)
            else:
                for piece, weight in zip(pieces, weights, strict=True):
                    accumulator.absorb(piece, dtype, weight, start)
        accumulator.finalise(out_dtype, out, divisor)
    return bytes(out)


@given(folds(), dtypes, finite.filter(bool) | st.just(3.0))
def test_every_bit_is_the_exact_one(
    case: tuple[str, list[bytes], list[float]], out_dtype: str, divisor: float
) -> None:
    dtype, updates, weights = case
    expected = reference(updates, weights, dtype, divisor, out_dtype)
    assert fold(updates, weights, dtype, divisor, out_dtype).hex() == expected.hex()


@given(folds(), st.lists(st.integers(0, 70), max_size=4), st.booleans(), st.integers(0, 7))
def test_neither_cuts_nor_fusion_nor_alignment_change_a_bit(
    case: tuple[str, list[bytes], list[float]], cuts: list[int], at_once: bool, shift: int
) -> None:
    dtype, updates, weights = case
    whole = fold(updates, weights, dtype, 7.0, "float64")
    parts = fold(updates, weights, dtype, 7.0, "float64", cuts=cuts, at_once=at_once, shift=shift)
    assert parts.hex() == whole.hex()


def test_a_large_fold_has_the_bits_of_numpy() -> None:
    """More values than a tile, more updates than are folded at once."""
    generator = np.random.default_rng(1)
    updates = [generator.normal(size=20_011).astype(np.float32) for _ in range(21)]
    weights = generator.uniform(1, 1000, len(updates)).tolist()
    expected = np.zeros(20_011)
    for update, weight in zip(updates, weights, strict=True):
        expected += update.astype(np.float64) * weight
    expected /= sum(weights)
    out = np.empty(20_011, np.float32)
    with native_c.Accumulator(capacity=20_011) as accumulator:
        accumulator.begin(20_011)
        accumulator.absorb_many(updates, "float32", weights)
        accumulator.finalise("float32", out, sum(weights))
    assert out.tobytes() == expected.astype(np.float32).tobytes()


def test_learners_count_in_the_order_in_which_they_come() -> None:
    """Adding floats is not associative: this is why a round folds in the order of names."""
    values = [struct.pack("<d", value) for value in (1e16, 1.0, -1e16)]
    first = fold(values, [1.0] * 3, "float64", 1.0, "float64")
    second = fold([values[0], values[2], values[1]], [1.0] * 3, "float64", 1.0, "float64")
    assert (decode(first, "float64"), decode(second, "float64")) == ([0.0], [1.0])


def test_a_range_begins_anew_and_sums_outlive_finalise() -> None:
    out = bytearray(8)
    with native_c.Accumulator(capacity=2) as accumulator:
        accumulator.begin(2)
        accumulator.absorb(struct.pack("<2d", 5.0, 6.0), "float64", 1.0)
        accumulator.begin(1)
        accumulator.absorb(struct.pack("<d", 3.0), "float64", 2.0)
        accumulator.finalise("float64", out, 2.0)
        accumulator.finalise("float64", out, 3.0)
    assert struct.unpack("<d", out) == (2.0,)


def test_tensors_of_two_dtypes_share_one_range() -> None:
    out = bytearray(4)
    with native_c.Accumulator(capacity=4) as accumulator:
        accumulator.begin(4)
        accumulator.absorb(bytes([1, 2]), "uint8", 10.0)
        accumulator.absorb(struct.pack("<2h", -3, 4), "int16", 10.0, offset=2)
        accumulator.finalise("int8", out, 1.0)
    assert struct.unpack("4b", out) == (10, 20, -30, 40)


@pytest.mark.parametrize(
    ("dtype", "quotient", "expected"),
    [
        ("float16", 2049.0, 2048.0),  # a tie goes to the even neighbour
        ("float16", 2051.0, 2052.0),
        ("float16", 2049.000001, 2050.0),  # not a tie; by way of float32 it would be one
        ("float16", 65519.99, 65504.0),
        ("float16", 65520.0, math.inf),
        ("float16", -(2.0**-25), -0.0),
        ("bfloat16", 257.0, 256.0),
        ("bfloat16", 257.000000001, 258.0),
        ("bfloat16", 3.4e38, math.inf),
        ("float32", 16777217.0, 16777216.0),
        ("float32", 1e39, math.inf),
        ("float64", -0.0, 0.0),  # since a sum begins at +0
        ("int8", 2.5, 2),
        ("int8", 3.5, 4),
        ("int8", -2.5, -2),
        ("int8", 1e9, 127),
        ("int8", -math.inf, -128),
        ("int64", math.inf, 2**63 - 1),
        ("int64", -(2.0**70), -(2**63)),
        ("uint64", 2.0**64, 2**64 - 1),
        ("uint8", -0.4, 0),
        ("uint8", -1.0, 0),
        ("uint16", math.nan, 0),
        ("bool", 0.5, 1),
        ("bool", math.nextafter(0.5, 0.0), 0),
        ("bool", math.nan, 0),
    ],
)
def test_rounding_by_example(dtype: str, quotient: float, expected: float) -> None:
    update = struct.pack("<d", quotient)
    result = fold([update], [1.0], "float64", 1.0, dtype)
    if dtype == "bool" or dtype not in FLOAT_FORMATS:
        assert struct.unpack(f"<{STRUCT_CODES[dtype]}", result) == (expected,)
    else:
        assert repr(decode(result, dtype)) == repr([float(expected)])


@pytest.mark.parametrize("dtype", sorted(FLOAT_FORMATS))
def test_every_nan_becomes_the_same_nan(dtype: str) -> None:
    minus_nan_with_payload = bytes.fromhex("01000000000ff8ff")
    result = fold([minus_nan_with_payload], [1.0], "float64", 1.0, dtype)
    assert result.hex() == POSITIVE_NAN[dtype]
