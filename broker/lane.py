"""One lane at its reader: records in order, without holes, each once, from two sources.

Rule: a live record applies when its predecessor in the lane is at or before the cursor and itself
after it; everything else that the live socket says is only a hint that something may be missing,
and what is missing is fetched from the log. The cursor moves to what a fetch says it covered, also
when that holds no record of this lane. Records that were trimmed before they were read are told.

Pure: the owner of the sockets passes in what arrived and the time, and sends what `wanted` returns.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from metisfl.broker.window import HistoryLost
from metisfl.proto.frames import (
    FETCH_EVENTS_MAX,
    Busy,
    Fetch,
    FetchedBatch,
    Head,
    RawRecord,
)
from metisfl.proto.topics import lane_of_federation

__all__ = ["Lane"]

BEHIND_S: Final = 0.5
ANSWER_S: Final = 2.0
READY_RECORDS_MAX: Final = 1024
READY_BYTES_MAX: Final = 8 * 1024 * 1024


class Lane:
    """`cursor` is the log sequence up to which everything of the lane was handed on or is `ready`.

    `caught_up` holds from when everything that the log had was handed on, until something is known
    to be missing or the connection is a new one. Raises ValueError for a name that is no lane.
    """

    def __init__(self, name: str, cursor: int) -> None:
        self.name = name
        self.cursor = cursor
        self.ready: list[RawRecord] = []
        self.caught_up = False
        self._untold = False  # that we have caught up
        self._trimmed_to = 0  # not told yet
        self._of_federation = lane_of_federation(name)
        self._ready_bytes = 0
        self._held: deque[RawRecord] = deque()
        self._held_bytes = 0
        self._incarnation = 0
        self._head = 0
        self._behind_since: float | None = None
        self._check = True  # ask the log at once
        self._unconfirmed = True  # the next head may be the first that knows our subscription
        self.waiting = False  # for an answer
        self._asked: Fetch | None = None  # its answer is welcome, however late
        self._asked_at = 0.0
        self._paused_until = 0.0

    def live(self, record: RawRecord) -> None:
        """A record of this lane came on the live socket."""
        if record.header.sequence <= self.cursor:
            return
        if self._previous(record) <= self.cursor and self._has_room():
            self._apply(record)
            return
        newest = self._held[-1].header.sequence if self._held else self.cursor
        full = (
            len(self._held) >= READY_RECORDS_MAX
            or self._held_bytes + len(record.envelope) > READY_BYTES_MAX
        )
        if not full:
            self._held.append(record)
            self._held_bytes += len(record.envelope)
        if full or self._previous(record) > newest:
            self._miss()  # the log has it

    def batch(self, batch: FetchedBatch) -> None:
        """The answer to a fetch. Raises HistoryLost if the log ends before our cursor."""
        if self._asked is None or batch.request != self._asked.request:
            return
        asked, self._asked, self.waiting = self._asked, None, False
        if batch.head < asked.after:
            raise HistoryLost(
                f"the broker's log ends at {batch.head}, but lane {self.name} was read up to "
                f"{asked.after} before: the log was lost or restored from an old copy. Restore "
                "the newest copy, or start with empty folders on both sides"
            )
        if batch.floor > self.cursor:
            self._trimmed_to = self.cursor = batch.floor
        for record in batch.records:
            if record.header.sequence > self.cursor:
                self._apply(record)
        self.cursor = max(self.cursor, batch.through)
        self._check = batch.through < batch.head
        self._release()
        if not self._check and not self.caught_up:
            self.caught_up = self._untold = True

    def head(self, head: Head, now: float) -> None:
        """The broker told how long its log is, or that the live link is up (again)."""
        known, self._incarnation = self._incarnation, head.incarnation
        if head.link_up or known not in (0, head.incarnation):
            self._head = head.sequence
            self._unconfirmed = True
            self._miss()
        else:
            self._head = max(self._head, head.sequence)
            if self._unconfirmed:
                self._unconfirmed = False
                self._check = self._check or self._head > self.cursor
        if self._head <= self.cursor:
            self._behind_since = None
        elif self._behind_since is None:
            self._behind_since = now

    def busy(self, busy: Busy, now: float) -> bool:
        """The broker answered a fetch with "not now". Returns False if it was not this lane's."""
        if self._asked is None or busy.request != self._asked.request:
            return False
        self.waiting = False
        self._check = True
        self._paused_until = now + min(busy.retry_ms, 60_000) / 1000
        return True

    def welcomed(self) -> None:
        """A new connection to the log: what was asked on the old one gets no answer."""
        self._asked, self.waiting = None, False
        self._miss()

    def wanted(self, now: float, request: int) -> Fetch | None:
        """Return what to ask the log for now, under the number `request`; it counts as asked.

        The same question keeps its number, so that a slow answer to it is still the answer.
        """
        if self.waiting:
            if now - self._asked_at < ANSWER_S:
                return None
        elif now < self._paused_until or not self._has_room():
            return None
        elif not self._check:
            if self._behind_since is None or self._head <= self.cursor:
                self._behind_since = None
                return None
            if now - self._behind_since < BEHIND_S:
                return None
        self._behind_since = None
        if self._asked is None or self._asked.after != self.cursor:
            self._asked = Fetch(request, self.cursor, FETCH_EVENTS_MAX, self.name)
        self._asked_at, self.waiting = now, True
        return self._asked

    @property
    def news(self) -> bool:
        """True if there is something to take: records, that some are gone, or that it is all."""
        return bool(self.ready or self._trimmed_to) or self._untold

    def take(self) -> tuple[list[RawRecord], int, int]:
        """Hand on what is ready, with the cursor that the reader has once it is applied.

        The third is 0, or the sequence up to which records are gone that were not read before.
        """
        taken = self.ready, self.cursor, self._trimmed_to
        self.ready, self._ready_bytes, self._untold, self._trimmed_to = [], 0, False, 0
        self._release()
        return taken

    def _previous(self, record: RawRecord) -> int:
        header = record.header
        return header.previous_in_federation if self._of_federation else header.previous_in_topic

    def _miss(self) -> None:
        self._check = True
        self.caught_up = self._untold = False

    def _has_room(self) -> bool:
        return len(self.ready) < READY_RECORDS_MAX and self._ready_bytes < READY_BYTES_MAX

    def _apply(self, record: RawRecord) -> None:
        self.ready.append(record)
        self._ready_bytes += len(record.envelope)
        self.cursor = record.header.sequence

    def _release(self) -> None:
        """Apply held records that follow the cursor; forget those that are behind it."""
        while self._held:
            record = self._held[0]
            if record.header.sequence > self.cursor:
                if not self._has_room():
                    return
                if self._previous(record) > self.cursor:
                    self._miss()
                    return
                self._apply(record)
            self._held.popleft()
            self._held_bytes -= len(record.envelope)
