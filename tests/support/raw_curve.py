"""A client of CurveZMQ (RFC 26) by hand, for what libzmq's own client never sends."""

from __future__ import annotations

import os
import socket
import struct
from typing import Final

from nacl.bindings import crypto_box, crypto_box_keypair, crypto_box_open
from zmq.utils import z85

from metisfl.deploy.keys import Identity

GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
LONG, COMMAND, MORE = 2, 4, 1
PATIENCE_S: Final = 20.0


class RawCurve:
    """One authenticated connection; `part` puts one part of a message on the wire."""

    def __init__(self, endpoint: str, who: Identity, server_public: bytes) -> None:
        """Connect and shake hands as a DEALER."""
        host, port = endpoint.removeprefix("tcp://").split(":")
        self.socket = socket.create_connection((host, int(port)), PATIENCE_S)
        self._counter = 0
        try:
            self._shake_hands(who, server_public)
        except BaseException:
            self.socket.close()
            raise

    def _shake_hands(self, who: Identity, server_public: bytes) -> None:
        server, public, secret = (
            z85.decode(server_public),
            z85.decode(who.public),
            z85.decode(who.secret),
        )
        short_public, self._short_secret = crypto_box_keypair()
        self.socket.sendall(GREETING)
        self._exactly(64)
        nonce = self._nonce()
        signed = crypto_box(bytes(64), b"CurveZMQHELLO---" + nonce, server, self._short_secret)
        self._command(b"\x05HELLO\x01\x00" + bytes(72) + short_public + nonce + signed)
        welcome = self._frame()
        assert welcome.startswith(b"\x07WELCOME"), welcome[:20]
        opened = crypto_box_open(
            welcome[24:], b"WELCOME-" + welcome[8:24], server, self._short_secret
        )
        self._server_short, cookie = opened[:32], opened[32:]
        vouch_nonce = os.urandom(16)
        vouch = crypto_box(
            short_public + server, b"VOUCH---" + vouch_nonce, self._server_short, secret
        )
        about = b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER\x08Identity" + bytes(4)
        nonce = self._nonce()
        sealed = self._box(b"CurveZMQINITIATE" + nonce, public + vouch_nonce + vouch + about)
        self._command(b"\x08INITIATE" + cookie + nonce + sealed)
        ready = self._frame()
        assert ready.startswith(b"\x05READY"), f"not let in: {ready[:40]!r}"

    def part(self, body: bytes, *, more: bool) -> None:
        """Send one part of a message; `more` follow."""
        nonce = self._nonce()
        sealed = self._box(b"CurveZMQMESSAGEC" + nonce, bytes([MORE if more else 0]) + body)
        self._send(0, b"\x07MESSAGE" + nonce + sealed)

    def close(self) -> None:
        self.socket.close()

    def _box(self, nonce: bytes, plain: bytes) -> bytes:
        return bytes(crypto_box(plain, nonce, self._server_short, self._short_secret))

    def _nonce(self) -> bytes:
        self._counter += 1
        return struct.pack(">Q", self._counter)

    def _command(self, body: bytes) -> None:
        self._send(COMMAND, body)

    def _send(self, flags: int, body: bytes) -> None:
        if len(body) > 255:
            head = struct.pack(">BQ", flags | LONG, len(body))
        else:
            head = struct.pack(">BB", flags, len(body))
        self.socket.sendall(head + body)

    def _frame(self) -> bytes:
        (flags,) = self._exactly(1)
        size = struct.unpack(">Q", self._exactly(8))[0] if flags & LONG else self._exactly(1)[0]
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            assert piece, "the server hung up"
            data += piece
        return data
