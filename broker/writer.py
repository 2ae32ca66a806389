"""The thread that waits for the disk, so that the sockets need not; and the one that tidies up.

Rule 1: batches are stored in the order in which they were given. When one fails, those of its
generation behind it are dropped unseen, because they were numbered as if it had succeeded.
Rule 2: the log is trimmed between two batches, one slice each time, so that no batch waits long.
"""

from __future__ import annotations

import os
import queue
import sqlite3
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import structlog
import zmq

from metisfl.broker.schema import PAGE_BYTES, WAL_LIMIT_BYTES, DamagedLog, checkpoint
from metisfl.broker.sequencer import Batch
from metisfl.broker.store import Store
from metisfl.broker.trimming import ROW_BYTES
from metisfl.proto.errors import MachineError

__all__ = ["Disk", "Outcome", "Writer"]

CHECKPOINT_BYTES: Final = 8 * 1024 * 1024
IDLE_S: Final = 1.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Outcome:
    """A batch is on disk, or it is not and `failure` says why."""

    batch: Batch
    failure: MachineError | None


@dataclass(frozen=True, slots=True)
class Disk:
    """How the log stood when it was last looked at, at most about a second ago."""

    floor: int
    log_bytes: int
    log_limit_bytes: int
    free_bytes: int


class Writer:
    """`submit` batches; `signal` becomes readable when there are `outcomes`.

    `disk` can be read from any thread.
    """

    def __init__(self, store: Store, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._store = store
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._outcomes: deque[Outcome] = deque()
        endpoint = f"inproc://writer-{id(self)}"
        self.signal = _pair(context)
        self.signal.bind(endpoint)
        self._signaller = _pair(context)
        self._signaller.connect(endpoint)
        self._checkpointer = _Checkpointer(store)
        self._closed = False
        self._trimming = True  # until damage is found
        self._more_to_trim = False
        self._looked_at = time.monotonic()
        self.disk = self._look()
        self._thread = threading.Thread(target=self._write, name="writer", daemon=True)
        self._thread.start()

    def submit(self, batch: Batch) -> None:
        """Store it soon. The caller keeps no more than two on their way."""
        self._batches.put(batch)

    def outcomes(self) -> list[Outcome]:
        """Take what has happened since the last time, oldest first."""
        while self.signal.poll(0):
            self.signal.recv()
        taken = []
        while self._outcomes:
            taken.append(self._outcomes.popleft())
        return taken

    def is_alive(self) -> bool:
        """False after a defect; the broker cannot go on without it."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Finish what was submitted and end; harmless when repeated.

        `outcomes` can still be taken. `signal` stays open: it belongs to the caller's thread.
        """
        if self._closed:
            return
        self._closed = True
        self._batches.put(None)
        self._thread.join()
        self._checkpointer.close()

    def _write(self) -> None:
        failed_generation = -1
        try:
            while True:
                try:
                    batch = self._batches.get(timeout=0 if self._more_to_trim else IDLE_S)
                except queue.Empty:
                    self._tidy(idle=True)
                    continue
                if batch is None:
                    break
                if batch.generation <= failed_generation:
                    continue
                failure: MachineError | None = None
                try:
                    self._store.append(batch)
                except MachineError as error:
                    failure = error
                    failed_generation = batch.generation
                self._outcomes.append(Outcome(batch, failure))
                self._signaller.send(b"")
                self._wrote(
                    sum(len(append.envelope) for append in batch.appends)
                    + ROW_BYTES * (len(batch.appends) + 1)
                )
                if self._more_to_trim or time.monotonic() - self._looked_at >= IDLE_S:
                    self._tidy(idle=False)
        finally:
            self._signaller.send(b"")  # also when a defect ends this thread: somebody must look
            self._signaller.close(linger=-1)

    def _tidy(self, *, idle: bool) -> None:
        """Trim one slice if something is due; else, with nothing to store, let the file shrink."""
        if self._trimming:
            trimmer, done = self._store.trimmer, None
            try:
                done = trimmer.trim(time.time_ns())
                if done is None and idle:
                    done = trimmer.give_back()
            except DamagedLog as error:
                log.error("the log is not trimmed any more", reason=str(error))
                self._trimming = False
            self._more_to_trim = done is not None
            if done is not None:
                self._wrote(done.bytes)
        self._looked_at = time.monotonic()
        with suppress(sqlite3.Error, OSError):  # it stays at what was seen last
            self.disk = self._look()

    def _wrote(self, count: int) -> None:
        self._checkpointer.wrote(count)
        if self._checkpointer.log_is_long:
            pages, moved = self._store.checkpoint()
            self._checkpointer.log_is_long = moved < pages

    def _look(self) -> Disk:
        trimmer = self._store.trimmer
        found = os.statvfs(self._store.folder)
        free = found.f_bavail * found.f_frsize
        return Disk(trimmer.floor, trimmer.log_bytes(), trimmer.limit_bytes, free)


class _Checkpointer:
    """Moves what the write-ahead log holds into the database, beside the writer.

    The log is used from its start again when all of it was moved while nobody wrote. Under a load
    that never pauses there is no such moment, so the writer makes one when the log is long: it
    moves the rest itself, between two batches.
    """

    def __init__(self, store: Store) -> None:
        self._connection = store.connect()
        self._wake = threading.Condition()
        self._unmoved_bytes = 0
        self._busy = False
        self._closing = False
        self.log_is_long = False
        self._thread = threading.Thread(target=self._run, name="checkpointer", daemon=True)
        self._thread.start()

    def wrote(self, count: int) -> None:
        """Called by the writer after each transaction, with about how many bytes it was."""
        with self._wake:
            self._busy = True
            self._unmoved_bytes += count
            if self._unmoved_bytes >= CHECKPOINT_BYTES:
                self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait(IDLE_S)
                if self._closing:
                    break
                idle, self._busy = not self._busy, False
                if self._unmoved_bytes < (1 if idle else CHECKPOINT_BYTES):
                    continue
                self._unmoved_bytes = 0
            pages, _ = checkpoint(self._connection)
            self.log_is_long = pages * PAGE_BYTES > WAL_LIMIT_BYTES


def _pair(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.PAIR)
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = 0  # at most two batches are on their way
    return socket
