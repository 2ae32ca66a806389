"""Downloads at the controller: models by digest, for whoever is authenticated.

Rule: a chunk is read only when it may be sent, so memory holds the budget and no more; credit is
the receiver's (what it can take) and ours (a fair share of the budget), whichever is less. One
chunk a turn: nobody waits behind another's model.

No socket in here: `send` delivers a frame to a route, or says that it cannot now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import structlog

from metisfl.controller.store import ModelStore
from metisfl.controller.uploads import Send
from metisfl.native_c import crc32c
from metisfl.proto.bulk import Chunk, Code, Credit, Get, Model, Refused
from metisfl.proto.chunk import NO_DIGEST, chunk_count, chunk_extent, describe_chunk, short_digest
from metisfl.proto.credit import WORD_S, Allocator, Sender
from metisfl.proto.errors import MachineError
from metisfl.proto.model_file import ModelFile, open_model

__all__ = ["Downloads"]

DOWNLOADS_PER_PEER: Final = 8
ABANDONED_S: Final = 120.0
CHUNKS_PER_TURN: Final = 16
BUSY_RETRY_S: Final = 0.01
SITES: Final = "learner:"
READERS: Final = (SITES, "driver:")
log = structlog.get_logger()

Key = tuple[bytes, bytes]
"""Route and subject: one connection may fetch several models."""


@dataclass(slots=True)
class _Download:
    principal: str
    digest: bytes
    model: ModelFile
    manifest_digest: bytes
    sender: Sender
    told_at: float
    heard_at: float
    allowed: int = 0  # chunks of its share that are not sent yet


class Downloads:
    """All downloads of one endpoint. Belongs to the endpoint's thread."""

    def __init__(self, store: ModelStore, send: Send, counts: Counter[str]) -> None:
        self._store = store
        self._send = send
        self._counts = counts
        self._credit: Allocator[Key] = Allocator()
        self._downloads: dict[Key, _Download] = {}
        self.updates: Mapping[bytes, Path] = MappingProxyType({})
        """Updates that sites may fetch to check the fold; replaced as a whole, by any thread."""

    def get(self, frame: Get, principal: str, route: bytes, now: float) -> None:
        """Somebody wants a model from chunk `first` on: answer with MODEL and chunks or REFUSED."""
        if not principal.startswith(READERS):
            reason = f"{principal} may not fetch models; learners and drivers may"
            self._refuse(route, frame.subject, Code.NOT_YOURS, reason)
            return
        key = route, frame.subject
        download = self._downloads.get(key)
        if download is None or download.digest != frame.digest:
            self._forget(key)
            download = self._begin(frame, principal, route, now)
        if download is None:
            return
        model = download.model
        self._send(route, Model(frame.digest, model.payload_bytes, model.manifest_bytes))
        self._restart(key, download, frame.first, frame.limit, now)

    def credit(self, frame: Credit, route: bytes, now: float) -> bool:
        """The receiver has taken chunks, and may take more. Raises PeerError beyond the model.

        Returns False if there is no such download, or it begins anew.
        """
        key = route, frame.subject
        download = self._downloads.get(key)
        if download is None:
            return False  # complete, or of an earlier connection
        download.heard_at = now
        self._credit.heard(key, now)
        if frame.rewind:
            self._restart(key, download, frame.first, frame.limit, now)
            return False
        self._credit.give_back(key, download.sender.allow(frame))
        self._want(key, download)
        if download.sender.acknowledged == download.sender.count:
            self._forget(key)
        return True

    def work(self, now: float) -> float | None:
        """Send what may be sent, one chunk each in turn; return in how many s to come again."""
        for key, chunks in self._credit.deal():
            self._downloads[key].allowed += chunks
        able = [key for key, d in self._downloads.items() if d.allowed and d.sender.ready]
        budget, busy = CHUNKS_PER_TURN, False
        while able and budget > 0:
            still_able = []
            for key in able:
                download = self._downloads[key]
                if not self._send_chunk(key, download, now):
                    busy = True
                elif key in self._downloads and download.allowed and download.sender.ready:
                    still_able.append(key)
                budget -= 1
            able = still_able
        if able:
            return 0.0
        return BUSY_RETRY_S if busy else None

    def tick(self, now: float) -> None:
        """Take credit from the silent, forget the abandoned, repeat the word to those who wait."""
        for key in self._credit.silent(now):
            self._credit.reclaim(key)
            self._downloads[key].allowed = 0
        for key, download in list(self._downloads.items()):
            if now - download.heard_at >= ABANDONED_S:
                self._forget(key)
            elif now - download.told_at >= WORD_S:
                download.told_at = now
                sender = download.sender
                self._send(key[0], Credit(key[1], sender.acknowledged, sender.limit))

    def unreachable(self, routes: set[bytes]) -> None:
        """The connections behind these routes are gone."""
        for key in [key for key in self._downloads if key[0] in routes]:
            self._forget(key)

    def close(self) -> None:
        for key in list(self._downloads):
            self._forget(key)

    def _begin(self, frame: Get, principal: str, route: bytes, now: float) -> _Download | None:
        update = self.updates.get(frame.digest) if principal.startswith(SITES) else None
        if update is None and not self._store.contains(frame.digest):
            reason = f"no model {frame.digest.hex()} here: it never was, or is no longer kept"
            self._refuse(route, frame.subject, Code.UNKNOWN_MODEL, reason)
            return None
        try:
            model = self._store.open(frame.digest) if update is None else open_model(update)
        except (MachineError, OSError) as error:
            self._unreadable(route, frame.subject, error)
            return None
        theirs = [key for key, d in self._downloads.items() if d.principal == principal]
        for key in theirs[: max(0, len(theirs) + 1 - DOWNLOADS_PER_PEER)]:
            self._forget(key)
        digest = short_digest(model.manifest_bytes)
        sender = Sender(chunk_count(model.manifest))
        download = _Download(principal, frame.digest, model, digest, sender, now, now)
        self._downloads[route, frame.subject] = download
        return download

    def _restart(self, key: Key, download: _Download, first: int, limit: int, now: float) -> None:
        download.sender.restart(first, limit)
        download.told_at = download.heard_at = now
        download.allowed = 0
        self._credit.join(key, 0, now)
        self._want(key, download)
        if download.sender.acknowledged == download.sender.count:
            self._forget(key)

    def _want(self, key: Key, download: _Download) -> None:
        sender = download.sender
        self._credit.want(key, max(0, sender.limit - sender.next - download.allowed))

    def _send_chunk(self, key: Key, download: _Download, now: float) -> bool:
        """Send the next chunk; False if it has to wait."""
        model, index = download.model, download.sender.next
        start, stop = chunk_extent(index, model.manifest)
        try:
            payload = model.pread(start, stop - start)
        except (MachineError, OSError) as error:
            self._unreadable(key[0], key[1], error)
            self._forget(key)
            return True
        header = describe_chunk(
            model.manifest,
            index,
            payload,
            federation=NO_DIGEST,
            manifest_digest=download.manifest_digest,
            subject=key[1],
            crc32c=crc32c,
        )
        if not self._send(key[0], Chunk(header, payload)):
            return False
        download.sender.sent()
        download.allowed -= 1
        download.told_at = now
        self._counts["chunks_sent"] += 1
        self._counts["chunk_bytes_sent"] += len(payload)
        return True

    def _unreadable(self, route: bytes, subject: bytes, error: Exception) -> None:
        log.error("model not readable", reason=str(error))
        self._refuse(route, subject, Code.UNKNOWN_MODEL, f"the model cannot be read: {error}")

    def _refuse(self, route: bytes, subject: bytes, code: Code, reason: str) -> None:
        self._counts[f"refused_{code.name.lower()}"] += 1
        self._send(route, Refused(subject, code, reason))

    def _forget(self, key: Key) -> None:
        download = self._downloads.pop(key, None)
        if download is not None:
            download.model.close()
            self._credit.leave(key)
