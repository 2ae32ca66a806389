"""What the broker decides about each message: which place an event gets, and who is told what.

Laws, whatever arrives and in whatever order:
1. The log holds each publisher's events of an epoch in their order, without holes, each once.
2. Nothing is acknowledged, and nobody reads it, before its batch is on disk.
3. A name is worth what its key is: an event that names another publisher changes nothing.
4. One bad event never blocks the ones behind it; a damaged one is never mistaken for one.
5. If a batch cannot be stored, the state is what the disk says, and publishers send again.

Pure: the shell passes messages and the time in, performs the effects, and stores sealed batches one
after the other. Time is monotonic seconds. A peer is a connection, named by its routing id.
"""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Final

from metisfl.broker import status
from metisfl.broker.access import may_ask_status, may_publish, may_read
from metisfl.broker.sequencer import Batch, Order, Publisher, Recovered, Sequencer
from metisfl.proto import frames
from metisfl.proto.envelope import envelope_fault, parse_envelope, topic_fault
from metisfl.proto.errors import PeerError
from metisfl.proto.events_pb2 import Envelope, Hello, Welcome
from metisfl.proto.frames import (
    FENCED,
    POISON,
    REFUSED,
    Ack,
    Beat,
    Busy,
    CursorReport,
    Fetch,
    FetchedBatch,
    Nack,
    Reject,
    SayHello,
    StatusRequest,
)
from metisfl.proto.topics import TRANSIENT_KINDS, parse_topic

__all__ = ["Dispatch", "Effect", "Forward", "Read", "Reply", "TellStatus"]

SESSIONS_MAX: Final = 8  # connections of one principal
FETCHES_MAX: Final = 4  # waiting, of one connection
BEATS_PER_S: Final = 100.0
REFUSALS_PER_S: Final = 10.0
STATUSES_PER_S: Final = 5.0
REPEAT_S: Final = 0.05  # the same answer goes to the same connection at most this often
RETRY_MS: Final = 250


@dataclass(frozen=True, slots=True)
class Reply:
    """Effect: send this to `peer`; what cannot be sent at once is dropped, it will ask again."""

    peer: bytes
    message: frames.Reply


@dataclass(frozen=True, slots=True)
class Read:
    """Effect: read the lane from the log, answer, and call `answered`."""

    peer: bytes
    fetch: Fetch
    of_federation: bool
    lane_id: int
    lane_head: int  # the lane's newest record on disk
    head: int  # the log's


@dataclass(frozen=True, slots=True)
class Forward:
    """Effect: publish this on the live socket now; it is not stored."""

    beat: Beat


@dataclass(frozen=True, slots=True)
class TellStatus:
    """Effect: tell `peer` how the broker is."""

    peer: bytes


Effect = Reply | Read | Forward | TellStatus


class _Bucket:
    """At most `per_s` a second, in bursts of up to twice that."""

    __slots__ = ("_at", "_level", "_per_s")

    def __init__(self, per_s: float, now: float) -> None:
        self._per_s, self._level, self._at = per_s, 2 * per_s, now

    def take(self, now: float) -> bool:
        self._level = min(2 * self._per_s, self._level + (now - self._at) * self._per_s)
        self._at = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


class _Session:
    """One connection of a principal."""

    __slots__ = (
        "beats",
        "epoch",
        "fetches",
        "peer",
        "publisher",
        "refusals",
        "said",
        "said_at",
        "statuses",
        "welcomed",
    )

    def __init__(self, peer: bytes, publisher: Publisher, now: float) -> None:
        self.peer, self.publisher = peer, publisher
        self.welcomed = False
        self.epoch = 0
        self.fetches = 0
        self.beats = _Bucket(BEATS_PER_S, now)
        self.refusals = _Bucket(REFUSALS_PER_S, now)
        self.statuses = _Bucket(STATUSES_PER_S, now)
        self.said: frames.Reply | None = None
        self.said_at = now

    def say(self, message: frames.Reply, now: float) -> list[Effect]:
        """Say it, unless the same was said just now."""
        if message == self.said and now - self.said_at < REPEAT_S:
            return []
        self.said, self.said_at = message, now
        return [Reply(self.peer, message)]


class Dispatch:
    """State of the ingress. `sequencer` holds what becomes of the events.

    `stored` and `refused` count them since the start, the refused by one of `status.REFUSALS`.
    """

    def __init__(self, recovered: Recovered, *, incarnation: int, software: str) -> None:
        self.sequencer = Sequencer(recovered)
        self._incarnation, self._software = incarnation, software
        self._sessions: dict[bytes, _Session] = {}
        self._of: dict[str, deque[bytes]] = {}  # principal -> its connections, oldest first
        self._speaking: dict[str, _Session] = {}  # publisher -> the connection it last used
        self._listed: frozenset[str] | None = None
        self._blocked_until = float("-inf")
        self._blocked_reason = self._blocked_cause = ""
        self.stored = 0
        self.refused: Counter[str] = Counter(dict.fromkeys(status.REFUSALS, 0))

    # ---- Connections ----------------------------------------------------------------

    def knows(self, peer: bytes) -> bool:
        return peer in self._sessions

    def allows(self, principal: str) -> bool:
        """False for who was let in once and is not listed any more."""
        return self._listed is None or principal in self._listed

    def connect(self, peer: bytes, principal: str, now: float) -> None:
        """A new connection of a principal that is allowed; of more than 8 the oldest is dropped."""
        peers = self._of.setdefault(principal, deque())
        if len(peers) >= SESSIONS_MAX:
            del self._sessions[peers.popleft()]
        peers.append(peer)
        self._sessions[peer] = _Session(peer, self.sequencer.publisher(principal), now)

    def connections(self) -> dict[str, int]:
        """How many connections of each principal are known."""
        return {principal: len(peers) for principal, peers in self._of.items()}

    def keep_only(self, principals: Set[str]) -> None:
        """Take nothing from anybody else from now on."""
        self._listed = frozenset(principals)
        for principal in [name for name in self._of if name not in principals]:
            for peer in self._of.pop(principal):
                del self._sessions[peer]
            self._speaking.pop(principal, None)

    # ---- Messages ---------------------------------------------------------------------

    def handle(self, peer: bytes, parts: Sequence[bytes], now: float) -> list[Effect]:
        """Take one message of a known connection. Never raises for what a peer sends."""
        session = self._sessions[peer]
        try:
            if not session.welcomed and parts[:1] != [frames.HELLO]:
                return session.say(SayHello(), now)
            if parts[0] == frames.PUBLISH:
                return self._publish(session, parts, now)
            request = frames.parse_request(parts)
            if isinstance(request, Fetch):
                return self._fetch(session, request, now)
            if isinstance(request, Beat):
                return self._beat(session, request, now)
            if isinstance(request, CursorReport):
                return self._cursor(session, request)
            if isinstance(request, StatusRequest):
                return self._status(session, now)
            return self._hello(session, request)
        except PeerError as error:
            if parts[0] == frames.PUBLISH:
                self.refused[status.INVALID] += 1
            if not session.refusals.take(now):
                return []
            return [Reply(peer, Reject(REFUSED, 0, str(error)))]

    def _hello(self, session: _Session, hello: Hello) -> list[Effect]:
        publisher = session.publisher
        if hello.protocol != frames.PROTOCOL:
            raise PeerError(
                f"protocol {hello.protocol} of {hello.software[:64]!r} is not spoken here; "
                f"{self._software} speaks {frames.PROTOCOL}"
            )
        session.welcomed, session.epoch = True, hello.epoch
        self._speaking[publisher.name] = session
        welcome = Welcome(
            protocol=frames.PROTOCOL,
            software=self._software,
            incarnation=self._incarnation,
            head=self.sequencer.durable_head,
            publisher_sequence=publisher.stored(hello.epoch),
            principal=publisher.name,
        )
        effects: list[Effect] = [Reply(session.peer, welcome)]
        if 0 < hello.epoch < publisher.epoch:
            effects.append(Reply(session.peer, self._fenced(publisher, hello.epoch, 0)))
        return effects

    def _publish(self, session: _Session, parts: Sequence[bytes], now: float) -> list[Effect]:
        if now < self._blocked_until:
            self.refused[self._blocked_cause] += 1
            return session.say(Busy(RETRY_MS, 0, self._blocked_reason), now)
        crc, data = frames.parse_publish(parts)
        publisher = session.publisher
        if zlib.crc32(data) != crc:
            self.refused[status.DAMAGED] += 1
            expected = publisher.expected(session.epoch)
            return session.say(Nack(session.epoch, expected), now)
        envelope = parse_envelope(data)
        if envelope.publisher != publisher.name:
            raise PeerError(
                f"an event of {envelope.publisher[:80]!r} came from {publisher.name}; a principal "
                "publishes in its own name only"
            )
        epoch, sequence = envelope.epoch, envelope.sequence
        order = self.sequencer.order(publisher, epoch, sequence)
        if order is Order.NEXT:
            self._speaking[publisher.name] = session
            topic = publisher.topics.get(envelope.topic)
            fault = envelope_fault(envelope)
            if topic is None and fault is None:
                fault = self._open_topic(publisher, envelope)
                topic = publisher.topics.get(envelope.topic)
            if fault is None and topic is not None:
                self.sequencer.append(publisher, topic, crc, data)
            else:
                self.sequencer.refuse(publisher, str(fault), data)
            return []
        if order is Order.DUPLICATE:
            self._speaking[publisher.name] = session
            # What is stored is acknowledged again; what is in flight will be when it is stored.
            stored = publisher.stored(epoch)
            return session.say(Ack(epoch, stored), now) if sequence <= stored else []
        if order is Order.GAP:
            return session.say(Nack(epoch, publisher.expected(epoch)), now)
        self.refused[status.FENCED] += 1
        return session.say(self._fenced(publisher, epoch, sequence), now)

    def _open_topic(self, publisher: Publisher, envelope: Envelope) -> str | None:
        if fault := topic_fault(envelope.topic):
            return fault
        topic = parse_topic(envelope.topic)
        if not may_publish(publisher.name, topic):
            return f"{publisher.name} may not publish under {envelope.topic!r}"
        return self.sequencer.open_topic(publisher, envelope.topic, topic.federation)

    def _fenced(self, publisher: Publisher, epoch: int, sequence: int) -> Reject:
        return Reject(
            FENCED, sequence, f"epoch {epoch} is over: {publisher.name} has epoch {publisher.epoch}"
        )

    def _fetch(self, session: _Session, fetch: Fetch, now: float) -> list[Effect]:
        if not may_read(session.publisher.name, fetch.lane):
            raise PeerError(f"{session.publisher.name} may not read {fetch.lane!r}")
        head = self.sequencer.durable_head
        lane = self.sequencer.lane(fetch.lane)
        if lane is None or lane.durable <= fetch.after:
            return [Reply(session.peer, FetchedBatch(fetch.request, head, head, 0, ()))]
        if session.fetches >= FETCHES_MAX:
            reason = f"{session.fetches} fetches wait on this connection"
            return [Reply(session.peer, Busy(RETRY_MS, fetch.request, reason))]
        session.fetches += 1
        return [
            Read(session.peer, fetch, lane.federation is None, lane.id, lane.durable, head),
        ]

    def answered(self, peer: bytes) -> None:
        """A Read is done, one way or the other."""
        if session := self._sessions.get(peer):
            session.fetches -= 1

    def _beat(self, session: _Session, beat: Beat, now: float) -> list[Effect]:
        try:
            topic = parse_topic(beat.topic)
        except ValueError as error:
            raise PeerError(str(error)) from error
        if topic.kind not in TRANSIENT_KINDS or not may_publish(session.publisher.name, topic):
            raise PeerError(f"{session.publisher.name} may not send beats under {beat.topic!r}")
        return [Forward(beat)] if session.beats.take(now) else []

    def _cursor(self, session: _Session, report: CursorReport) -> list[Effect]:
        reader, known = session.publisher.name, self.sequencer.lane(report.lane)
        # One beyond the log is of a reader that has seen another past: it has not read this one.
        if (
            known
            and may_read(reader, report.lane)
            and report.sequence <= self.sequencer.durable_head
        ):
            self.sequencer.report(reader, report.lane, report.sequence)
        return []

    def _status(self, session: _Session, now: float) -> list[Effect]:
        if not may_ask_status(session.publisher.name):
            raise PeerError(f"{session.publisher.name} may not ask for the status")
        return [TellStatus(session.peer)] if session.statuses.take(now) else []

    # ---- Batches ---------------------------------------------------------------------------

    def committed(self, batch: Batch) -> list[Effect]:
        """The batch is on disk: now its events may be published, after these answers."""
        effects: list[Effect] = []
        moved = self.sequencer.committed(batch)
        self.stored += len(batch.appends)
        self.refused[status.POISON] += len(batch.refused)
        for refused in batch.refused:
            if session := self._speaking.get(refused.publisher):
                reject = Reject(POISON, refused.sequence, refused.reason)
                effects.append(Reply(session.peer, reject))
        for publisher in moved:
            if session := self._speaking.get(publisher.name):
                ack = Ack(publisher.durable_epoch, publisher.durable)
                effects.append(Reply(session.peer, ack))
        return effects

    def failed(self, reason: str, now: float, cause: str = status.FULL_DISK) -> list[Effect]:
        """The oldest batch cannot be stored; for a moment nothing more is tried."""
        self._blocked_until, self._blocked_reason = now + RETRY_MS / 1000, reason
        self._blocked_cause = cause
        self.refused[cause] += self.sequencer.undecided
        busy = Busy(RETRY_MS, 0, reason)
        speaking = (self._speaking.get(publisher.name) for publisher in self.sequencer.failed())
        return [Reply(session.peer, busy) for session in speaking if session is not None]
