"""The controller's spool, model store and admission, as far as controller/uploads.py needs them.

Law: of a part only what was noted survives the end of the process; a complete update is durable,
and on disk before anybody is told of it.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Final
from unittest.mock import patch

from structlog.testing import capture_logs

from metisfl.controller import uploads
from metisfl.controller.admission import Admission
from metisfl.controller.spool import UpdateRejected
from metisfl.proto.bulk import Code, Open
from metisfl.proto.chunk import CHUNK_BYTES, Buffer, ChunkHeader, chunk_count
from metisfl.proto.errors import MachineError
from metisfl.proto.model_pb2 import Manifest
from simulated.disk import Disk
from simulated.scheduler import Node
from simulated.transfer import chunk_payload

__all__ = ["Spool", "Store", "Welcome", "hashing_is_simulated"]

NOTE_CHUNKS: Final = 2  # the real one notes every 8 MiB


class Staged:
    """One update on its way in."""

    hashed = True

    def __init__(self, spool: Spool, task_id: str, digest: bytes, manifest: Manifest) -> None:
        self._spool, self._task_id = spool, task_id
        self.digest = digest
        self.manifest = manifest
        self.count = chunk_count(manifest)
        self.payload_bytes: int = manifest.payload_bytes
        self.file_bytes = self.payload_bytes
        noted = spool.disk.read(("part", task_id))
        self.received = noted[1] if noted is not None and noted[0] == digest else 0
        self.resumed = self.received > 0

    def check(self, header: ChunkHeader, payload: Buffer) -> None:
        if payload != chunk_payload(self.digest, self.received):
            raise UpdateRejected(Code.DAMAGED, f"chunk {header.index} is not chunk {self.received}")

    def write(self, payload: Buffer) -> None:
        self._spool.check_space()
        self.received += 1
        if self.received % NOTE_CHUNKS == 0:
            self.note()

    def note(self) -> None:
        self._spool.disk.files["part", self._task_id] = ((self.digest, self.received), True)

    def commit(self) -> None:
        assert self.received == self.count
        self._spool.node.crash_point(likelier=20)
        self._spool.disk.files["update", self._task_id] = (self.digest, True)
        self._spool.disk.files.pop(("part", self._task_id), None)
        self._spool.node.crash_point(likelier=20)

    def close(self) -> None:
        pass

    def discard(self) -> None:
        self._spool.disk.files.pop(("part", self._task_id), None)


class Update:
    """A complete update; its "descriptor" is the digest of its content."""

    payload_offset = 0

    def __init__(self, digest: bytes, chunks: int) -> None:
        self._digest = digest
        self.payload_bytes = chunks * CHUNK_BYTES
        self.manifest = Manifest(payload_bytes=self.payload_bytes)
        self.manifest_bytes = b""

    def fileno(self) -> Any:
        return self._digest

    def close(self) -> None:
        pass


class Hashing:
    """The digest of an update, after a few turns."""

    def __init__(self, digest: Any, manifest_bytes: bytes) -> None:
        self._digest, self._turns = digest, 3

    def advance(self, end: int) -> bool:
        self._turns -= 1
        return self._turns <= 0

    def digest(self) -> bytes:
        digest: bytes = self._digest
        return digest


class Spool:
    """Parts and updates on the controller's disk."""

    def __init__(self, node: Node, disk: Disk, chunks: int) -> None:
        self.node, self.disk, self._chunks = node, disk, chunks
        self.full_until = 0.0

    def check_space(self) -> None:
        if self.node.now < self.full_until:
            raise MachineError("disk full")

    def begin(self, task_id: str, digest: bytes, manifest: Manifest) -> Staged:
        self.check_space()
        return Staged(self, task_id, digest, manifest)

    def is_stored(self, task_id: str) -> bool:
        return ("update", task_id) in self.disk.files

    def open(self, task_id: str) -> Update:
        return Update(self.disk.read(("update", task_id)), self._chunks)

    def keep(self, task_ids: Collection[str]) -> None:
        self._keep("update", task_ids)

    def keep_parts(self, task_ids: Collection[str]) -> None:
        self._keep("part", task_ids)

    def _keep(self, kind: str, task_ids: Collection[str]) -> None:
        for found, name in list(self.disk.files):
            if found == kind and name not in task_ids:
                del self.disk.files[found, name]


class Store:
    """Models by digest, each durable before anybody is told of it."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def contains(self, digest: bytes) -> bool:
        return ("model", digest) in self._disk.files

    def put(self, digest: bytes) -> None:
        self._disk.files["model", digest] = (digest, True)

    def keep(self, digests: Collection[bytes]) -> None:
        for kind, name in list(self._disk.files):
            if kind == "model" and name not in digests:
                del self._disk.files[kind, name]


class Welcome(Admission):
    """The real judge of who may upload; every manifest is taken as it is."""

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]

    def manifest(self, frame: Open) -> Manifest:
        return Manifest.FromString(frame.manifest)


def hashing_is_simulated() -> AbstractContextManager[object]:
    """While a world runs: uploads.py hashes no files and its log lines go nowhere."""
    stack = ExitStack()
    stack.enter_context(patch.object(uploads, "RunningDigest", Hashing))
    stack.enter_context(capture_logs())
    return stack
