"""Values become coefficients, scales and grids by powers of two, and nothing is lost on the way."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metisfl.learner.packing import (
    LARGEST,
    as_float64,
    coefficients_of,
    pieces,
    round_to_grid,
    scale_down,
    scale_up,
    slots_of,
)

RINGS = (16, 1024, 2048, 4096)
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


@pytest.mark.parametrize("ring", [8, 64, 256])
def test_slots_are_the_polynomials_values_at_the_roots_that_openfhe_uses(ring: int) -> None:
    coefficients = np.random.default_rng(ring).normal(size=(3, ring))
    roots = [
        np.exp(1j * np.pi * (pow(5, slot, 2 * ring) * np.arange(ring) % (2 * ring)) / ring)
        for slot in range(ring // 2)
    ]
    assert np.allclose(slots_of(coefficients), coefficients @ np.array(roots).T, atol=1e-12)


@pytest.mark.parametrize("ring", RINGS)
def test_coefficients_come_back_from_slots(ring: int) -> None:
    random = np.random.default_rng(ring)
    for coefficients in (
        random.uniform(-1, 1, (5, ring)),
        np.ones((1, ring)),
        np.where(np.arange(ring) % 2, 1.0, -1.0)[None],
        np.eye(1, ring, ring - 1),
    ):
        slots = slots_of(coefficients)
        assert slots.shape == (len(coefficients), ring // 2)
        assert np.abs(coefficients_of(slots) - coefficients).max() < 1e-14


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    rows = np.random.default_rng(0).normal(size=(7, 2048))
    slots = slots_of(rows)
    back = coefficients_of(slots)
    for number, row in enumerate(rows):
        assert np.array_equal(slots_of(row[None])[0], slots[number])
        assert np.array_equal(coefficients_of(slots[number][None])[0], back[number])


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), max_size=12), st.integers(0, 60), st.integers(0, 60))
def test_pieces_name_each_value_of_a_range_once_and_in_order(
    counts: list[int], start: int, length: int
) -> None:
    owners = [(tensor, value) for tensor, count in enumerate(counts) for value in range(count)]
    found = []
    for piece in pieces([*itertools.accumulate(counts)], start, start + length):
        assert piece.offset == len(found)
        assert piece.start < piece.stop
        found += [(piece.tensor, value) for value in range(piece.start, piece.stop)]
    assert found == owners[start : start + length]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_float_is_a_float64_exactly(dtype: str) -> None:
    kind = DTYPES[dtype]
    bits = np.random.default_rng(1).integers(0, 256, 4096, np.uint8).view(kind)
    bits = np.concatenate([bits, np.array([0.0, -0.0, LARGEST[dtype], -LARGEST[dtype]], kind)])
    found = as_float64(bits, dtype)
    assert found.dtype == np.float64
    with np.errstate(invalid="ignore"):  # of signalling NaNs
        assert np.array_equal(found, bits.astype(np.float64), equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(bits))


def test_bfloat16_may_be_held_as_uint16() -> None:
    values = np.array([1.5, -3e38, 2.0**-130], ml_dtypes.bfloat16)
    assert np.array_equal(as_float64(values.view(np.uint16), "bfloat16"), values.astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_value_of_each_dtype_is_known(dtype: str) -> None:
    assert LARGEST[dtype] == float(ml_dtypes.finfo(DTYPES[dtype]).max)


@settings(deadline=None)
@given(
    st.floats(-1.7e308, 1.7e308, allow_subnormal=False),
    st.integers(0, 1100),
    st.floats(1e-3, 1e3),
)
def test_scaling_down_rounds_once_and_never_overflows(
    value: float, exponent: int, weight: float
) -> None:
    values = np.array([math.ldexp(value, min(0, exponent - 1030))])  # fits the scale
    kept = float(values[0])
    scale_down(values, exponent, weight)
    assert values[0] == math.ldexp(kept, -exponent) * weight
    assert abs(values[0]) <= weight


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8), st.integers(0, 1000))
def test_scaling_up_undoes_scaling_down(fractions: list[float], exponent: int) -> None:
    kept = np.ldexp(np.round(np.ldexp(fractions, 20)), exponent - 20)
    values = kept.copy()
    scale_down(values, exponent, 1.0)
    assert np.array_equal(scale_up(values, exponent, 1.0, "float64"), kept)


@pytest.mark.parametrize(
    ("dtype", "exponent"), [("float16", 16), ("bfloat16", 130), ("float32", 130), ("float64", 1026)]
)
def test_what_the_grid_carries_beyond_the_largest_value_becomes_the_largest(
    dtype: str, exponent: int
) -> None:
    sums = np.array([1.0, -1.0, math.ldexp(LARGEST[dtype], -exponent) + 2.0**-20])
    found = scale_up(2 * sums, exponent, 2.0, dtype)
    assert found.tolist() == [LARGEST[dtype], -LARGEST[dtype], LARGEST[dtype]]


@settings(deadline=None)
@given(st.lists(st.floats(-1000, 1000), min_size=1, max_size=8).map(np.array), st.integers(1, 40))
def test_rounding_to_the_grid_is_to_the_nearest_multiple_and_happens_once(
    values: np.ndarray, grid: int
) -> None:
    rounded = values.copy()
    round_to_grid(rounded, grid)
    steps = rounded * 2.0**grid
    assert np.array_equal(steps, np.rint(steps))
    assert (np.abs(rounded - values) <= 2.0 ** -(grid + 1)).all()
    again = rounded.copy()
    round_to_grid(again, grid)
    assert np.array_equal(again, rounded)
