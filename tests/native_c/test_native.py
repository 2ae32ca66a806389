"""The Python face: what it takes, what it refuses and how, its checks, its kernels."""

from __future__ import annotations

import math
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from metisfl import native_c

# ---- buffers -------------------------------------------------------------------------------------


def file_map(data: bytes, folder: Path) -> mmap.mmap:
    path = folder / "update"
    path.write_bytes(data)
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@pytest.mark.parametrize(
    "lend",
    [
        lambda data, folder: data,
        lambda data, folder: bytearray(data),
        lambda data, folder: memoryview(data),
        lambda data, folder: np.frombuffer(data, np.float32),
        lambda data, folder: np.frombuffer(data, np.float32).reshape(2, 1),
        file_map,
    ],
    ids=["bytes", "bytearray", "memoryview", "array", "matrix", "mmap"],
)
def test_any_contiguous_buffer_will_do(
    lend: Callable[[bytes, Path], native_c.Buffer], tmp_path: Path
) -> None:
    data = struct.pack("<2f", 1.5, -2.0)
    buffer = lend(data, tmp_path)
    out = np.empty(2, np.float32)
    with native_c.Accumulator(capacity=2) as accumulator:
        accumulator.begin(2)
        accumulator.absorb(buffer, "float32", 2.0)
        accumulator.absorb_many([buffer, buffer], "float32", [1.0, 1.0])
        accumulator.finalise("float32", out, 4.0)
    assert out.tolist() == [1.5, -2.0]
    assert native_c.crc32c(buffer) == native_c.crc32c(data)
    if isinstance(buffer, mmap.mmap):
        buffer.close()  # raises BufferError if a call has kept a hold on it


def test_a_refused_buffer_is_given_back() -> None:
    data = bytearray(5)
    with native_c.Accumulator(capacity=1) as accumulator:
        accumulator.begin(1)
        with pytest.raises(native_c.ArgumentError) as refused:
            accumulator.absorb(data, "float32", 1.0)
    data.append(0)  # raises BufferError while it is lent, even by the traceback's frames
    assert "5 bytes" in str(refused.value)


# ---- refusals ------------------------------------------------------------------------------------

ONE = struct.pack("<f", 1.0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda a: a.begin(4), "4 values is above the capacity of 3"),
        (lambda a: a.begin(-1), "count is -1"),
        (lambda a: a.begin(2**64), "count is 18446744073709551616"),
        (lambda a: a.absorb(ONE * 4, "float32", 1.0), "4 values from offset 0"),
        (lambda a: a.absorb(ONE, "float32", 1.0, 3), "offset 3 on do not fit a range of 3"),
        (lambda a: a.absorb(ONE, "float32", 1.0, 2**64 - 1), "do not fit"),
        (lambda a: a.absorb(ONE, "float32", 1.0, -1), "offset is -1"),
        (lambda a: a.absorb(ONE[:3], "float32", 1.0), "3 bytes"),
        (lambda a: a.absorb(ONE, "float8", 1.0), "'float8' is unknown, allowed: float16, "),
        (lambda a: a.absorb(ONE, "float32", math.nan), "nan, not finite"),
        (lambda a: a.absorb(ONE, "float32", math.inf), "inf, not finite"),
        (lambda a: a.absorb(np.ones((4, 4), "f4")[:, 1], "float32", 1.0), "values: "),
        (lambda a: a.absorb_many([ONE], "float32", []), "1 updates but 0 weights"),
        (lambda a: a.absorb_many([ONE, ONE * 2], "float32", [1, 1]), "update 1 has 8 bytes"),
        (lambda a: a.absorb_many([ONE, ONE], "float32", [1, math.inf]), "update 1 is inf"),
        (lambda a: a.finalise("float32", bytearray(12), 0.0), "divisor of 0"),
        (lambda a: a.finalise("float32", bytearray(12), math.inf), "divisor of inf"),
        (lambda a: a.finalise("float32", bytearray(8), 1.0), "room for 2 values"),
        (lambda a: a.finalise("float32", bytearray(13), 1.0), "13 bytes"),
        (lambda a: a.finalise("complex64", bytearray(12), 1.0), "'complex64' is unknown"),
        (lambda a: a.finalise("float32", bytes(12), 1.0), "out: "),
    ],
)
def test_a_bad_argument_is_named_and_changes_no_sum(
    call: Callable[[native_c.Accumulator], None], text: str
) -> None:
    out = np.zeros(3, np.float32)
    with native_c.Accumulator(capacity=3) as accumulator:
        accumulator.begin(3)
        accumulator.absorb(ONE * 3, "float32", 4.0)
        with pytest.raises(native_c.ArgumentError) as refused:
            call(accumulator)
        accumulator.finalise("float32", out, 2.0)
    assert text in str(refused.value)
    assert out.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("capacity", [0, -1, 2**32 + 1, 2**64])
def test_a_capacity_out_of_bounds_is_refused(capacity: int) -> None:
    with pytest.raises(native_c.ArgumentError, match="capacity"):
        native_c.Accumulator(capacity=capacity)


def test_a_finalise_that_fails_leaves_its_output_alone() -> None:
    out = bytearray(b"before")
    with native_c.Accumulator(capacity=4) as accumulator:
        accumulator.begin(4)
        with pytest.raises(native_c.ArgumentError):
            accumulator.finalise("int8", out, 1.0)
    assert out == b"before"


def test_before_its_first_range_an_accumulator_takes_nothing() -> None:
    with (
        native_c.Accumulator(capacity=1) as accumulator,
        pytest.raises(native_c.ArgumentError, match="a range of 0 values"),
    ):
        accumulator.absorb(ONE, "float32", 1.0)


def test_closed_is_closed() -> None:
    accumulator = native_c.Accumulator(capacity=1)
    accumulator.begin(1)
    accumulator.close()
    accumulator.close()
    calls: list[Callable[[], None]] = [
        lambda: accumulator.begin(1),
        lambda: accumulator.absorb(ONE, "float32", 1.0),
        lambda: accumulator.absorb_many([ONE], "float32", [1.0]),
        lambda: accumulator.finalise("float32", bytearray(4), 1.0),
    ]
    for call in calls:
        with pytest.raises(native_c.ArgumentError, match="closed"):
            call()


# ---- checks --------------------------------------------------------------------------------------


EXPONENT_BITS = {
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float32": 0x7F800000,
    "float64": 0x7FF << 52,
}


@pytest.mark.parametrize("dtype", sorted(native_c.DTYPES))
@given(data=st.data())
def test_first_non_finite_finds_the_first(dtype: str, data: st.DataObject) -> None:
    """Not finite is: all exponent bits set. Integers always are finite."""
    bits = 16 if dtype == "bfloat16" else 8 * np.dtype(dtype).itemsize
    values = np.zeros(data.draw(st.integers(1, 1200)), f"uint{bits}")
    exponent = EXPONENT_BITS.get(dtype, 0)
    any_bits = st.integers(0, 2**bits - 1)
    for place in data.draw(st.lists(st.integers(0, values.size - 1), max_size=3)):
        values[place] = data.draw(any_bits | any_bits.map(lambda drawn: drawn | exponent))
    wrong = np.flatnonzero((values & exponent) == exponent).tolist() if exponent else []
    assert native_c.first_non_finite(values, dtype) == (wrong[0] if wrong else None)


def test_first_non_finite_refuses_what_is_not_whole() -> None:
    with pytest.raises(native_c.ArgumentError, match="3 bytes"):
        native_c.first_non_finite(bytes(3), "float32")
    with pytest.raises(native_c.ArgumentError, match="'text' is unknown"):
        native_c.first_non_finite(bytes(3), "text")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # this and what follows: RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_crc32c_is_castagnolis(data: bytes, expected: int) -> None:
    assert native_c.crc32c(data) == expected


@given(st.binary(max_size=64), st.integers(1, 120), st.integers(0, 8000))
@example(b"x", 1, 0)
def test_crc32c_carries_on(seed: bytes, times: int, cut: int) -> None:
    data = seed * times
    assert native_c.crc32c(data[cut:], native_c.crc32c(data[:cut])) == native_c.crc32c(data)


@pytest.mark.parametrize("crc", [-1, 2**32])
def test_a_crc_has_32_bits(crc: int) -> None:
    with pytest.raises(native_c.ArgumentError, match="outside 0 to 2\\^32 - 1"):
        native_c.crc32c(b"", crc)


# ---- kernels -------------------------------------------------------------------------------------

DIGEST = """
import hashlib, random
from metisfl import native_c
source = random.Random(7)
digest = hashlib.sha256()
for dtype in sorted(native_c.DTYPES):
    updates = [source.randbytes(8 * 101) for _ in range(3)]
    with native_c.Accumulator(capacity=8 * 101) as accumulator:
        for out in sorted(native_c.DTYPES):
            count = {"8": 8, "6": 4, "2": 2, "4": 1, "l": 8}[dtype[-1]] * 101
            accumulator.begin(count)
            accumulator.absorb_many(updates, dtype, [0.1, 2.0, -30.0])
            result = bytearray(count * {"8": 1, "6": 2, "2": 4, "4": 8, "l": 1}[out[-1]])
            accumulator.finalise(out, result, 7.0)
            digest.update(result)
    digest.update(b"%d" % native_c.crc32c(b"".join(updates) * 9))
    digest.update(repr(native_c.first_non_finite(updates[0], dtype)).encode())
print(native_c.kernel(), digest.hexdigest())
"""


def run_with_kernel(kernel: str | None, code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "METIS_KERNEL"}
    if kernel is not None:
        environment["METIS_KERNEL"] = kernel
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_portable_kernel_can_be_forced_and_gives_the_same_bits() -> None:
    fastest = run_with_kernel(None, DIGEST)
    portable = run_with_kernel("portable", DIGEST)
    assert (fastest.returncode, portable.returncode) == (0, 0), fastest.stderr + portable.stderr
    assert portable.stdout.split()[0] == "portable"
    assert fastest.stdout.split()[1] == portable.stdout.split()[1], fastest.stdout


def test_a_kernel_that_cannot_run_is_refused_by_name() -> None:
    refused = run_with_kernel("avx9000", "import metisfl.native_c")
    assert refused.returncode != 0
    assert "METIS_KERNEL is 'avx9000', allowed here: portable" in refused.stderr
