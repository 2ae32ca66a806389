"""The daemon's handle on the process that trains.

Rule 1: the daemon stays free while a model trains: it beats, reports and cancels, and never imports
the framework. Rule 2: the child is a new program, never a fork: a process that has used TensorFlow
or OpenMP hangs in a forked child. Rule 3: whatever happens to the child, `run` answers: a result or
a TrainingError that says why; the next `run` starts a new child if it must. A full disk is neither:
it is DiskFull, and the job is done again when there is room.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from metisfl.learner.worker_messages import (
    FRAME_BYTES_MAX,
    LENGTH,
    Cancel,
    Failure,
    Fault,
    Job,
    Progress,
    Ready,
    Result,
    Run,
    Start,
    pack,
)
from metisfl.proto.errors import DiskFull, MetisError

__all__ = [
    "Job",
    "Progress",
    "Result",
    "TrainingCancelled",
    "TrainingError",
    "TrainingKilled",
    "Worker",
]

EXIT_WAIT_S: Final = 5.0
# The child gets our import path: it must find the same packages, however we were started.
_BOOTSTRAP: Final = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from metisfl.learner.worker_child import main; main(int(sys.argv[1]))"
)


class TrainingError(MetisError):
    """A job gave no result. The text is the reason; `fault` says who must act."""

    def __init__(self, reason: str, fault: Fault) -> None:
        super().__init__(reason)
        self.fault = fault


class TrainingKilled(TrainingError):
    """A signal ended the process that worked, and nobody here has sent it."""


class TrainingCancelled(TrainingError):
    """The job was cancelled."""


class _Child:
    """One process and the socket to it."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._killed = False
        self.ready = False

    @classmethod
    async def launch(cls, start: Start) -> _Child:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", _BOOTSTRAP, str(theirs.fileno()), *sys.path]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], close_fds=True
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        child = cls(process, reader, writer)
        child.send(start)
        return child

    @property
    def alive(self) -> bool:
        return not self._killed and self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: object) -> None:
        self._writer.write(pack(message))

    async def receive(self) -> object:
        """The next message. Raises EOFError when the child is gone."""
        try:
            (count,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            if count > FRAME_BYTES_MAX:
                raise EOFError
            return pickle.loads(await self._reader.readexactly(count))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise EOFError from None

    def kill(self) -> None:
        self._killed = True  # what the kernel says a moment later
        self._process.kill()

    async def ended(self) -> int:
        """Wait for the process to end, by force after EXIT_WAIT_S; return its exit code."""
        self._writer.close()
        try:
            code = await asyncio.to_thread(self._process.wait, EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = await asyncio.to_thread(self._process.wait)
        return code


class Worker:
    """Runs jobs one at a time in a child process; all methods belong to one event loop.

    Its thread must live as long as the child may: Linux ends a child with the thread that made it.
    `app` is "module:object", `path` the folder to import it from, `source` what the app's data()
    is called with, `keys` the folder of the key of an encrypted federation.
    """

    def __init__(
        self, *, app: str, path: Path | None, source: str, keys: Path | None = None
    ) -> None:
        self._start = Start(
            app,
            None if path is None else str(path),
            source,
            os.getpid(),
            None if keys is None else str(keys),
        )
        self._examples = 0
        self._child: _Child | None = None
        self._starting = asyncio.Lock()
        self._number = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._killed_for = 0

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is none."""
        return None if self._child is None else self._child.pid

    @property
    def examples(self) -> int:
        """Size of the training split, once started; 0 if the application does not say."""
        return self._examples

    async def start(self) -> None:
        """Start the child unless it runs, and wait until the app is loaded (seconds, with Keras).

        Raises TrainingError if the app cannot be loaded, or the key; DiskFull.
        """
        async with self._starting:
            if self._child is not None and not self._child.alive:
                await self._bury()
            if self._child is None:
                self._child = await _Child.launch(self._start)
            if not self._child.ready:
                try:
                    ready = await self._receive(self._child)
                except (TrainingError, DiskFull):
                    await self._bury()  # it has nothing more to say; the next start loads anew
                    raise
                assert isinstance(ready, Ready)
                self._examples = ready.examples
                self._child.ready = True

    async def run(self, job: Job, on_progress: Callable[[Progress], None]) -> Result:
        """Do one job. `on_progress` is called at most ten times a second.

        Raises TrainingError; TrainingCancelled after `cancel`; DiskFull.
        """
        assert self._idle.is_set(), "one job at a time"
        self._number += 1
        number = self._number
        self._idle.clear()
        try:
            await self.start()
            assert self._child is not None
            self._child.send(Run(number, job))
            while True:
                message = await self._receive(self._child)
                if isinstance(message, Result):
                    return message
                if isinstance(message, Progress):
                    on_progress(message)
        finally:
            self._idle.set()

    async def cancel(self, grace_s: float) -> None:
        """End the running job: by asking, and after `grace_s` by killing the child.

        Returns when it has ended; then a new child is on its way if the old one was killed.
        Without a running job nothing happens.
        """
        if self._idle.is_set():
            return
        number = self._number
        if self._child is not None:
            self._child.send(Cancel(number))  # before its Run, too, while the app still loads
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
            return
        except asyncio.TimeoutError:
            self._killed_for = number
        if self._child is not None:
            self._child.kill()
        await self._idle.wait()
        async with self._starting:
            if self._child is None:
                self._child = await _Child.launch(self._start)

    async def close(self) -> None:
        """End the child. A job that runs fails."""
        if self._child is not None:
            self._child.kill()
        await self._idle.wait()
        async with self._starting:
            await self._bury()

    async def _bury(self) -> int:
        child, self._child = self._child, None
        return 0 if child is None else await child.ended()

    async def _receive(self, child: _Child) -> Ready | Progress | Result:
        """The child's next message. Raises DiskFull; TrainingError for a failure and its death."""
        try:
            message = await child.receive()
        except EOFError:
            raise self._death(await self._bury()) from None
        except asyncio.CancelledError:
            # Whoever waited is gone; what the child would answer must not be taken for the next.
            child.kill()
            raise
        if isinstance(message, Failure):
            if message.fault == "cancelled":
                raise TrainingCancelled(message.reason, message.fault)
            if message.fault == "full":
                raise DiskFull(f"{message.reason}; make room on that disk")
            raise TrainingError(message.reason, message.fault)
        assert isinstance(message, Ready | Progress | Result)
        return message

    def _death(self, code: int) -> TrainingError:
        if self._killed_for == self._number:
            return TrainingCancelled("the task was cancelled; training was killed", "cancelled")
        if code >= 0:
            return TrainingError(
                f"the training process ended with exit code {code}; its output above says why",
                "user",
            )
        name = signal.Signals(-code).name
        hint = " (the kernel does this when memory runs out)" if name == "SIGKILL" else ""
        return TrainingKilled(f"the training process was killed by {name}{hint}", "machine")
