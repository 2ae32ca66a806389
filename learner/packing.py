"""Values into polynomial coefficients and back: floats, scales, the grid, and OpenFHE's slots.

Rule 1: one value is one coefficient. CKKS encodes slots, the values of a polynomial at the roots
zeta^(5^j), zeta = exp(i pi / N); so the coefficients go through that transform first, OpenFHE's
encoder inverts it, and the encoded polynomial has the values themselves as coefficients. That is
twice as many values as real slots, with a fraction of their error.
Rule 2: a scale is a power of two, and so is a grid step: nothing is lost but by the weight and the
rounding. What was finite comes back finite.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Piece",
    "as_float64",
    "coefficients_of",
    "pieces",
    "round_to_grid",
    "scale_down",
    "scale_up",
    "slots_of",
]

Floats = NDArray[np.float64]
Complexes = NDArray[np.complex128]

LARGEST: Final = {
    "bfloat16": (2 - 2.0**-7) * 2.0**127,
    "float16": float(np.finfo(np.float16).max),
    "float32": float(np.finfo(np.float32).max),
    "float64": float(np.finfo(np.float64).max),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """Values `[start, stop)` of one tensor, and where in the range asked for they lie."""

    tensor: int
    start: int
    stop: int
    offset: int


def pieces(ends: Sequence[int], start: int, stop: int) -> Iterator[Piece]:
    """Whose the values `[start, stop)` are, of a vector in which tensor i ends before `ends[i]`."""
    place = start
    for tensor in range(bisect_right(ends, start), len(ends)):
        if place >= stop:
            return
        begin = ends[tensor - 1] if tensor else 0
        end = min(stop, ends[tensor])
        if place < end:
            yield Piece(tensor, place - begin, end - begin, place - start)
            place = end


def as_float64(values: NDArray[Any], dtype: str) -> Floats:
    """A flat array of one of the float dtypes, exactly, as a new array. bfloat16 may be uint16."""
    if dtype == "bfloat16":
        values = (values.view("<u2").astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # of a signalling NaN, which becomes a quiet one
        return values.astype(np.float64)


def scale_down(values: Floats, exponent: int, weight: float) -> None:
    """Divide by 2^exponent, then multiply by the weight, in place."""
    np.ldexp(values, -exponent, out=values)
    values *= weight


def scale_up(sums: Floats, exponent: int, weight_sum: float, dtype: str) -> Floats:
    """The means of weighted sums, times 2^exponent.

    Rounding to the grid can carry a mean beyond the largest value of its dtype: it becomes that.
    """
    with np.errstate(over="ignore"):
        means: Floats = np.ldexp(sums / weight_sum, exponent)
    return np.clip(means, -LARGEST[dtype], LARGEST[dtype], out=means)


def round_to_grid(values: Floats, grid_bits: int) -> None:
    """Round to multiples of 2^-grid_bits, ties to even, in place. |values| < 2^(1023 - grid)."""
    values *= 2.0**grid_bits
    np.rint(values, out=values)
    values *= 2.0**-grid_bits


def slots_of(coefficients: Floats) -> Complexes:
    """The slots, (rows, N / 2), of polynomials with these coefficients, (rows, N).

    With e = 5^j = 4t + 1 a root is zeta^e, zeta^(e N/2) is i, and zeta^(4 t k) is the k-th power of
    a root of unity of order N/2: half the coefficients fold onto the other half, and an inverse
    FFT of N/2 points does the rest.
    """
    half, order, _, twist = _tables(coefficients.shape[1])
    folded = (coefficients[:, :half] + 1j * coefficients[:, half:]) * twist
    slots: Complexes = np.fft.ifft(folded, axis=1, norm="forward")[:, order]
    return slots


def coefficients_of(slots: Complexes) -> Floats:
    """What `slots_of` was given."""
    _, _, place, twist = _tables(2 * slots.shape[1])
    folded = np.fft.fft(slots[:, place], axis=1, norm="forward") * np.conj(twist)
    return np.concatenate([folded.real, folded.imag], axis=1)


@lru_cache(maxsize=4)
def _tables(ring: int) -> tuple[int, NDArray[np.intp], NDArray[np.intp], Complexes]:
    """N / 2; t of each slot; the slot of each t; zeta^k."""
    half = ring // 2
    order = np.empty(half, np.intp)
    power = 1
    for slot in range(half):
        order[slot] = (power - 1) // 4
        power = power * 5 % (2 * ring)
    place = np.empty(half, np.intp)
    place[order] = np.arange(half)
    return half, order, place, np.exp(1j * np.pi * np.arange(half) / ring)
