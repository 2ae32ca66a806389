"""The thread that waits for the disk, so that the sockets need not; and the one that tidies up.

Rule: batches are stored in the order in which they were given. When one fails, those of its
generation behind it are dropped unseen, because they were numbered as if it had succeeded.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

import zmq

from metisfl.broker.sequencer import Batch
from metisfl.broker.store import PAGE_BYTES, WAL_LIMIT_BYTES, Store, checkpoint
from metisfl.proto.errors import MachineError

__all__ = ["Outcome", "Writer"]

CHECKPOINT_BYTES: Final = 8 * 1024 * 1024
IDLE_S: Final = 1.0
ROW_BYTES: Final = 128  # what an event adds to the database beyond its envelope, about


@dataclass(frozen=True, slots=True)
class Outcome:
    """A batch is on disk, or it is not and `failure` says why."""

    batch: Batch
    failure: MachineError | None


class Writer:
    """`submit` batches; `signal` becomes readable when there are `outcomes`."""

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
            while (batch := self._batches.get()) is not None:
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
                self._checkpointer.wrote(batch)
                if self._checkpointer.log_is_long:
                    pages, moved = self._store.checkpoint()
                    self._checkpointer.log_is_long = moved < pages
        finally:
            self._signaller.send(b"")  # also when a defect ends this thread: somebody must look
            self._signaller.close(linger=-1)


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

    def wrote(self, batch: Batch) -> None:
        """Called by the writer after each batch."""
        written = sum(len(append.envelope) for append in batch.appends)
        with self._wake:
            self._busy = True
            self._unmoved_bytes += written + ROW_BYTES * (len(batch.appends) + 1)
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
