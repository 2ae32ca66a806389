"""Who connects and does not get in: counted, and named by address.

libzmq asks the authenticator about keys only. Whoever comes without one is cut off in silence:
garbage, half a greeting, a frame of 1 GiB that is announced, a connection that says nothing for
5 s. A socket's monitor is what tells of them.

Rule 1: nobody is named who got in. libzmq does not say which connection a success belongs to: where
that is not clear, a connection that ends without a word of its failure is not counted.
Rule 2: a flood costs bounded memory. A monitor that is behind is begun anew, and what it had is
dropped: left to itself it would fill the memory, and with a limit stop the whole socket.
"""

from __future__ import annotations

import errno
import itertools
import socket as sockets
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import zmq

__all__ = ["OTHERS", "UNKNOWN", "Handshakes", "Monitors"]

ACCEPTED: Final = int(zmq.EVENT_ACCEPTED)
SUCCEEDED: Final = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
DISCONNECTED: Final = int(zmq.EVENT_DISCONNECTED)
FAILED: Final = (
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL),
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL),
)
REFUSED: Final = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)  # the authenticator tells of those itself
EVENTS: Final = ACCEPTED | SUCCEEDED | DISCONNECTED | sum(FAILED) | REFUSED
EVENTS_PER_TURN: Final = 1024
YOUNG_S: Final = 6.0  # a handshake has failed by then, or it never will
YOUNG_MAX: Final = 4096
ADDRESSES_TOLD_MAX: Final = 16
UNKNOWN: Final = "an address that was gone at once"
OTHERS: Final = "other addresses"

_numbers = itertools.count()

Event = tuple[int, int]
"""What libzmq's monitor tells: the event, and a value whose meaning depends on it."""


@dataclass(slots=True)
class _Young:
    address: str
    since_s: float
    maybe_in: bool = False


class Handshakes:
    """What became of the connections of one socket. Pure but for the `address_of` it is given."""

    def __init__(self) -> None:
        self.failed = 0
        """Connections that ended before they were let in."""
        self._young: dict[int, _Young] = {}
        self._failing = self._refusing = False
        self._untold: Counter[str] = Counter()

    def take(self, events: Iterable[Event], address_of: Callable[[int], str], now_s: float) -> None:
        """Take what has happened, in its order. `address_of`: of a file descriptor, or UNKNOWN."""
        events = list(events)
        newest = {fd: at for at, (event, fd) in enumerate(events) if event == ACCEPTED}
        for at, (event, value) in enumerate(events):
            if event == ACCEPTED:
                # A number that was given out again by now is another connection's.
                address = address_of(value) if newest[value] == at else UNKNOWN
                self._accepted(value, address, now_s)
            elif event in FAILED:
                self._failing = True
            elif event == REFUSED:
                self._refusing = True
            elif event == SUCCEEDED:
                self._succeeded(now_s)
            elif event == DISCONNECTED:
                self._ended(value, now_s)

    def told(self) -> list[tuple[str, int]]:
        """Who failed since the last time, and how often; at most 17."""
        others = self._untold.total()
        del self._untold[OTHERS]
        told = self._untold.most_common(ADDRESSES_TOLD_MAX)
        others -= sum(times for _, times in told)
        if others:
            told.append((OTHERS, others))
        self._untold.clear()
        return told

    def missed(self) -> None:
        """Events were dropped: what belongs together is not known any more."""
        self._young.clear()
        self._failing = self._refusing = False

    def _accepted(self, fd: int, address: str, now_s: float) -> None:
        self._young.pop(fd, None)
        if len(self._young) >= YOUNG_MAX:
            del self._young[next(iter(self._young))]
        self._young[fd] = _Young(address, now_s)

    def _succeeded(self, now_s: float) -> None:
        self._grow_up(now_s)
        if len(self._young) == 1:
            self._young.clear()
        for one in self._young.values():
            one.maybe_in = True

    def _ended(self, fd: int, now_s: float) -> None:
        self._grow_up(now_s)
        one = self._young.pop(fd, None)
        failing, refusing = self._failing, self._refusing
        self._failing = self._refusing = False
        if failing or (one is not None and not refusing and not one.maybe_in):
            self._count(UNKNOWN if one is None else one.address)

    def _grow_up(self, now_s: float) -> None:
        while self._young:
            fd, one = next(iter(self._young.items()))
            if now_s - one.since_s < YOUNG_S:
                return
            del self._young[fd]

    def _count(self, address: str) -> None:
        self.failed += 1
        if address in self._untold or len(self._untold) < YOUNG_MAX:
            self._untold[address] += 1
        else:
            self._untold[OTHERS] += 1


class Monitors:
    """Tell what became of the connections of some sockets, to whose thread they belong.

    `close` them before the sockets. What was not told yet is kept.
    """

    def __init__(self, poller: zmq.Poller) -> None:
        self._poller = poller
        self._all: list[_Monitor] = []
        self._untold: Counter[str] = Counter()

    def open(self, *sockets: zmq.Socket[bytes]) -> None:
        """Listen to these, which are bound and have no other monitor; the poller wakes for it."""
        self._all = [_Monitor(one, self._poller, Handshakes()) for one in sockets]

    def drain(self, ready: Mapping[object, int], now_s: float) -> None:
        """Take what there is to tell, up to a bound; `ready` is what the poller has found."""
        for one in self._all:
            if one.pair in ready:
                one.drain(now_s)
            elif one.pair is None:
                one.renew()

    def told(self) -> list[tuple[str, int]]:
        """Who failed since the last time, and how often; call it about once a second."""
        for one in self._all:
            self._untold.update(dict(one.to.told()))
        told = list(self._untold.items())
        self._untold.clear()
        return told

    def close(self) -> None:
        """Let go of the sockets, which can then be closed or have other monitors."""
        for one in self._all:
            one.close()
            self._untold.update(dict(one.to.told()))
        self._all.clear()


class _Monitor:
    """One socket's monitor, and what it has told."""

    def __init__(self, socket: zmq.Socket[bytes], poller: zmq.Poller, to: Handshakes) -> None:
        self._socket, self._poller, self.to = socket, poller, to
        self._port = int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self.pair: zmq.Socket[bytes] | None = None
        self._open()

    def drain(self, now_s: float) -> None:
        assert self.pair is not None, "there is nothing to drain"
        events: list[Event] = []
        with suppress(zmq.Again):
            while len(events) < EVENTS_PER_TURN:
                events.append(struct.unpack("=HI", self.pair.recv_multipart(zmq.NOBLOCK)[0]))
        self.to.take(events, self._address_of, now_s)
        if len(events) == EVENTS_PER_TURN:
            self.renew()

    def renew(self) -> None:
        """Begin anew, without what was not heard; later, if no file can be opened now."""
        self.close()
        self.to.missed()
        try:
            self._open()
        except zmq.ZMQError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise

    def close(self) -> None:
        if self.pair is not None:
            self._poller.unregister(self.pair)
            self._socket.monitor(None, 0)
            self.pair.close(linger=0)
            self.pair = None

    def _open(self) -> None:
        pair = self._socket.context.socket(zmq.PAIR)
        pair.rcvhwm = 0  # else libzmq's thread would wait, with all connections, to be heard
        address = f"inproc://handshakes-{next(_numbers)}"
        try:
            self._socket.monitor(address, EVENTS)
        except zmq.ZMQError:
            pair.close(linger=0)
            raise
        pair.connect(address)
        self._poller.register(pair, zmq.POLLIN)
        self.pair = pair

    def _address_of(self, fd: int) -> str:
        """The other end of a connection to this socket, unless the number is another's by now."""
        try:
            with sockets.fromfd(fd, sockets.AF_INET, sockets.SOCK_STREAM) as one:
                here, there = one.getsockname(), one.getpeername()
        except OSError:
            return UNKNOWN
        ours = isinstance(here, tuple) and here[1] == self._port
        return str(there[0]) if ours else UNKNOWN
