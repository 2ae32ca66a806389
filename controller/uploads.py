"""Uploads at the controller: what is there already, what is wanted next, and when it is stored.

Rule 1: an update is announced (`on_stored`) after it is durable, and again after a restart that
finds one nobody knew of: whoever listens counts it once.
Rule 2: no failure of one upload, not even a full disk, touches another.

No socket in here: `send` delivers a frame to a route, or drops it, which does no harm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from metisfl.controller.admission import Admission, Expected, Refusal, closed
from metisfl.controller.repeats import Repeats, is_worth_a_line
from metisfl.controller.spool import Spool, StagedUpdate, UpdateRejected
from metisfl.native_c import crc32c
from metisfl.proto.bulk import EAGER_BYTES, Chunk, Code, Credit, Frame, Open, Refused, Stored
from metisfl.proto.chunk import check_payload, chunk_count, short_digest, task_digest
from metisfl.proto.credit import WORD_S, Allocator, Arrival, Receiver
from metisfl.proto.digest import RunningDigest
from metisfl.proto.errors import MachineError, PeerError
from metisfl.proto.model_file import ModelFile

__all__ = ["OnDenied", "OnRefused", "OnStored", "Send", "Uploads", "is_worth_a_line"]

Send = Callable[[bytes, Frame], bool]
"""Route, frame -> whether it was accepted for delivery."""
OnStored = Callable[[str, bytes, int], None]
"""Task id, digest, bytes of the update's file."""
OnRefused = Callable[[str, str, str], None]
"""Task id, the principal that holds the task, reason."""
OnDenied = Callable[[Code, str, str], None]
"""Code, the principal that asked, reason."""

DAMAGED_CHUNKS_MAX: Final = 3  # in a row; the transport is authenticated, so the sender is at fault
log = structlog.get_logger()


@dataclass(slots=True)
class _Upload:
    task_id: str
    subject: bytes
    expected: Expected
    federation: bytes
    manifest_digest: bytes
    staged: StagedUpdate
    receiver: Receiver
    route: bytes | None
    told_at: float
    damaged: int = 0


@dataclass(slots=True)
class _Check:
    """A complete update of a former process, on its way to its digest."""

    model: ModelFile
    running: RunningDigest
    route: bytes | None = None
    digest: bytes = b""  # what the learner asks about, if it does
    told_at: float = 0.0


class Uploads:
    """All uploads of one endpoint. Belongs to the endpoint's thread."""

    def __init__(
        self,
        spool: Spool,
        admission: Admission,
        send: Send,
        on_stored: OnStored,
        on_refused: OnRefused,
        counts: Counter[str],
        on_denied: OnDenied = lambda *_: None,
    ) -> None:
        self._spool = spool
        self._admission = admission
        self._send = send
        self._on_stored = on_stored
        self._on_refused = on_refused
        self._counts = counts
        self._on_denied = on_denied
        self._repeats = Repeats()
        self._credit: Allocator[bytes] = Allocator()
        self._uploads: dict[bytes, _Upload] = {}
        self._changed: dict[bytes, None] = {}  # a set in the order of change
        self._checks: dict[str, _Check] = {}
        self._stored: dict[str, bytes] = {}
        # Until the owner has said what is open nobody is refused; one OPEN a learner waits here.
        self._early: dict[str, tuple[Open, bytes]] | None = {}

    def expect(self, expected: Mapping[str, Expected], now: float) -> None:
        """These tasks are open, and no others: parts and uploads of others are dropped."""
        for upload in list(self._uploads.values()):
            if expected.get(upload.task_id) != upload.expected:
                self._refuse(upload.route, upload.subject, closed(upload.task_id))
                self._drop(upload)
        for task_id in self._checks.keys() - expected.keys():
            self._checks.pop(task_id).model.close()
        self._admission.expect(expected)
        self._spool.keep_parts(expected)
        known, self._stored = self._stored, {}
        for task_id, one in expected.items():
            if digest := known.get(task_id, one.stored_digest):
                self._stored[task_id] = digest
            elif task_id not in self._checks and self._spool.is_stored(task_id):
                self._begin_check(task_id)
        early, self._early = self._early, None
        for principal, (frame, route) in (early or {}).items():
            self.open(frame, principal, route, now)

    def open(self, frame: Open, principal: str, route: bytes, now: float) -> None:
        """A learner has an update: answer with STORED, REFUSED or credit."""
        if self._early is not None:
            self._early[principal] = frame, route
            return
        task_id = frame.task_id
        refusal = self._admission.judge(frame, principal)
        upload = self._uploads.get(frame.subject)
        if refusal is not None:
            self._refuse(route, frame.subject, refusal)
            self._log_refusal(task_id, principal, refusal)
            self._on_denied(refusal.code, principal, refusal.reason)
        elif task_id in self._stored:
            self._tell_stored(route, task_id, frame.digest)
        elif task_id in self._checks:
            check = self._checks[task_id]
            check.route, check.digest = route, frame.digest
        elif upload is not None and upload.staged.digest == frame.digest:
            upload.route = route
            self._restart(upload, now)
        else:
            if upload is not None:  # of an update that the learner has thrown away
                self._drop(upload)
            self._begin(frame, principal, route, now)

    def chunk(self, frame: Chunk, principal: str, route: bytes, now: float) -> bool:
        """A chunk has come: check it, then store it, or ask for what is missing.

        Returns whether it is the one that this learner was to send next.
        """
        header = frame.header
        upload = self._uploads.get(header.subject)
        if upload is None or upload.expected.learner != principal:
            self._counts["chunks_unknown"] += 1  # of a refused upload; its sender has been told
            return False
        upload.route = route
        self._credit.heard(upload.subject, now)
        said = header.federation, header.manifest, header.count
        if said != (upload.federation, upload.manifest_digest, upload.receiver.count):
            reason = f"chunk {header.index} is part of another update than its OPEN announced"
            self._reject(upload, Refusal(Code.BAD_FRAME, reason))
            return False
        arrival = upload.receiver.arrived(header.index)
        if arrival is Arrival.NEXT:
            self._take(upload, frame, now)
        else:
            self._counts["chunks_repeated"] += 1
        if arrival is Arrival.GAP:
            self._tell_credit(upload, now, rewind=True)
        return arrival is Arrival.NEXT

    def work(self, now: float) -> bool:
        """Finish what is complete, hand out credit; return whether there is more to do at once."""
        for key in list(self._changed):
            upload = self._uploads[key]
            if upload.receiver.complete and upload.staged.hashed:
                self._finish(upload)
        for key, chunks in self._credit.deal():
            self._uploads[key].receiver.widen(chunks)
            self._changed[key] = None
        most = max(self._counts["upload_chunks_granted_max"], self._credit.outstanding)
        self._counts["upload_chunks_granted_max"] = most
        for key in self._changed:
            self._tell_credit(self._uploads[key], now)
        self._changed.clear()
        return self._catch_up()

    def tick(self, now: float) -> None:
        """Take credit from the silent, repeat the word to those who wait."""
        for key in self._credit.silent(now):
            self._sleep(self._uploads[key])
        for upload in self._uploads.values():
            if now - upload.told_at >= WORD_S:
                self._tell_credit(upload, now)
        for task_id, check in self._checks.items():
            if check.route is not None and now - check.told_at >= WORD_S:
                check.told_at = now
                count = chunk_count(check.model.manifest)
                self._send(check.route, Credit(task_digest(task_id), count, count))

    def unreachable(self, routes: set[bytes] | None = None) -> None:
        """The connections behind these routes are gone, or all."""
        for upload in self._uploads.values():
            if routes is None or upload.route in routes:
                upload.route = None
                self._sleep(upload)

    def close(self) -> None:
        """Note what was received, so that it need not be sent again, and close all files."""
        for upload in self._uploads.values():
            try:
                upload.staged.note()
            except MachineError as error:  # then some of it is sent again
                log.error("spooled part not noted", task=upload.task_id, why=str(error))
            upload.staged.close()
        for check in self._checks.values():
            check.model.close()
        self._uploads.clear()
        self._checks.clear()

    def _begin(self, frame: Open, principal: str, route: bytes, now: float) -> None:
        task_id, subject = frame.task_id, frame.subject
        try:
            staged = self._spool.begin(task_id, frame.digest, self._admission.manifest(frame))
        except PeerError as error:
            code = error.code if isinstance(error, UpdateRejected) else Code.BAD_MANIFEST
            refusal = Refusal(code, str(error))
            self._refuse(route, subject, refusal)
            self._remember(task_id, frame.digest, principal, refusal)
            return
        except MachineError as error:
            self._cannot_store(task_id, subject, principal, route, error)
            return
        self._uploads[subject] = upload = _Upload(
            task_id,
            subject,
            self._admission.expected[task_id],
            frame.federation,
            short_digest(frame.manifest),
            staged,
            Receiver(staged.count, staged.received),
            route,
            now,
        )
        self._restart(upload, now)

    def _restart(self, upload: _Upload, now: float) -> None:
        """The learner asks anew: it knows of no credit and goes on where we say."""
        receiver = upload.receiver
        receiver.restart(eager=1 if upload.staged.payload_bytes <= EAGER_BYTES else 0)
        self._credit.join(upload.subject, receiver.count - receiver.received, now)
        self._changed[upload.subject] = None

    def _take(self, upload: _Upload, frame: Chunk, now: float) -> None:
        staged, receiver = upload.staged, upload.receiver
        try:
            check_payload(frame.header, frame.payload, crc32c)
        except PeerError as error:
            self._counts["chunks_damaged"] += 1
            upload.damaged += 1
            if upload.damaged >= DAMAGED_CHUNKS_MAX:
                self._reject(upload, Refusal(Code.DAMAGED, str(error)))
            elif receiver.lost() is Arrival.GAP:
                self._tell_credit(upload, now, rewind=True)
            return
        try:
            staged.check(frame.header, frame.payload)
            staged.write(frame.payload)
        except UpdateRejected as error:
            self._reject(upload, Refusal(error.code, str(error)))
            return
        except MachineError as error:
            self._fail(upload, error)
            return
        upload.damaged = 0
        receiver.taken()
        self._credit.give_back(upload.subject, 1)
        self._credit.want(upload.subject, receiver.count - receiver.limit)
        self._changed[upload.subject] = None
        self._counts["chunks_received"] += 1
        self._counts["chunk_bytes_received"] += len(frame.payload)

    def _finish(self, upload: _Upload) -> None:
        staged = upload.staged
        try:
            staged.commit()
        except UpdateRejected as error:
            if staged.resumed:  # the disk may have lost it, not the learner: it starts anew
                log.error("spooled part damaged", task=upload.task_id, why=str(error))
                self._drop(upload)
            else:
                self._reject(upload, Refusal(error.code, str(error)))
            return
        except MachineError as error:
            self._fail(upload, error)
            return
        self._forget(upload)
        self._announce(upload.task_id, staged.digest, staged.file_bytes)
        if upload.route is not None:
            self._tell_stored(upload.route, upload.task_id, staged.digest)

    def _catch_up(self) -> bool:
        """Hash one slice of what is only on disk; return whether more is left."""
        for task_id, check in self._checks.items():
            model = check.model
            if check.running.advance(model.payload_bytes):
                del self._checks[task_id]
                model.close()
                file_bytes = model.payload_offset + model.payload_bytes
                self._announce(task_id, check.running.digest(), file_bytes)
                if check.route is not None:
                    self._tell_stored(check.route, task_id, check.digest)
            return True
        for upload in self._uploads.values():
            if not upload.staged.hashed:
                if upload.staged.catch_up():
                    self._changed[upload.subject] = None
                return True
        return False

    def _begin_check(self, task_id: str) -> None:
        try:
            model = self._spool.open(task_id)
        except MachineError as error:  # the learner still has it: let it come again
            log.error("spooled update unusable", task=task_id, why=str(error))
            self._spool.discard(task_id)
            return
        self._checks[task_id] = _Check(model, RunningDigest(model.fileno(), model.manifest_bytes))

    def _announce(self, task_id: str, digest: bytes, file_bytes: int) -> None:
        self._stored[task_id] = digest
        self._counts["uploads_stored"] += 1
        self._on_stored(task_id, digest, file_bytes)

    def _reject(self, upload: _Upload, refusal: Refusal) -> None:
        """The update is unusable, now and whenever it is offered again."""
        self._refuse(upload.route, upload.subject, refusal)
        self._drop(upload)
        self._remember(upload.task_id, upload.staged.digest, upload.expected.learner, refusal)

    def _remember(self, task_id: str, digest: bytes, learner: str, refusal: Refusal) -> None:
        self._admission.remember(task_id, digest, refusal)
        self._log_refusal(task_id, learner, refusal)
        self._on_denied(refusal.code, learner, refusal.reason)
        self._on_refused(task_id, learner, refusal.reason)

    def _fail(self, upload: _Upload, error: MachineError) -> None:
        self._drop(upload)
        learner = upload.expected.learner
        self._cannot_store(upload.task_id, upload.subject, learner, upload.route, error)

    def _cannot_store(
        self, task_id: str, subject: bytes, learner: str, route: bytes | None, error: MachineError
    ) -> None:
        """This machine is at fault; the same update is welcome later."""
        refusal = Refusal(Code.NO_SPACE, f"the controller cannot store the update: {error}")
        self._refuse(route, subject, refusal)
        if count := self._repeats.line(learner, refusal.code.name):
            why = str(error)
            log.error("update not spooled", task=task_id, learner=learner, count=count, why=why)
        self._on_refused(task_id, learner, refusal.reason)

    def _drop(self, upload: _Upload) -> None:
        self._forget(upload)
        upload.staged.discard()

    def _forget(self, upload: _Upload) -> None:
        del self._uploads[upload.subject]
        self._credit.leave(upload.subject)
        self._changed.pop(upload.subject, None)

    def _sleep(self, upload: _Upload) -> None:
        self._credit.reclaim(upload.subject)
        upload.receiver.narrow()

    def _tell_credit(self, upload: _Upload, now: float, *, rewind: bool = False) -> None:
        upload.told_at = now
        if upload.route is not None:
            self._send(upload.route, upload.receiver.credit(upload.subject, rewind=rewind))

    def _tell_stored(self, route: bytes, task_id: str, digest: bytes) -> None:
        stored, subject = self._stored[task_id], task_digest(task_id)
        if digest == stored:
            self._send(route, Stored(subject, stored))
        else:
            reason = f"task {task_id} has another update already, with the digest {stored.hex()}"
            self._refuse(route, subject, Refusal(Code.OTHER_UPDATE, reason))

    def _refuse(self, route: bytes | None, subject: bytes, refusal: Refusal) -> None:
        self._counts[f"refused_{refusal.code.name.lower()}"] += 1
        if route is not None:
            self._send(route, Refused(subject, refusal.code, refusal.reason))

    def _log_refusal(self, task_id: str, principal: str, refusal: Refusal) -> None:
        code, why = refusal.code.name, refusal.reason
        if count := self._repeats.line(principal, code):
            facts = {"task": task_id, "learner": principal, "code": code, "count": count}
            log.warning("update refused", **facts, why=why)
