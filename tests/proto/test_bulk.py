"""Every frame survives the wire, and nothing but a frame comes out of it."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metisfl.proto import bulk as b
from metisfl.proto.chunk import ChunkHeader
from metisfl.proto.errors import PeerError

checksum = zlib.crc32
digests = st.binary(min_size=32, max_size=32)
subjects = st.binary(min_size=16, max_size=16)
payload_sizes = st.integers(0, b.PAYLOAD_BYTES_MAX)
pairs = st.tuples(st.integers(0, 2**30), st.integers(0, 2**30)).map(sorted)
payloads = st.binary(min_size=1, max_size=100)


def chunk_of(payload: bytes) -> b.Chunk:
    header = ChunkHeader(bytes(16), bytes(16), bytes(16), 0, 1, 0, len(payload), checksum(payload))
    return b.Chunk(header, payload)


frames = st.one_of(
    st.builds(
        b.Open,
        st.text(min_size=1, max_size=200),
        subjects,
        digests,
        payload_sizes,
        st.binary(max_size=100),
    ),
    st.builds(lambda digest, pair: b.Get(digest, *pair), digests, pairs),
    st.builds(
        lambda subject, pair, rewind: b.Credit(subject, *pair, rewind),
        subjects,
        pairs,
        st.booleans(),
    ),
    st.builds(b.Model, digests, payload_sizes, st.binary(max_size=100)),
    payloads.map(chunk_of),
    st.builds(b.Stored, subjects, digests),
    st.builds(b.Refused, subjects, st.integers(0, 65_535), st.text(max_size=100)),
)


@given(frames)
def test_a_frame_comes_out_as_it_went_in(frame: b.Frame) -> None:
    assert b.parse(b.pack(frame, checksum), checksum) == frame


@given(st.lists(st.binary(max_size=120), max_size=6))
def test_garbage_is_the_peers_error_and_nothing_else(parts: list[bytes]) -> None:
    with pytest.raises(PeerError):
        b.parse(parts, checksum)


@given(frames, st.data())
def test_a_damaged_frame_is_a_frame_or_the_peers_error(frame: b.Frame, data: st.DataObject) -> None:
    parts = [bytes(part) for part in b.pack(frame, checksum)]
    which = data.draw(st.integers(0, len(parts) - 1))
    parts[which] = data.draw(st.binary(max_size=120) | st.just(parts[which][:-1]))
    try:
        again = b.parse(parts, checksum)
    except PeerError:
        return
    assert isinstance(again, type(frame)), f"{frame} became {again}"


def test_an_oversized_part_is_refused_by_its_size_alone() -> None:
    parts = [b"C", bytes(96), bytes(b.MESSAGE_BYTES_MAX + 1)]
    with pytest.raises(PeerError, match="part 2 has 270337 bytes; at most 270336"):
        b.parse(parts, checksum)


def test_another_version_of_the_protocol_is_refused_in_words() -> None:
    parts = [bytes(part) for part in b.pack(b.Get(bytes(32), 0, 1), checksum)]
    parts[1] = struct.pack("<H", 2) + parts[1][2:]
    with pytest.raises(PeerError, match="version 2; this release speaks 1: use the same release"):
        b.parse(parts, checksum)


@pytest.mark.parametrize(
    ("frame", "story"),
    [
        (b.Get(bytes(32), 3, 2), "first 3, limit 2"),
        (b.Credit(bytes(16), 0, 2**31), "limit 2147483648"),
        (
            b.Open("t", bytes(16), bytes(32), b.PAYLOAD_BYTES_MAX + 1, b""),
            "at most 281474976710656",
        ),
        (b.Open("", bytes(16), bytes(32), 1, b""), "task id is empty"),
        (b.Open("t" * 801, bytes(16), bytes(32), 1, b""), "task id of 801 bytes; at most 800"),
        (b.Model(bytes(32), 1, bytes(258_049)), "manifest of 258049 bytes; at most 258048"),
    ],
)
def test_a_field_out_of_its_bounds_is_named(frame: b.Frame, story: str) -> None:
    with pytest.raises(PeerError, match=story):
        b.parse(b.pack(frame, checksum), checksum)


def test_a_reason_of_any_length_can_be_sent() -> None:
    frame = b.parse(b.pack(b.Refused(bytes(16), 1, "é" * 3_000), checksum), checksum)
    assert isinstance(frame, b.Refused)
    assert frame.reason == "é" * 1_000


def test_uploads_and_downloads_name_their_transfer_alike_at_both_ends() -> None:
    opened = b.Open("task-1", bytes(16), bytes(32), 0, b"")
    assert opened.subject == b.Open("task-1", bytes(16), b"x" * 32, 9, b"").subject
    assert b.Get(b"d" * 32, 0, 1).subject == b.Model(b"d" * 32, 0, b"").subject
