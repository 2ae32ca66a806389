"""Bulk: the frames in which model bytes travel between a learner and the controller.

    upload    OPEN -> CREDIT, CHUNK ... -> CREDIT ... -> STORED | REFUSED
    download  GET -> MODEL, CHUNK ... <- CREDIT ... | REFUSED

Rule 1: credit is absolute ("I have all before chunk `first`; you may send up to chunk `limit`"), so
a frame that is lost, repeated or overtaken does no harm.
Rule 2: who asks (OPEN, GET) is the one who asks again after a silence; the other end keeps no timer
for it. Asking again for what is done answers at once.
Rule 3: every part has a size limit, and fields are checked before anything is done with them.

A message is a list of parts; the first is the kind, one byte. Its fields, little-endian:

    O  OPEN     u16 version, federation 16, digest 32, u64 payload bytes | task id | manifest
    G  GET      u16 version, digest 32, u32 first, u32 limit
    R  CREDIT   subject 16, u32 first, u32 limit, u8 rewind
    M  MODEL    digest 32, u64 payload bytes | manifest
    C  CHUNK    a chunk header (chunk.py) | payload
    S  STORED   subject 16, digest 32
    X  REFUSED  subject 16, u16 code | reason in UTF-8

`subject` names a transfer: the task's digest, or the first 16 bytes of the model's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Final

from metisfl.proto.chunk import (
    CHUNK_BYTES,
    CHUNKS_MAX,
    HEADER_BYTES,
    SHORT_DIGEST_BYTES,
    Buffer,
    ChunkHeader,
    Crc32c,
    pack_header,
    parse_header,
    task_digest,
)
from metisfl.proto.errors import PeerError
from metisfl.proto.tensors import MANIFEST_BYTES_MAX

__all__ = [
    "EAGER_BYTES",
    "MESSAGE_BYTES_MAX",
    "PARTS_MAX",
    "PAYLOAD_BYTES_MAX",
    "VERSION",
    "Chunk",
    "Code",
    "Credit",
    "Frame",
    "Get",
    "Model",
    "Open",
    "Refused",
    "Stored",
    "model_subject",
    "pack",
    "parse",
]

VERSION: Final = 1
PAYLOAD_BYTES_MAX: Final = 1 << 48  # chunk indices stay below 2^30
MESSAGE_BYTES_MAX: Final = CHUNK_BYTES + 8 * 1024  # of one part; also holds any manifest
PARTS_MAX: Final = 4
TASK_ID_BYTES_MAX: Final = 800  # 200 characters
REASON_BYTES_MAX: Final = 2_000
EAGER_BYTES: Final = 64 * 1024
"""A payload up to this long follows its OPEN without waiting for credit."""

assert MANIFEST_BYTES_MAX <= MESSAGE_BYTES_MAX
assert EAGER_BYTES <= CHUNK_BYTES


class Code(IntEnum):
    """Why something was refused; the reason says it in words."""

    BAD_FRAME = 1
    UNKNOWN_TASK = 2  # its round is closed, or it never was
    NOT_YOURS = 3
    OTHER_FEDERATION = 4
    BAD_MANIFEST = 5
    OTHER_UPDATE = 6  # the task has a stored update already
    DIGEST_MISMATCH = 7
    NON_FINITE = 8
    DAMAGED = 9
    NO_SPACE = 10
    TOO_LARGE = 11
    UNKNOWN_MODEL = 12


@dataclass(frozen=True, slots=True)
class Open:
    """The learner has an update for a task. `digest` is the SHA-256 of manifest and payload."""

    task_id: str
    federation: bytes
    digest: bytes
    payload_bytes: int
    manifest: bytes

    @property
    def subject(self) -> bytes:
        return task_digest(self.task_id)


@dataclass(frozen=True, slots=True)
class Get:
    """Send the model from chunk `first` on, up to chunk `limit` (exclusive)."""

    digest: bytes
    first: int
    limit: int

    @property
    def subject(self) -> bytes:
        return model_subject(self.digest)


@dataclass(frozen=True, slots=True)
class Credit:
    """All before `first` has arrived; chunks below `limit` may be sent. `rewind`: from `first`."""

    subject: bytes
    first: int
    limit: int
    rewind: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """What the chunks that follow are part of."""

    digest: bytes
    payload_bytes: int
    manifest: bytes

    @property
    def subject(self) -> bytes:
        return model_subject(self.digest)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A header that has been checked and a payload that has not."""

    header: ChunkHeader
    payload: Buffer

    @property
    def subject(self) -> bytes:
        return self.header.subject


@dataclass(frozen=True, slots=True)
class Stored:
    """The update is complete, checked and durable."""

    subject: bytes
    digest: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """The transfer has ended. A `subject` of zeros means: whatever you sent last."""

    subject: bytes
    code: int
    reason: str


Frame = Open | Get | Credit | Model | Chunk | Stored | Refused

_OPEN = struct.Struct("<H16s32sQ")
_GET = struct.Struct("<H32sII")
_CREDIT = struct.Struct("<16sIIB")
_MODEL = struct.Struct("<32sQ")
_STORED = struct.Struct("<16s32s")
_REFUSED = struct.Struct("<16sH")


def model_subject(digest: bytes) -> bytes:
    """The 16 bytes that name the download of a model."""
    return digest[:SHORT_DIGEST_BYTES]


def pack(frame: Frame, crc32c: Crc32c) -> list[Buffer]:
    """The parts of a message, without a routing id. A chunk's payload is not copied."""
    match frame:
        case Chunk(header, payload):
            return [b"C", pack_header(header, crc32c), payload]
        case Credit(subject, first, limit, rewind):
            return [b"R", _CREDIT.pack(subject, first, limit, rewind)]
        case Open(task_id, federation, digest, payload_bytes, manifest):
            fields = _OPEN.pack(VERSION, federation, digest, payload_bytes)
            return [b"O", fields, task_id.encode(), manifest]
        case Get(digest, first, limit):
            return [b"G", _GET.pack(VERSION, digest, first, limit)]
        case Model(digest, payload_bytes, manifest):
            return [b"M", _MODEL.pack(digest, payload_bytes), manifest]
        case Stored(subject, digest):
            return [b"S", _STORED.pack(subject, digest)]
        case Refused(subject, code, reason):
            text = reason.encode()[:REASON_BYTES_MAX].decode(errors="ignore")
            return [b"X", _REFUSED.pack(subject, code), text.encode()]


def parse(parts: Sequence[Buffer], crc32c: Crc32c) -> Frame:
    """The frame that `parts` (without a routing id) hold. Raises PeerError for everything else."""
    if not 2 <= len(parts) <= PARTS_MAX:
        raise PeerError(f"bulk message of {len(parts)} parts; allowed are 2 to {PARTS_MAX}")
    for number, part in enumerate(parts):
        if len(part) > MESSAGE_BYTES_MAX:
            raise PeerError(
                f"bulk message: part {number} has {len(part)} bytes; at most {MESSAGE_BYTES_MAX}"
            )
    kind = bytes(parts[0][:8])
    shape = _SHAPES.get(kind)
    if shape is None:
        raise PeerError(f"bulk message of the unknown kind {kind!r}")
    name, count, field_bytes, parse_parts = shape
    if len(parts) != count:
        raise PeerError(f"{name} of {len(parts)} parts; it has {count}")
    if len(parts[1]) != field_bytes:
        raise PeerError(f"{name}: fields of {len(parts[1])} bytes; they have {field_bytes}")
    return parse_parts(parts, crc32c)


def _open(parts: Sequence[Buffer], crc32c: Crc32c) -> Frame:
    version, federation, digest, payload_bytes = _OPEN.unpack(parts[1])
    _check_version("OPEN", version)
    task_id = _text("OPEN", "task id", parts[2], TASK_ID_BYTES_MAX)
    if not task_id:
        raise PeerError("OPEN: the task id is empty")
    _check_payload_bytes("OPEN", payload_bytes)
    return Open(task_id, federation, digest, payload_bytes, _manifest("OPEN", parts[3]))


def _get(parts: Sequence[Buffer], crc32c: Crc32c) -> Frame:
    version, digest, first, limit = _GET.unpack(parts[1])
    _check_version("GET", version)
    _check_order("GET", first, limit)
    return Get(digest, first, limit)


def _credit(parts: Sequence[Buffer], crc32c: Crc32c) -> Frame:
    subject, first, limit, rewind = _CREDIT.unpack(parts[1])
    _check_order("CREDIT", first, limit)
    if rewind > 1:
        raise PeerError(f"CREDIT: rewind is {rewind}; allowed are 0 and 1")
    return Credit(subject, first, limit, bool(rewind))


def _model(parts: Sequence[Buffer], crc32c: Crc32c) -> Frame:
    digest, payload_bytes = _MODEL.unpack(parts[1])
    _check_payload_bytes("MODEL", payload_bytes)
    return Model(digest, payload_bytes, _manifest("MODEL", parts[2]))


def _chunk(parts: Sequence[Buffer], crc32c: Crc32c) -> Frame:
    return Chunk(parse_header(parts[1], crc32c), parts[2])


def _stored(parts: Sequence[Buffer], crc32c: Crc32c) -> Frame:
    return Stored(*_STORED.unpack(parts[1]))


def _refused(parts: Sequence[Buffer], crc32c: Crc32c) -> Frame:
    subject, code = _REFUSED.unpack(parts[1])
    return Refused(subject, code, _text("REFUSED", "reason", parts[2], REASON_BYTES_MAX))


Shape = tuple[str, int, int, Callable[[Sequence[Buffer], Crc32c], Frame]]
_SHAPES: Final[Mapping[bytes, Shape]] = MappingProxyType(
    {
        b"O": ("OPEN", 4, _OPEN.size, _open),
        b"G": ("GET", 2, _GET.size, _get),
        b"R": ("CREDIT", 2, _CREDIT.size, _credit),
        b"M": ("MODEL", 3, _MODEL.size, _model),
        b"C": ("CHUNK", 3, HEADER_BYTES, _chunk),
        b"S": ("STORED", 2, _STORED.size, _stored),
        b"X": ("REFUSED", 3, _REFUSED.size, _refused),
    }
)


def _check_version(name: str, version: int) -> None:
    if version != VERSION:
        raise PeerError(
            f"{name}: bulk protocol version {version}; this release speaks {VERSION}: use the same "
            "release at all sites"
        )


def _check_payload_bytes(name: str, payload_bytes: int) -> None:
    if payload_bytes > PAYLOAD_BYTES_MAX:
        raise PeerError(f"{name}: payload of {payload_bytes} bytes; at most {PAYLOAD_BYTES_MAX}")


def _check_order(name: str, first: int, limit: int) -> None:
    if not first <= limit <= CHUNKS_MAX:
        raise PeerError(
            f"{name}: first {first}, limit {limit}; first <= limit <= {CHUNKS_MAX} must hold"
        )


def _manifest(name: str, part: Buffer) -> bytes:
    if len(part) > MANIFEST_BYTES_MAX:
        raise PeerError(f"{name}: manifest of {len(part)} bytes; at most {MANIFEST_BYTES_MAX}")
    return bytes(part)


def _text(name: str, field: str, part: Buffer, bytes_max: int) -> str:
    if len(part) > bytes_max:
        raise PeerError(f"{name}: {field} of {len(part)} bytes; at most {bytes_max}")
    try:
        return bytes(part).decode()
    except UnicodeDecodeError as error:
        raise PeerError(f"{name}: {field} is not UTF-8 ({error.reason})") from None
