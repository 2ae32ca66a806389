"""The broker's two sockets, and how everybody behind them is sent away at once.

Rule: ZeroMQ cannot cut one connection. Whoever must go is cut with all others: the sockets are
closed and opened anew at the same addresses, and who is still welcome is back in a moment and
misses nothing, since the log has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import zmq

from metisfl.deploy.curve import let_invited_in
from metisfl.deploy.rebind import close_bound
from metisfl.proto.errors import MachineError, UserError
from metisfl.proto.frames import MESSAGE_BYTES_MAX, Head, pack_head

__all__ = ["Context", "Doors", "Socket"]

BACKLOG: Final = 1024
INGRESS_RECEIVE_HWM: Final = 512
INGRESS_SEND_HWM: Final = 256
LIVE_SEND_HWM: Final = 2048
SUBSCRIPTION_MESSAGE_BYTES_MAX: Final = 512

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]


class Doors:
    """`ingress` (ROUTER) and `live` (XPUB), bound. All in the broker's main thread."""

    def __init__(
        self,
        context: Context,
        guard: Callable[[Socket], None],
        *,
        ingress: str,
        live: str,
        head: Head,
    ) -> None:
        """Bind both; `guard` secures a socket that is not bound yet, `head` is told to subscribers.

        Raises MachineError if an address is taken, UserError if it cannot be one.
        """
        self._context, self._guard = context, guard
        self.ingress, self.live = self._new_ingress(), self._new_live(head)
        self.ingress_endpoint = _bind(self.ingress, ingress, "--ingress")
        self.live_endpoint = _bind(self.live, live, "--live")

    def reopen(self, head: Head) -> None:
        """Cut every connection. What was not read or sent yet is gone; peers send and ask again.

        `ingress` and `live` are other sockets afterwards. Raises MachineError for a lost address.
        """
        close_bound(self.ingress, self.ingress_endpoint)
        close_bound(self.live, self.live_endpoint)
        self.ingress, self.live = self._new_ingress(), self._new_live(head)
        _bind(self.ingress, self.ingress_endpoint, "--ingress")
        _bind(self.live, self.live_endpoint, "--live")

    def close(self) -> None:
        self.ingress.close(linger=0)
        self.live.close(linger=0)

    def _new_ingress(self) -> Socket:
        socket = self._context.socket(zmq.ROUTER)
        self._guard(socket)
        let_invited_in(socket)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        socket.rcvhwm, socket.sndhwm = INGRESS_RECEIVE_HWM, INGRESS_SEND_HWM
        return socket

    def _new_live(self, head: Head) -> Socket:
        socket = self._context.socket(zmq.XPUB)
        self._guard(socket)
        socket.setsockopt(zmq.XPUB_MANUAL, 1)
        socket.setsockopt(zmq.XPUB_WELCOME_MSG, b"".join(pack_head(head)))
        socket.setsockopt(zmq.MAXMSGSIZE, SUBSCRIPTION_MESSAGE_BYTES_MAX)
        socket.sndhwm = LIVE_SEND_HWM
        return socket


def _bind(socket: Socket, endpoint: str, flag: str) -> str:
    """Bind and return the endpoint with its port."""
    socket.setsockopt(zmq.BACKLOG, BACKLOG)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        if error.errno in (zmq.EADDRINUSE, zmq.EADDRNOTAVAIL):
            raise MachineError(
                f"{endpoint} cannot be bound: {error.strerror}. Another process may have it "
                f"(`ss -ltnp` shows which); end that one or choose another endpoint with {flag}"
            ) from None
        raise UserError(
            f"{flag} {endpoint!r} cannot be bound: {error.strerror}; use tcp://ADDRESS:PORT"
        ) from None
    found = socket.get(zmq.LAST_ENDPOINT)
    assert isinstance(found, bytes), found
    return found.decode().rstrip("\0")
