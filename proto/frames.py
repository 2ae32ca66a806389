"""Frames of the broker's two sockets, packed and parsed in one place.

Rule 1: every part has a fixed length or a limit, checked before it is read further; the number of
parts is exact. What breaks that is a PeerError that names the value and the bound.
Rule 2: an envelope is made once, by its publisher, and then stored and forwarded byte for byte;
the broker's own knowledge travels in the record header in front of it.
All integers are little-endian and unsigned; 64-bit ones stay below 2**63, as in SQLite.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from metisfl.proto.envelope import ENVELOPE_BYTES_MAX, EVENT_TYPE, INTEGER_MAX
from metisfl.proto.errors import PeerError
from metisfl.proto.events_pb2 import Hello, Welcome
from metisfl.proto.topics import HEADS, TOPIC_BYTES_MAX, lane_of_federation

PROTOCOL: Final = 1
MESSAGE_BYTES_MAX: Final = ENVELOPE_BYTES_MAX + 1024
"""MAXMSGSIZE of every event socket: libzmq cuts the connection of a peer that sends more."""
PARTS_MAX: Final = 5
FETCH_EVENTS_MAX: Final = 256
FETCH_BYTES_MAX: Final = 4 * 1024 * 1024
BEAT_BYTES_MAX: Final = 64 * 1024
HELLO_BYTES_MAX: Final = 1024
STATUS_BYTES_MAX: Final = 128 * 1024
REASON_BYTES_MAX: Final = 2048

HELLO: Final = b"H"  # from a client: Hello; from the broker, alone: say hello (again)
PUBLISH: Final = b"P"
FETCH: Final = b"F"
BEAT: Final = b"B"
CURSOR: Final = b"C"
STATUS: Final = b"S"  # from a client, alone: how are you; from the broker: the answer
WELCOME: Final = b"W"
ACK: Final = b"A"
NACK: Final = b"N"
REJECT: Final = b"R"
BUSY: Final = b"Y"
BATCH: Final = b"E"

POISON: Final = 1  # this event will never be accepted; the watermark has moved past it
FENCED: Final = 2  # a newer epoch of this publisher exists; this one is over
REFUSED: Final = 3  # not understood or not allowed; nothing was consumed

HEADER_MAGIC: Final = 0x4D01  # "M", version 1
_HEADER: Final = struct.Struct("<HHIQQQQQ")
_HEAD: Final = struct.Struct("<QQ")
_FETCH: Final = struct.Struct("<IQI")
_CURSOR: Final = struct.Struct("<Q")
_CRC: Final = struct.Struct("<I")
_MARK: Final = struct.Struct("<QQ")
_REJECT: Final = struct.Struct("<BQ")
_BUSY: Final = struct.Struct("<II")
_BATCH: Final = struct.Struct("<IQQQI")
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
class Fetch:
    request: int
    after: int
    max_events: int
    lane: str


@dataclass(frozen=True, slots=True)
class CursorReport:
    sequence: int
    lane: str


@dataclass(frozen=True, slots=True)
class Beat:
    """A transient event: published live, never stored."""

    topic: str
    type: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class StatusRequest:
    """How is the broker? It is packed as [STATUS]."""


@dataclass(frozen=True, slots=True)
class StatusAnswer:
    """`body` is an object in JSON; see the broker's status."""

    body: bytes


@dataclass(frozen=True, slots=True)
class Head:
    """How long the log is. `link_up`: this subscriber's connection is new."""

    incarnation: int
    sequence: int
    link_up: bool = False


@dataclass(frozen=True, slots=True)
class SayHello:
    """The broker does not know this connection (yet, or any more)."""


@dataclass(frozen=True, slots=True)
class Ack:
    epoch: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Nack:
    epoch: int
    expected: int


@dataclass(frozen=True, slots=True)
class Reject:
    code: int
    sequence: int
    reason: str


@dataclass(frozen=True, slots=True)
class Busy:
    """Ask again after `retry_ms`. `request` is the fetch meant, 0 for publishing."""

    retry_ms: int
    request: int
    reason: str


@dataclass(frozen=True, slots=True)
class FetchedBatch:
    """The lane's next records; its cursor moves to `through`, also when there is none.

    `floor`: 0, or the newest record of the lane behind what was asked for that was trimmed away.
    """

    request: int
    head: int
    through: int
    floor: int
    records: tuple[RawRecord, ...]


Request = Hello | Fetch | CursorReport | Beat | StatusRequest
Reply = SayHello | Welcome | Ack | Nack | Reject | Busy | FetchedBatch | StatusAnswer


def _unpack(layout: struct.Struct, part: bytes, what: str) -> tuple[int, ...]:
    if len(part) != layout.size:
        raise PeerError(f"{what} has {len(part)} bytes; it has exactly {layout.size}")
    values: tuple[int, ...] = layout.unpack(part)
    if max(values) > INTEGER_MAX:
        raise PeerError(f"{what} holds {max(values)}; at most {INTEGER_MAX}")
    return values


def _text(part: bytes, most: int, what: str) -> str:
    if len(part) > most:
        raise PeerError(f"{what} has {len(part)} bytes; at most {most}")
    try:
        return part.decode()
    except UnicodeDecodeError as error:
        raise PeerError(f"{what} is not UTF-8: {part[:40]!r}") from error


def _lane(part: bytes) -> str:
    lane = _text(part, TOPIC_BYTES_MAX, "lane")
    try:
        lane_of_federation(lane)
    except ValueError as error:
        raise PeerError(f"not a lane: {error}") from error
    return lane


def _exact(parts: Sequence[bytes], count: int, what: str) -> None:
    if len(parts) != count:
        raise PeerError(f"{what} has {len(parts)} parts; it has exactly {count}")


# ---- Client to broker ------------------------------------------------------------


def pack_crc(envelope: bytes) -> bytes:
    return _CRC.pack(zlib.crc32(envelope))


def parse_publish(parts: Sequence[bytes]) -> tuple[int, bytes]:
    """Return (crc, envelope) of [b"P", crc, envelope]; the envelope is not looked into."""
    if len(parts) != 3 or len(parts[1]) != 4:
        raise PeerError(f"publish has {len(parts)} parts; it has exactly 3, with a crc of 4 bytes")
    if len(parts[2]) > ENVELOPE_BYTES_MAX:
        raise PeerError(f"envelope has {len(parts[2])} bytes; at most {ENVELOPE_BYTES_MAX}")
    return _CRC.unpack(parts[1])[0], parts[2]


def pack_hello(hello: Hello) -> list[bytes]:
    return [HELLO, hello.SerializeToString()]


def pack_fetch(fetch: Fetch) -> list[bytes]:
    return [FETCH, _FETCH.pack(fetch.request, fetch.after, fetch.max_events), fetch.lane.encode()]


def pack_cursor(report: CursorReport) -> list[bytes]:
    return [CURSOR, _CURSOR.pack(report.sequence), report.lane.encode()]


def pack_beat(beat: Beat) -> list[bytes]:
    return [BEAT, beat.topic.encode(), beat.type.encode(), beat.payload]


def parse_request(parts: Sequence[bytes]) -> Request:
    """Parse any message of a client but a publish (see `parse_publish`). Raises PeerError."""
    kind = parts[0] if parts else b""
    if kind == HELLO:
        _exact(parts, 2, "hello")
        if len(parts[1]) > HELLO_BYTES_MAX:
            raise PeerError(f"hello has {len(parts[1])} bytes; at most {HELLO_BYTES_MAX}")
        try:
            hello = Hello.FromString(parts[1])
        except DecodeError as error:
            raise PeerError(f"hello is not protobuf: {error}") from error
        if hello.epoch > INTEGER_MAX:
            raise PeerError(f"hello has the epoch {hello.epoch}; at most {INTEGER_MAX}")
        return hello
    if kind == FETCH:
        _exact(parts, 3, "fetch")
        request, after, max_events = _unpack(_FETCH, parts[1], "fetch")
        if not 1 <= max_events <= FETCH_EVENTS_MAX:
            raise PeerError(f"fetch of {max_events} events; allowed are 1 to {FETCH_EVENTS_MAX}")
        return Fetch(request, after, max_events, _lane(parts[2]))
    if kind == CURSOR:
        _exact(parts, 3, "cursor")
        return CursorReport(_unpack(_CURSOR, parts[1], "cursor")[0], _lane(parts[2]))
    if kind == BEAT:
        _exact(parts, 4, "beat")
        return _beat(parts[1], parts[2], parts[3])
    if kind == STATUS and len(parts) == 1:
        return StatusRequest()
    raise PeerError(f"unknown message kind {kind[:8]!r} of {len(parts)} parts from a client")


def _beat(topic: bytes, kind: bytes, payload: bytes) -> Beat:
    if len(payload) > BEAT_BYTES_MAX:
        raise PeerError(f"beat has {len(payload)} bytes; at most {BEAT_BYTES_MAX}")
    name = _text(kind, 64, "beat's type")
    if not EVENT_TYPE.fullmatch(name):
        raise PeerError(f"beat's type {name!r} is not a message name")
    return Beat(_text(topic, TOPIC_BYTES_MAX, "beat's topic"), name, payload)


# ---- Broker to client --------------------------------------------------------------


def pack_reply(reply: Reply) -> list[bytes]:
    """Pack any message of the broker but a batch (see `pack_batch`)."""
    if isinstance(reply, Ack):
        return [ACK, _MARK.pack(reply.epoch, reply.sequence)]
    if isinstance(reply, Nack):
        return [NACK, _MARK.pack(reply.epoch, reply.expected)]
    if isinstance(reply, Reject):
        reason = reply.reason.encode()[:REASON_BYTES_MAX]
        return [REJECT, _REJECT.pack(reply.code, reply.sequence), reason]
    if isinstance(reply, Busy):
        return [BUSY, _BUSY.pack(reply.retry_ms, reply.request), reply.reason.encode()]
    if isinstance(reply, Welcome):
        return [WELCOME, reply.SerializeToString()]
    if isinstance(reply, StatusAnswer):
        return [STATUS, reply.body]
    assert isinstance(reply, SayHello), reply
    return [HELLO]


def pack_batch(
    request: int, head: int, through: int, floor: int, records: Sequence[bytes]
) -> list[bytes]:
    """`records` holds topic, header, envelope of each record, one after the other."""
    return [BATCH, _BATCH.pack(request, head, through, floor, len(records) // 3), *records]


def parse_reply(parts: Sequence[bytes]) -> Reply:
    """Parse any message of the broker on the ingress connection. Raises PeerError."""
    kind = parts[0] if parts else b""
    if kind == BATCH:
        return _parse_batch(parts)
    if kind == HELLO:
        _exact(parts, 1, "say-hello")
        return SayHello()
    if kind == STATUS:
        _exact(parts, 2, "status")
        if len(parts[1]) > STATUS_BYTES_MAX:
            raise PeerError(f"status has {len(parts[1])} bytes; at most {STATUS_BYTES_MAX}")
        return StatusAnswer(parts[1])
    if kind in (ACK, NACK):
        _exact(parts, 2, "ack")
        mark = _unpack(_MARK, parts[1], "ack")
        return Ack(*mark) if kind == ACK else Nack(*mark)
    if kind == REJECT:
        _exact(parts, 3, "reject")
        code, sequence = _unpack(_REJECT, parts[1], "reject")
        return Reject(code, sequence, parts[2][:REASON_BYTES_MAX].decode(errors="replace"))
    if kind == BUSY:
        _exact(parts, 3, "busy")
        retry_ms, request = _unpack(_BUSY, parts[1], "busy")
        return Busy(retry_ms, request, parts[2][:REASON_BYTES_MAX].decode(errors="replace"))
    if kind == WELCOME:
        _exact(parts, 2, "welcome")
        try:
            return Welcome.FromString(parts[1])
        except DecodeError as error:
            raise PeerError(f"welcome is not protobuf: {error}") from error
    raise PeerError(f"unknown message kind {kind[:8]!r} from the broker")


def _parse_batch(parts: Sequence[bytes]) -> FetchedBatch:
    if len(parts) < 2:
        raise PeerError("batch has 1 part; it has at least 2")
    request, head, through, floor, count = _unpack(_BATCH, parts[1], "batch")
    if count > FETCH_EVENTS_MAX:
        raise PeerError(f"batch of {count} records; at most {FETCH_EVENTS_MAX}")
    _exact(parts, 2 + 3 * count, f"batch of {count} records")
    records = tuple(
        RawRecord(parts[at], parse_header(parts[at + 1], parts[at + 2]), parts[at + 2])
        for at in range(2, len(parts), 3)
    )
    return FetchedBatch(request, head, through, floor, records)


# ---- Records and the live socket ---------------------------------------------------------


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
    if zlib.crc32(envelope) != header.crc:
        raise PeerError(f"record {header.sequence} is damaged: its checksum does not match")
    return header


def pack_live_beat(beat: Beat) -> list[bytes]:
    return [beat.topic.encode(), b"", beat.type.encode(), beat.payload]


def pack_head(head: Head) -> list[bytes]:
    return [HEADS, _HEAD.pack(head.incarnation, head.sequence)]


def parse_live(parts: Sequence[bytes]) -> RawRecord | Beat | Head:
    """Parse a message of the live socket. Raises PeerError."""
    if len(parts) == 3:
        return RawRecord(parts[0], parse_header(parts[1], parts[2]), parts[2])
    if len(parts) == 4 and not parts[1]:
        return _beat(parts[0], parts[2], parts[3])
    if parts and parts[0].startswith(HEADS) and len(parts) <= 2:
        # The welcome message of XPUB has one part only: the same bytes, joined.
        tail = parts[1] if len(parts) == 2 else parts[0][len(HEADS) :]
        incarnation, sequence = _unpack(_HEAD, tail, "head")
        return Head(incarnation, sequence, link_up=len(parts) == 1)
    raise PeerError(f"live message of {len(parts)} parts is neither record, beat nor head")
