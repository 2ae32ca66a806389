"""Models on their way: bulk frames, chunk headers, manifests, model files, what OpenFHE wrote."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from openfhe_bytes import check_parsers, samples

from fuzzed.mutation import behind, in_parts, protobuf
from fuzzed.target import Target, file_named, joined, parts_of, refused
from metisfl.native_c import crc32c
from metisfl.proto import bulk as b
from metisfl.proto import chunk as c
from metisfl.proto import ckks
from metisfl.proto import tensors as t
from metisfl.proto.errors import MachineError, PeerError
from metisfl.proto.model_file import header_of, open_model
from metisfl.proto.model_pb2 import Encryption, Manifest, Share

__all__ = ["TARGETS"]

REPAIR = 1
DIGEST = bytes(range(32))
MODEL = t.manifest_of(
    [
        t.Tensor("dense/kernel", np.zeros((30, 50), np.float32), True),
        t.Tensor("seed", np.zeros(2, np.uint32), False),
        t.Tensor("none", np.zeros((0, 7), np.float16), False),
        t.Tensor("dense/bias", np.zeros(50, np.uint16), True, "bfloat16"),
    ]
)


def bulk(data: bytes) -> bool:
    """The first bit repairs the checksum of a chunk's header."""
    parts = parts_of(data[1:])
    if data[:1] and data[0] & REPAIR and len(parts) > 1 and parts[0] == b"C":
        parts[1] = _repaired(parts[1])
    with refused(PeerError):
        frame = b.parse(parts, crc32c)
        assert [bytes(part) for part in b.pack(frame, crc32c)] == parts
        assert len(frame.subject) == c.SHORT_DIGEST_BYTES
        if isinstance(frame, b.Chunk):
            with refused(PeerError):
                c.check_payload(frame.header, frame.payload, crc32c)
        return True
    return False


def bulk_frames() -> Iterator[bytes]:
    manifest = t.serialise_manifest(MODEL)
    payload = bytes(MODEL.payload_bytes)
    for frame in (
        b.Open("r.1.train.ada", bytes(16), DIGEST, len(payload), manifest),
        b.Get(DIGEST, 0, 4),
        b.Credit(DIGEST[:16], 0, 4, True),
        b.Model(DIGEST, len(payload), manifest),
        b.Chunk(_header(MODEL), payload),
        b.Stored(DIGEST[:16], DIGEST),
        b.Refused(DIGEST[:16], b.Code.NO_SPACE, "no room"),
    ):
        yield bytes([REPAIR]) + joined([bytes(part) for part in b.pack(frame, crc32c)])


def chunk(data: bytes) -> bool:
    """The first bit repairs the checksum."""
    header = _repaired(data[1:]) if data[:1] and data[0] & REPAIR else data[1:]
    with refused(PeerError):
        found = c.parse_header(header, crc32c)
        assert c.pack_header(found, crc32c) == header
        return True
    return False


def chunks() -> Iterator[bytes]:
    for manifest in (MODEL, _encrypted()):
        yield bytes([REPAIR]) + c.pack_header(_header(manifest), crc32c)


def _header(manifest: Manifest) -> c.ChunkHeader:
    start, stop = c.chunk_extent(0, manifest)
    return c.describe_chunk(
        manifest,
        0,
        bytes(stop - start),
        federation=c.federation_digest("f", "r"),
        manifest_digest=c.short_digest(t.serialise_manifest(manifest)),
        subject=c.task_digest("r.1.train.ada"),
        crc32c=crc32c,
    )


def _repaired(header: bytes) -> bytes:
    fields = header[: c.HEADER_BYTES - 4]
    return fields + struct.pack("<I", crc32c(fields)) + header[c.HEADER_BYTES :]


def _encrypted() -> Manifest:
    shares = [Share(learner=name, weight=0.5, update_digest=DIGEST) for name in ("ada", "bob")]
    form = Encryption(
        fingerprint=bytes(16),
        limb_bits=44,
        ring_dimension=ckks.RING_DIMENSION,
        polynomials=1,
        seeds=2,
        exponents=[0, 3, 1100][: len(t.float_specs(MODEL))],
        shares=shares,
    )
    return t.encrypted_manifest(MODEL, form)


def manifest(data: bytes) -> bool:
    with refused(PeerError):
        found = t.parse_manifest(data)
        assert t.serialise_manifest(found) == data
        assert t.compare_manifests(found, found) is None
        _cut(found)
        return True
    return False


def _cut(found: Manifest) -> None:
    """Chunks cover the payload without a gap, whatever its size, and fit a message."""
    count = c.chunk_count(found)
    assert (count == 0) == (found.payload_bytes == 0)
    assert 0 < c.chunk_bytes(found) <= c.CHUNK_BYTES
    if count:
        assert c.chunk_extent(0, found)[0] == 0
        assert c.chunk_extent(count - 1, found)[1] == found.payload_bytes
    for index in {0, count // 2, count - 1} if count else ():
        start, stop = c.chunk_extent(index, found)
        assert 0 <= c.value_count(found, index) <= stop - start
    c.exponents_of(found)


def manifests() -> Iterator[bytes]:
    for each in (MODEL, _encrypted(), Manifest()):
        yield t.serialise_manifest(each)


def model_file(data: bytes) -> bool:
    path = file_named("a.model", data)
    with refused(MachineError), open_model(path) as model:
        assert header_of(model.manifest_bytes)[:16] == data[:16]
        assert len(model.pread(0, model.payload_bytes + 1)) == model.payload_bytes
        model.digest()
        if not t.is_encrypted(model.manifest):
            for tensor, spec in zip(model.tensors(), model.manifest.tensors, strict=True):
                assert tensor.array.nbytes == t.spec_bytes(spec)
        return True
    return False


def model_files() -> Iterator[bytes]:
    for manifest_bytes in manifests():
        payload_bytes = t.parse_manifest(manifest_bytes).payload_bytes
        if payload_bytes < 1 << 16:
            yield header_of(manifest_bytes) + bytes(payload_bytes)


TARGETS = (
    Target("bulk", bulk, bulk_frames, b.MESSAGE_BYTES_MAX + 64, behind(1, in_parts)),
    Target("chunk", chunk, chunks, 128),
    Target("manifest", manifest, manifests, t.MANIFEST_BYTES_MAX + 64, protobuf),
    Target("model-file", model_file, model_files, 1 << 16),
    Target("openfhe", check_parsers, samples, 1 << 12),
)
