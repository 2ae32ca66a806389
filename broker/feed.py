"""What a reader gets from the client: records, batches of them, and the iterator they come from.

Rule: a feed has one reader and holds nothing itself. It asks where the items are kept whenever its
reader is ready, so a slow reader slows its source down and fills no queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from metisfl.proto.envelope import parse_envelope
from metisfl.proto.errors import PeerError
from metisfl.proto.frames import RawRecord

__all__ = ["Batch", "Feed", "Record", "opened"]

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
    """

    records: tuple[Record, ...]
    through: int
    caught_up: bool


def opened(raw: RawRecord) -> Record:
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
