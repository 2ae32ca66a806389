"""CURVE on every socket, and the one thread that decides whose key may connect.

Rule: closed when in doubt. libzmq lets everybody in when a CURVE socket finds no authenticator, so
each server socket gets ZMQ_ZAP_ENFORCE_DOMAIN before it is bound, the authenticator runs before
any bind, and a daemon shows with `self_test` that a random key is refused before it says READY.

The authenticator answers ZAP (RFC 27) from a frozen dict: nothing of ours or of the user's runs in
its thread, so nothing can raise there and leave the federation without a doorkeeper.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock, Thread
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from metisfl.deploy.keys import Identity
from metisfl.proto.errors import MachineError

__all__ = ["Authenticator", "Refusal", "secure_client", "secure_server", "self_test"]

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
ZAP_VERSION = b"1.0"
ZAP_DOMAIN = b"metisfl"  # compared literally, on both sides: there is no wildcard
REFUSALS_KEPT = 64
HANDSHAKE_MS = 5000
SELF_TEST_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A handshake that was refused: the key (Z85, empty when none came), the address, why."""

    public: bytes
    address: str
    reason: str


class Authenticator:
    """The ZAP handler of one context, in a thread of its own.

    Its answers carry the principal as User-Id, which libzmq puts on every frame received from that
    connection: `frame.get("User-Id")`.
    """

    def __init__(self, context: zmq.Context[Any], peers: Mapping[bytes, str]) -> None:
        """`peers`: public key in Z85 -> principal, as `keys.load_peers` returns it."""
        self._context = zmq.Context(context)  # a shadow: plain sockets even from an asyncio context
        self._lock = Lock()
        self._refused_total = 0
        self._refusals: deque[Refusal] = deque(maxlen=REFUSALS_KEPT)
        self._thread: Thread | None = None
        self._stop_endpoint = f"inproc://authenticator-{id(self)}"
        self.replace(peers)

    @property
    def refused_total(self) -> int:
        """Handshakes refused since the start; a daemon's own `self_test` counts as one."""
        return self._refused_total

    def take_refusals(self) -> list[Refusal]:
        """Return the latest refusals (at most 64) that were not taken before, for the log."""
        with self._lock:
            taken = list(self._refusals)
            self._refusals.clear()
        return taken

    def replace(self, peers: Mapping[bytes, str]) -> None:
        """Know exactly `peers` from the next handshake on. Open connections are not cut."""
        self._peers = {z85.decode(key): principal.encode() for key, principal in peers.items()}

    def start(self) -> None:
        """Start to answer. Raises MachineError if the context has an authenticator already."""
        assert self._thread is None, "started twice"
        door, stopped = _inproc(self._context, zmq.ROUTER), _inproc(self._context, zmq.PAIR)
        try:
            door.bind(ZAP_ENDPOINT)
            stopped.bind(self._stop_endpoint)
        except zmq.ZMQError as error:
            door.close()
            stopped.close()
            raise MachineError(f"{ZAP_ENDPOINT}: {error}; one authenticator a context") from None
        # Both sockets are the thread's from here on; starting it is the memory barrier.
        self._thread = Thread(
            target=self._serve, args=(door, stopped), name="authenticator", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop to answer: from now on nobody can connect. Harmless when repeated."""
        if self._thread is None:
            return
        if self._thread.is_alive():
            stopper = _inproc(self._context, zmq.PAIR)
            stopper.connect(self._stop_endpoint)
            stopper.send(b"")
            self._thread.join()
            stopper.close()
        self._thread = None

    def is_alive(self) -> bool:
        """A daemon that finds False here cannot be reached by anybody new: it must end."""
        return self._thread is not None and self._thread.is_alive()

    def _serve(self, door: zmq.Socket[bytes], stopped: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(door, zmq.POLLIN)
        poller.register(stopped, zmq.POLLIN)
        try:
            while stopped not in dict(poller.poll()):
                door.send_multipart(self._answer(door.recv_multipart()))
            # At once, while close leaves it to libzmq's reaper: a client that got hold of a dying
            # door would wait for its time-out, and a new start would find the addresses taken.
            door.unbind(ZAP_ENDPOINT)
            stopped.unbind(self._stop_endpoint)
        except zmq.ContextTerminated:
            return
        finally:
            door.close()
            stopped.close()

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """Answer [routing id, "", version, request id, domain, address, identity, mechanism, key].

        libzmq is the only one who asks, so a request of another form is refused like a wrong key.
        """
        principal, reason, key = b"", "not a CURVE request of this domain", b""
        match request:
            case [_, b"", version, _, domain, _, _, b"CURVE", key] if (
                version == ZAP_VERSION and domain == ZAP_DOMAIN
            ):
                principal, reason = self._peers.get(key, b""), "unknown key"
        request_id = request[3] if len(request) > 3 else b""
        head = [*request[:1], b"", ZAP_VERSION, request_id]
        if principal:
            return [*head, b"200", b"OK", principal, b""]
        address = request[5].decode(errors="replace") if len(request) > 5 else ""
        with self._lock:
            self._refused_total += 1
            public = z85.encode(key) if len(key) == 32 else b""
            self._refusals.append(Refusal(public, address, reason))
        return [*head, b"400", reason.encode(), b"", b""]


def secure_server(socket: zmq.Socket[Any], identity: Identity) -> None:
    """Let only authenticated peers connect to `socket`, which must not be bound yet.

    Raises MachineError if this libzmq cannot be kept closed.
    """
    assert not socket.get(zmq.LAST_ENDPOINT), "security set after bind has no effect"
    socket.curve_server = True
    socket.curve_publickey = identity.public
    socket.curve_secretkey = identity.secret
    socket.zap_domain = ZAP_DOMAIN
    try:
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    except zmq.ZMQError:
        raise MachineError(
            f"libzmq {zmq.zmq_version()} was built without ZMQ_ZAP_ENFORCE_DOMAIN and would let "
            "unknown keys in; install the pyzmq wheel from PyPI, which brings its own libzmq"
        ) from None
    _set_hygiene(socket)


def secure_client(
    socket: zmq.Socket[Any], *, public: bytes, secret: bytes, server_public: bytes
) -> None:
    """Encrypt `socket`, not connected yet, towards the one server with the key `server_public`."""
    assert not socket.get(zmq.LAST_ENDPOINT), "security set after connect has no effect"
    socket.curve_publickey = public
    socket.curve_secretkey = secret
    socket.curve_serverkey = server_public
    _set_hygiene(socket)


def self_test(
    context: zmq.Context[Any],
    endpoint: str,
    server_public: bytes,
    timeout_s: float,
    socket_type: int = zmq.DEALER,
) -> None:
    """Show that the server bound to `endpoint` of this process refuses a fresh random key.

    `socket_type` is one that may talk to the server's: another is cut off before the key is looked
    at. Takes about 2 ms. The server's own loop need not run yet. Raises MachineError if the key is
    let in, or if nobody refuses it within `timeout_s`.
    """
    public, secret = zmq.curve_keypair()
    # A shadow, because the monitor of an asyncio socket would be an asyncio socket.
    probe = zmq.Context(context).socket(socket_type)
    secure_client(probe, public=public, secret=secret, server_public=server_public)
    probe.setsockopt(zmq.RECONNECT_IVL, -1)
    monitor = probe.get_monitor_socket(SELF_TEST_EVENTS)
    try:
        probe.connect(re.sub(r"//(\*|0\.0\.0\.0):", "//127.0.0.1:", endpoint))
        event = _next_event(monitor, timeout_s)
    finally:
        probe.disable_monitor()
        monitor.close(linger=0)  # left open it would hang the context's end
        probe.close(linger=0)
    if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
        raise MachineError(
            f"{endpoint} let an unknown key in; this process must not serve: its authenticator "
            "is not in charge of that socket"
        )
    if event != zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        found = "no answer" if event is None else zmq.Event(event).name
        raise MachineError(
            f"{endpoint} did not refuse an unknown key within {timeout_s} s ({found}); is its "
            "authenticator running, and does the endpoint belong to this process?"
        )


def _next_event(monitor: zmq.Socket[bytes], timeout_s: float) -> int | None:
    deadline = time.monotonic() + timeout_s
    while (remaining_s := deadline - time.monotonic()) > 0:
        if monitor.poll(int(remaining_s * 1000) + 1):
            return int(parse_monitor_message(monitor.recv_multipart())["event"])
    return None


def _inproc(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.linger = 0
    return socket


def _set_hygiene(socket: zmq.Socket[Any]) -> None:
    # No ZMTP heartbeats: with a full receive queue they abort the process. TCP finds dead links.
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    socket.linger = 0
