"""Whom an attack is aimed at and by what name, for how long it goes on, and what came of it.

Rule: an attack is a function of a target, an end and a tally. It goes on until the end, whatever is
done to it, and counts what the other side did.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from metisfl.broker.credentials import Claim, ClientKeys, Credentials
from metisfl.deploy.key_lists import load_servers
from metisfl.deploy.keys import Identity, load_identity

WAIT_MS: Final = 200
FILES: Final = 65_536
HANDSHAKES: Final = {
    zmq.EVENT_HANDSHAKE_SUCCEEDED: "let in",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "refused",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "refused",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "cut off",
    zmq.EVENT_DISCONNECTED: "cut off",
}

Socket = zmq.Socket[bytes]


class End:
    """When to stop: at a deadline, or when told to."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._told = Event()

    def tell(self) -> None:
        self._told.set()

    @property
    def come(self) -> bool:
        return self._told.is_set() or time.monotonic() >= self._deadline

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until the end; return whether that has come."""
        left = max(0.0, min(seconds, self._deadline - time.monotonic()))
        return self._told.wait(left) or self.come


class Tally:
    """What came of one attack."""

    def __init__(self) -> None:
        self._lock, self._counts = Lock(), Counter[str]()
        self.said: dict[str, str] = {}
        """The last answer of each kind in words, for people."""

    def __call__(self, what: str, times: int = 1) -> None:
        with self._lock:
            self._counts[what] += times

    @property
    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(sorted(self._counts.items()))


@dataclass(frozen=True, slots=True)
class Target:
    """A federation, and who the attacker is there. Without `home` it has no key."""

    ingress: str
    live: str
    bulk: str
    federation: str
    principal: str
    home: Path | None
    insecure: bool

    @property
    def name(self) -> str:
        return self.principal.partition(":")[2]

    @property
    def doors(self) -> tuple[tuple[str, int, str], ...]:
        """Each endpoint, the kind of socket that talks to it, and whose it is."""
        return (
            (self.ingress, zmq.DEALER, "broker"),
            (self.live, zmq.SUB, "broker"),
            (self.bulk, zmq.DEALER, "controller"),
        )

    def identity(self) -> Identity:
        assert self.home is not None, "--home DIR is missing: the folder with the attacker's keys"
        return load_identity(self.home / "keys")

    def server(self, whose: str) -> bytes:
        assert self.home is not None, "--home DIR is missing: the folder with the attacker's keys"
        return load_servers(self.home / "keys", whose)[whose]

    def credentials(self, whose: str) -> Credentials:
        """The attacker's own, towards broker or controller; a bare claim if it has no key."""
        if self.insecure or self.home is None:
            return Claim(self.principal)
        identity = self.identity()
        return ClientKeys(identity.public, identity.secret, self.server(whose))


Attack = Callable[[Target, End, Tally], None]


@contextmanager
def dealer(target: Target, endpoint: str, whose: str) -> Iterator[Socket]:
    """A connection of the attacker's own to ingress or bulk."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        target.credentials(whose).put_on(socket)
        socket.connect(endpoint)
        yield socket


def sent(socket: Socket, parts: list[Any], wait_ms: int = WAIT_MS) -> bool:
    """Send it; False if the other side takes no more for a while."""
    try:
        socket.send_multipart(parts, zmq.NOBLOCK)
    except zmq.Again:
        return bool(socket.poll(wait_ms, zmq.POLLOUT)) and sent(socket, parts, 0)
    return True


def answers(socket: Socket, wait_ms: int = 0) -> Iterator[list[bytes]]:
    """All that has come, waiting so long for the first."""
    while socket.poll(wait_ms):
        wait_ms = 0
        yield socket.recv_multipart()


def knock(kind: int, endpoint: str, put_on: Callable[[Socket], None]) -> str:
    """Try one handshake and say what came of it."""
    with zmq.Context() as context, context.socket(kind) as socket:
        socket.linger = 0
        put_on(socket)
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        monitor = socket.get_monitor_socket(sum(HANDSHAKES))
        try:
            socket.connect(endpoint)
            if not monitor.poll(10 * WAIT_MS):
                return "no answer"
            event = parse_monitor_message(monitor.recv_multipart())["event"]
            return HANDSHAKES[zmq.Event(event)]
        finally:
            socket.disable_monitor()
            monitor.close(linger=0)


def address(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def take_many_files() -> int:
    """Let this process, and those that it starts, have many files open; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(soft, most)
