"""By what a client is known to a server, and why a server did not take it.

Rule: it is keys. A name without keys is sent only where `--insecure` was asked for, and never as a
way out: a client with keys does not talk to a server without them, nor the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

__all__ = ["Claim", "ClientKeys", "Credentials", "Handshakes"]

UNKNOWN: Final = 400  # the status of an authenticator that says no
FAILURES: Final = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """CURVE keys in Z85, 40 bytes each: our own pair and the server's public key."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes

    def put_on(self, socket: zmq.Socket[Any]) -> None:
        """Encrypt `socket`, not connected yet, towards the one server with that key."""
        socket.curve_publickey = self.public
        socket.curve_secretkey = self.secret
        socket.curve_serverkey = self.server

    def why(self, event: int, value: int) -> str:
        """What a failed handshake means, for people; "" if it may be the network's doing."""
        if _other_mechanism(event, value):
            return (
                "it does not speak CURVE: it was started with --insecure and this process was not, "
                "or it is no MetisFL server; start both in the same way"
            )
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and value == UNKNOWN:
            return "it does not know this key; its operator has to admit it"
        return ""


@dataclass(frozen=True, slots=True)
class Claim:
    """No keys: a principal that nobody checks, over a connection that anybody can read.

    For --insecure only.
    """

    principal: str

    def put_on(self, socket: zmq.Socket[Any]) -> None:
        """Name the principal on every connection of `socket`, which is not connected yet."""
        socket.plain_username = self.principal.encode()

    def why(self, event: int, value: int) -> str:
        """What a failed handshake means, for people; "" if it may be the network's doing."""
        if _other_mechanism(event, value):
            return (
                "it wants keys: this process was started with --insecure and it was not, or it is "
                "no MetisFL server; start both in the same way"
            )
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and value == UNKNOWN:
            return f"it does not take {self.principal!r} for a principal"
        return ""


Credentials = ClientKeys | Claim


class Handshakes:
    """The failed handshakes of one client socket, as libzmq reports them.

    A socket that was refused does not try again: its owner opens another. Close this before it.
    """

    def __init__(self, socket: zmq.Socket[bytes], credentials: Credentials) -> None:
        """`socket` is not connected yet, and has its credentials on."""
        self._socket, self._credentials = socket, credentials
        self._monitor = socket.get_monitor_socket(FAILURES)

    def why_refused(self) -> str:
        """Why the server took none of the latest handshakes, in words; "" if it was not that."""
        why = ""
        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())
            why = self._credentials.why(event["event"], event["value"]) or why
        return why

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)  # left open it would hang the context's end


def _other_mechanism(event: int, value: int) -> bool:
    mismatch: int = zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
    return event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == mismatch
