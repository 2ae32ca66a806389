"""What a publisher knows about its outbox: sent, acknowledged, refused, and when to try again.

Rule: nothing is acknowledged by silence. A row leaves the outbox only after the broker said that it
is on disk; until then every doubt (a new connection, a nack, a pause, silence) means: send again
from the first row that is not acknowledged. The broker drops what it has already.

Pure: the owner of the socket passes what arrived and the time in, and does what it is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from metisfl.proto.errors import MachineError, PeerError, UserError
from metisfl.proto.events_pb2 import Welcome
from metisfl.proto.frames import FENCED, POISON, PROTOCOL, Ack, Busy, Nack, Reject, SayHello

__all__ = [
    "WINDOW_EVENTS",
    "EventRejected",
    "Fenced",
    "HelloWanted",
    "HistoryLost",
    "Patience",
    "Window",
]

WINDOW_EVENTS: Final = 256


class Fenced(MachineError):
    """A newer outbox of the same principal is at work; this one may not publish any more."""


class HistoryLost(MachineError):
    """Broker and client remember different pasts: one of them was restored from an old copy."""


@dataclass(frozen=True, slots=True)
class HelloWanted:
    """Effect: introduce yourself on this connection."""


@dataclass(frozen=True, slots=True)
class EventRejected:
    """Effect: tell the owner that the broker will never take this event. The stream goes on."""

    sequence: int
    reason: str


class Patience:
    """Tells when silence has lasted too long; each time in a row it waits twice as long."""

    __slots__ = ("_first_s", "_most_s", "_since", "_wait_s")

    def __init__(self, first_s: float, most_s: float, now: float) -> None:
        self._first_s, self._most_s = first_s, most_s
        self._wait_s, self._since = first_s, now

    def heard(self, now: float) -> None:
        """Somebody is there."""
        self._wait_s, self._since = self._first_s, now

    def idle(self, now: float) -> None:
        """Nothing is being waited for."""
        self._since = now

    def ended(self, now: float) -> bool:
        """True once per wait; the next wait starts then."""
        if now - self._since < self._wait_s:
            return False
        self._since, self._wait_s = now, min(2 * self._wait_s, self._most_s)
        return True


class Window:
    """`acked` <= `sent` <= `last`, and at most `WINDOW_EVENTS` between the first two.

    All three are sequence numbers of one outbox and epoch; 0 is before the first event.
    """

    def __init__(self, *, principal: str, epoch: int, acked: int, last: int, now: float) -> None:
        self.principal = principal
        self.epoch = epoch
        self.acked = acked
        self.sent = acked
        self.last = last
        self.welcomed = False
        self._paused_until = now
        self._patience = Patience(1.0, 5.0, now)

    def appended(self, last: int, now: float) -> None:
        """The outbox holds events up to `last`."""
        if self.welcomed and self.sent == self.acked:
            self._patience.idle(now)  # from now on there is something to wait for
        self.last = last

    def sendable(self, now: float) -> tuple[int, int]:
        """Return (after, count): send the `count` rows that follow the sequence `after`."""
        if not self.welcomed or now < self._paused_until:
            return self.sent, 0
        return self.sent, min(self.last, self.acked + WINDOW_EVENTS) - self.sent

    def was_sent(self, sequence: int) -> None:
        """All rows up to `sequence` are with the socket."""
        self.sent = sequence

    def reopened(self, now: float) -> None:
        """The socket is a new one: what the old one had is void."""
        self.welcomed = False
        self.sent = self.acked
        self._paused_until = now

    def must_reopen(self, now: float) -> bool:
        """True when the broker owes an answer and has been silent for too long."""
        if (self.welcomed and self.sent == self.acked) or now < self._paused_until:
            self._patience.idle(now)
        return self._patience.ended(now)

    def handle(
        self, reply: SayHello | Welcome | Ack | Nack | Reject | Busy, now: float
    ) -> HelloWanted | EventRejected | None:
        """Take a message of the broker. Raises MetisError when publishing cannot go on."""
        self._patience.heard(now)
        if isinstance(reply, Ack):
            if reply.epoch == self.epoch and self.acked < reply.sequence <= self.last:
                self.acked = reply.sequence
                self.sent = max(self.sent, self.acked)
        elif isinstance(reply, Nack):
            if reply.epoch == self.epoch:
                self._rewind(reply.expected - 1)
        elif isinstance(reply, SayHello):
            self.reopened(now)
            return HelloWanted()
        elif isinstance(reply, Busy):
            self._paused_until = now + min(reply.retry_ms, 60_000) / 1000
            self.sent = self.acked
        elif isinstance(reply, Reject):
            return self._rejected(reply)
        else:
            self._welcome(reply)
        return None

    def _rewind(self, stored: int) -> None:
        """The broker holds everything up to `stored`, not yet durably perhaps."""
        if stored < self.acked:
            raise HistoryLost(
                f"the broker expects event {stored + 1} of {self.principal}, but it acknowledged "
                f"all up to {self.acked} before: its log was lost or restored from an old copy. "
                "Restore the newest copy, or start with empty folders on both sides"
            )
        self.sent = min(stored, self.sent)

    def _welcome(self, welcome: Welcome) -> None:
        if welcome.protocol != PROTOCOL:
            raise PeerError(
                f"the broker ({welcome.software[:64]}) speaks protocol {welcome.protocol}, this "
                f"client {PROTOCOL}: install the same release on both sides"
            )
        if welcome.principal != self.principal:
            raise UserError(
                f"the broker knows this key as {welcome.principal!r}, but the outbox belongs to "
                f"{self.principal!r}: correct the key or the broker's list of peers"
            )
        stored = welcome.publisher_sequence
        if stored > self.last:
            raise HistoryLost(
                f"the broker stored events up to {stored} of {self.principal}, but this outbox "
                f"ends at {self.last}: its database was restored from an old copy. Restore the "
                "newest copy, or start with an empty folder"
            )
        self.sent = self.last  # nothing is known to be on its way, so the rewind decides alone
        self._rewind(stored)
        self.acked = stored
        self.welcomed = True

    def _rejected(self, reject: Reject) -> EventRejected | None:
        if reject.code == FENCED:
            raise Fenced(
                f"{self.principal} publishes from a newer database elsewhere ({reject.reason}): "
                "stop one of the two"
            )
        if reject.code != POISON:
            raise PeerError(f"the broker refuses {self.principal}: {reject.reason}")
        if reject.sequence <= self.acked:
            return None
        return EventRejected(reject.sequence, reject.reason)
