"""Chunks: the unit of transport, checksum, resume and folding. One format for all of them.

Rule 1: a plain payload is cut every CHUNK_BYTES, whatever it holds. Tensors lie on 64-byte
boundaries and 64 divides CHUNK_BYTES, so no value is ever split. An encrypted payload is cut into
its blocks (see ckks.py), so that what arrives can be checked, and folded, by itself.
Rule 2: every field of a header is checked before the payload is touched, and the payload's CRC-32C
before its values are used.

The header, 96 bytes, all integers little-endian and on their natural boundaries:

    offset  bytes  type  field
    0       4      raw   magic, "MFLC"
    4       2      u16   version, 1
    6       1      u8    privacy mode: 0 plain, 1 ckks
    7       1      u8    reserved, 0
    8       16     raw   digest of the federation and its run; zeros for a published model
    24      16     raw   digest of the manifest
    40      16     raw   digest of the exponents; zeros in plain mode
    56      16     raw   subject: digest of the task, or the start of the model's own digest
    72      4      u32   index of this chunk, from 0
    76      4      u32   count of chunks in the payload
    80      4      u32   values that lie in this chunk: of all dtypes, padding not counted
    84      4      u32   bytes of this chunk's payload, 1 to 262144
    88      4      u32   CRC-32C of this chunk's payload
    92      4      u32   CRC-32C of the 92 bytes before

Digests in headers are the first 16 bytes of a SHA-256. The checksum function is passed in.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from metisfl.proto import ckks
from metisfl.proto.errors import PeerError
from metisfl.proto.model_pb2 import Manifest
from metisfl.proto.tensors import ITEM_BYTES, encrypted_values, is_encrypted, segments

__all__ = [
    "CHUNKS_MAX",
    "CHUNK_BYTES",
    "CKKS",
    "HEADER_BYTES",
    "NO_DIGEST",
    "PLAIN",
    "SHORT_DIGEST_BYTES",
    "Buffer",
    "ChunkHeader",
    "Crc32c",
    "check_payload",
    "chunk_bytes",
    "chunk_count",
    "chunk_extent",
    "describe_chunk",
    "exponents_of",
    "federation_digest",
    "pack_header",
    "parse_header",
    "short_digest",
    "task_digest",
    "value_count",
]

Buffer = bytes | bytearray | memoryview
Crc32c = Callable[[Buffer], int]

CHUNK_BYTES: Final = 256 * 1024
HEADER_BYTES: Final = 96
SHORT_DIGEST_BYTES: Final = 16
NO_DIGEST: Final = bytes(SHORT_DIGEST_BYTES)
CHUNKS_MAX: Final = 2**31 - 1
PLAIN: Final = 0
CKKS: Final = 1

MAGIC: Final = b"MFLC"
VERSION: Final = 1
_FIELDS: Final = struct.Struct("<4sHBB16s16s16s16sIIIII")
_U32: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """What a chunk says of itself. Digests have 16 bytes; `payload_bytes` is this chunk's alone."""

    federation: bytes
    manifest: bytes
    subject: bytes
    index: int
    count: int
    value_count: int
    payload_bytes: int
    payload_crc32c: int
    exponents: bytes = NO_DIGEST
    privacy: int = PLAIN


def short_digest(data: Buffer) -> bytes:
    """The first 16 bytes of the SHA-256 of `data`."""
    return hashlib.sha256(data).digest()[:SHORT_DIGEST_BYTES]


def federation_digest(federation: str, run_id: str) -> bytes:
    """16 bytes that tell one run of one federation from every other; '/' is in neither name."""
    return short_digest(f"{federation}/{run_id}".encode())


def task_digest(task_id: str) -> bytes:
    """The 16 bytes that stand for a task in chunk headers and bulk frames."""
    return short_digest(task_id.encode())


def chunk_bytes(manifest: Manifest) -> int:
    """Bytes of every chunk but the last, which may have fewer."""
    if not is_encrypted(manifest):
        return CHUNK_BYTES
    form = manifest.encryption
    most = ckks.block_ciphertexts(form.limb_bits, form.ring_dimension)
    return ckks.block_bytes(most, form.limb_bits, form.ring_dimension, form.polynomials, form.seeds)


def chunk_count(manifest: Manifest) -> int:
    """Chunks that the payload is cut into; none for an empty one."""
    return -(-manifest.payload_bytes // chunk_bytes(manifest))


def chunk_extent(index: int, manifest: Manifest) -> tuple[int, int]:
    """Where chunk `index` starts and stops in the payload."""
    step = chunk_bytes(manifest)
    return index * step, min((index + 1) * step, manifest.payload_bytes)


def value_count(manifest: Manifest, index: int) -> int:
    """Values of the tensors that lie in chunk `index`."""
    if is_encrypted(manifest):
        form = manifest.encryption
        step = ckks.block_ciphertexts(form.limb_bits, form.ring_dimension) * form.ring_dimension
        if index + 1 < chunk_count(manifest):
            return step
        return encrypted_values(manifest) - index * step
    count = 0
    for part in segments(manifest, *chunk_extent(index, manifest)):
        count += (part.stop - part.start) // ITEM_BYTES[part.dtype]
    return count


def describe_chunk(
    manifest: Manifest,
    index: int,
    payload: Buffer,
    *,
    federation: bytes,
    manifest_digest: bytes,
    subject: bytes,
    crc32c: Crc32c,
) -> ChunkHeader:
    """The header of chunk `index` of a model, whose bytes are `payload`."""
    start, stop = chunk_extent(index, manifest)
    assert len(payload) == stop - start, f"chunk {index}: {len(payload)} bytes, not {stop - start}"
    return ChunkHeader(
        federation=federation,
        manifest=manifest_digest,
        subject=subject,
        index=index,
        count=chunk_count(manifest),
        value_count=value_count(manifest, index),
        payload_bytes=len(payload),
        payload_crc32c=crc32c(payload),
        privacy=CKKS if is_encrypted(manifest) else PLAIN,
        exponents=exponents_of(manifest),
    )


def exponents_of(manifest: Manifest) -> bytes:
    """The digest of the exponents, and of what partials open, which headers carry; zeros in plain
    mode."""
    if not is_encrypted(manifest):
        return NO_DIGEST
    return ckks.exponents_digest(manifest.encryption.exponents, manifest.encryption.opens)


def pack_header(header: ChunkHeader, crc32c: Crc32c) -> bytes:
    """The 96 bytes of a header. What does not fit its field is a defect: struct.error."""
    fields = _FIELDS.pack(
        MAGIC,
        VERSION,
        header.privacy,
        0,
        header.federation,
        header.manifest,
        header.exponents,
        header.subject,
        header.index,
        header.count,
        header.value_count,
        header.payload_bytes,
        header.payload_crc32c,
    )
    return fields + _U32.pack(crc32c(fields))


def parse_header(data: Buffer, crc32c: Crc32c) -> ChunkHeader:
    """Check and unpack a header. Raises PeerError with the field, its value and its bound."""
    if len(data) != HEADER_BYTES:
        raise PeerError(f"chunk header of {len(data)} bytes; it has {HEADER_BYTES}")
    magic, version, privacy, reserved, *digests_and_numbers = _FIELDS.unpack_from(data)
    if magic != MAGIC:
        raise PeerError(f"chunk header: magic is {magic!r}; it must be {MAGIC!r}")
    if version != VERSION:
        raise PeerError(f"chunk header: version is {version}; this release reads {VERSION}")
    (said,) = _U32.unpack_from(data, _FIELDS.size)
    found = crc32c(memoryview(data)[: _FIELDS.size])
    if said != found:
        raise PeerError(f"chunk header: its CRC-32C is {found:#010x} and it says {said:#010x}")
    federation, manifest, exponents, subject = digests_and_numbers[:4]
    index, count, value_count, payload_bytes, payload_crc32c = digests_and_numbers[4:]
    if privacy not in (PLAIN, CKKS):
        raise PeerError(
            f"chunk header: privacy mode is {privacy}; this release knows 0 (plain) and 1 (ckks)"
        )
    if reserved:
        raise PeerError(f"chunk header: the reserved byte is {reserved}; it must be 0")
    if (exponents == NO_DIGEST) != (privacy == PLAIN):
        raise PeerError(
            f"chunk header: exponents {exponents.hex()} in privacy mode {privacy}; they are zeros "
            "in plain mode (0), and only there"
        )
    if not 1 <= payload_bytes <= CHUNK_BYTES:
        raise PeerError(
            f"chunk header: payload of {payload_bytes} bytes; allowed are 1 to {CHUNK_BYTES}"
        )
    if index >= count:
        raise PeerError(f"chunk header: index is {index} of {count} chunks; at most {count - 1}")
    if privacy == PLAIN and index + 1 < count and payload_bytes != CHUNK_BYTES:
        raise PeerError(
            f"chunk header: chunk {index} of {count} has {payload_bytes} bytes; only the last may "
            f"have fewer than {CHUNK_BYTES}"
        )
    if value_count > payload_bytes:
        raise PeerError(
            f"chunk header: {value_count} values in {payload_bytes} bytes; at most one a byte"
        )
    return ChunkHeader(
        federation,
        manifest,
        subject,
        index,
        count,
        value_count,
        payload_bytes,
        payload_crc32c,
        exponents,
        privacy,
    )


def check_payload(header: ChunkHeader, payload: Buffer, crc32c: Crc32c) -> None:
    """Check a payload against its header. Raises PeerError for its length or its checksum."""
    if len(payload) != header.payload_bytes:
        raise PeerError(
            f"chunk {header.index}: payload of {len(payload)} bytes; its header says "
            f"{header.payload_bytes}"
        )
    found = crc32c(payload)
    if found != header.payload_crc32c:
        raise PeerError(
            f"chunk {header.index}: the payload's CRC-32C is {found:#010x}; its header says "
            f"{header.payload_crc32c:#010x}"
        )
