"""The bulk endpoint: the controller's door for model bytes, a socket in a thread of its own.

Rule 1: whatever comes in is either a checked frame from a known principal, or it is counted,
answered and dropped; nothing a peer sends ends the thread.
Rule 2: nothing is waited for but the socket. A peer that does not read is passed over.
Rule 3: a thread that ends by itself is seen: `finished` carries its error to the owner.
"""

from __future__ import annotations

import socket as sockets
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Any, Final

import structlog
import zmq

from metisfl.controller.admission import Admission, Expected
from metisfl.controller.downloads import Downloads
from metisfl.controller.spool import Spool
from metisfl.controller.store import ModelStore
from metisfl.controller.uploads import OnRefused, OnStored, Uploads, is_worth_a_line
from metisfl.deploy.curve import Authenticator, secure_server, self_test
from metisfl.deploy.keys import Identity
from metisfl.native_c import crc32c
from metisfl.proto.bulk import (
    MESSAGE_BYTES_MAX,
    Chunk,
    Code,
    Credit,
    Frame,
    Get,
    Open,
    Refused,
    pack,
    parse,
)
from metisfl.proto.chunk import NO_DIGEST
from metisfl.proto.credit import WINDOW_CHUNKS, WORD_S
from metisfl.proto.errors import MachineError, PeerError

__all__ = ["BulkEndpoint", "Expected"]

MESSAGES_PER_TURN: Final = 64
RECEIVE_HWM: Final = WINDOW_CHUNKS + 8
# libzmq learns only at half of the mark that messages went out, so one window needs two.
SEND_HWM: Final = 2 * WINDOW_CHUNKS + 8
BACKLOG: Final = 1024
DEAD_LINK_MS: Final = 30_000
IO_THREADS: Final = 2  # CURVE costs more than all the rest
SELF_TEST_S: Final = 5.0
log = structlog.get_logger()


class BulkEndpoint:
    """Takes updates into the spool and serves models from the store.

    `on_stored` and `on_refused` are called in the endpoint's thread: wrap them with
    `loop.call_soon_threadsafe`. `on_refused` is only called for an update from the learner that
    holds the task. All methods may be called from any thread.
    """

    def __init__(
        self,
        *,
        endpoint: str,
        identity: Identity,
        peers: Mapping[bytes, str],
        store: ModelStore,
        spool: Spool,
        on_stored: OnStored,
        on_refused: OnRefused = lambda *_: None,
    ) -> None:
        """`peers`: public key in Z85 -> principal, as `keys.load_peers` returns it.

        Refusals are logged here; `on_refused` is for an owner who wants to know more.
        """
        self._wanted_endpoint = endpoint
        self._identity = identity
        self._counts: Counter[str] = Counter()
        self._gone: set[bytes] = set()
        admission = Admission(store)
        self._uploads = Uploads(spool, admission, self._send, on_stored, on_refused, self._counts)
        self._downloads = Downloads(store, self._send, self._counts)
        self._expected: Mapping[str, Expected] | None = None
        self._adopted: Mapping[str, Expected] | None = None
        self._stopping = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(IO_THREADS)
        self._authenticator = Authenticator(self._context, peers)
        self._wake_reader, self._wake_writer = sockets.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._thread = Thread(target=self._run, name="bulk", daemon=True)
        self.finished: Future[None] = Future()
        """Done when the thread has ended; with its error if it ended of one."""
        self.endpoint = ""
        """Where it is bound, with the real port; empty before `start`."""

    def start(self) -> None:
        """Bind and serve. Raises MachineError if the address is taken or unknown keys get in."""
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            self._authenticator.start()
            self._bind()
            self_test(self._context, self.endpoint, self._identity.public, SELF_TEST_S)
        except MachineError:
            self._release()
            raise
        self.finished.set_running_or_notify_cancel()  # so that no waiter can cancel it
        self._thread.start()

    def close(self) -> None:
        """Stop, keep what was received, and free the port. Closing twice is fine."""
        self._stopping = True
        if self._thread.is_alive():
            self._wake()
            self._thread.join()
        self._authenticator.stop()
        self._wake_reader.close()
        self._wake_writer.close()
        self._context.destroy(linger=0)

    def expect(self, expected: Mapping[str, Expected]) -> None:
        """From now on these tasks are open, by task id, and no others.

        Before the first call learners wait for their answer. With each, what was received for other
        tasks is deleted, unless it is complete: that is the owner's.
        Raises ValueError for a task id that cannot name a file.
        """
        if expected == self._expected:
            return
        for task_id in expected:
            Spool.check_task_id(task_id)
        self._expected = MappingProxyType(dict(expected))
        self._wake()

    def offer(self, updates: Mapping[bytes, Path]) -> None:
        """From now on these files can be fetched by their digests, beside the models."""
        self._downloads.updates = MappingProxyType(dict(updates))

    def replace_peers(self, peers: Mapping[bytes, str]) -> None:
        """Know exactly these keys from the next handshake on."""
        self._authenticator.replace(peers)

    @property
    def counts(self) -> dict[str, int]:
        """What happened so far: frames, chunks, bytes, refusals by code."""
        return dict(self._counts)

    def _bind(self) -> None:
        socket = self._socket
        secure_server(socket, self._identity)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        socket.setsockopt(zmq.RCVHWM, RECEIVE_HWM)
        socket.setsockopt(zmq.SNDHWM, SEND_HWM)
        socket.setsockopt(zmq.BACKLOG, BACKLOG)
        socket.setsockopt(zmq.TCP_MAXRT, DEAD_LINK_MS)
        try:
            socket.bind(self._wanted_endpoint)
        except zmq.ZMQError as error:
            raise MachineError(
                f"bulk endpoint {self._wanted_endpoint}: {zmq.strerror(error.errno or 0)}; stop "
                "what uses that address or set another one"
            ) from None
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _wake(self) -> None:
        try:
            self._wake_writer.send(b"\0")
        except BlockingIOError:
            pass  # it has enough to wake up from
        except OSError:
            assert self._stopping, "the endpoint lost its waker"

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            # Not handled, handed on: the owner must learn that nobody serves any more.
            self.finished.set_exception(error)
        else:
            self.finished.set_result(None)
        finally:
            self._release()

    def _release(self) -> None:
        self._uploads.close()
        self._downloads.close()
        self._socket.close(linger=0)

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        next_tick, wait_ms = time.monotonic(), 0
        while not self._stopping:
            ready = dict(poller.poll(wait_ms))
            if self._wake_reader.fileno() in ready:
                self._wake_reader.recv(4096)
            self._adopt()
            if self._socket in ready:
                self._receive()
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + WORD_S / 2
                self._tick(now)
            more = self._uploads.work(now)
            again_s = self._downloads.work(now)
            self._bury()
            waits = (0.0 if more else WORD_S, WORD_S if again_s is None else again_s)
            wait_ms = max(0, round(1000 * min(next_tick - now, *waits)))

    def _adopt(self) -> None:
        expected = self._expected
        if expected is not None and expected is not self._adopted:
            self._adopted = expected
            self._uploads.expect(expected, time.monotonic())

    def _tick(self, now: float) -> None:
        if not self._authenticator.is_alive():
            raise MachineError("the bulk endpoint's authenticator has ended: nobody can connect")
        self._uploads.tick(now)
        self._downloads.tick(now)

    def _receive(self) -> None:
        """Take what has arrived, up to a bound, so that everything else gets its turn."""
        for _ in range(MESSAGES_PER_TURN):
            try:
                message = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._take(message)

    def _take(self, message: list[zmq.Frame]) -> None:
        route = message[0].bytes
        principal = str(message[0].get("User-Id"))
        try:
            frame = parse([part.buffer for part in message[1:]], crc32c)
            self._dispatch(frame, principal, route)
        except PeerError as error:
            self._counts["bad_frames"] += 1
            count = self._counts["bad_frames"]
            if is_worth_a_line(count):
                log.warning("bad bulk frame", peer=principal, count=count, why=str(error))
            self._send(route, Refused(NO_DIGEST, Code.BAD_FRAME, str(error)))

    def _dispatch(self, frame: Frame, principal: str, route: bytes) -> None:
        now = time.monotonic()
        match frame:
            case Chunk():
                self._uploads.chunk(frame, principal, route, now)
            case Credit():
                self._downloads.credit(frame, route, now)
            case Open():
                self._adopt()  # whoever asks after `expect` has returned is judged by it
                self._uploads.open(frame, principal, route, now)
            case Get():
                self._downloads.get(frame, principal, route, now)
            case _:
                raise PeerError(f"a {type(frame).__name__} frame is not for a controller")

    def _send(self, route: bytes, frame: Frame) -> bool:
        parts: list[Any] = [route, *pack(frame, crc32c)]
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            self._counts["sends_deferred"] += 1
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._gone.add(route)
            return False
        return True

    def _bury(self) -> None:
        if self._gone:
            self._counts["peers_unreachable"] += len(self._gone)
            self._uploads.unreachable(self._gone)
            self._downloads.unreachable(self._gone)
            self._gone.clear()
