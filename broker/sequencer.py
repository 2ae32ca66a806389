"""The place of every event in the log, and what of it is on disk.

Rule: each number has two values, the one that holds if the batches in flight succeed and the one
that the disk has. A commit makes the second follow the first; a failure makes the first go back.

Pure. Sequences start at 1; 0 stands for "none before". Batches are stored in the order in which
they were sealed, each whole or not at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, NamedTuple

from metisfl.broker.status import POISON
from metisfl.proto.topics import federation_lane

__all__ = [
    "BATCHES_IN_FLIGHT_MAX",
    "BATCH_BYTES_MAX",
    "BATCH_EVENTS_MAX",
    "Append",
    "Batch",
    "Lane",
    "Order",
    "Publisher",
    "Recovered",
    "Refused",
    "Sequencer",
]

BATCH_EVENTS_MAX: Final = 512
BATCH_BYTES_MAX: Final = 8 * 1024 * 1024
BATCHES_IN_FLIGHT_MAX: Final = 2
TOPICS_MAX: Final = 65_536


class Append(NamedTuple):
    """One event with its place in the log. A tuple, since one is made for every event."""

    sequence: int
    topic_id: int
    federation_id: int
    previous_in_topic: int
    previous_in_federation: int
    crc: int
    envelope: bytes
    topic: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """An event that will never be in the log; its publisher's watermark moves past it."""

    publisher: str
    epoch: int
    sequence: int
    reason: str
    envelope: bytes
    cause: str = POISON  # one of status.EVENT_REFUSALS


@dataclass(frozen=True, slots=True)
class Batch:
    """What goes to disk in one transaction."""

    number: int
    generation: int  # batches of one generation fail together, from the first that fails on
    logged_unix_ns: int
    appends: Sequence[Append]
    refused: Sequence[Refused]
    watermarks: Sequence[tuple[str, int, int]]  # publisher, epoch, sequence
    federations: Sequence[tuple[int, str]]  # new ones: id, name
    topics: Sequence[tuple[int, str, int]]  # new ones: id, topic, federation's id
    cursors: Sequence[tuple[str, str, int]]  # reader, lane, sequence


@dataclass(frozen=True, slots=True)
class Recovered:
    """What the disk says at the start."""

    head: int = 0
    federations: Sequence[tuple[int, str, int]] = ()  # id, name, head
    topics: Sequence[tuple[int, str, int, int]] = ()  # id, topic, federation's id, head
    watermarks: Sequence[tuple[str, int, int]] = ()  # publisher, epoch, sequence


class Order(Enum):
    """Where an event stands in its publisher's own order."""

    NEXT = auto()
    DUPLICATE = auto()
    GAP = auto()
    FENCED = auto()


class Lane:
    """A topic, or a federation: what has an order of its own within the log."""

    __slots__ = ("durable", "federation", "head", "id", "name", "stored", "wire")

    def __init__(
        self, id: int, name: str, federation: Lane | None, *, head: int = 0, stored: bool = False
    ) -> None:
        self.id, self.name, self.wire = id, name, name.encode()
        self.federation = federation  # None for a federation
        self.head = self.durable = head
        self.stored = stored


class Publisher:
    """A principal's watermark: everything up to `last` of `epoch` has its place or was refused."""

    __slots__ = ("durable", "durable_epoch", "epoch", "last", "name", "topics")

    def __init__(self, name: str, epoch: int = 0, last: int = 0) -> None:
        self.name = name
        self.epoch = self.durable_epoch = epoch
        self.last = self.durable = last
        self.topics: dict[str, Lane] = {}  # those that it has published to

    def expected(self, epoch: int) -> int:
        """The next sequence of `epoch`, which is not an older one."""
        return self.last + 1 if epoch == self.epoch else 1

    def stored(self, epoch: int) -> int:
        """The last sequence of `epoch` that is on disk."""
        return self.durable if epoch == self.durable_epoch else 0

    @property
    def undecided(self) -> int:
        """How many of its events have a place or were refused, but are not on disk yet."""
        return self.last - self.stored(self.epoch)


@dataclass(frozen=True, slots=True)
class _InFlight:
    batch: Batch
    head: int
    watermarks: list[tuple[Publisher, int, int]]
    lanes: list[tuple[Lane, int]]


class Sequencer:
    """`order` first; then, for what is next, `append` or `refuse`."""

    def __init__(self, recovered: Recovered) -> None:
        self.durable_head = self._head = recovered.head
        self._publishers = {
            name: Publisher(name, epoch, last) for name, epoch, last in recovered.watermarks
        }
        self._lanes = {
            name: Lane(id, name, None, head=head, stored=True)
            for id, name, head in recovered.federations
        }
        by_id = {lane.id: lane for lane in self._lanes.values()}
        for id, name, federation, head in recovered.topics:
            self._lanes[name] = Lane(id, name, by_id[federation], head=head, stored=True)
        self._next_lane = 1 + max((lane.id for lane in self._lanes.values()), default=0)
        self._number = self._generation = 0
        self._in_flight: deque[_InFlight] = deque()
        self._cursors: dict[tuple[str, str], int] = {}
        self._leftovers_due = False
        self._clear()

    @property
    def full(self) -> bool:
        """True when no more should be taken in before a batch was sealed."""
        events = len(self._appends) + len(self._refused)
        return events >= BATCH_EVENTS_MAX or self._bytes >= BATCH_BYTES_MAX

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def undecided(self) -> int:
        """Events that have a place, but are not on disk yet."""
        return self._head - self.durable_head

    def publisher(self, name: str) -> Publisher:
        found = self._publishers.get(name)
        if found is None:
            found = self._publishers[name] = Publisher(name)
        return found

    def lane(self, name: str) -> Lane | None:
        """The topic or federation lane of that name, if there was ever an event in it."""
        return self._lanes.get(name)

    def federations(self) -> list[str]:
        """The names of those that there were ever events of."""
        lanes = self._lanes.values()
        return [lane.name.rstrip("/") for lane in lanes if lane.federation is None]

    def close_topics(self) -> None:
        """Let every publisher's next event under a topic be judged again."""
        for publisher in self._publishers.values():
            publisher.topics.clear()

    def order(self, publisher: Publisher, epoch: int, sequence: int) -> Order:
        """Tell what an event is; one that is next in a newer epoch fences the older."""
        if epoch != publisher.epoch:
            if epoch < publisher.epoch:
                return Order.FENCED
            if sequence != 1:
                return Order.GAP
            publisher.epoch, publisher.last = epoch, 0
            return Order.NEXT
        if sequence == publisher.last + 1:
            return Order.NEXT
        return Order.DUPLICATE if sequence <= publisher.last else Order.GAP

    def open_topic(self, publisher: Publisher, topic: str, federation: str) -> str | None:
        """Let `publisher` append to `topic`, which was checked. Returns why it cannot, or None."""
        lane = self._lanes.get(topic)
        if lane is None:
            if len(self._lanes) >= TOPICS_MAX:
                return f"the log has {len(self._lanes)} topics; at most {TOPICS_MAX}"
            whole = self._lanes.get(federation_lane(federation))
            if whole is None:
                whole = self._new_lane(federation_lane(federation), None)
            lane = self._new_lane(topic, whole)
        publisher.topics[topic] = lane
        return None

    def append(self, publisher: Publisher, topic: Lane, crc: int, envelope: bytes) -> None:
        """Give the publisher's next event the next place. `topic` is one of publisher.topics."""
        federation = topic.federation
        assert federation is not None, topic.name
        publisher.last += 1
        self._head = head = self._head + 1
        self._appends.append(
            Append(
                head,
                topic.id,
                federation.id,
                topic.head,
                federation.head,
                crc,
                envelope,
                topic.wire,
            )
        )
        topic.head = federation.head = head
        self._touched_publishers.add(publisher)
        self._touched_lanes.add(topic)
        self._bytes += len(envelope)

    def refuse(
        self, publisher: Publisher, reason: str, envelope: bytes, cause: str = POISON
    ) -> None:
        """Put the publisher's next event aside for good, with the next batch."""
        publisher.last += 1
        self._refused.append(
            Refused(publisher.name, publisher.epoch, publisher.last, reason, envelope, cause)
        )
        self._touched_publishers.add(publisher)
        self._bytes += len(envelope)

    def report(self, reader: str, lane: str, cursor: int) -> None:
        """Note how far a reader is. It waits for a batch, or for `leftovers_due`."""
        self._cursors[reader, lane] = cursor

    def leftovers_due(self) -> None:
        """Let cursors and refused events go to disk even if there is no event to go with."""
        self._leftovers_due = bool(self._cursors or self._refused)

    def seal(self, unix_ns: int) -> Batch | None:
        """Return the next batch to store, if it should be stored now.

        What arrives while one batch is being stored makes up the next one, so the second place in
        flight is for a full batch only. Refused events make no batch of their own until they are
        due: who sends nothing else does not get to say how often the disk is waited for.
        """
        if not (self._appends or self._leftovers_due or self.full):
            return None
        if self._in_flight and (len(self._in_flight) >= BATCHES_IN_FLIGHT_MAX or not self.full):
            return None
        lanes = self._touched_lanes
        federations = {lane.federation for lane in lanes if lane.federation is not None}
        self._number += 1
        batch = Batch(
            number=self._number,
            generation=self._generation,
            logged_unix_ns=unix_ns,
            appends=self._appends,
            refused=self._refused,
            watermarks=[(p.name, p.epoch, p.last) for p in self._touched_publishers],
            federations=[(lane.id, lane.name) for lane in federations if not lane.stored],
            topics=[
                (lane.id, lane.name, lane.federation.id)
                for lane in lanes
                if lane.federation is not None and not lane.stored
            ],
            cursors=[(*key, cursor) for key, cursor in self._cursors.items()],
        )
        self._in_flight.append(
            _InFlight(
                batch,
                self._head,
                [(p, p.epoch, p.last) for p in self._touched_publishers],
                [(lane, lane.head) for lane in (*lanes, *federations)],
            )
        )
        self._cursors = {}
        self._clear()
        return batch

    def committed(self, batch: Batch) -> list[Publisher]:
        """The oldest batch in flight is on disk. Returns the publishers whose watermarks moved."""
        done = self._in_flight.popleft()
        assert done.batch is batch, f"batch {batch.number} out of order"
        self.durable_head = done.head
        for lane, head in done.lanes:
            lane.durable, lane.stored = head, True
        for publisher, epoch, last in done.watermarks:
            publisher.durable_epoch, publisher.durable = epoch, last
        return [publisher for publisher, _, _ in done.watermarks]

    def failed(self) -> list[Publisher]:
        """The oldest batch in flight cannot be stored: forget it and all that came after it.

        Returns the publishers that must send again. Cursors are kept: nobody reports them twice.
        """
        for entry in reversed(self._in_flight):
            for reader, lane_name, cursor in entry.batch.cursors:
                self._cursors.setdefault((reader, lane_name), cursor)
        waiting = {p for entry in self._in_flight for p, _, _ in entry.watermarks}
        waiting |= self._touched_publishers
        self._in_flight.clear()
        self._generation += 1
        self._head = self.durable_head
        for lane in self._lanes.values():
            lane.head = lane.durable
        for publisher in self._publishers.values():
            publisher.epoch, publisher.last = publisher.durable_epoch, publisher.durable
        self._clear()
        return sorted(waiting, key=lambda publisher: publisher.name)

    def _new_lane(self, name: str, federation: Lane | None) -> Lane:
        lane = self._lanes[name] = Lane(self._next_lane, name, federation)
        self._next_lane += 1
        return lane

    def _clear(self) -> None:
        self._appends: list[Append] = []
        self._refused: list[Refused] = []
        self._touched_publishers: set[Publisher] = set()
        self._touched_lanes: set[Lane] = set()
        self._bytes = 0
        self._leftovers_due = False
