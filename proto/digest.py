"""The digest of a model that is still arriving, or of which a part is on disk already.

Rule: every byte is hashed once, in order; bytes at hand are taken as they come, the others are read
back slice by slice, so nobody waits for a big file.
"""

from __future__ import annotations

import os
from typing import Final

from metisfl.proto.errors import MachineError
from metisfl.proto.model_file import content_hash, header_of

__all__ = ["RunningDigest"]

SLICE_BYTES: Final = 1 << 20


class RunningDigest:
    """SHA-256 of a model file's content up to `bytes_done` of its payload.

    `descriptor` stays the caller's; it is only read from.
    """

    def __init__(self, descriptor: int, manifest_bytes: bytes) -> None:
        self.bytes_done = 0
        self._descriptor = descriptor
        self._payload_offset = len(header_of(manifest_bytes))
        self._hash = content_hash(manifest_bytes)

    def update(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Take payload bytes that are at hand, if they are the next ones."""
        if offset == self.bytes_done:
            self._hash.update(data)
            self.bytes_done += len(data)

    def advance(self, end: int) -> bool:
        """Read and hash one more slice below `end`; return whether all below it is hashed.

        Raises MachineError if the file is shorter, OSError.
        """
        length = min(SLICE_BYTES, end - self.bytes_done)
        if length > 0:
            data = os.pread(self._descriptor, length, self._payload_offset + self.bytes_done)
            if not data:
                raise MachineError(
                    f"a model file was cut at byte {self.bytes_done} of its payload while in use"
                )
            self.update(self.bytes_done, data)
        return self.bytes_done >= end

    def digest(self) -> bytes:
        """The digest of all that was hashed so far, 32 bytes."""
        return self._hash.digest()
