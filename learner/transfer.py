"""Bulk at the learner: bring an update to the controller, fetch a model from it.

Rule 1: a transfer ends in success, in a refusal in words, or when it is cancelled. Silence is none
of these: it is asked again on a new connection, for ever, and goes on where it was.
Rule 2: a connection that did its work is kept for the next transfer, since a handshake costs more
than a small model; one that was silent or cut off in the middle is thrown away.
Rule 3: the event loop is never held for longer than a few chunks take.
Rule 4: a site that only sends encrypted updates is asked here once more, before the first frame.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import structlog
import zmq

from metisfl.broker.client import Credentials, Handshakes
from metisfl.deploy.curve import set_hygiene
from metisfl.learner.conversation import Download, DownloadRefused, Upload, UploadRefused
from metisfl.learner.part import PartFile
from metisfl.native_c import crc32c
from metisfl.proto.bulk import MESSAGE_BYTES_MAX, Frame, pack, parse
from metisfl.proto.chunk import NO_DIGEST, federation_digest
from metisfl.proto.credit import WINDOW_CHUNKS, Patience
from metisfl.proto.digest import RunningDigest
from metisfl.proto.errors import UserError
from metisfl.proto.model_file import ModelFile, open_model
from metisfl.proto.tensors import is_encrypted

__all__ = ["BulkClient", "DownloadRefused", "NotEncrypted", "OnProgress", "UploadRefused"]

FRAMES_PER_TURN: Final = 8
LINKS_KEPT: Final = 2
PROGRESS_S: Final = 0.5
HWM: Final = 2 * WINDOW_CHUNKS + 8
DEAD_LINK_MS: Final = 30_000
RECONNECT_MS_MAX: Final = 300  # one refused connection: cheap, and who is back is found soon

log = structlog.get_logger()

OnProgress = Callable[[float], None]
"""Takes the fraction that has arrived; called at most twice a second, when a word has come."""


class NotEncrypted(UserError):
    """An update is plain at a site that only sends encrypted ones; nothing of it was sent."""


class BulkClient:
    """Transfers between this learner and one controller. Use it as an async context manager."""

    def __init__(
        self, endpoint: str, keys: Credentials, *, federation: str, encrypted_only: bool = False
    ) -> None:
        """`keys` are ours towards the controller."""
        self._endpoint = endpoint
        self._keys = keys
        self._federation = federation
        self._encrypted_only = encrypted_only
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._links: list[_Link] = []
        self._refusal = ""

    async def __aenter__(self) -> BulkClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections. Cancel the transfers first."""
        self._context.destroy(linger=0)

    async def upload(
        self,
        task_id: str,
        path: Path,
        *,
        run_id: str = "",
        digest: bytes = b"",
        on_progress: OnProgress | None = None,
    ) -> bytes:
        """Bring the model file at `path` to the controller as the update of a task.

        Returns its digest (32 bytes), once the controller has it on disk; `digest` saves computing
        it again. Raises UploadRefused, NotEncrypted, and MachineError for a file that cannot be
        read.
        """
        with open_model(path) as model:
            if self._encrypted_only and not is_encrypted(model.manifest):
                raise NotEncrypted(
                    f"{path} is a plain update, and this site holds a key and only sends encrypted "
                    "ones; it was not sent"
                )
            digest = digest or await _digest_of(model)
            federation = federation_digest(self._federation, run_id)
            await self._converse(Upload(model, task_id, federation, digest), on_progress)
        return digest

    async def download(
        self, digest: bytes, path: Path, *, on_progress: OnProgress | None = None
    ) -> None:
        """Fetch the model with this digest (32 bytes) to `path`, where it appears when complete.

        Raises DownloadRefused if the controller does not have it, MachineError if this disk cannot
        take it.
        """
        resumed = True
        while resumed:  # at most twice: what an earlier attempt left may be damaged
            with PartFile(path, digest) as part:
                resumed = part.resumed
                if not part.complete:
                    await self._converse(Download(digest, part), on_progress)
                while not part.catch_up():
                    await asyncio.sleep(0)
                if part.matches():
                    part.publish()
                    return
                part.discard()
        raise DownloadRefused(
            f"what the controller sent as model {digest.hex()} has another digest; its store is "
            "damaged"
        )

    async def _converse(self, transfer: Upload | Download, on_progress: OnProgress | None) -> None:
        loop = asyncio.get_running_loop()
        patience = Patience(loop.time())
        link = self._links.pop() if self._links else self._connect()
        try:
            while not await _talk(link, transfer, patience, on_progress):
                self._tell(link.why_refused())
                link.close()
                link = self._connect()
        except BaseException:
            link.close()
            raise
        self._refusal = ""
        if len(self._links) < LINKS_KEPT:
            self._links.append(link)
        else:
            link.close()

    def _tell(self, refusal: str) -> None:
        """Say once why the controller does not let us in, until a transfer has got through."""
        if refusal and refusal != self._refusal:
            self._refusal = refusal
            log.error(
                "the controller refuses the connection", reason=refusal, endpoint=self._endpoint
            )

    def _connect(self) -> _Link:
        socket = self._context.socket(zmq.DEALER)
        self._keys.put_on(socket)
        set_hygiene(socket)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        socket.setsockopt(zmq.SNDHWM, HWM)
        socket.setsockopt(zmq.RCVHWM, HWM)
        socket.setsockopt(zmq.TCP_MAXRT, DEAD_LINK_MS)
        # libzmq doubles the wait without jitter, so the jitter is in the first one.
        socket.setsockopt(zmq.RECONNECT_IVL, random.randrange(80, 160))
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)
        handshakes = Handshakes(socket, self._keys)
        socket.connect(self._endpoint)
        return _Link(socket, handshakes)


class _Link:
    """One connection. Plain calls on the socket, and one wait on its file descriptor."""

    def __init__(self, socket: zmq.Socket[bytes], handshakes: Handshakes) -> None:
        self._socket, self._handshakes = socket, handshakes
        self._descriptor = int(socket.getsockopt(zmq.FD))

    def close(self) -> None:
        self._handshakes.close()
        self._socket.close(linger=0)

    def why_refused(self) -> str:
        return self._handshakes.why_refused()

    def send(self, frame: Frame) -> bool:
        """Send a frame; False if it has to wait until the link is writable."""
        try:
            parts: list[Any] = pack(frame, crc32c)
            self._socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def receive(self) -> Frame | None:
        """The next frame that has come, or None. Raises PeerError for what is no frame."""
        try:
            message = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        return parse([part.buffer for part in message], crc32c)

    async def ready(self, *, writable: bool, deadline: float) -> None:
        """Wait for something to read (or for room to write), until `deadline` at the longest.

        The descriptor tells of changes, not of states: it is only waited on after the socket has
        said that there is nothing to do.
        """
        loop = asyncio.get_running_loop()
        wanted = zmq.POLLIN | zmq.POLLOUT if writable else zmq.POLLIN
        if self._can(wanted):
            await asyncio.sleep(0)  # others may have something to do meanwhile
        while not self._can(wanted) and loop.time() < deadline:
            changed = asyncio.Event()
            loop.add_reader(self._descriptor, changed.set)
            timer = loop.call_at(deadline, changed.set)
            try:
                await changed.wait()
            finally:
                timer.cancel()
                loop.remove_reader(self._descriptor)

    def _can(self, wanted: int) -> bool:
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & wanted)


async def _talk(
    link: _Link, transfer: Upload | Download, patience: Patience, on_progress: OnProgress | None
) -> bool:
    """Hold the conversation over one link; False if the other end fell silent."""
    clock = asyncio.get_running_loop().time
    question, asked, progress_at = transfer.question(), False, clock()
    while True:
        for _ in range(FRAMES_PER_TURN):
            frame = link.receive()
            if frame is None:
                break
            if frame.subject in (transfer.subject, NO_DIGEST):  # else: of an earlier transfer
                patience.word(clock(), progress=transfer.take(frame))
                if on_progress is not None and clock() - progress_at >= PROGRESS_S:
                    progress_at = clock()
                    on_progress(transfer.fraction)
        asked = asked or link.send(question)
        sent_all = asked and _send_some(link, transfer)
        if transfer.done:
            return True
        if clock() >= patience.deadline:
            patience.ask_again(clock())
            return False
        await link.ready(writable=not sent_all, deadline=patience.deadline)


def _send_some(link: _Link, transfer: Upload | Download) -> bool:
    """Send a few frames; return whether there was nothing more to send."""
    for _ in range(FRAMES_PER_TURN):
        frame = transfer.next_frame()
        if frame is None:
            return True
        if not link.send(frame):
            return False
        transfer.sent()
    return False


async def _digest_of(model: ModelFile) -> bytes:
    running = RunningDigest(model.fileno(), model.manifest_bytes)
    while not running.advance(model.payload_bytes):
        await asyncio.sleep(0)
    return running.digest()
