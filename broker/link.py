"""The two sockets of a client, in an asyncio loop: DEALER to the ingress, SUB to the live feed.

Rule: wait once, then take all there is. The descriptor of a ZeroMQ socket is edge-triggered: any
call on the socket may swallow the edge, so after everything that was done with a socket its state
is looked at again before the loop may sleep.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from types import TracebackType
from typing import Final

import zmq

from metisfl.broker.credentials import Credentials, Handshakes
from metisfl.proto.frames import MESSAGE_BYTES_MAX

__all__ = ["Guard", "Link"]

DRAIN_MESSAGES: Final = 512
RECEIVE_HWM: Final = 2000
SEND_HWM: Final = 1000
RECONNECT_MS: Final = (50, 150)  # at random, so that a federation does not come back in step
RECONNECT_MS_MAX: Final = 300


class Guard:
    """`with guard:` around what the loop calls: an error ends the client and is not only logged."""

    def __init__(self, fail: Callable[[BaseException], None]) -> None:
        self._fail = fail

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if isinstance(error, Exception):
            self._fail(error)
            return True
        return False


class Link:
    """Opened inside a running loop. `on_reply` and `on_live` get the parts of each message,
    `on_settled` follows whenever messages came or the sockets may have become writable."""

    def __init__(
        self,
        *,
        ingress: str,
        live: str,
        keys: Credentials,
        on_reply: Callable[[list[bytes]], None],
        on_live: Callable[[list[bytes]], None],
        on_settled: Callable[[], None],
        guard: Guard,
    ) -> None:
        self._ingress, self._live, self._keys = ingress, live, keys
        self._on_reply, self._on_live, self._on_settled = on_reply, on_live, on_settled
        self._guard = guard
        self._subscriptions: list[bytes] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._dealer: zmq.Socket[bytes] | None = None
        self._sub: zmq.Socket[bytes] | None = None
        self._handshakes: Handshakes | None = None  # of the dealer
        self._again: asyncio.Handle | None = None

    def open(self) -> None:
        """Connect both sockets; the connections come up in the background."""
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._connect()

    def reopen(self) -> None:
        """Replace both sockets by new ones with the same subscriptions."""
        self._disconnect()
        self._connect()

    def close(self) -> None:
        """Close both sockets; harmless when repeated."""
        if self._context is not None:
            self._disconnect()
            self._context.term()
            self._context = None

    def why_refused(self) -> str:
        """Why the ingress refused us since this was asked last; "" if it did not."""
        return self._handshakes.why_refused() if self._handshakes is not None else ""

    def subscribe(self, prefix: bytes) -> None:
        self._subscriptions.append(prefix)
        if self._sub is not None:
            self._sub.subscribe(prefix)
            self._look_again()

    def send(self, *parts: bytes) -> bool:
        """Send a message to the ingress; False when there is no connection or no room."""
        if self._dealer is None:
            return False
        send, last = self._dealer.send, len(parts) - 1
        try:
            for part in parts[:-1]:
                send(part, zmq.SNDMORE | zmq.NOBLOCK)
            send(parts[last], zmq.NOBLOCK)
        except zmq.Again:
            return False  # only the first part can be refused
        finally:
            self._look_again()
        return True

    def _look_again(self) -> None:
        """Come back before the loop sleeps: what was just done may have swallowed an edge."""
        if self._again is None:
            assert self._loop is not None, "used before open"
            self._again = self._loop.call_soon(self._ready)

    def _ready(self) -> None:
        self._again = None
        with self._guard:
            taken = self._drain(self._dealer, self._on_reply), self._drain(self._sub, self._on_live)
            if self._dealer is None:
                return  # a handler closed us
            if any(taken) or int(self._dealer.getsockopt(zmq.EVENTS)) & zmq.POLLOUT:
                self._on_settled()
            if DRAIN_MESSAGES in taken:
                self._look_again()

    def _drain(
        self, socket: zmq.Socket[bytes] | None, handle: Callable[[list[bytes]], None]
    ) -> int:
        """Take what there is, in turns of 512; return how many messages there were."""
        for taken in range(DRAIN_MESSAGES):
            if socket is None or socket.closed:
                return taken
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return taken
            handle(parts)
        return DRAIN_MESSAGES

    def _connect(self) -> None:
        assert self._loop is not None, "used before open"
        self._dealer = self._secured(zmq.DEALER)
        self._handshakes = Handshakes(self._dealer, self._keys)
        # Only to a broker that is there: what waits in a socket is lost with its connection.
        self._dealer.setsockopt(zmq.IMMEDIATE, 1)
        # An empty message on each new connection, which the broker answers with "say hello".
        self._dealer.setsockopt(zmq.PROBE_ROUTER, 1)
        self._dealer.sndhwm = SEND_HWM
        self._sub = self._secured(zmq.SUB)
        self._sub.sndhwm = 0  # subscriptions are messages too, and would be dropped
        for prefix in self._subscriptions:
            self._sub.subscribe(prefix)
        for socket, endpoint in ((self._dealer, self._ingress), (self._sub, self._live)):
            socket.connect(endpoint)
            self._loop.add_reader(socket.FD, self._ready)
        self._look_again()

    def _secured(self, kind: int) -> zmq.Socket[bytes]:
        assert self._context is not None, "used before open"
        socket = self._context.socket(kind)
        self._keys.put_on(socket)
        socket.linger = 0
        socket.rcvhwm = RECEIVE_HWM
        for option, value in (
            (zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX),
            (zmq.HANDSHAKE_IVL, 5000),
            (zmq.TCP_KEEPALIVE, 1),
            (zmq.TCP_KEEPALIVE_IDLE, 30),
            (zmq.TCP_KEEPALIVE_INTVL, 10),
            (zmq.TCP_KEEPALIVE_CNT, 3),
            (zmq.RECONNECT_IVL, random.randint(*RECONNECT_MS)),
            (zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX),
        ):
            socket.setsockopt(option, value)
        return socket

    def _disconnect(self) -> None:
        assert self._loop is not None, "used before open"
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._handshakes is not None:
            self._handshakes.close()
            self._handshakes = None
        for socket in (self._dealer, self._sub):
            if socket is not None:
                self._loop.remove_reader(socket.FD)
                socket.close(linger=0)
        self._dealer = self._sub = None
