"""The Python face of the C library, which folds updates into a model and checks their bytes.

Rule: only this file and, for encrypted blocks, blocks.py and ckks.py touch `ffi` and `lib`. They
decide nothing: metis.h states the arithmetic and the bounds, C enforces them, and a status becomes
an exception with C's own text.

Buffers are never copied: anything contiguous that lends its memory will do (bytes, bytearray,
memoryview, mmap, a NumPy array; of ml_dtypes.bfloat16 its `.view("uint16")`). They are lent for
the call only, and the GIL is released meanwhile: leave them alone until it returns.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from metisfl.native_c._ffi import ffi, lib

if TYPE_CHECKING:
    from mmap import mmap

    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "DTYPES",
    "Accumulator",
    "ArgumentError",
    "Buffer",
    "WritableBuffer",
    "bench_add_pass",
    "bench_limb_pass",
    "bench_scan",
    "crc32c",
    "first_non_finite",
    "kernel",
]

Buffer: TypeAlias = "bytes | bytearray | memoryview | mmap | NDArray[Any]"
WritableBuffer: TypeAlias = "bytearray | memoryview | mmap | NDArray[Any]"

_DTYPES: dict[str, int] = {
    "float16": lib.METIS_FLOAT16,
    "bfloat16": lib.METIS_BFLOAT16,
    "float32": lib.METIS_FLOAT32,
    "float64": lib.METIS_FLOAT64,
    "int8": lib.METIS_INT8,
    "int16": lib.METIS_INT16,
    "int32": lib.METIS_INT32,
    "int64": lib.METIS_INT64,
    "uint8": lib.METIS_UINT8,
    "uint16": lib.METIS_UINT16,
    "uint32": lib.METIS_UINT32,
    "uint64": lib.METIS_UINT64,
    "bool": lib.METIS_BOOL,
}
DTYPES = frozenset(_DTYPES)
"""The names that every `dtype` argument allows."""

_SIZE_MAX = 2**64 - 1
_CHARS = ffi.typeof("char[]")


class ArgumentError(ValueError):
    """An argument was out of its bounds: a defect in the calling code. No output was changed.

    What a peer declares (sizes, weights, dtypes) must be checked before it comes here.
    """


def kernel() -> str:
    """Which kernels run, "avx2" or "portable". All give the same bits.

    METIS_KERNEL=portable in the environment, set before the first import, forces the latter.
    """
    name: bytes = ffi.string(lib.metis_kernel())
    return name.decode("ascii")


def crc32c(data: Buffer, crc: int = 0) -> int:
    """The CRC-32C (Castagnoli) of `data`; `crc` carries on from that of the bytes before it."""
    if not 0 <= crc < 2**32:
        raise ArgumentError(f"a crc of {crc} is outside 0 to 2^32 - 1")
    value = ffi.new("uint32_t *", crc)
    with _borrow("data", data) as source:
        _check(lib.metis_crc32c(source, len(source), value))
    return int(value[0])


def first_non_finite(values: Buffer, dtype: str) -> int | None:
    """The index of the first NaN or infinity among `values`; None when all are finite."""
    code = _code(dtype)
    index = ffi.new("size_t *")
    with _borrow("values", values) as source:
        _check(lib.metis_first_non_finite(source, len(source), code, index))
    return None if index[0] == lib.METIS_ALL_FINITE else int(index[0])


class Accumulator:
    """One float64 sum for each value of a range of up to `capacity` values.

    `begin` a range, `absorb` it from each update, always in the same order, then `finalise`. How
    a range is cut does not change a bit of the result. One thread at a time per accumulator. Use
    it as a context manager, or `close` it; once closed every method raises ArgumentError.
    """

    def __init__(self, *, capacity: int) -> None:
        """Takes 8 bytes for each of 1 to 2^32 values. Raises ArgumentError, MemoryError."""
        self._handle = ffi.NULL
        out = ffi.new("metis_accumulator **")
        _check(lib.metis_accumulator_create(_size("capacity", capacity), out))
        self._handle = ffi.gc(out[0], lib.metis_accumulator_destroy, 8 * capacity)

    def begin(self, count: int) -> None:
        """Starts a range of `count` values, at most the capacity, with all sums zero."""
        _check(lib.metis_accumulator_begin(self._handle, _size("count", count)))

    def absorb(self, values: Buffer, dtype: str, weight: float, offset: int = 0) -> None:
        """Adds `values` times the finite `weight` to the sums, from the one at `offset` on."""
        code, start = _code(dtype), _size("offset", offset)
        with _borrow("values", values) as source:
            status = lib.metis_accumulator_absorb(
                self._handle, source, len(source), code, weight, start
            )
        _check(status)

    def absorb_many(
        self, updates: Sequence[Buffer], dtype: str, weights: Sequence[float], offset: int = 0
    ) -> None:
        """Like absorbing each of `updates`, all of one length, with its weight, in this order.

        The same bits in about half the time, since the sums pass through memory once.
        """
        code, start = _code(dtype), _size("offset", offset)
        if len(updates) != len(weights):
            raise ArgumentError(f"{len(updates)} updates but {len(weights)} weights")
        sources = _borrow_all("values", updates)
        try:
            length = len(sources[0]) if sources else 0
            for index, source in enumerate(sources):
                if len(source) != length:
                    raise ArgumentError(
                        f"update {index} has {len(source)} bytes, update 0 has {length}"
                    )
            status = lib.metis_accumulator_absorb_many(
                self._handle,
                ffi.new("const void *[]", sources),
                ffi.new("double[]", list(weights)),
                len(sources),
                length,
                code,
                start,
            )
        finally:
            _give_back(sources)
        _check(status)

    def finalise(self, dtype: str, out: WritableBuffer, divisor: float) -> None:
        """Writes each sum / `divisor`, rounded to `dtype`, to `out`, which holds the whole range.

        To nearest, ties to even; metis.h says what becomes of NaN, infinity and large values.
        The sums stay as they are.
        """
        code = _code(dtype)
        with _borrow("out", out, writable=True) as target:
            status = lib.metis_accumulator_finalise(
                self._handle, code, divisor, target, len(target)
            )
        _check(status)

    def close(self) -> None:
        """Gives the memory back; a second time does nothing."""
        # A released handle must not reach C again; C refuses NULL.
        handle, self._handle = self._handle, ffi.NULL
        if handle:
            ffi.release(handle)

    def __enter__(self) -> Accumulator:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def bench_add_pass(accumulator: Accumulator, values: Buffer) -> None:
    """For bench.py: adds float32 `values` to the whole range, in plain C without a weight."""
    with _borrow("values", values) as source:
        _check(lib.metis_bench_add_pass(accumulator._handle, source, len(source)))


def bench_limb_pass(sums: NDArray[np.uint64], limbs: NDArray[np.uint64]) -> None:
    """For bench.py: `sums += limbs` in plain C; two contiguous uint64 arrays of one length."""
    with _borrow("sums", sums, writable=True) as target, _borrow("limbs", limbs) as source:
        if len(target) != len(source) or len(source) % 8 != 0:
            raise ArgumentError(f"{len(source)} bytes of limbs for {len(target)} bytes of sums")
        _check(
            lib.metis_bench_limb_pass(
                ffi.cast("uint64_t *", target), ffi.cast("uint64_t *", source), len(source) // 8
            )
        )


def bench_scan(values: Buffer) -> int:
    """For bench.py: reads every byte, a multiple of 8 of them, and nothing else."""
    checksum = ffi.new("uint64_t *")
    with _borrow("values", values) as source:
        _check(lib.metis_bench_scan(source, len(source), checksum))
    return int(checksum[0])


def _borrow(
    name: str, buffer: Buffer | WritableBuffer, *, writable: bool = False
) -> AbstractContextManager[Any]:
    """The memory of `buffer`, given back at the end of the block, so that an mmap can close."""
    try:
        memory: AbstractContextManager[Any] = ffi.from_buffer(
            _CHARS, buffer, require_writable=writable
        )
    except (BufferError, ValueError) as error:
        raise ArgumentError(f"{name}: {error}") from error
    return memory


def _borrow_all(name: str, buffers: Sequence[Buffer]) -> list[Any]:
    """Likewise for each of `buffers`, until `_give_back`. Bare, since a fold is short."""
    sources: list[Any] = []
    try:
        for buffer in buffers:
            sources.append(ffi.from_buffer(_CHARS, buffer))
    except (BufferError, ValueError) as error:
        _give_back(sources)
        raise ArgumentError(f"{name}: {error}") from error
    return sources


def _give_back(sources: list[Any]) -> None:
    for source in sources:
        ffi.release(source)


def _code(dtype: str) -> int:
    code = _DTYPES.get(dtype)
    if code is None:
        raise ArgumentError(f"dtype {dtype!r} is unknown, allowed: {', '.join(_DTYPES)}")
    return code


def _size(name: str, value: int) -> int:
    if not 0 <= value <= _SIZE_MAX:
        raise ArgumentError(f"{name} is {value}, outside 0 to 2^64 - 1")
    return value


def _check(status: int) -> None:
    if status == lib.METIS_OK:
        return
    text: str = ffi.string(lib.metis_error_text()).decode("utf-8", "replace")
    raise MemoryError(text) if status == lib.METIS_ERR_MEMORY else ArgumentError(text)


def _refuse_another_kernel() -> None:
    """A kernel that was asked for and does not run is an error, not a silent fallback."""
    asked = os.environ.get("METIS_KERNEL", "")
    if asked not in ("", kernel()):
        raise ArgumentError(
            f"METIS_KERNEL is {asked!r}, allowed here: portable, or unset for {kernel()}"
        )


_refuse_another_kernel()
