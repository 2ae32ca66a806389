"""The broker: what loop.py, writer.py and store.py do, around the real Dispatch and Sequencer.

Law: nothing is published or acknowledged before its commit has come back; a crash keeps a batch
whole or not at all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, Final

from metisfl.broker.access import Subscriptions
from metisfl.broker.dispatch import Dispatch, Effect, Read, Reply
from metisfl.broker.retention import Aged, Limits, Pin, trim_to
from metisfl.broker.sequencer import Append, Batch, Recovered
from metisfl.proto.frames import FetchedBatch, Head, Header, RawRecord
from simulated.invariants import Invariants
from simulated.network import Connection, Network
from simulated.scheduler import Node, Scheduler

__all__ = ["BrokerNode", "Log"]

TICK_S: Final = 1.0
HEAD_GAP_S: Final = 0.02
NEWS_S: Final = 0.0002  # from the writer's thread to the loop's
IN_ORDER: Final = frozenset({"SayHello", "Welcome", "Ack", "Nack", "Reject"})


@dataclass
class Log:
    """What the broker's database holds."""

    records: list[tuple[Append, int]] = field(default_factory=list)  # with the time of each
    federations: dict[int, str] = field(default_factory=dict)
    topics: dict[int, tuple[str, int]] = field(default_factory=dict)
    heads: dict[int, int] = field(default_factory=dict)  # by lane id
    watermarks: dict[str, tuple[int, int]] = field(default_factory=dict)
    lanes: dict[int, list[int]] = field(default_factory=dict)  # sequences, by lane id
    cursors: dict[tuple[str, str], int] = field(default_factory=dict)  # by reader and lane
    floor: int = 0  # nobody is given what is not behind it

    def store(self, batch: Batch) -> None:
        """One transaction."""
        self.federations.update(dict(batch.federations))
        self.topics.update({id: (name, whole) for id, name, whole in batch.topics})
        for place in batch.appends:
            self.records.append((place, batch.logged_unix_ns))
            for lane in (place.topic_id, place.federation_id):
                self.heads[lane] = place.sequence
                self.lanes.setdefault(lane, []).append(place.sequence)
        for publisher, epoch, sequence in batch.watermarks:
            self.watermarks[publisher] = epoch, sequence
        self.cursors.update({(reader, lane): at for reader, lane, at in batch.cursors})

    def trim(self, keep_ns: int, now_ns: int) -> bool:
        """One slice of what is old and read by the controller; whether anything went."""
        oldest = [
            Aged(place.sequence, logged, 1) for place, logged in self.records[self.floor :][:20]
        ]
        pins = []
        for id, name in self.federations.items():
            cursor = self.cursors.get(("controller", name), 0)
            if self.heads[id] > cursor:
                unread = self.lanes[id][bisect_right(self.lanes[id], cursor)]
                pins.append(Pin(name, cursor, unread))
        to = trim_to(0, oldest, pins, Limits(keep_ns=keep_ns), now_ns)
        self.floor = max(self.floor, to)
        return to > 0

    def recovered(self) -> Recovered:
        return Recovered(
            head=len(self.records),
            federations=[(id, name, self.heads[id]) for id, name in self.federations.items()],
            topics=[(id, name, whole, self.heads[id]) for id, (name, whole) in self.topics.items()],
            watermarks=[(name, *mark) for name, mark in self.watermarks.items()],
        )

    def read_lane(self, lane: int, after: int, head: int, most: int) -> tuple[list[int], int, int]:
        """The next sequences of a lane, up to where they cover it, and what of it was trimmed."""
        sequences = self.lanes.get(lane, [])
        gone = bisect_right(sequences, self.floor)
        first, last = bisect_right(sequences, max(after, self.floor)), bisect_right(sequences, head)
        found = sequences[first : min(last, first + most)]
        lost = sequences[gone - 1] if gone else 0
        through = found[-1] if first + most < last else head
        return found, through, lost if lost > after else 0


class BrokerNode(Node):
    """One machine with a log."""

    def __init__(self, scheduler: Scheduler, network: Network, invariants: Invariants) -> None:
        super().__init__(scheduler, "broker")
        self.log = Log()
        self.full_until = 0.0  # the disk takes nothing before
        self.slow_until = 0.0
        self.keep_s: float | None = None  # how old records may become; None: as old as they like
        self.fetch_events = 256  # that it gives in one answer, as when they are big
        self._network, self._invariants = network, invariants
        self._incarnation = 0
        self._subscribers: list[Connection] = []
        self._forget()
        network.listen("ingress", self)
        network.listen("live", self)

    def boot(self) -> None:
        self._incarnation += 1
        self._dispatch = Dispatch(
            self.log.recovered(), incarnation=self._incarnation, software="simulated"
        )
        self._invariants.recovered(self.log)
        self._subscriptions = Subscriptions()
        self.later(TICK_S, self._tick)

    def died(self, *, power_cut: bool) -> None:
        if self._writing and self.scheduler.random.random() < 0.5:
            self._store(self._writing[0])  # it was on disk, only nobody was told
        self._forget()

    def _forget(self) -> None:
        self._waiting: deque[tuple[Connection, list[bytes]]] = deque()
        self._writing: deque[Batch] = deque()
        self._reads: deque[Read] = deque()
        self._routes: dict[bytes, Connection] = {}
        self._subscribers.clear()
        self._failed_generation = -1
        self._head_due = False
        self._told_head: Head | None = None
        self._receipts = 0

    # ---- In ---------------------------------------------------------------------------

    def connected(self, connection: Connection) -> None:
        if connection.kind == "ingress":
            self._routes[connection.route] = connection
        else:
            self._subscribers.append(connection)
            if self._told_head is not None:
                head = self._told_head
                connection.to_client(Head(head.incarnation, head.sequence, link_up=True))

    def subscribed(self, connection: Connection, prefix: bytes) -> None:
        if connection.cut or connection not in self._subscribers:
            return
        refusal = self._subscriptions.subscribe(connection.principal, prefix)
        assert refusal is None, refusal
        connection.prefixes.add(prefix)
        if not self._head_due:
            self._head_due = True
            self.later(HEAD_GAP_S, self._send_head)

    def received(self, connection: Connection, message: list[bytes]) -> None:
        self._waiting.append((connection, message))
        self._turn()

    def _turn(self) -> None:
        dispatch, sequencer = self._dispatch, self._dispatch.sequencer
        while self._waiting and not sequencer.full:
            connection, parts = self._waiting.popleft()
            if not dispatch.knows(connection.route):
                route, who = connection.route, connection.principal
                if not dispatch.connect(route, who, self.now, self._is_there):
                    continue
            self._perform(dispatch.handle(connection.route, parts, self.now))
        self._seal()
        while self._reads:
            self._answer(self._reads.popleft())

    def _seal(self) -> None:
        batch = self._dispatch.sequencer.seal(self.wall_ns())
        if batch is not None:
            self._writing.append(batch)
            if len(self._writing) == 1:
                self._write()

    # ---- The disk --------------------------------------------------------------------

    def _write(self) -> None:
        """Begin the oldest batch."""
        chance = self.scheduler.random.random
        takes_s = 0.001 + 0.01 * chance()
        if self.now < self.slow_until:
            takes_s += 0.5 * chance()
        self.later(takes_s, self._written)

    def _written(self) -> None:
        batch = self._writing[0]
        if batch.generation <= self._failed_generation:
            self._writing.popleft()  # numbered as if the one before it had succeeded
        else:
            self.crash_point(likelier=3)
            self._writing.popleft()
            failed = self.now < self.full_until
            if failed:
                self._failed_generation = batch.generation
            else:
                self._store(batch)
            self.later(NEWS_S, self._outcome, batch, failed)
            self.crash_point(likelier=3)
        if self._writing:
            self._write()

    def _store(self, batch: Batch) -> None:
        self.log.store(batch)
        self._invariants.logged(self.log, batch)

    def _outcome(self, batch: Batch, failed: bool) -> None:
        if failed:
            self.say("disk full", batch.number)
            self._perform(self._dispatch.failed("disk full", self.now))
        else:
            self.say("stored", batch.number, len(batch.appends), "head", len(self.log.records))
            self._perform(self._dispatch.committed(batch))
            self._publish(batch)
        self._turn()

    # ---- Out ----------------------------------------------------------------------------

    def _perform(self, effects: list[Effect]) -> None:
        # Those of one call concern different peers, or one peer in their order; the sequencer
        # holds its publishers in a set, whose order is not part of the history.
        replies = [effect for effect in effects if isinstance(effect, Reply)]
        for reply in sorted(replies, key=lambda reply: reply.peer):
            self._send(reply.peer, reply.message)
        for effect in effects:
            if isinstance(effect, Read):
                self._reads.append(effect)
            elif not isinstance(effect, Reply):
                self._broadcast(effect.beat.topic.encode(), effect.beat)

    def _is_there(self, peer: bytes) -> bool:
        connection = self._routes.get(peer)
        return connection is not None and not connection.cut

    def _send(self, peer: bytes, message: Any) -> None:
        if isinstance(message, FetchedBatch):
            self._receipts += 1
            message = replace(message, receipt=self._receipts)
        if there := self._is_there(peer):
            self._routes[peer].to_client(message, in_order=type(message).__name__ in IN_ORDER)
        if isinstance(message, FetchedBatch):
            size = 100 + sum(100 + len(record.envelope) for record in message.records)
            self._dispatch.answered(peer, message.receipt, size if there else 0)

    def _publish(self, batch: Batch) -> None:
        for place in batch.appends:
            self._broadcast(place.topic, self._record(place, batch.logged_unix_ns))

    def _record(self, place: Append, logged: int) -> RawRecord:
        header = Header(
            place.crc,
            self._incarnation,
            place.sequence,
            place.previous_in_topic,
            place.previous_in_federation,
            logged,
        )
        return RawRecord(place.topic, header, place.envelope)

    def _broadcast(self, topic: bytes, message: Any) -> None:
        for connection in list(self._subscribers):
            if connection.cut:
                self._subscribers.remove(connection)
            elif any(topic.startswith(prefix) for prefix in connection.prefixes):
                connection.to_client(message)

    def _answer(self, read: Read) -> None:
        fetch = read.fetch
        found, through, floor = self.log.read_lane(
            read.lane_id, fetch.after, read.head, min(fetch.max_events, self.fetch_events)
        )
        records = tuple(self._record(*self.log.records[number - 1]) for number in found)
        self._send(read.peer, FetchedBatch(fetch.request, read.head, through, floor, records))

    def _send_head(self) -> None:
        self._head_due = False
        self._told_head = Head(self._incarnation, self._dispatch.sequencer.durable_head)
        self._broadcast(b"hb/", self._told_head)

    def _tick(self) -> None:
        self._send_head()
        if self.keep_s is not None and self.log.trim(int(self.keep_s * 1e9), self.wall_ns()):
            self.say("trims the log to", self.log.floor)
            self._invariants.trimmed(self.log.floor)
        self._dispatch.sequencer.leftovers_due()
        self._turn()
        self.later(TICK_S, self._tick)
