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
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Any, Final

import structlog
import zmq

from metisfl.controller.admission import Admission, Expected
from metisfl.controller.downloads import READERS, Downloads
from metisfl.controller.patience import Patience
from metisfl.controller.repeats import Repeats
from metisfl.controller.spool import Spool
from metisfl.controller.store import ModelStore
from metisfl.controller.uploads import OnDenied, OnRefused, OnStored, Uploads
from metisfl.deploy.curve import Authenticator, Insecure, guard_server, self_test
from metisfl.deploy.handshakes import Monitors
from metisfl.deploy.keys import Identity
from metisfl.deploy.memory import needed_bytes
from metisfl.deploy.memory_guard import LOOK_S, MEMORY_LIMIT_BYTES, MemoryGuard, suspects
from metisfl.deploy.rebind import close_bound
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

__all__ = ["BulkEndpoint", "Expected", "OnStranger"]

MESSAGES_PER_TURN: Final = 64
RECEIVE_HWM: Final = WINDOW_CHUNKS + 8
# libzmq learns only at half of the mark that messages went out, so one window needs two.
SEND_HWM: Final = 2 * WINDOW_CHUNKS + 8
BACKLOG: Final = 1024
DEAD_LINK_MS: Final = 30_000
IO_THREADS: Final = 2  # CURVE costs more than all the rest
SELF_TEST_S: Final = 5.0
ROUTES_MAX: Final = 4096
OnStranger = Callable[[str, str, str], None]
"""What was refused, to whom (an address, or the principal that is suspected), why."""
log = structlog.get_logger()


class BulkEndpoint:
    """Takes updates into the spool and serves models from the store.

    `on_stored` and `on_refused` are called in the endpoint's thread: wrap them with
    `loop.call_soon_threadsafe`. `on_refused` is only called for an update from the learner that
    holds the task, `on_denied` for whatever anybody may not do, as often as that is tried. All
    methods may be called from any thread.
    """

    def __init__(
        self,
        *,
        endpoint: str,
        identity: Identity | Insecure,
        peers: Mapping[bytes, str],
        store: ModelStore,
        spool: Spool,
        on_stored: OnStored,
        on_refused: OnRefused = lambda *_: None,
        on_denied: OnDenied = lambda *_: None,
        on_stranger: OnStranger = lambda *_: None,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    ) -> None:
        """`peers`: public key in Z85 -> principal.

        Beyond the limit of what the process has allocated (what it maps of files does not count)
        all connections are cut. `on_stranger` is told who is suspected, and who shows no key.
        Refusals are logged here; `on_refused` is for an owner who wants to know more.
        """
        self._wanted_endpoint = endpoint
        self._identity = identity
        self._counts: Counter[str] = Counter()
        self._gone: set[bytes] = set()
        admission = Admission(store)
        self._on_denied, self._on_stranger = on_denied, on_stranger
        self._memory = MemoryGuard(memory_limit_bytes)
        self._routes: dict[bytes, None] = {}
        self._heard: Counter[str] = Counter()
        self._repeats = Repeats()
        self._patience = Patience()
        self._uploads = Uploads(
            spool, admission, self._send, on_stored, on_refused, self._counts, on_denied
        )
        self._downloads = Downloads(store, self._send, self._counts)
        self._expected: Mapping[str, Expected] | None = None
        self._adopted: Mapping[str, Expected] | None = None
        self._stopping = self._cut_due = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(IO_THREADS)
        self._authenticator = Authenticator(
            self._context, peers, insecure=isinstance(identity, Insecure)
        )
        self._wake_reader, self._wake_writer = sockets.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._wake_reader, zmq.POLLIN)
        self._monitors = Monitors(self._poller)
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
            self._bind(self._wanted_endpoint)
            if isinstance(self._identity, Identity):
                self_test(self._context, self.endpoint, self._identity.public, SELF_TEST_S)
            self._authenticator.take_refusals()  # that of the self-test
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

    def replace_peers(self, peers: Mapping[bytes, str], *, cut: bool = False) -> None:
        """Know exactly these keys from the next handshake on.

        With `cut` all connections are cut, so that who is not known any more is gone; who is goes
        on with its transfers on a new one.
        """
        self._authenticator.replace(peers)
        if cut:
            self._cut_due = True
            self._wake()

    @property
    def counts(self) -> dict[str, int]:
        """What happened so far: frames, chunks, bytes, refusals by code."""
        return dict(self._counts)

    def _bind(self, endpoint: str) -> None:
        socket = self._socket
        guard_server(socket, self._identity)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        socket.setsockopt(zmq.RCVHWM, RECEIVE_HWM)
        socket.setsockopt(zmq.SNDHWM, SEND_HWM)
        socket.setsockopt(zmq.BACKLOG, BACKLOG)
        socket.setsockopt(zmq.TCP_MAXRT, DEAD_LINK_MS)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise MachineError(
                f"bulk endpoint {endpoint}: {zmq.strerror(error.errno or 0)}; stop "
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
        self._monitors.close()
        self._socket.close(linger=0)

    def _serve(self) -> None:
        self._listen()
        next_tick, next_look, wait_ms = time.monotonic(), 0.0, 0
        while not self._stopping:
            ready = dict(self._poller.poll(wait_ms))
            now = time.monotonic()
            if self._wake_reader.fileno() in ready:
                self._wake_reader.recv(4096)
            self._monitors.drain(ready, now)
            self._adopt()
            if now >= next_look:
                next_look = now + LOOK_S
                self._hold_memory(now)
            if self._cut_due:
                self._cut_due = False
                self._reopen()
            elif self._socket in ready:
                self._receive()
            if now >= next_tick:
                next_tick = now + WORD_S / 2
                self._tick(now)
            more = self._uploads.work(now)
            again_s = self._downloads.work(now)
            self._bury()
            waits = (0.0 if more else LOOK_S, LOOK_S if again_s is None else again_s)
            wait_ms = max(0, round(1000 * min(next_tick - now, *waits)))

    def _listen(self) -> None:
        self._poller.register(self._socket, zmq.POLLIN)
        self._monitors.open(self._socket)

    def _reopen(self) -> None:
        self._poller.unregister(self._socket)
        self._monitors.close()
        close_bound(self._socket, self.endpoint)
        self._uploads.unreachable()
        self._downloads.close()
        self._gone.clear()
        self._socket = self._context.socket(zmq.ROUTER)
        self._bind(self.endpoint)
        self._listen()

    def _hold_memory(self, now: float) -> None:
        """Cut everybody off when somebody makes libzmq hold too much."""
        limit = self._memory.limit_bytes
        held = needed_bytes(limit)
        self._memory, cut = self._memory.look(held, now)
        if not cut:
            return
        self._cut_due = True
        self._counts["memory_cuts"] += 1
        named = suspects(self._authenticator.let_in(), self._heard)
        why = f"{held} bytes of memory are in use, over {limit}"
        log.warning("all connections are cut; peers go on by themselves", why=why, suspects=named)
        for who in named or ["unknown"]:
            self._on_stranger("memory limit", who, why)

    def _tell_strangers(self) -> None:
        for address, times in self._monitors.told():
            self._counts["handshakes_failed"] += times
            if self._repeats.line(address, "handshake"):
                log.warning("handshake failed", address=address, times=times)
            self._on_stranger("handshake failed", address, f"{times} times")
        for refusal in self._authenticator.take_refusals():
            who, why = refusal.public.decode() or refusal.address, refusal.reason
            self._counts["keys_refused"] += 1
            if self._repeats.line(who, "key"):
                log.warning("connection refused", public=who, address=refusal.address, reason=why)
            self._on_stranger("connection refused", who, why)

    def _adopt(self) -> None:
        expected = self._expected
        if expected is not None and expected is not self._adopted:
            self._adopted = expected
            self._uploads.expect(expected, time.monotonic())

    def _tick(self, now: float) -> None:
        if not self._authenticator.is_alive():
            raise MachineError("the bulk endpoint's authenticator has ended: nobody can connect")
        self._tell_strangers()
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
        if route not in self._routes:
            self._note(route, principal)
        now = time.monotonic()
        if self._patience.is_out(principal, now):
            self._counts["frames_unread"] += 1
            if count := self._repeats.line(principal, "too much"):
                log.warning("bulk frames dropped unread", peer=principal, count=count)
            return
        try:
            frame = parse([part.buffer for part in message[1:]], crc32c)
            if not self._dispatch(frame, principal, route, now):
                self._patience.spend(principal, now)
        except PeerError as error:
            self._patience.spend(principal, now)
            self._counts["bad_frames"] += 1
            if count := self._repeats.line(principal, "bad frame"):
                log.warning("bad bulk frame", peer=principal, count=count, why=str(error))
            self._send(route, Refused(NO_DIGEST, Code.BAD_FRAME, str(error)))
            self._on_denied(Code.BAD_FRAME, principal, str(error))

    def _note(self, route: bytes, principal: str) -> None:
        if len(self._routes) >= ROUTES_MAX:
            del self._routes[next(iter(self._routes))]
        self._routes[route] = None
        if principal in self._heard or len(self._heard) < ROUTES_MAX:
            self._heard[principal] += 1

    def _dispatch(self, frame: Frame, principal: str, route: bytes, now: float) -> bool:
        """Hand it on; whether an open transfer has asked for it."""
        match frame:
            case Chunk():
                return self._uploads.chunk(frame, principal, route, now)
            case Credit():
                return self._downloads.credit(frame, route, now)
            case Open():
                self._adopt()  # whoever asks after `expect` has returned is judged by it
                self._uploads.open(frame, principal, route, now)
            case Get():
                self._downloads.get(frame, principal, route, now)
                if not principal.startswith(READERS):
                    self._on_denied(Code.NOT_YOURS, principal, "it asked for a model")
            case _:
                raise PeerError(f"a {type(frame).__name__} frame is not for a controller")
        return False

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
