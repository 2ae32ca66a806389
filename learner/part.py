"""A model on its way in: a model file that grows by whole chunks.

Rule: its size says how much is there, so an interrupted download goes on without any other note.
Whether it is the right model is for the digest of all of it to say; only then does it get its name.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from metisfl.proto.chunk import Buffer, chunk_bytes, chunk_count
from metisfl.proto.digest import RunningDigest
from metisfl.proto.errors import PeerError, machine_error
from metisfl.proto.model_file import header_of
from metisfl.proto.tensors import MANIFEST_BYTES_MAX, parse_manifest

__all__ = ["PartFile"]

_PREFIX = struct.Struct("<8sII")  # magic, version, manifest length


class PartFile:
    """`<path>.<digest>.part`, next to the path that the model will have. A context manager.

    Raises DiskFull and MachineError, from any method.
    """

    def __init__(self, path: Path, digest: bytes) -> None:
        self._path = path
        self._wanted = digest
        self._part = path.with_name(f"{path.name}.{digest.hex()[:16]}.part")
        with self._on_disk():
            self._descriptor = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            found, size = self._found(), os.fstat(self._descriptor).st_size
        self.begun = found is not None
        """Whether the manifest is known."""
        self._start(found or b"")
        if self.begun and size == self._payload_offset + self._payload_bytes:
            self.received = self.count
        elif self.begun:
            self.received = min(max(0, size - self._payload_offset) // self._step, self.count)
        self.resumed = self.received > 0
        """Whether some of it is from an earlier attempt."""

    def __enter__(self) -> PartFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def complete(self) -> bool:
        return self.begun and self.received == self.count

    def begin(self, manifest_bytes: bytes) -> None:
        """The model has this manifest; chunks of a model with another one are dropped.

        Raises PeerError for a manifest that is none.
        """
        if self.begun and manifest_bytes == self.manifest_bytes:
            return
        parse_manifest(manifest_bytes)
        with self._on_disk():
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, header_of(manifest_bytes), 0)
        self.begun = True
        self._start(manifest_bytes)

    def append(self, payload: Buffer) -> None:
        """Add chunk `received`, checked before."""
        offset = self.received * self._step
        with self._on_disk():
            written = os.pwrite(self._descriptor, payload, self._payload_offset + offset)
            if written != len(payload):
                raise OSError(errno.ENOSPC, f"only {written} of {len(payload)} bytes were written")
        self._digest.update(offset, payload)
        self.received += 1

    def catch_up(self) -> bool:
        """Hash one slice of what is there and not hashed yet; return whether that is all."""
        with self._on_disk():
            return self._digest.advance(min(self.received * self._step, self._payload_bytes))

    def matches(self) -> bool:
        """Whether the complete, hashed content is the model that is wanted."""
        return self.complete and self._digest.digest() == self._wanted

    def publish(self) -> None:
        """Give it its name. It is a copy of what the controller has, so it is not synced."""
        with self._on_disk():
            os.replace(self._part, self._path)

    def discard(self) -> None:
        """Delete the part; nothing of it is used."""
        self._part.unlink(missing_ok=True)

    def _found(self) -> bytes | None:
        """The manifest at the beginning of what is there, if there is one."""
        prefix = os.pread(self._descriptor, _PREFIX.size, 0)
        if len(prefix) < _PREFIX.size:
            return None
        length: int = _PREFIX.unpack(prefix)[2]
        manifest_bytes = os.pread(self._descriptor, min(length, MANIFEST_BYTES_MAX), _PREFIX.size)
        try:
            parse_manifest(manifest_bytes)
        except PeerError:
            return None
        header = header_of(manifest_bytes)
        return manifest_bytes if os.pread(self._descriptor, len(header), 0) == header else None

    def _start(self, manifest_bytes: bytes) -> None:
        """Start from this manifest, with no chunk."""
        self.manifest_bytes = manifest_bytes
        self.received = 0
        self._payload_offset: int = len(header_of(manifest_bytes))
        manifest = parse_manifest(manifest_bytes)
        self._payload_bytes: int = manifest.payload_bytes
        self._step: int = chunk_bytes(manifest)
        self.count: int = chunk_count(manifest)
        self._digest = RunningDigest(self._descriptor, manifest_bytes)

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            text = f"{self._part}: {error.strerror}; make room or repair the disk"
            raise machine_error(text, error) from None
