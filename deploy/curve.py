"""CURVE on every socket, and the one thread that decides whose key may connect.

Rule: closed when in doubt. libzmq lets everybody in when a CURVE socket finds no authenticator, so
each server socket gets ZMQ_ZAP_ENFORCE_DOMAIN before it is bound, the authenticator runs before
any bind, and a daemon shows with `self_test` that a random key is refused before it says READY.

The authenticator answers ZAP (RFC 27) from a frozen dict: nothing of the user's runs in its thread,
so nothing can raise there and leave the federation without a doorkeeper.

Only where `--insecure` was asked for the sockets are PLAIN ones, without keys, whose clients name
their principal and are believed. No process, and no context, has both kinds.
"""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock, Thread
from types import MappingProxyType
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from metisfl.deploy.keys import Identity, check_principal
from metisfl.proto.errors import MachineError, UserError

__all__ = [
    "Authenticator",
    "Insecure",
    "Refusal",
    "guard_server",
    "let_invited_in",
    "secure_client",
    "secure_server",
    "self_test",
    "set_hygiene",
]

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
ZAP_VERSION = b"1.0"
ZAP_DOMAIN = b"metisfl"  # compared literally, on both sides: there is no wildcard
ZAP_DOMAIN_INVITED = b"metisfl-invited"  # of the one socket that has an answer for an invitation
REFUSALS_KEPT = 64
LET_IN_KEPT = 4096
HANDSHAKE_MS = 5000
_NOBODY: Mapping[bytes, str] = MappingProxyType({})
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


@dataclass(frozen=True, slots=True)
class Insecure:
    """What a server has in place of an Identity, and only if it was started with --insecure."""


class Authenticator:
    """The ZAP handler of one context, in a thread of its own.

    Its answers carry the principal as User-Id, which libzmq puts on every frame received from that
    connection: `frame.get("User-Id")`.
    """

    def __init__(
        self, context: zmq.Context[Any], peers: Mapping[bytes, str], *, insecure: bool = False
    ) -> None:
        """`peers`: public key in Z85 -> principal, as `Registry.keys` has it.

        An `insecure` one knows no keys: it takes everybody for the principal that they claim to be.
        """
        self._judge = _claimed if insecure else self._known
        self._context = zmq.Context(context)  # a shadow: plain sockets even from an asyncio context
        self._lock = Lock()
        self._refused_total = 0
        self._let_in: dict[bytes, Counter[str]] = {
            ZAP_DOMAIN: Counter(),
            ZAP_DOMAIN_INVITED: Counter(),
        }
        self._refusals: deque[Refusal] = deque(maxlen=REFUSALS_KEPT)
        self._thread: Thread | None = None
        self._stop_endpoint = f"inproc://authenticator-{id(self)}"
        self.replace(peers)

    @property
    def refused_total(self) -> int:
        """Handshakes refused since the start; a daemon's own `self_test` counts as one."""
        return self._refused_total

    def let_in(self, *, with_invited: bool = False) -> dict[str, int]:
        """How many connections of each principal were let in since the start.

        `with_invited`: by the sockets that `let_invited_in` was called for, else by the others. Of
        the principals the first 4096 are told.
        """
        with self._lock:
            return dict(self._let_in[ZAP_DOMAIN_INVITED if with_invited else ZAP_DOMAIN])

    def take_refusals(self) -> list[Refusal]:
        """Return the latest refusals (at most 64) that were not taken before, for the log."""
        with self._lock:
            taken = list(self._refusals)
            self._refusals.clear()
        return taken

    def replace(self, peers: Mapping[bytes, str], invited: Mapping[bytes, str] = _NOBODY) -> None:
        """Know exactly `peers` from the next handshake on. Open connections are not cut.

        The keys in `invited` open only a socket that `let_invited_in` was called for.
        """
        self._peers = {z85.decode(key): principal.encode() for key, principal in peers.items()}
        self._invited = {z85.decode(key): user.encode() for key, user in invited.items()}

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
        """Answer [routing id, "", version, request id, domain, address, identity, mechanism, ...].

        libzmq is the only one who asks, so a request of another form is refused like a wrong key.
        """
        principal, reason, key = b"", "not a request of this version and domain", b""
        match request:
            case [_, b"", version, _, domain, _, _, mechanism, *credentials] if (
                version == ZAP_VERSION and domain in (ZAP_DOMAIN, ZAP_DOMAIN_INVITED)
            ):
                principal, reason = self._judge(mechanism, credentials)
                key = credentials[0] if mechanism == b"CURVE" and credentials else b""
                if domain == ZAP_DOMAIN_INVITED:
                    principal = principal or self._invited.get(key, b"")
        request_id = request[3] if len(request) > 3 else b""
        head = [*request[:1], b"", ZAP_VERSION, request_id]
        if principal:
            self._note(request[4], principal.decode())
            return [*head, b"200", b"OK", principal, b""]
        address = request[5].decode(errors="replace") if len(request) > 5 else ""
        with self._lock:
            self._refused_total += 1
            public = z85.encode(key) if len(key) == 32 else b""
            self._refusals.append(Refusal(public, address, reason))
        return [*head, b"400", reason.encode(), b"", b""]

    def _note(self, domain: bytes, principal: str) -> None:
        let_in = self._let_in[domain]
        with self._lock:
            if principal in let_in or len(let_in) < LET_IN_KEPT:
                let_in[principal] += 1

    def _known(self, mechanism: bytes, credentials: list[bytes]) -> tuple[bytes, str]:
        """The principal of the key, or why it is refused."""
        if mechanism != b"CURVE" or len(credentials) != 1:
            return b"", "not a CURVE request"
        return self._peers.get(credentials[0], b""), "unknown key"


def _claimed(mechanism: bytes, credentials: list[bytes]) -> tuple[bytes, str]:
    """The principal that a PLAIN client says it is, or why that is none."""
    if mechanism != b"PLAIN" or len(credentials) != 2 or credentials[1]:
        return b"", "not a PLAIN request with an empty password"
    try:
        return check_principal(credentials[0].decode()).encode(), ""
    except (UnicodeDecodeError, UserError):
        return b"", f"{credentials[0][:80]!r} is no principal"


def secure_server(socket: zmq.Socket[Any], identity: Identity) -> None:
    """Let only authenticated peers connect to `socket`, which must not be bound yet.

    Raises MachineError if this libzmq cannot be kept closed.
    """
    assert not socket.get(zmq.LAST_ENDPOINT), "security set after bind has no effect"
    socket.curve_server = True
    socket.curve_publickey = identity.public
    socket.curve_secretkey = identity.secret
    _ask_authenticator(socket)
    set_hygiene(socket)


def guard_server(socket: zmq.Socket[Any], identity: Identity | Insecure) -> None:
    """`secure_server`; or, without keys, let everybody connect who names a principal.

    Raises MachineError.
    """
    if isinstance(identity, Identity):
        secure_server(socket, identity)
        return
    assert not socket.get(zmq.LAST_ENDPOINT), "security set after bind has no effect"
    socket.plain_server = True
    _ask_authenticator(socket)
    set_hygiene(socket)


def let_invited_in(socket: zmq.Socket[Any]) -> None:
    """Open `socket`, guarded and not bound yet, to invitations' keys as well.

    Whoever reads it has to tell them from peers by their User-Id.
    """
    assert not socket.get(zmq.LAST_ENDPOINT), "security set after bind has no effect"
    socket.zap_domain = ZAP_DOMAIN_INVITED


def _ask_authenticator(socket: zmq.Socket[Any]) -> None:
    socket.zap_domain = ZAP_DOMAIN
    try:
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    except zmq.ZMQError:
        raise MachineError(
            f"libzmq {zmq.zmq_version()} was built without ZMQ_ZAP_ENFORCE_DOMAIN and would let "
            "unknown keys in; install the pyzmq wheel from PyPI, which brings its own libzmq"
        ) from None


def secure_client(
    socket: zmq.Socket[Any], *, public: bytes, secret: bytes, server_public: bytes
) -> None:
    """Encrypt `socket`, not connected yet, towards the one server with the key `server_public`."""
    assert not socket.get(zmq.LAST_ENDPOINT), "security set after connect has no effect"
    socket.curve_publickey = public
    socket.curve_secretkey = secret
    socket.curve_serverkey = server_public
    set_hygiene(socket)


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


def set_hygiene(socket: zmq.Socket[Any]) -> None:
    """What every socket has, whatever its security: dead links are found, nothing lingers."""
    # No ZMTP heartbeats: with a full receive queue they abort the process. TCP finds dead links.
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    socket.linger = 0
