"""Questions to the broker and its answers, packed and parsed: the frames of its ingress.

Rule 1: every part has a fixed length or a limit (`frame_parts.py`); the number of parts is exact.
What breaks that is a PeerError that names the value and the bound.
Rule 2: an answer to a fetch carries a receipt that nobody can guess. Who shows it later has read
that answer and all before it, and only then has the broker let go of their memory.
Records and the live socket are in `live_frames.py`; its names are found here, too.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from metisfl.proto.envelope import ENVELOPE_BYTES_MAX, INTEGER_MAX
from metisfl.proto.errors import PeerError
from metisfl.proto.events_pb2 import Hello, Welcome
from metisfl.proto.frame_parts import exact, text, unpack
from metisfl.proto.live_frames import BEAT_BYTES_MAX as BEAT_BYTES_MAX
from metisfl.proto.live_frames import HEADER_BYTES as HEADER_BYTES
from metisfl.proto.live_frames import Beat as Beat
from metisfl.proto.live_frames import Head as Head
from metisfl.proto.live_frames import Header as Header
from metisfl.proto.live_frames import RawRecord as RawRecord
from metisfl.proto.live_frames import pack_head as pack_head
from metisfl.proto.live_frames import pack_header as pack_header
from metisfl.proto.live_frames import pack_live_beat as pack_live_beat
from metisfl.proto.live_frames import parse_beat
from metisfl.proto.live_frames import parse_header as parse_header
from metisfl.proto.live_frames import parse_live as parse_live
from metisfl.proto.topics import TOPIC_BYTES_MAX, lane_of_federation

PROTOCOL: Final = 2
MESSAGE_BYTES_MAX: Final = ENVELOPE_BYTES_MAX + 1024
"""MAXMSGSIZE of every event socket: libzmq cuts the connection of a peer that sends more."""
PARTS_MAX: Final = 5
FETCH_EVENTS_MAX: Final = 256
ANSWER_BYTES_MAX: Final = 2 * 1024 * 1024
"""What an answer to a fetch takes of the memory, with `PART_BYTES` for each of its parts."""
PART_BYTES: Final = 100  # what libzmq needs to carry one, about
FETCH_BYTES_MAX: Final = ANSWER_BYTES_MAX - FETCH_EVENTS_MAX * (
    TOPIC_BYTES_MAX + HEADER_BYTES + 3 * PART_BYTES
)
"""Envelopes in one answer."""
FETCHES_MAX: Final = 4
"""Fetches without an answer that a reader has on its way; beyond that the broker may put it off."""
HELLO_BYTES_MAX: Final = 1024
STATUS_BYTES_MAX: Final = 128 * 1024
REASON_BYTES_MAX: Final = 2048
WELCOME_BYTES_MAX: Final = 1024

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
RECEIPT: Final = b"K"  # for who has nothing to fetch; a fetch carries one, too

POISON: Final = 1  # this event will never be accepted; the watermark has moved past it
FENCED: Final = 2  # a newer epoch of this publisher exists; this one is over
REFUSED: Final = 3  # not understood or not allowed; nothing was consumed

_FETCH: Final = struct.Struct("<IQIQ")
_CURSOR: Final = struct.Struct("<Q")
_CRC: Final = struct.Struct("<I")
_MARK: Final = struct.Struct("<QQ")
_REJECT: Final = struct.Struct("<BQ")
_BUSY: Final = struct.Struct("<II")
_BATCH: Final = struct.Struct("<IQQQQI")
_RECEIPT: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Fetch:
    """`receipt` is that of the latest answer which came on this connection, 0 before the first."""

    request: int
    after: int
    max_events: int
    lane: str
    receipt: int = 0


@dataclass(frozen=True, slots=True)
class Receipt:
    """The answer of this number has come, and all before it."""

    number: int


@dataclass(frozen=True, slots=True)
class CursorReport:
    sequence: int
    lane: str


@dataclass(frozen=True, slots=True)
class StatusRequest:
    """How is the broker? It is packed as [STATUS]."""


@dataclass(frozen=True, slots=True)
class StatusAnswer:
    """`body` is an object in JSON; see the broker's status."""

    body: bytes


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
    `receipt`: what the next fetch carries. No two answers have the same, and none is 0.
    """

    request: int
    head: int
    through: int
    floor: int
    records: tuple[RawRecord, ...]
    receipt: int = 0


Request = Hello | Fetch | Receipt | CursorReport | Beat | StatusRequest
Reply = SayHello | Welcome | Ack | Nack | Reject | Busy | FetchedBatch | StatusAnswer


def _lane(part: bytes) -> str:
    lane = text(part, TOPIC_BYTES_MAX, "lane")
    try:
        lane_of_federation(lane)
    except ValueError as error:
        raise PeerError(f"not a lane: {error}") from error
    return lane


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
    numbers = _FETCH.pack(fetch.request, fetch.after, fetch.max_events, fetch.receipt)
    return [FETCH, numbers, fetch.lane.encode()]


def pack_receipt(receipt: Receipt) -> list[bytes]:
    return [RECEIPT, _RECEIPT.pack(receipt.number)]


def pack_cursor(report: CursorReport) -> list[bytes]:
    return [CURSOR, _CURSOR.pack(report.sequence), report.lane.encode()]


def pack_beat(beat: Beat) -> list[bytes]:
    return [BEAT, beat.topic.encode(), beat.type.encode(), beat.payload]


def parse_request(parts: Sequence[bytes]) -> Request:
    """Parse any message of a client but a publish (see `parse_publish`). Raises PeerError."""
    kind = parts[0] if parts else b""
    if kind == HELLO:
        exact(parts, 2, "hello")
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
        exact(parts, 3, "fetch")
        request, after, max_events, receipt = unpack(_FETCH, parts[1], "fetch")
        if not 1 <= max_events <= FETCH_EVENTS_MAX:
            raise PeerError(f"fetch of {max_events} events; allowed are 1 to {FETCH_EVENTS_MAX}")
        return Fetch(request, after, max_events, _lane(parts[2]), receipt)
    if kind == RECEIPT:
        exact(parts, 2, "receipt")
        return Receipt(unpack(_RECEIPT, parts[1], "receipt")[0])
    if kind == CURSOR:
        exact(parts, 3, "cursor")
        return CursorReport(unpack(_CURSOR, parts[1], "cursor")[0], _lane(parts[2]))
    if kind == BEAT:
        exact(parts, 4, "beat")
        return parse_beat(parts[1], parts[2], parts[3])
    if kind == STATUS and len(parts) == 1:
        return StatusRequest()
    raise PeerError(f"unknown message kind {kind[:8]!r} of {len(parts)} parts from a client")


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
        reason = reply.reason.encode()[:REASON_BYTES_MAX]
        return [BUSY, _BUSY.pack(reply.retry_ms, reply.request), reason]
    if isinstance(reply, Welcome):
        return [WELCOME, reply.SerializeToString()]
    if isinstance(reply, StatusAnswer):
        return [STATUS, reply.body]
    assert isinstance(reply, SayHello), reply
    return [HELLO]


def pack_batch(
    request: int, head: int, through: int, floor: int, receipt: int, records: Sequence[bytes]
) -> list[bytes]:
    """`records` holds topic, header, envelope of each record, one after the other."""
    numbers = _BATCH.pack(request, head, through, floor, receipt, len(records) // 3)
    return [BATCH, numbers, *records]


def memory_bytes(parts: Sequence[bytes]) -> int:
    """What a message takes of the memory until its receiver has it, about."""
    return sum(map(len, parts)) + PART_BYTES * len(parts)


def parse_reply(parts: Sequence[bytes]) -> Reply:
    """Parse any message of the broker on the ingress connection. Raises PeerError."""
    kind = parts[0] if parts else b""
    if kind == BATCH:
        return _parse_batch(parts)
    if kind == HELLO:
        exact(parts, 1, "say-hello")
        return SayHello()
    if kind == STATUS:
        exact(parts, 2, "status")
        if len(parts[1]) > STATUS_BYTES_MAX:
            raise PeerError(f"status has {len(parts[1])} bytes; at most {STATUS_BYTES_MAX}")
        return StatusAnswer(parts[1])
    if kind in (ACK, NACK):
        exact(parts, 2, "ack")
        mark = unpack(_MARK, parts[1], "ack")
        return Ack(*mark) if kind == ACK else Nack(*mark)
    if kind == REJECT:
        exact(parts, 3, "reject")
        code, sequence = unpack(_REJECT, parts[1], "reject")
        return Reject(code, sequence, parts[2][:REASON_BYTES_MAX].decode(errors="replace"))
    if kind == BUSY:
        exact(parts, 3, "busy")
        retry_ms, request = unpack(_BUSY, parts[1], "busy")
        return Busy(retry_ms, request, parts[2][:REASON_BYTES_MAX].decode(errors="replace"))
    if kind == WELCOME:
        exact(parts, 2, "welcome")
        return _parse_welcome(parts[1])
    raise PeerError(f"unknown message kind {kind[:8]!r} from the broker")


def _parse_welcome(data: bytes) -> Welcome:
    if len(data) > WELCOME_BYTES_MAX:
        raise PeerError(f"welcome has {len(data)} bytes; at most {WELCOME_BYTES_MAX}")
    try:
        welcome = Welcome.FromString(data)
    except DecodeError as error:
        raise PeerError(f"welcome is not protobuf: {error}") from error
    most = max(welcome.incarnation, welcome.head, welcome.publisher_sequence)
    if most > INTEGER_MAX:
        raise PeerError(f"welcome has the number {most}; at most {INTEGER_MAX}")
    return welcome


def _parse_batch(parts: Sequence[bytes]) -> FetchedBatch:
    if len(parts) < 2:
        raise PeerError("batch has 1 part; it has at least 2")
    request, head, through, floor, receipt, count = unpack(_BATCH, parts[1], "batch")
    if count > FETCH_EVENTS_MAX:
        raise PeerError(f"batch of {count} records; at most {FETCH_EVENTS_MAX}")
    exact(parts, 2 + 3 * count, f"batch of {count} records")
    records = tuple(
        RawRecord(parts[at], parse_header(parts[at + 1], parts[at + 2]), parts[at + 2])
        for at in range(2, len(parts), 3)
    )
    return FetchedBatch(request, head, through, floor, records, receipt)
