"""Models on disk: what was written is what is read, or it is not there at all."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from metisfl.proto import tensors as tensors_module
from metisfl.proto.errors import MachineError
from metisfl.proto.model_file import ModelWriter, header_of, open_model, write_model
from metisfl.proto.tensors import ITEM_BYTES, Tensor, manifest_of, serialise_manifest

DTYPES = sorted(set(ITEM_BYTES) - {"bfloat16"})


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """One for all examples of a property: pytest's own is one for each test."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Any dtype and shape, also big-endian and not contiguous."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES))).newbyteorder(draw(st.sampled_from("<>")))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    array = draw(hnp.arrays(dtype, shape))
    if draw(st.booleans()):
        array = array.T
    if array.ndim and draw(st.booleans()):
        array = array[::2]
    return array


@given(st.lists(arrays(), max_size=4))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(folder: Path, values: list[np.ndarray]) -> None:
    path = folder / "model"
    digest = write_model(path, [Tensor(f"t{i}", v, i % 2 == 0) for i, v in enumerate(values)])
    with open_model(path) as model:
        assert model.digest() == digest
        read = model.tensors()
    assert [tensor.name for tensor in read] == [f"t{i}" for i in range(len(values))]
    for tensor, value in zip(read, values, strict=True):
        assert tensor.array.dtype.newbyteorder("=") == value.dtype.newbyteorder("=")
        assert tensor.array.shape == value.shape
        np.testing.assert_array_equal(tensor.array, value)


@given(arrays())
@settings(max_examples=30, deadline=None)
def test_equal_content_has_one_digest(folder: Path, value: np.ndarray) -> None:
    """Neither byte order nor strides nor where it is written count; one bit does."""
    here = write_model(folder / "a", [Tensor("w", value, True)])
    copy = np.array(value, dtype=value.dtype.newbyteorder("<"), order="C")
    assert write_model(folder / "b", [Tensor("w", copy, True)]) == here
    assert write_model(folder / "b", [Tensor("v", copy, True)]) != here
    assert write_model(folder / "b", [Tensor("w", copy, False)]) != here
    if copy.size:
        copy.reshape(-1).view("u1")[-1] ^= 1
        assert write_model(folder / "b", [Tensor("w", copy, True)]) != here


def test_the_layout_on_disk(tmp_path: Path) -> None:
    """The layout is a promise to other programs, so it is spelled out here once more."""
    tensors = [
        Tensor("a", np.array([1, 2, 3], np.uint8), True),
        Tensor("b", np.array(7.5, ">f4"), False),
    ]
    digest = write_model(tmp_path / "model", tensors)
    manifest = serialise_manifest(manifest_of(tensors))
    payload = b"\x01\x02\x03" + bytes(61) + struct.pack("<f", 7.5)
    head = b"METISMDL" + struct.pack("<II", 1, len(manifest)) + manifest
    assert (tmp_path / "model").read_bytes() == head.ljust(4096, b"\0") + payload
    content = struct.pack("<I", len(manifest)) + manifest + payload
    assert digest == hashlib.sha256(content).digest()


def test_bfloat16(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0, np.inf], ml_dtypes.bfloat16)
    here = write_model(tmp_path / "m", [Tensor("w", values, True)])
    with open_model(tmp_path / "m") as model:
        (read,) = model.tensors()
    assert (read.array.dtype, read.dtype_name) == (values.dtype, "bfloat16")
    assert read.array.tolist() == values.tolist()
    as_integers = Tensor("w", values.view(np.uint16), True, "bfloat16")
    assert write_model(tmp_path / "m", [as_integers]) == here


def test_bfloat16_where_ml_dtypes_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    here = write_model(tmp_path / "m", [Tensor("w", values, True)])
    monkeypatch.setattr(tensors_module, "_bfloat16", None)
    with open_model(tmp_path / "m") as model:
        read = model.tensors()
    assert (read[0].array.dtype, read[0].dtype_name) == (np.dtype(np.uint16), "bfloat16")
    assert write_model(tmp_path / "m", read) == here


def test_reading_maps_the_file_and_copies_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "m", [Tensor("w", np.arange(1000.0), True)])
    with open_model(tmp_path / "m") as model:
        (read,) = model.tensors()
    assert not read.array.flags.owndata
    assert not read.array.flags.writeable
    (tmp_path / "m").unlink()
    assert read.array.sum() == 499500, "the array holds the mapping, also of a removed file"


def test_the_payload_is_read_in_parts(tmp_path: Path) -> None:
    write_model(tmp_path / "m", [Tensor("w", np.arange(100, dtype=np.uint8), True)])
    with open_model(tmp_path / "m") as model:
        assert model.payload_bytes == 100
        assert model.pread(90, 64) == bytes(range(90, 100))
        assert model.pread(100, 64) == b""
        buffer = bytearray(64)
        assert model.read_payload_into(buffer, 64) == 36
        assert buffer[:36] == bytes(range(64, 100))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"", "is not a model file"),
        (lambda data: b"\x89HDF\r\n\x1a\n" + data[8:], "is not a model file"),
        (lambda data: data[:8] + b"\x02" + data[9:], "has version 2; this release reads version 1"),
        (lambda data: data[:-1], "bytes where its manifest asks for"),
        (lambda data: data + b"\0", "bytes where its manifest asks for"),
        (lambda data: data[:12] + b"\xff\xff\xff\x7f" + data[16:], "at most 258048"),
        (lambda data: data[:16] + b"\xff" + data[17:], "is damaged"),
        (lambda data: data[:20], "is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, change: object, words: str) -> None:
    path = tmp_path / "m"
    write_model(path, [Tensor("w", np.arange(10.0), True)])
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(MachineError) as caught:
        open_model(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_changed_payload_shows_in_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "m"
    digest = write_model(path, [Tensor("w", np.arange(10.0), True)])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with open_model(path) as model:
        assert model.digest() != digest


def test_a_file_that_is_cut_while_open_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_model(path, [Tensor("w", np.arange(10.0), True)])
    with open_model(path) as model:
        os.truncate(path, 4100)
        with pytest.raises(MachineError, match="was cut"):
            model.pread(0, 80)
        with pytest.raises(MachineError, match="was cut"):
            model.read_payload_into(bytearray(80), 0)


def test_a_model_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    manifest = serialise_manifest(manifest_of([Tensor("w", np.arange(10.0), True)]))
    path = tmp_path / "m"
    with ModelWriter(path, manifest) as writer:
        writer.append(bytes(64))
        assert not path.exists()
    assert list(tmp_path.iterdir()) == [], "left without commit, for whatever reason"
    with ModelWriter(path, manifest) as writer:
        writer.append(bytes(64))
        writer.append(memoryview(np.zeros(2)))
        assert not path.exists()
        writer.commit()
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_a_writer_refuses_too_few_and_too_many_bytes(tmp_path: Path) -> None:
    manifest = serialise_manifest(manifest_of([Tensor("w", np.arange(10.0), True)]))
    with ModelWriter(tmp_path / "m", manifest) as writer:
        with pytest.raises(AssertionError, match="80 are missing"):
            writer.append(bytes(81))
        with pytest.raises(AssertionError, match="80 bytes of the payload are missing"):
            writer.commit()


def test_the_payload_starts_on_a_page() -> None:
    assert len(header_of(bytes(4080))) == 4096
    assert len(header_of(bytes(4081))) == 8192


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Writing, checking and mapping a model of 100 MB takes a few MB."""
    script = """
import resource, sys, numpy as np
from pathlib import Path
from metisfl.proto.model_file import open_model, write_model
from metisfl.proto.tensors import Tensor
peak_kb = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before_kb = peak_kb()
never_touched = np.zeros(12_500_000)  # takes no memory of its own
digest = write_model(Path(sys.argv[1]), [Tensor("w", never_touched, True)])
with open_model(Path(sys.argv[1])) as model:
    assert model.payload_bytes == 100_000_000
    assert model.digest() == digest
    model.tensors()
print(peak_kb() - before_kb)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "m")]
    grown_kb = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert grown_kb < 20_000
