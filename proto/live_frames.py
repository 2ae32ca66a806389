"""Records as they travel, and the frames of the broker's live socket, packed and parsed.

Rule: an envelope is made once, by its publisher, and then stored and forwarded byte for byte; the
broker's own knowledge travels in the record header in front of it, which holds its checksum.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from metisfl.proto.envelope import EVENT_TYPE, INTEGER_MAX
from metisfl.proto.errors import PeerError
from metisfl.proto.frame_parts import text, unpack
from metisfl.proto.topics import HEADS, TOPIC_BYTES_MAX

__all__ = [
    "BEAT_BYTES_MAX",
    "HEADER_BYTES",
    "HEADER_MAGIC",
    "Beat",
    "Head",
    "Header",
    "RawRecord",
    "pack_head",
    "pack_header",
    "pack_live_beat",
    "parse_beat",
    "parse_header",
    "parse_live",
]

BEAT_BYTES_MAX: Final = 64 * 1024
HEADER_MAGIC: Final = 0x4D01  # "M", version 1
_HEADER: Final = struct.Struct("<HHIQQQQQ")
_HEAD: Final = struct.Struct("<QQ")
HEADER_BYTES: Final = _HEADER.size


class Header(NamedTuple):
    """The broker's stamp on a record. A tuple, since one is made for every event."""

    crc: int
    incarnation: int
    sequence: int
    previous_in_topic: int
    previous_in_federation: int
    logged_unix_ns: int


class RawRecord(NamedTuple):
    """One record as it travels: the topic as bytes and the envelope untouched."""

    topic: bytes
    header: Header
    envelope: bytes


@dataclass(frozen=True, slots=True)
class Beat:
    """A transient event: published live, never stored."""

    topic: str
    type: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Head:
    """How long the log is. `link_up`: this subscriber's connection is new."""

    incarnation: int
    sequence: int
    link_up: bool = False


def pack_header(header: Header) -> bytes:
    return _HEADER.pack(HEADER_MAGIC, 0, *header)


def parse_header(part: bytes, envelope: bytes) -> Header:
    """Check the header against the envelope behind it. Raises PeerError."""
    if len(part) != HEADER_BYTES:
        raise PeerError(f"record header has {len(part)} bytes; it has exactly {HEADER_BYTES}")
    magic, _, *fields = _HEADER.unpack(part)
    if magic != HEADER_MAGIC:
        raise PeerError(f"record header begins with {magic:#06x}; known is {HEADER_MAGIC:#06x}")
    header = Header(*fields)
    if max(header) > INTEGER_MAX:
        raise PeerError(f"record header holds {max(header)}; at most {INTEGER_MAX}")
    if zlib.crc32(envelope) != header.crc:
        raise PeerError(f"record {header.sequence} is damaged: its checksum does not match")
    return header


def parse_beat(topic: bytes, kind: bytes, payload: bytes) -> Beat:
    """The three parts of a beat, on either socket. Raises PeerError."""
    if len(payload) > BEAT_BYTES_MAX:
        raise PeerError(f"beat has {len(payload)} bytes; at most {BEAT_BYTES_MAX}")
    name = text(kind, 64, "beat's type")
    if not EVENT_TYPE.fullmatch(name):
        raise PeerError(f"beat's type {name!r} is not a message name")
    return Beat(text(topic, TOPIC_BYTES_MAX, "beat's topic"), name, payload)


def pack_live_beat(beat: Beat) -> list[bytes]:
    return [beat.topic.encode(), b"", beat.type.encode(), beat.payload]


def pack_head(head: Head) -> list[bytes]:
    return [HEADS, _HEAD.pack(head.incarnation, head.sequence)]


def parse_live(parts: Sequence[bytes]) -> RawRecord | Beat | Head:
    """Parse a message of the live socket. Raises PeerError."""
    if len(parts) == 3:
        if len(parts[0]) > TOPIC_BYTES_MAX or not parts[0].isascii():
            raise PeerError(f"a live record has the topic {parts[0][:40]!r}")
        return RawRecord(parts[0], parse_header(parts[1], parts[2]), parts[2])
    if len(parts) == 4 and not parts[1]:
        return parse_beat(parts[0], parts[2], parts[3])
    if parts and parts[0].startswith(HEADS) and len(parts) <= 2:
        # The welcome message of XPUB has one part only: the same bytes, joined.
        tail = parts[1] if len(parts) == 2 else parts[0][len(HEADS) :]
        incarnation, sequence = unpack(_HEAD, tail, "head")
        return Head(incarnation, sequence, link_up=len(parts) == 1)
    raise PeerError(f"live message of {len(parts)} parts is neither record, beat nor head")
