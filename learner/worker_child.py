"""The process that trains: loads the application once, then does one job after the other.

Rule 1: it lives no longer than its parent. A thread waits for the parent's end of the socket to
close, and the kernel is asked for the same, for when app code keeps that thread from running.
Rule 2: what the app, the model or the disk does wrong is a Failure to the parent; a defect of ours
ends this process with its traceback on stderr, and the parent starts another.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from metisfl.deploy.run import exit_with_parent
from metisfl.learner.app import load_app, trainer_for
from metisfl.learner.jobs import JobLine, Jobs
from metisfl.learner.trainer import TaskCancelled
from metisfl.learner.worker_messages import (
    LENGTH,
    Cancel,
    Failure,
    Fault,
    Job,
    Ready,
    Result,
    Run,
    Start,
    pack,
)
from metisfl.proto.errors import FULL, DiskFull, MachineError, PeerError, UserError
from metisfl.proto.events import REASON_CHARACTERS_MAX

__all__ = ["main"]


class _Channel:
    """The child's end of the socket. A thread reads it; only the main thread writes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames = connection.makefile("rb")
        self._runs: queue.SimpleQueue[Run] = queue.SimpleQueue()
        self._cancelled = 0

    def first(self) -> Start:
        """The frame that says what to load; before `watch`."""
        start = self._read()
        assert isinstance(start, Start)
        return start

    def watch(self) -> None:
        """Read from now on in a thread of its own; end the process with the parent."""
        threading.Thread(target=self._watch, name="parent-watch", daemon=True).start()

    def next_run(self) -> Run:
        return self._runs.get()

    def is_cancelled(self, number: int) -> bool:
        return number == self._cancelled

    def send(self, message: object) -> None:
        try:
            self._connection.sendall(pack(message))
        except OSError:  # the parent is gone
            os._exit(0)

    def _read(self) -> object:
        return pickle.loads(self._exactly(*LENGTH.unpack(self._exactly(LENGTH.size))))

    def _exactly(self, count: int) -> bytes:
        data = b""
        with contextlib.suppress(ConnectionError):  # it was killed before it had read all of ours
            data = self._frames.read(count)
        if len(data) < count:  # the parent is gone
            os._exit(0)
        return data

    def _watch(self) -> None:
        while True:
            message = self._read()
            if isinstance(message, Run):
                self._runs.put(message)
            elif isinstance(message, Cancel):
                self._cancelled = message.number


@contextlib.contextmanager
def _failures(channel: _Channel) -> Iterator[None]:
    """Send what goes wrong inside as a Failure, with the traceback on stderr if the app did it."""

    def fail(reason: str, fault: Fault) -> None:
        text = reason.encode(errors="replace").decode()  # a file's name may be no text
        channel.send(Failure(text[:REASON_CHARACTERS_MAX], fault))

    try:
        yield
    except TaskCancelled as error:
        fail(str(error), "cancelled")
    except PeerError as error:
        fail(str(error), "peer")
    except DiskFull as error:
        fail(str(error), "full")
    except MachineError as error:
        fail(str(error), "machine")
    except UserError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        fail(str(error), "user")
    except OSError as error:
        fault: Fault = "full" if error.errno in FULL else "machine"
        fail(f"{error.filename or 'the update file'}: {error.strerror}", fault)


def main(descriptor: int) -> None:
    """Serve the parent at the other end of the socket `descriptor` until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    os.dup2(2, 1)  # what an app prints is no answer of the daemon's
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    channel = _Channel(socket.socket(fileno=descriptor))
    start = channel.first()
    exit_with_parent(start.parent, signal.SIGKILL)
    channel.watch()
    line = JobLine(channel.send, channel.is_cancelled)
    do = None
    with _failures(channel):
        do = _prepare(start, line, channel)
    if do is None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)  # the interpreter's own way out may wait for the thread that reads, for ever
    while True:
        run = channel.next_run()
        line.begin(run.number)
        with _failures(channel):
            channel.send(do(run.job))


def _prepare(start: Start, line: JobLine, channel: _Channel) -> Callable[[Job], Result]:
    """Load the application, and the key if there is one; return what does jobs."""
    jobs = Jobs(trainer_for(load_app(start.app, start.path), start.source), line)
    do = jobs.do
    if start.keys is not None:
        # Here, not above: a plain federation needs no OpenFHE.
        from metisfl.learner.crypto import Crypto
        from metisfl.learner.encrypted_jobs import EncryptedJobs

        do = EncryptedJobs(jobs, Crypto.load(Path(start.keys)), line).do
        if not jobs.examples():
            raise UserError(
                "the app does not say how many examples it trains on, and encrypted updates are "
                "weighted before anyone may see them: give it a method examples() that returns the "
                "number"
            )
    channel.send(Ready(jobs.examples()))
    return do
