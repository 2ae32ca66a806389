"""The model file: one layout on disk for models and updates, at learners and controller.

    b"METISMDL" | u32 version | u32 manifest length | manifest | zeros to 4096 | payload

Rule: a model file appears under its name only when its content is complete; it is never changed
afterwards. Its digest is SHA-256 over the manifest's length (u32), the manifest and the
payload. All integers are little-endian. Reading maps the file: memory does not grow with the model.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from metisfl.proto.errors import MachineError, PeerError
from metisfl.proto.model_pb2 import Manifest
from metisfl.proto.tensors import (
    MANIFEST_BYTES_MAX,
    Tensor,
    array_of,
    manifest_of,
    normalised,
    parse_manifest,
    serialise_manifest,
)

__all__ = [
    "DIGEST_BYTES",
    "ModelFile",
    "ModelWriter",
    "content_hash",
    "header_of",
    "open_model",
    "sync_file",
    "sync_folder",
    "write_model",
]

DIGEST_BYTES: Final = 32
MAGIC: Final = b"METISMDL"
VERSION: Final = 1
PAGE_BYTES: Final = 4096
READ_BYTES: Final = 1 << 20
_PREFIX: Final = struct.Struct("<8sII")
_LENGTH: Final = struct.Struct("<I")


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` durable. Raises OSError."""
    _sync(folder, os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Make what the file `path` holds durable. Raises OSError."""
    _sync(path)


def _sync(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def header_of(manifest_bytes: bytes) -> bytes:
    """Everything before the payload; its length is where the payload starts."""
    used = _PREFIX.size + len(manifest_bytes)
    return (
        _PREFIX.pack(MAGIC, VERSION, len(manifest_bytes))
        + manifest_bytes
        + bytes(-used % PAGE_BYTES)
    )


def content_hash(manifest_bytes: bytes) -> hashlib._Hash:
    """The hash of a model's content, which the payload is yet to be added to."""
    return hashlib.sha256(_LENGTH.pack(len(manifest_bytes)) + manifest_bytes)


class ModelWriter:
    """Writes one model file front to back: `append` all of the payload, then `commit`.

    Use it as a context manager: what is not committed is removed. One path has one writer at a
    time; what a killed writer left (`<path>.partial`) is overwritten by the next.
    Raises OSError from the file system, such as for a full disk.
    """

    def __init__(self, path: Path, manifest_bytes: bytes) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._digest = content_hash(manifest_bytes)
        self._missing = parse_manifest(manifest_bytes).payload_bytes
        self._file = open(self._partial, "wb", buffering=READ_BYTES)  # noqa: SIM115
        self._file.write(header_of(manifest_bytes))

    def __enter__(self) -> ModelWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._file.closed:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Add the next bytes of the payload (any contiguous buffer)."""
        view = memoryview(data).cast("B")
        assert len(view) <= self._missing, f"{len(view)} bytes where {self._missing} are missing"
        self._missing -= len(view)
        self._digest.update(view)
        self._file.write(view)

    def commit(self, *, sync: bool = True) -> bytes:
        """Give the complete content its name and return its digest (32 bytes).

        With `sync` the content is on disk first; that its name is, too, takes a `sync_folder`.
        """
        assert self._missing == 0, f"{self._missing} bytes of the payload are missing"
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self._path)
        return self._digest.digest()


def write_model(path: Path, tensors: Sequence[Tensor], *, sync: bool = True) -> bytes:
    """Write `tensors` to `path`, atomically, and return the digest (32 bytes).

    With `sync` the content is on disk before it has its name.

    Raises UserError for tensors that cannot travel (see `manifest_of`) and OSError.
    """
    manifest = manifest_of(tensors)
    with ModelWriter(path, serialise_manifest(manifest)) as writer:
        end = 0
        for tensor, spec in zip(tensors, manifest.tensors, strict=True):
            writer.append(bytes(spec.offset - end))
            values = normalised(tensor)
            # As raw bytes: neither bfloat16 nor an empty array exports a buffer that can be cast.
            writer.append(values.reshape(-1).view("u1").data if values.size else b"")
            end = spec.offset + values.nbytes
        return writer.commit(sync=sync)


class ModelFile:
    """A complete model file, open for reading; close it, or use it as a context manager.

    Arrays from `tensors()` stay valid after `close()`: they hold the mapping themselves.
    """

    def __init__(self, path: Path, descriptor: int, manifest_bytes: bytes) -> None:
        self.path = path
        self.manifest_bytes = manifest_bytes
        self.manifest: Manifest = parse_manifest(manifest_bytes)
        self.payload_offset = len(header_of(manifest_bytes))
        self.payload_bytes: int = self.manifest.payload_bytes
        self._descriptor = descriptor

    def __enter__(self) -> ModelFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Closing twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def fileno(self) -> int:
        return self._descriptor

    def pread(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes of the payload from `offset`; fewer only at its end."""
        data = bytearray(max(0, min(count, self.payload_bytes - offset)))
        self.read_payload_into(data, offset)
        return bytes(data)

    def read_payload_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill `buffer` from the payload at `offset`; return the bytes read, fewer at its end.

        Raises MachineError if the file was cut since it was opened, and OSError.
        """
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.payload_bytes - offset))
        done = 0
        while done < count:  # one call reads at most 2 GiB
            place = self.payload_offset + offset + done
            read = os.preadv(self._descriptor, [view[done:count]], place)
            if read == 0:
                raise MachineError(f"{self.path} was cut while in use; delete and fetch it again")
            done += read
        return count

    def digest(self) -> bytes:
        """SHA-256 of the content (32 bytes); reads the whole file."""
        digest = content_hash(self.manifest_bytes)
        buffer = bytearray(min(READ_BYTES, self.payload_bytes))
        for offset in range(0, self.payload_bytes, READ_BYTES):
            count = self.read_payload_into(buffer, offset)
            digest.update(memoryview(buffer)[:count])
        return digest.digest()

    def tensors(self) -> list[Tensor]:
        """All tensors as read-only views of the mapped file; nothing is copied."""
        payload = memoryview(b"")
        if self.payload_bytes:
            end = self.payload_offset + self.payload_bytes
            mapped = mmap.mmap(self._descriptor, end, access=mmap.ACCESS_READ)
            payload = memoryview(mapped)[self.payload_offset :]
        return [
            Tensor(
                spec.name,
                array := array_of(spec, payload),
                spec.trainable,
                "" if array.dtype.name == spec.dtype else spec.dtype,
            )
            for spec in self.manifest.tensors
        ]


def open_model(path: Path) -> ModelFile:
    """Open a model file and check everything but the payload's content.

    Raises MachineError, naming the file, for what is not a complete model file, and OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _checked(path, descriptor)
    except PeerError as error:
        os.close(descriptor)
        raise MachineError(f"{path} is damaged: {error}; delete it and fetch it again") from None
    except BaseException:
        os.close(descriptor)
        raise


def _checked(path: Path, descriptor: int) -> ModelFile:
    prefix = os.pread(descriptor, _PREFIX.size, 0)
    if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
        raise MachineError(f"{path} is not a model file (it does not begin with {MAGIC.decode()})")
    _, version, manifest_length = _PREFIX.unpack(prefix)
    if version != VERSION:
        raise MachineError(f"{path} has version {version}; this release reads version {VERSION}")
    if manifest_length > MANIFEST_BYTES_MAX:
        raise PeerError(f"manifest of {manifest_length} bytes; at most {MANIFEST_BYTES_MAX}")
    model = ModelFile(path, descriptor, os.pread(descriptor, manifest_length, _PREFIX.size))
    wanted = model.payload_offset + model.payload_bytes
    if os.fstat(descriptor).st_size != wanted:
        found = os.fstat(descriptor).st_size
        raise PeerError(f"{found} bytes where its manifest asks for {wanted}")
    return model
