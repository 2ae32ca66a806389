"""Credit: which chunk goes next, when to ask again, and how much may be under way in all.

Rule 1: chunks are taken in order. What is behind is ignored, what is ahead means that something was
lost: the sender is told once to go back.
Rule 2: the windows of all transfers together never exceed the budget. Who is silent gives its
credit back; who waits is served in the order of waiting, so nobody waits for ever.
Rule 3: no clock in here. `now` is monotonic and in seconds.

`Sender` and `Receiver` are the two ends of one transfer, `Patience` is the asking end's,
`Allocator` the controller's for all of its transfers. Units are chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Final, Generic, TypeVar

from metisfl.proto.bulk import Credit
from metisfl.proto.chunk import CHUNK_BYTES
from metisfl.proto.errors import PeerError

__all__ = [
    "BUDGET_CHUNKS",
    "RECLAIM_S",
    "WINDOW_CHUNKS",
    "WORD_S",
    "Allocator",
    "Arrival",
    "Patience",
    "Receiver",
    "Sender",
]

BUDGET_CHUNKS: Final = (16 << 20) // CHUNK_BYTES
WINDOW_CHUNKS: Final = (8 << 20) // CHUNK_BYTES
RECLAIM_S: Final = 10.0
SILENCE_S: Final = 1.0  # twice WORD_S: a controller that is killed is missed no longer
STALL_S: Final = 8.0
WAIT_S_MAX: Final = 60.0
WORD_S: Final = 0.5
"""How often the answering end repeats its word when it has nothing else to say."""

K = TypeVar("K", bound=Hashable)


class Sender:
    """The end that has the chunks: all before `acknowledged` have arrived, `next` is to be sent."""

    __slots__ = ("acknowledged", "count", "limit", "next")

    def __init__(self, count: int) -> None:
        self.count = count
        self.restart()

    def restart(self, first: int = 0, limit: int = 0) -> None:
        """Begin at `first` under a new limit: whatever was allowed before is void."""
        self.acknowledged = self.next = min(first, self.count)
        self.limit = min(limit, self.count)

    def allow(self, credit: Credit) -> int:
        """Take the receiver's word; return how many more chunks have arrived there.

        Raises PeerError for a credit beyond the payload.
        """
        if credit.limit > self.count:
            raise PeerError(f"CREDIT up to chunk {credit.limit} of {self.count}")
        advanced = max(0, credit.first - self.acknowledged)
        self.acknowledged += advanced
        self.limit = max(self.limit, credit.limit)
        if credit.rewind and credit.first == self.acknowledged:
            self.next = self.acknowledged
        self.next = max(self.next, self.acknowledged)
        return advanced

    @property
    def ready(self) -> bool:
        """Whether chunk `next` may be sent."""
        return self.next < self.limit

    def sent(self) -> None:
        """Chunk `next` is on its way."""
        assert self.ready, f"chunk {self.next} of {self.count} beyond limit {self.limit}"
        self.next += 1


class Arrival(Enum):
    """What to do with a chunk that has come."""

    NEXT = "next"  # check it, store it, then call `taken`
    GAP = "gap"  # drop it and send the receiver's credit, which asks to go back
    IGNORED = "ignored"  # drop it: known already, beyond what was promised, or after a gap


class Receiver:
    """The end that wants the chunks: all before `received` are there.

    `limit` is what is allowed now; `promised` the highest limit that the sender may still believe
    in, since a limit that was reclaimed cannot be unsaid.
    """

    __slots__ = ("count", "gap", "limit", "promised", "received")

    def __init__(self, count: int, received: int = 0) -> None:
        self.count = count
        self.received = received
        self.limit = received
        self.promised = received
        self.gap = False

    def restart(self, eager: int = 0) -> None:
        """The sender has asked anew and begins at `received`; `eager` chunks need no credit."""
        self.limit = self.received
        self.promised = min(self.count, max(self.received, eager))
        self.gap = False

    def widen(self, chunks: int) -> None:
        """Allow so many more."""
        self.limit += chunks
        assert self.limit <= self.count, f"limit {self.limit} beyond {self.count} chunks"
        self.promised = max(self.promised, self.limit)

    def narrow(self) -> None:
        """Take back what is allowed and has not come."""
        self.limit = self.received

    def arrived(self, index: int) -> Arrival:
        """Judge a chunk by its index alone."""
        if index == self.received < self.promised:
            return Arrival.NEXT
        if not self.received < index < self.promised:
            return Arrival.IGNORED
        return self.lost()

    def lost(self) -> Arrival:
        """Chunk `received` is missing or damaged; GAP the first time only."""
        first_time, self.gap = not self.gap, True
        return Arrival.GAP if first_time else Arrival.IGNORED

    def taken(self) -> None:
        """Chunk `received` is stored."""
        self.received += 1
        self.limit = max(self.limit, self.received)
        self.gap = False

    @property
    def complete(self) -> bool:
        return self.received == self.count

    def credit(self, subject: bytes, *, rewind: bool = False) -> Credit:
        """The word to the sender."""
        return Credit(subject, self.received, self.limit, rewind)


class Patience:
    """When the asking end stops waiting and asks again on a new connection.

    Silence (no word at all) ends sooner than a stall (words, but no chunk gets through). Both waits
    double with each attempt that brings nothing and follow the pace of a link that brings chunks
    slowly, so nobody is cut off for ever.
    """

    __slots__ = ("_progress_at", "_silence_s", "_stall_s", "_word_at")

    def __init__(self, now: float) -> None:
        self._word_at = self._progress_at = now
        self._silence_s = SILENCE_S
        self._stall_s = STALL_S

    def word(self, now: float, *, progress: bool) -> None:
        """Something has come from the other end."""
        self._silence_s = min(max(SILENCE_S, 4 * (now - self._word_at)), WAIT_S_MAX)
        self._word_at = now
        if progress:
            self._stall_s = min(max(STALL_S, 4 * (now - self._progress_at)), WAIT_S_MAX)
            self._progress_at = now

    @property
    def deadline(self) -> float:
        """When to ask again. Who merely waits in line asks too, lest it be taken for dead."""
        return min(self._word_at + self._silence_s, self._progress_at + self._stall_s)

    def ask_again(self, now: float) -> None:
        """The deadline has passed: the next, longer wait begins."""
        self._silence_s = min(2 * self._silence_s, WAIT_S_MAX)
        self._stall_s = min(2 * self._stall_s, WAIT_S_MAX)
        self._word_at = self._progress_at = now


@dataclass(slots=True)
class _Member:
    wanted: int
    heard_at: float
    held: int = 0
    awake: bool = True
    queued: bool = False


class Allocator(Generic[K]):
    """Shares one budget of chunks under way among any number of transfers.

    A member's share is budget / members, from one chunk to the window. Who finds the budget spent
    waits in line until others give back.
    """

    def __init__(self, budget: int = BUDGET_CHUNKS, window: int = WINDOW_CHUNKS) -> None:
        self._budget = budget
        self._window = window
        self._free = budget
        self._awake = 0
        self._members: dict[K, _Member] = {}
        self._line: deque[K] = deque()

    @property
    def outstanding(self) -> int:
        """Chunks that all members together may have under way."""
        return self._budget - self._free

    def held(self, key: K) -> int:
        return self._members[key].held

    def join(self, key: K, wanted: int, now: float) -> None:
        """A transfer that could use `wanted` chunks begins, or begins again without credit.

        Who begins again keeps its place in the line.
        """
        if key in self._members:
            self.give_back(key, self.held(key))
            self.heard(key, now)
        else:
            self._members[key] = _Member(wanted, now)
            self._awake += 1
        self.want(key, wanted)

    def leave(self, key: K) -> None:
        """The transfer is over; unknown keys are fine."""
        if (member := self._members.pop(key, None)) is not None:
            self._free += member.held
            self._awake -= member.awake
            if member.queued:
                self._line.remove(key)

    def want(self, key: K, wanted: int) -> None:
        """The transfer could use `wanted` chunks more than it holds."""
        self._members[key].wanted = wanted
        self._stand_in_line(key)

    def give_back(self, key: K, chunks: int) -> None:
        """So many chunks have arrived; those that were reclaimed meanwhile count no more."""
        member = self._members[key]
        chunks = min(chunks, member.held)
        member.held -= chunks
        self._free += chunks

    def heard(self, key: K, now: float) -> None:
        """The peer lives. One that was silent stands in line again."""
        member = self._members[key]
        member.heard_at = now
        if not member.awake:
            member.awake = True
            self._awake += 1
            self._stand_in_line(key)

    def reclaim(self, key: K) -> int:
        """Take all credit of a silent peer, which gets none until it is heard; return how much."""
        member = self._members[key]
        taken, member.held = member.held, 0
        member.wanted += taken
        self._free += taken
        self._awake -= member.awake
        member.awake = False
        return taken

    def silent(self, now: float, silence_s: float = RECLAIM_S) -> list[K]:
        """Who has credit and was not heard for `silence_s`."""
        return [
            key
            for key, member in self._members.items()
            if member.awake and member.held and now - member.heard_at >= silence_s
        ]

    def deal(self) -> list[tuple[K, int]]:
        """Hand out what is free: who gets how many more chunks."""
        dealt = []
        share = max(1, min(self._window, self._budget // max(1, self._awake)))
        for _ in range(len(self._line)):
            if not self._free:
                break
            key = self._line.popleft()
            member = self._members[key]
            chunks = min(share - member.held, member.wanted, self._free)
            if member.awake and chunks > 0:
                member.held += chunks
                member.wanted -= chunks
                self._free -= chunks
                dealt.append((key, chunks))
            member.queued = member.awake and member.wanted > 0
            if member.queued:
                self._line.append(key)
        return dealt

    def _stand_in_line(self, key: K) -> None:
        member = self._members[key]
        if member.awake and member.wanted and not member.queued:
            member.queued = True
            self._line.append(key)
