"""What one connection, and one principal, may still ask for: rates, and what it has not read yet.

Rule 1: everything that a peer can make us hold or do has a bound of its own here, and what a bound
keeps out costs next to nothing.
Rule 2: what an answer takes of the memory counts until its reader shows the receipt, and a
connection that owes one keeps its place: nobody gets rid of what he owes by connecting anew.

Pure. Time is monotonic seconds.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from metisfl.broker.sequencer import Publisher
from metisfl.deploy.bucket import Bucket
from metisfl.proto import frames
from metisfl.proto.frames import ANSWER_BYTES_MAX, FETCHES_MAX, Busy

__all__ = [
    "OUTSTANDING_ANSWERS_MAX",
    "OUTSTANDING_BYTES_MAX",
    "PUBLISHES_BURST",
    "PUBLISHES_PER_S",
    "Account",
    "Answers",
    "PublishRate",
    "Session",
]

OUTSTANDING_BYTES_MAX: Final = FETCHES_MAX * ANSWER_BYTES_MAX  # of one connection
OUTSTANDING_ANSWERS_MAX: Final = 64
PUBLISHES_PER_S: Final = 200.0  # of one learner or driver
PUBLISHES_BURST: Final = 2000.0
EVENT_BYTES: Final = 16 * 1024  # an event counts once more for each of these that it fills
REPEAT_COST: Final = 0.1  # of what is not new
SHUT_S: Final = 0.25
CONNECTS_PER_S: Final = 10.0  # of one principal
FETCHES_PER_S: Final = 1000.0  # of one connection, as all the following
HELLOS_PER_S: Final = 5.0
BEATS_PER_S: Final = 100.0
REFUSALS_PER_S: Final = 10.0
STATUSES_PER_S: Final = 5.0
REPEAT_S: Final = 0.05  # the same answer goes to the same connection at most this often


class PublishRate:
    """Lets events through at a rate. Once it is spent it stays shut until it is worth coming back.

    So a client that is told to wait sends its window again four times a second, and not for each
    event that may go.
    """

    __slots__ = ("_at", "_level", "_opens_at")

    def __init__(self, now: float) -> None:
        self._level, self._at = PUBLISHES_BURST, now
        self._opens_at = now

    def shut_s(self, now: float) -> float:
        """For how long it is shut still; 0 if it is open."""
        return max(0.0, self._opens_at - now)

    def spend(self, cost: float, now: float) -> None:
        """Something went through, which was open."""
        earned = (now - self._at) * PUBLISHES_PER_S
        self._level = min(PUBLISHES_BURST, self._level + earned) - cost
        self._at = now
        if self._level < 1:
            self._opens_at = now + max(SHUT_S, (1 - self._level) / PUBLISHES_PER_S)

    def give_back(self, cost: float) -> None:
        """What went through came to nothing, for no fault of who sent it."""
        self._level += cost

    @staticmethod
    def cost(event_bytes: int) -> int:
        """What an event counts for."""
        return 1 + event_bytes // EVENT_BYTES


class Answers:
    """What was answered on one connection and not acknowledged by a receipt yet."""

    __slots__ = ("_unread", "bytes", "waiting")

    def __init__(self) -> None:
        self.waiting = 0  # questions without an answer yet
        self.bytes = 0
        self._unread: deque[tuple[int, int]] = deque()  # receipt, bytes

    @property
    def none(self) -> bool:
        """True if nothing is waited for and nothing unread."""
        return not (self.waiting or self._unread)

    def ask(self) -> str | None:
        """Take a question; or return why it has to wait."""
        if (self.waiting + 1) * ANSWER_BYTES_MAX + self.bytes > OUTSTANDING_BYTES_MAX:
            return (
                f"{self.waiting} fetches wait on this connection and {self.bytes} bytes of answers "
                f"were not acknowledged; at most {OUTSTANDING_BYTES_MAX} bytes in all"
            )
        if self.waiting + len(self._unread) >= OUTSTANDING_ANSWERS_MAX:
            return f"{len(self._unread)} answers on this connection were not acknowledged"
        self.waiting += 1
        return None

    def answered(self, receipt: int, answer_bytes: int) -> None:
        """A question was answered, with so many bytes; with 0 if none went to the socket."""
        self.waiting = max(0, self.waiting - 1)
        if answer_bytes:
            self._unread.append((receipt, answer_bytes))
            self.bytes += answer_bytes

    def acknowledge(self, receipt: int) -> None:
        """The answer with this receipt was read, and all before it; an unknown one says nothing."""
        if any(receipt == known for known, _ in self._unread):
            known = 0
            while known != receipt:
                known, size = self._unread.popleft()
                self.bytes -= size


class Account:
    """A principal with all its connections. `gate` is None for who publishes as it likes."""

    __slots__ = ("connects", "gate", "peers", "publisher")

    def __init__(self, publisher: Publisher, limited: bool, now: float) -> None:
        self.publisher = publisher
        self.peers: deque[bytes] = deque()  # its connections, oldest first
        self.connects = Bucket(CONNECTS_PER_S, now)
        self.gate = PublishRate(now) if limited else None


class Session:
    """One connection of a principal."""

    __slots__ = (
        "account",
        "answers",
        "beats",
        "epoch",
        "fetches",
        "hellos",
        "peer",
        "publisher",
        "refusals",
        "said",
        "said_at",
        "statuses",
        "welcomed",
    )

    def __init__(self, peer: bytes, account: Account, now: float) -> None:
        self.peer, self.account, self.publisher = peer, account, account.publisher
        self.welcomed = False
        self.epoch = 0
        self.answers = Answers()
        self.beats = Bucket(BEATS_PER_S, now)
        self.fetches = Bucket(FETCHES_PER_S, now)
        self.hellos = Bucket(HELLOS_PER_S, now)
        self.refusals = Bucket(REFUSALS_PER_S, now)
        self.statuses = Bucket(STATUSES_PER_S, now)
        self.said: frames.Reply | None = None
        self.said_at = now

    def repeats(self, message: frames.Reply, now: float) -> bool:
        """True if the same was said just now, but for how long to wait; else it counts as said."""
        what = Busy(0, message.request, message.reason) if isinstance(message, Busy) else message
        if what == self.said and now - self.said_at < REPEAT_S:
            return True
        self.said, self.said_at = what, now
        return False
