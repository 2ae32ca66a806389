"""Knock at a server's door with one key, and hear how the door behaves: open, refused, a stranger.

Rule: what a connection cannot say, its monitor does. A refused key is told apart from a server that
holds another key than expected, and both from a place where nobody answers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import Enum
from types import TracebackType
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from metisfl.deploy.curve import secure_client
from metisfl.proto.errors import UserError
from metisfl.proto.frames import MESSAGE_BYTES_MAX

__all__ = ["Knock", "Sign"]

RECONNECT_MS: Final = 200
RECONNECT_MS_MAX: Final = 2000


class Sign(Enum):
    OPEN = "both sides know each other"
    REFUSED = "the server does not let this key in"
    STRANGER = "somebody answered who does not hold the server's key, or broke off"
    LOST = "an open connection ended; another is tried"


_SIGNS: Final[dict[int, Sign]] = {
    zmq.EVENT_HANDSHAKE_SUCCEEDED: Sign.OPEN,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: Sign.REFUSED,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: Sign.STRANGER,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: Sign.STRANGER,
    zmq.EVENT_DISCONNECTED: Sign.LOST,
}
_EVENTS: Final = sum(int(event) for event in _SIGNS)


class Knock:
    """`with Knock(...) as knock:` a DEALER that tries again until it is open or refused."""

    def __init__(
        self, endpoint: str, *, public: bytes, secret: bytes, server_public: bytes
    ) -> None:
        """Keys in Z85. Raises UserError if the endpoint cannot be one."""
        self._open = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        secure_client(self._socket, public=public, secret=secret, server_public=server_public)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        self._poller = zmq.Poller()
        self._poller.register(self._monitor, zmq.POLLIN)
        self._poller.register(self._socket, zmq.POLLIN)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise UserError(f"{endpoint!r}: {error.strerror}; use tcp://ADDRESS:PORT") from None

    def __enter__(self) -> Knock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        self._context.term()

    @property
    def is_open(self) -> bool:
        return self._open

    def send(self, parts: Sequence[bytes]) -> None:
        """Send a message if the door is open. It may be lost with the connection, which is told."""
        if self._open:
            self._socket.send_multipart(parts)

    def wait(self, timeout_s: float) -> Sign | list[bytes] | None:
        """The next sign or message; None if there is none within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while (remaining_s := deadline - time.monotonic()) > 0:
            ready = dict(self._poller.poll(int(remaining_s * 1000) + 1))
            if self._monitor in ready:
                event = parse_monitor_message(self._monitor.recv_multipart())["event"]
                sign = _SIGNS[zmq.Event(event)]
                was_open, self._open = self._open, sign is Sign.OPEN
                if sign is not Sign.LOST or was_open:
                    return sign  # a handshake that failed is disconnected as well
            elif self._socket in ready:
                return self._socket.recv_multipart(zmq.NOBLOCK)
        return None
