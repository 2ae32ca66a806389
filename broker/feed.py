"""What a reader gets from the client: records in batches, beats, and the iterators they come from.

Rule: a feed has one reader and holds nothing itself. It asks where the items are kept whenever its
reader is ready, so a slow reader slows its source down and fills no queue: a lane goes on from the
log later, and of waiting beats the oldest is dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypeVar

from metisfl.broker.lane import Lane
from metisfl.proto.envelope import parse_envelope
from metisfl.proto.errors import PeerError
from metisfl.proto.frames import (
    FETCHES_MAX,
    Beat,
    Busy,
    Fetch,
    FetchedBatch,
    Head,
    RawRecord,
    Receipt,
)

__all__ = ["Batch", "Feed", "Readers", "Record"]

BEATS_WAITING_MAX: Final = 1024
SUBSCRIPTIONS_MAX: Final = 16  # the broker's bound, of which the heads take one

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Record:
    """One event of the log. `proto.events.decode(record.type, record.payload)` is the message."""

    sequence: int
    logged_unix_ns: int
    topic: str
    publisher: str
    type: str
    correlation_id: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """The next records of a lane; apply them and move the cursor to `through` in one transaction.

    `caught_up`: the log held no more when last asked. When that comes true after the last record
    was handed on, an empty batch says so: a new reader of an empty lane gets one, too.
    `trimmed_to`: 0, or the sequence up to which records that this reader had not read are gone:
    the log was trimmed before it came to them. What is left follows, from this batch on.
    """

    records: tuple[Record, ...]
    through: int
    caught_up: bool
    trimmed_to: int = 0


def _opened(raw: RawRecord) -> Record:
    """Look into a record. Raises PeerError if the envelope is not what its frame says."""
    envelope = parse_envelope(raw.envelope)
    if envelope.topic.encode() != raw.topic:
        raise PeerError(
            f"record {raw.header.sequence} came as {raw.topic!r} but is of {envelope.topic!r}"
        )
    return Record(
        raw.header.sequence,
        raw.header.logged_unix_ns,
        envelope.topic,
        envelope.publisher,
        envelope.type,
        envelope.correlation_id,
        envelope.payload,
    )


class Feed(Generic[Item]):
    """An asynchronous iterator for one reader. It ends by raising what ended the client."""

    def __init__(self, take: Callable[[], Item | None]) -> None:
        self._take = take
        self._waiter: asyncio.Future[None] | None = None
        self._ended: BaseException | None = None

    def __aiter__(self) -> Feed[Item]:
        return self

    async def __anext__(self) -> Item:
        while True:
            if self._ended is not None:
                raise self._ended
            if (item := self._take()) is not None:
                return item
            if self._waiter is not None:
                raise ValueError("a feed has one reader")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def wake(self) -> None:
        """There may be something to take."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self, error: BaseException) -> None:
        self._ended = error
        self.wake()


class Readers:
    """All lanes and beats of one client. `on_taken` is called when a reader took something."""

    def __init__(self, on_taken: Callable[[], None]) -> None:
        self._on_taken = on_taken
        self._lanes: dict[str, tuple[Lane, Feed[Batch]]] = {}
        self._beats: dict[str, tuple[deque[Beat], Feed[Beat]]] = {}
        self._request = 0
        self._receipt = self._shown = 0

    @property
    def lanes(self) -> list[str]:
        """Names of the lanes that are read."""
        return list(self._lanes)

    def read_lane(self, name: str, cursor: int) -> Feed[Batch]:
        """Raises ValueError for a name that is no lane or is read already, or one lane too many."""
        if name in self._lanes:
            raise ValueError(f"lane {name!r} has a reader already")
        lane = Lane(name, cursor)
        self._check_number(name)
        feed: Feed[Batch] = Feed(lambda: self._take(lane))
        self._lanes[name] = (lane, feed)
        return feed

    def read_beats(self, prefix: str) -> Feed[Beat]:
        """Raises ValueError for a prefix without `/` at its end, read already, or one too many."""
        if not prefix.endswith("/") or prefix in self._beats:
            raise ValueError(f"{prefix!r} does not end in '/' or has a reader already")
        self._check_number(prefix)
        waiting: deque[Beat] = deque(maxlen=BEATS_WAITING_MAX)
        feed: Feed[Beat] = Feed(lambda: waiting.popleft() if waiting else None)
        self._beats[prefix] = (waiting, feed)
        return feed

    def live(self, item: RawRecord | Beat | Head, now: float) -> None:
        """The live socket brought this."""
        if isinstance(item, RawRecord):
            topic = item.topic.decode()
            for name in (topic, topic[: topic.find("/") + 1]):
                if name in self._lanes:
                    self._lanes[name][0].live(item)
        elif isinstance(item, Beat):
            for prefix, (waiting, feed) in self._beats.items():
                if item.topic.startswith(prefix):
                    waiting.append(item)
                    feed.wake()
        else:
            for lane, _ in self._lanes.values():
                lane.head(item, now)

    def fetched(self, answer: FetchedBatch | Busy, now: float) -> None:
        """The log answered one of `wanted`. Raises HistoryLost."""
        if isinstance(answer, FetchedBatch):
            self._receipt = answer.receipt
        for lane, _ in self._lanes.values():
            if isinstance(answer, FetchedBatch):
                lane.batch(answer)
            else:
                lane.busy(answer, now)

    def welcomed(self) -> None:
        """The connection to the log is a new one."""
        self._receipt = self._shown = 0
        for lane, _ in self._lanes.values():
            lane.welcomed()

    def wanted(self, now: float) -> Iterator[Fetch]:
        """What to ask the log for; it counts as asked.

        So few at a time that the broker never puts one off. Whoever asked has its next turn last.
        """
        waiting = sum(lane.waiting for lane, _ in self._lanes.values())
        for name, (lane, feed) in list(self._lanes.items()):
            if waiting >= FETCHES_MAX and not lane.waiting:
                continue
            waits = lane.waiting
            if fetch := lane.wanted(now, self._request + 1):
                self._request = (self._request + 1) % 2**31
                waiting += not waits
                del self._lanes[name]
                self._lanes[name] = lane, feed
                self._shown = self._receipt
                yield replace(fetch, receipt=self._receipt)

    def receipt(self) -> Receipt | None:
        """The receipt for what was answered last, if no fetch has shown it; it counts as shown."""
        if self._shown == self._receipt:
            return None
        self._shown = self._receipt
        return Receipt(self._receipt)

    def wake(self) -> None:
        """Wake the readers for whom there is something."""
        for lane, feed in self._lanes.values():
            if lane.news:
                feed.wake()

    def end(self, error: BaseException) -> None:
        """All readers get `error` from now on."""
        feeds: list[Feed[Any]] = [feed for _, feed in self._lanes.values()]
        feeds.extend(feed for _, feed in self._beats.values())
        for feed in feeds:
            feed.end(error)

    def _take(self, lane: Lane) -> Batch | None:
        if not lane.news:
            return None
        raw, through, trimmed_to = lane.take()
        self._on_taken()
        caught_up = lane.caught_up and not lane.ready
        return Batch(tuple(_opened(record) for record in raw), through, caught_up, trimmed_to)

    def _check_number(self, prefix: str) -> None:
        if len({*self._lanes, *self._beats, prefix}) >= SUBSCRIPTIONS_MAX:
            raise ValueError(f"at most {SUBSCRIPTIONS_MAX - 1} lanes and beat prefixes a client")
