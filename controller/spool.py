"""The spool: updates on their way in, and those that are complete and wait for the fold.

    spool/<task id>.part      a model file in the making, with two notes behind its payload
    spool/<task id>.update    a complete, checked, durable model file

Rule 1: a chunk is checked before it is written, so what lies on disk below `received` was good when
it was written; the SHA-256 over all of it decides at the end.
Rule 2: a note says only what was synced before the note was written. The two notes are written in
turn: a torn one leaves the other. A small update needs none, and two fsyncs in all.
Rule 3: parts belong to the bulk endpoint's thread, updates to whoever folds.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

from metisfl.controller.room import RESERVE_BYTES, Room, explained
from metisfl.native_c import ckks, first_non_finite
from metisfl.proto.bulk import Code
from metisfl.proto.chunk import (
    PLAIN,
    Buffer,
    ChunkHeader,
    chunk_bytes,
    chunk_count,
    chunk_extent,
    exponents_of,
    value_count,
)
from metisfl.proto.digest import RunningDigest
from metisfl.proto.errors import MachineError, PeerError
from metisfl.proto.model_file import ModelFile, header_of, open_model, sync_folder
from metisfl.proto.model_pb2 import Manifest
from metisfl.proto.tensors import (
    FLOATS,
    ITEM_BYTES,
    is_encrypted,
    segments,
    serialise_manifest,
)

__all__ = ["Spool", "StagedUpdate", "UpdateRejected"]

UPDATE_BYTES_MAX: Final = 64 << 30
SYNC_BYTES: Final = 8 << 20
TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@=+-]{0,199}")
PART: Final = ".part"
UPDATE: Final = ".update"

NOTE_BYTES: Final = 512  # one sector each
_NOTE = struct.Struct("<8sQQ32s")  # magic, number, chunks received, announced digest
_NOTE_CRC = struct.Struct("<I")
_NOTE_MAGIC: Final = b"METISPRT"


class UpdateRejected(PeerError):
    """What the learner sent cannot be used; it has to make another update."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class StagedUpdate:
    """One update on its way in. Create it with `Spool.begin`."""

    def __init__(
        self,
        path: Path,
        descriptor: int,
        digest: bytes,
        manifest: Manifest,
        trial: ckks.Fold | None,
    ) -> None:
        manifest_bytes = serialise_manifest(manifest)
        self._trial = trial
        self._exponents = exponents_of(manifest)
        self.digest = digest
        self.manifest = manifest
        self.payload_bytes: int = manifest.payload_bytes
        self.count = chunk_count(manifest)
        self.received = 0  # chunks
        self._step = chunk_bytes(manifest)
        self.resumed = False  # whether some of it was found on disk
        self.path = path
        self._descriptor = descriptor
        self._payload_offset = len(header_of(manifest_bytes))
        self.file_bytes = self._payload_offset + self.payload_bytes
        self._digest = RunningDigest(descriptor, manifest_bytes)
        self._noted = 0  # chunks
        self._notes = 0

    @property
    def received_bytes(self) -> int:
        return min(self.received * self._step, self.payload_bytes)

    @property
    def complete(self) -> bool:
        return self.received == self.count

    @property
    def hashed(self) -> bool:
        """Whether the digest has caught up with what was received."""
        return self._digest.bytes_done == self.received_bytes

    def check(self, header: ChunkHeader, payload: Buffer) -> None:
        """Check that the values of chunk `received` can be folded. Raises UpdateRejected."""
        start, stop = chunk_extent(self.received, self.manifest)
        values = value_count(self.manifest, self.received)
        if (header.payload_bytes, header.value_count) != (stop - start, values):
            raise UpdateRejected(
                Code.DAMAGED,
                f"chunk {header.index} of {self.count} has {header.payload_bytes} bytes and "
                f"{header.value_count} values; the manifest says {stop - start} and {values}",
            )
        if (header.privacy == PLAIN) == is_encrypted(self.manifest):
            raise UpdateRejected(
                Code.BAD_MANIFEST,
                f"chunk {header.index} says that its privacy mode is {header.privacy}, which its "
                "manifest contradicts",
            )
        if header.exponents != self._exponents:
            raise UpdateRejected(
                Code.BAD_MANIFEST,
                f"chunk {header.index} has the exponents {header.exponents.hex()}; the manifest's "
                f"are {self._exponents.hex()}",
            )
        if is_encrypted(self.manifest):
            self._check_block(header.value_count, payload)
        else:
            self._check_finite(start, stop, payload)

    def _check_block(self, values: int, payload: Buffer) -> None:
        """Try to fold it: whatever the fold would refuse later is refused now."""
        assert self._trial is not None, "an encrypted update at a controller without a key"
        form = self.manifest.encryption
        ciphertexts = -(-values // form.ring_dimension)
        self._trial.begin(self.received, self.count, ciphertexts, self._exponents, form.polynomials)
        try:
            self._trial.absorb(payload)
        except ckks.BlockError as error:
            raise UpdateRejected(Code.DAMAGED, f"chunk {self.received}: {error}") from None

    def _check_finite(self, start: int, stop: int, payload: Buffer) -> None:
        view = memoryview(payload)
        for part in segments(self.manifest, start, stop):
            if part.dtype not in FLOATS:
                continue
            index = first_non_finite(view[part.start - start : part.stop - start], part.dtype)
            if index is not None:
                raise UpdateRejected(
                    Code.NON_FINITE,
                    f"tensor {part.name!r} holds NaN or infinity (byte "
                    f"{part.start + index * ITEM_BYTES[part.dtype]} of the payload); the training "
                    "diverged: lower the learning rate or check the data",
                )

    def write(self, payload: Buffer) -> None:
        """Write chunk `received`, checked before. Raises MachineError, such as for a full disk."""
        offset = self.received_bytes
        try:
            written = os.pwrite(self._descriptor, payload, self._payload_offset + offset)
            if written != len(payload):  # what a full disk does to a file without reserved blocks
                raise MachineError(f"{self.path}: {written} of {len(payload)} bytes written")
        except OSError as error:
            raise MachineError(f"{self.path}: {error.strerror}") from None
        self._digest.update(offset, payload)
        self.received += 1
        if (self.received - self._noted) * self._step >= SYNC_BYTES:
            self.note()

    def note(self) -> None:
        """Make what was received durable, then note that it is. Raises MachineError."""
        note = _NOTE.pack(_NOTE_MAGIC, self._notes, self.received, self.digest)
        place = self.file_bytes + NOTE_BYTES * (self._notes % 2)
        try:
            os.fdatasync(self._descriptor)
            os.pwrite(self._descriptor, note + _NOTE_CRC.pack(zlib.crc32(note)), place)
        except OSError as error:
            raise MachineError(f"{self.path}: {error.strerror}") from None
        self._notes += 1
        self._noted = self.received

    def catch_up(self) -> bool:
        """Hash one more slice of what was on disk before; return whether that is all."""
        return self._digest.advance(self.received_bytes)

    def commit(self) -> None:
        """Turn the complete part into the task's update, durable and under its final name.

        Raises UpdateRejected if the content is not what was announced, MachineError.
        """
        assert self.complete, f"{self.path}: {self.received} of {self.count} chunks"
        assert self.hashed, f"{self.path} is not hashed to its end"
        found = self._digest.digest()
        if found != self.digest:
            raise UpdateRejected(
                Code.DIGEST_MISMATCH,
                f"the update has the digest {found.hex()} and {self.digest.hex()} was announced; "
                "the file at the learner was changed or damaged",
            )
        try:
            os.ftruncate(self._descriptor, self.file_bytes)
            os.fsync(self._descriptor)
            os.replace(self.path, self.path.with_suffix(UPDATE))
            sync_folder(self.path.parent)
        except OSError as error:
            raise MachineError(f"{self.path}: {error.strerror}") from None
        self.close()

    def close(self) -> None:
        """Close the file; what was received stays. Closing twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def discard(self) -> None:
        """Close and delete the part."""
        self.close()
        self.path.unlink(missing_ok=True)

    def restore(self) -> None:
        """Go on from the newer readable note that names this digest, if there is one."""
        for slot in range(2):
            data = os.pread(self._descriptor, NOTE_BYTES, self.file_bytes + slot * NOTE_BYTES)
            if len(data) < NOTE_BYTES:
                return
            magic, number, received, digest = _NOTE.unpack_from(data)
            (crc,) = _NOTE_CRC.unpack_from(data, _NOTE.size)
            good = magic == _NOTE_MAGIC and crc == zlib.crc32(data[: _NOTE.size])
            ours = digest == self.digest and received <= self.count
            if good and ours and number >= self._notes:
                self._notes, self._noted = number + 1, received
                self.received, self.resumed = received, received > 0


class Spool:
    """The folder of parts and updates of one controller."""

    def __init__(
        self,
        folder: Path,
        *,
        contexts: Iterable[ckks.Context] = (),
        limit_bytes: int | None = None,
        reserve_bytes: int = RESERVE_BYTES,
        update_bytes_max: int = UPDATE_BYTES_MAX,
    ) -> None:
        """Open or create `folder`. `contexts` are those that encrypted updates may have.

        `limit_bytes` bounds the folder; None leaves it to the disk. Raises MachineError if it
        cannot be used.
        """
        self._trials = {one.fingerprint: ckks.Fold(one) for one in contexts}
        self.folder = folder
        self._room = Room(folder, "--spool-limit", limit_bytes, reserve_bytes)
        self._update_bytes_max = update_bytes_max
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(f"spool {folder}: {error.strerror}") from None

    @staticmethod
    def check_task_id(task_id: str) -> str:
        """Return `task_id` if it can name a file; another one is a defect: ValueError."""
        if not TASK_ID.fullmatch(task_id):
            raise ValueError(f"task id {task_id!r} cannot name a file; allowed: {TASK_ID.pattern}")
        return task_id

    def update_path(self, task_id: str) -> Path:
        """Where the complete update of a task is, or would be."""
        return self.folder / (self.check_task_id(task_id) + UPDATE)

    def part_path(self, task_id: str) -> Path:
        return self.folder / (self.check_task_id(task_id) + PART)

    def is_stored(self, task_id: str) -> bool:
        return self.update_path(task_id).is_file()

    def stored(self) -> list[str]:
        """The tasks whose updates are complete, in the order of their names."""
        return self._tasks(UPDATE)

    def open(self, task_id: str) -> ModelFile:
        """Open a complete update for the fold. Raises MachineError if it is not here or damaged."""
        try:
            return open_model(self.update_path(task_id))
        except FileNotFoundError:
            raise MachineError(f"spool {self.folder}: no update for task {task_id}") from None

    def discard(self, task_id: str) -> None:
        """Delete a task's complete update; one that is not here is fine."""
        self.update_path(task_id).unlink(missing_ok=True)

    def keep(self, task_ids: Collection[str]) -> list[str]:
        """Delete every complete update but these, and return what was deleted."""
        surplus = [task_id for task_id in self.stored() if task_id not in task_ids]
        for task_id in surplus:
            self.discard(task_id)
        return surplus

    def keep_parts(self, task_ids: Collection[str]) -> None:
        """Delete every part but these. For the bulk endpoint's thread."""
        for task_id in self._tasks(PART):
            if task_id not in task_ids:
                self.part_path(task_id).unlink(missing_ok=True)

    def begin(self, task_id: str, digest: bytes, manifest: Manifest) -> StagedUpdate:
        """Make room for an update, or go on with what a part of the same content holds.

        Raises UpdateRejected if it is larger than any may be, NoRoom if there is none now.
        """
        if manifest.payload_bytes > self._update_bytes_max:
            raise UpdateRejected(
                Code.TOO_LARGE,
                f"an update of {manifest.payload_bytes} bytes; this controller takes up to "
                f"{self._update_bytes_max}",
            )
        path = self.part_path(task_id)
        header = header_of(serialise_manifest(manifest))
        part_bytes = len(header) + manifest.payload_bytes + 2 * NOTE_BYTES
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise MachineError(f"{path}: {error.strerror}") from None
        trial = self._trials.get(manifest.encryption.fingerprint)
        staged = StagedUpdate(path, descriptor, digest, manifest, trial)
        try:
            if os.fstat(descriptor).st_size == part_bytes and (
                os.pread(descriptor, len(header), 0) == header
            ):
                staged.restore()
            if not staged.resumed:
                os.ftruncate(descriptor, 0)
                self._room.check(part_bytes)
                os.posix_fallocate(descriptor, 0, part_bytes)
                os.pwrite(descriptor, header, 0)
        except OSError as error:
            staged.discard()
            raise explained(path, error) from None
        except MachineError:
            staged.discard()
            raise
        return staged

    def _tasks(self, suffix: str) -> list[str]:
        names = sorted(os.listdir(self.folder))
        return [name[: -len(suffix)] for name in names if name.endswith(suffix)]
