"""The learner's side of one upload or one download: which frame next, and what an answer means.

Rule: a conversation starts with its question and can start again at any time, on any connection;
what has arrived is not sent again.
"""

from __future__ import annotations

from typing import Final

from metisfl.learner.part import PartFile
from metisfl.native_c import crc32c
from metisfl.proto.bulk import (
    EAGER_BYTES,
    Chunk,
    Credit,
    Frame,
    Get,
    Model,
    Open,
    Refused,
    Stored,
    model_subject,
)
from metisfl.proto.chunk import (
    CKKS,
    PLAIN,
    check_payload,
    chunk_count,
    chunk_extent,
    describe_chunk,
    exponents_of,
    short_digest,
    task_digest,
)
from metisfl.proto.credit import WINDOW_CHUNKS, Arrival, Receiver, Sender
from metisfl.proto.errors import PeerError
from metisfl.proto.model_file import ModelFile
from metisfl.proto.tensors import is_encrypted, parse_manifest

__all__ = ["Download", "DownloadRefused", "Upload", "UploadRefused"]

DAMAGED_CHUNKS_MAX: Final = 3


class UploadRefused(PeerError):
    """The controller does not take the update; `code` is a `proto.bulk.Code`."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class DownloadRefused(PeerError):
    """The controller does not have the model, or what it sent is not that model."""


class Upload:
    """Brings a model file to the controller. Ends with `done`, or raises UploadRefused."""

    def __init__(self, model: ModelFile, task_id: str, federation: bytes, digest: bytes) -> None:
        self.subject = task_digest(task_id)
        self.done = False
        self._model = model
        self._open = Open(task_id, federation, digest, model.payload_bytes, model.manifest_bytes)
        self._manifest_digest = short_digest(model.manifest_bytes)
        self._sender = Sender(chunk_count(model.manifest))

    def question(self) -> Frame:
        """OPEN; whatever was under way before is void."""
        eager = 1 if self._model.payload_bytes <= EAGER_BYTES else 0
        self._sender.restart(limit=eager)
        return self._open

    def take(self, frame: Frame) -> bool:
        """Take an answer; return whether the transfer advanced."""
        match frame:
            case Credit():
                return self._sender.allow(frame) > 0
            case Stored(_, digest) if digest == self._open.digest:
                self.done = True
                return True
            case Refused(_, code, reason):
                raise UploadRefused(code, reason)
        raise PeerError(f"the controller answered an upload with {type(frame).__name__}")

    def next_frame(self) -> Frame | None:
        """What can be sent now; call `sent` when it was."""
        if not self._sender.ready:
            return None
        index = self._sender.next
        start, stop = chunk_extent(index, self._model.manifest)
        payload = self._model.pread(start, stop - start)
        header = describe_chunk(
            self._model.manifest,
            index,
            payload,
            federation=self._open.federation,
            manifest_digest=self._manifest_digest,
            subject=self.subject,
            crc32c=crc32c,
        )
        return Chunk(header, payload)

    def sent(self) -> None:
        self._sender.sent()

    @property
    def fraction(self) -> float:
        return 1.0 if self.done else self._sender.acknowledged / max(1, self._sender.count)


class Download:
    """Fetches a model into a part file. Ends with `done`, or raises DownloadRefused."""

    def __init__(self, digest: bytes, part: PartFile) -> None:
        self.subject = model_subject(digest)
        self.done = False
        self._digest = digest
        self._part = part
        self._receiver: Receiver | None = None
        self._header_fields: tuple[object, ...] = ()
        self._owed: Frame | None = None
        self._damaged = 0

    def question(self) -> Frame:
        """GET from the first missing chunk on."""
        self._receiver = self._owed = None
        first = self._part.received
        return Get(self._digest, first, first + WINDOW_CHUNKS)

    def take(self, frame: Frame) -> bool:
        """Take an answer; return whether the transfer advanced."""
        receiver = self._receiver
        match frame:
            case Chunk():
                return receiver is not None and self._chunk(receiver, frame)
            case Model():
                self._begin(frame)
                return False
            case Credit(_, first, limit):  # what the controller knows of ours: was one lost?
                if receiver is not None and (first, limit) != (receiver.received, receiver.limit):
                    self._owed = receiver.credit(self.subject)
                return False
            case Refused(_, _, reason):
                raise DownloadRefused(reason)
        raise PeerError(f"the controller answered a download with {type(frame).__name__}")

    def next_frame(self) -> Frame | None:
        """What can be sent now; call `sent` when it was."""
        return self._owed

    def sent(self) -> None:
        self._owed = None

    @property
    def fraction(self) -> float:
        return 1.0 if self.done else self._part.received / max(1, self._part.count)

    def _begin(self, frame: Model) -> None:
        part = self._part
        asked_from = part.received
        part.begin(frame.manifest)
        manifest = parse_manifest(frame.manifest)
        self._header_fields = (
            short_digest(frame.manifest),
            part.count,
            CKKS if is_encrypted(manifest) else PLAIN,
            exponents_of(manifest),
        )
        self._receiver = receiver = Receiver(part.count, part.received)
        receiver.widen(min(WINDOW_CHUNKS, part.count - part.received))
        if part.received != asked_from:
            self._owed = receiver.credit(self.subject, rewind=True)
        self.done = part.complete

    def _chunk(self, receiver: Receiver, frame: Chunk) -> bool:
        header = frame.header
        found = (header.manifest, header.count, header.privacy, header.exponents)
        if found != self._header_fields:
            raise PeerError(f"chunk {header.index} is part of another model than was announced")
        arrival = receiver.arrived(header.index)
        if arrival is Arrival.NEXT:
            try:
                check_payload(header, frame.payload, crc32c)
            except PeerError:
                self._damaged += 1
                if self._damaged == DAMAGED_CHUNKS_MAX:
                    raise
                arrival = receiver.lost()
        if arrival is Arrival.NEXT:
            self._part.append(frame.payload)
            self._damaged = 0
            receiver.taken()
            receiver.widen(min(1, receiver.count - receiver.limit))
            self._owed = receiver.credit(self.subject)
            self.done = receiver.complete
            return True
        if arrival is Arrival.GAP:
            self._owed = receiver.credit(self.subject, rewind=True)
        return False
