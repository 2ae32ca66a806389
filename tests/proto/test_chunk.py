"""A chunk's header says what its payload is, and whatever is wrong with it is found first."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metisfl.proto import chunk as c
from metisfl.proto.errors import PeerError
from metisfl.proto.model_pb2 import Manifest, TensorSpec

checksum = zlib.crc32  # any function of bytes will do here; native_c has its own tests

short_digests = st.binary(min_size=16, max_size=16)
headers = st.builds(
    lambda index, more, federation, manifest, subject, last_bytes, crc: c.ChunkHeader(
        federation=federation,
        manifest=manifest,
        subject=subject,
        index=index,
        count=index + 1 + more,
        value_count=(last_bytes if more == 0 else c.CHUNK_BYTES) // 4,
        payload_bytes=last_bytes if more == 0 else c.CHUNK_BYTES,
        payload_crc32c=crc,
    ),
    st.integers(0, 2**31),
    st.integers(0, 3),
    short_digests,
    short_digests,
    short_digests,
    st.integers(1, c.CHUNK_BYTES),
    st.integers(0, 2**32 - 1),
)
GOOD = c.ChunkHeader(
    federation=c.federation_digest("demo", "run-1"),
    manifest=c.short_digest(b"manifest"),
    subject=c.task_digest("run-1.3.train.ada"),
    index=2,
    count=3,
    value_count=25,
    payload_bytes=100,
    payload_crc32c=7,
)


@given(headers)
def test_a_header_comes_out_as_it_went_in(header: c.ChunkHeader) -> None:
    data = c.pack_header(header, checksum)
    assert len(data) == c.HEADER_BYTES
    assert c.parse_header(data, checksum) == header


@given(headers, st.integers(0, c.HEADER_BYTES - 1), st.integers(1, 255))
def test_any_changed_byte_of_a_header_is_noticed(
    header: c.ChunkHeader, place: int, change: int
) -> None:
    data = bytearray(c.pack_header(header, checksum))
    data[place] ^= change
    with pytest.raises(PeerError):
        c.parse_header(data, checksum)


@given(st.binary(max_size=200))
def test_garbage_is_the_peers_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(PeerError):
        c.parse_header(data, checksum)


def test_the_layout_is_the_one_in_the_table() -> None:
    data = c.pack_header(GOOD, checksum)
    assert data[0:4] == b"MFLC"
    assert struct.unpack_from("<HBB", data, 4) == (1, 0, 0)
    assert data[8:24] == GOOD.federation
    assert data[24:40] == GOOD.manifest
    assert data[40:56] == bytes(16)
    assert data[56:72] == GOOD.subject
    assert struct.unpack_from("<5I", data, 72) == (2, 3, 25, 100, 7)
    assert struct.unpack_from("<I", data, 92) == (checksum(data[:92]),)


@pytest.mark.parametrize(
    ("change", "story"),
    [
        ({"privacy": 2}, "privacy mode is 2; this release knows 0 (plain) and 1 (ckks)"),
        ({"privacy": 1}, "exponents 0000"),
        ({"exponents": b"x" * 16}, "exponents 7878"),
        ({"payload_bytes": 0}, "payload of 0 bytes; allowed are 1 to 262144"),
        ({"payload_bytes": 262_145}, "payload of 262145 bytes; allowed are 1 to 262144"),
        ({"index": 3}, "index is 3 of 3 chunks; at most 2"),
        ({"index": 0, "count": 0}, "index is 0 of 0 chunks"),
        ({"index": 1}, "chunk 1 of 3 has 100 bytes; only the last may"),
        ({"value_count": 101}, "101 values in 100 bytes; at most one a byte"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_its_bound(
    change: dict[str, int], story: str
) -> None:
    data = c.pack_header(replace(GOOD, **change), checksum)  # type: ignore[arg-type]
    with pytest.raises(PeerError, match=re.escape(story)):
        c.parse_header(data, checksum)


@pytest.mark.parametrize(
    ("place", "value", "story"),
    [(0, b"X", "magic is b'XFLC'"), (4, b"\2", "version is 2"), (7, b"\1", "reserved byte is 1")],
)
def test_a_header_of_another_format_is_refused(place: int, value: bytes, story: str) -> None:
    fields = bytearray(c.pack_header(GOOD, checksum)[:-4])
    fields[place : place + 1] = value
    with pytest.raises(PeerError, match=story):
        c.parse_header(bytes(fields) + struct.pack("<I", checksum(fields)), checksum)


def test_a_payload_must_have_the_length_and_the_checksum_of_its_header() -> None:
    payload = bytes(range(100))
    header = replace(GOOD, payload_crc32c=checksum(payload))
    c.check_payload(header, payload, checksum)
    with pytest.raises(PeerError, match="payload of 99 bytes; its header says 100"):
        c.check_payload(header, payload[:-1], checksum)
    with pytest.raises(PeerError, match="CRC-32C is 0x"):
        c.check_payload(header, bytes(100), checksum)


@given(st.integers(0, 5 * c.CHUNK_BYTES))
def test_the_chunks_cover_the_payload_once(payload_bytes: int) -> None:
    manifest = Manifest(payload_bytes=payload_bytes)
    extents = [c.chunk_extent(i, manifest) for i in range(c.chunk_count(manifest))]
    assert sum(stop - start for start, stop in extents) == payload_bytes
    ends = [0, *(stop for _, stop in extents)]
    assert [start for start, _ in extents] == ends[:-1]
    assert all(0 < stop - start <= c.CHUNK_BYTES for start, stop in extents)


def test_padding_between_tensors_is_not_counted_as_values() -> None:
    manifest = Manifest(payload_bytes=c.CHUNK_BYTES + 8)
    # Three values and 52 bytes of padding, then as many as reach two values into the next chunk.
    first = TensorSpec(name="a", dtype="float32", shape=[3], offset=0)
    rest = (c.CHUNK_BYTES + 8 - 64) // 4
    manifest.tensors.extend([first, TensorSpec(name="b", dtype="float32", shape=[rest], offset=64)])
    payload = bytes(c.CHUNK_BYTES)

    def described(index: int, payload: bytes) -> c.ChunkHeader:
        return c.describe_chunk(
            manifest,
            index,
            payload,
            federation=bytes(16),
            manifest_digest=bytes(16),
            subject=bytes(16),
            crc32c=checksum,
        )

    assert described(0, payload).value_count == 3 + rest - 2
    assert described(1, payload[:8]).value_count == 2
    assert described(1, payload[:8]).count == 2


def test_runs_and_federations_have_digests_of_their_own() -> None:
    pairs = [("a", "b"), ("a", "c"), ("b", "b"), ("a-b", ""), ("a", "b-")]
    assert len({c.federation_digest(*pair) for pair in pairs}) == len(pairs)
