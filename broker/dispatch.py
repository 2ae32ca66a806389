"""What the broker decides about each message: which place an event gets, and who is told what.

Laws, whatever arrives and in whatever order:
1. The log holds each publisher's events of an epoch in their order, without holes, each once.
2. Nothing is acknowledged, and nobody reads it, before its batch is on disk.
3. A name is worth what its key is: an event that names another publisher changes nothing.
4. One bad event never blocks the ones behind it; a damaged one is never mistaken for one.
5. If a batch cannot be stored, the state is what the disk says, and publishers send again.
6. Whatever a peer sends, what it makes us hold and do is bounded (`session.py`), and what it is
   refused is counted (`offences.py`).

Pure: the shell passes messages and the time in, performs the effects, and stores sealed batches one
after the other. Time is monotonic seconds. A peer is a connection, named by its routing id.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Final

from metisfl.broker import status
from metisfl.broker.access import is_limited, may_ask_status, may_publish, may_read
from metisfl.broker.effects import Effect, Forward, Read, Reply, TellStatus
from metisfl.broker.offences import Offence, Offences
from metisfl.broker.sequencer import Batch, Order, Publisher, Recovered, Sequencer
from metisfl.broker.session import PUBLISHES_PER_S, REPEAT_COST, Account, PublishRate, Session
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
    Receipt,
    Reject,
    SayHello,
    StatusRequest,
)
from metisfl.proto.topics import TRANSIENT_KINDS, parse_topic

__all__ = ["Dispatch", "Effect", "Forward", "Read", "Reply", "TellStatus"]

SESSIONS_MAX: Final = 8  # connections of one principal
RETRY_MS: Final = 250


class Dispatch:
    """State of the ingress. `sequencer` holds what becomes of the events.

    `stored` counts them since the start, `offences` what was refused.
    """

    def __init__(self, recovered: Recovered, *, incarnation: int, software: str) -> None:
        self.sequencer = Sequencer(recovered)
        self._incarnation, self._software = incarnation, software
        self._sessions: dict[bytes, Session] = {}
        self._accounts: dict[str, Account] = {}
        self._speaking: dict[str, Session] = {}  # publisher -> the connection it last used
        self._bounds: Mapping[str, Set[str]] = {}
        self._blocked_until = float("-inf")
        self._blocked_reason = self._blocked_cause = ""
        self.stored = 0
        self.offences = Offences()

    # ---- Connections ----------------------------------------------------------------

    def knows(self, peer: bytes) -> bool:
        return peer in self._sessions

    def connect(
        self, peer: bytes, principal: str, now: float, is_there: Callable[[bytes], bool]
    ) -> bool:
        """A new connection of a principal; False if it has to come back later.

        Of more than 8 those go that are not there any more; if all are, the oldest that owes no
        receipt. It has to say hello again.
        """
        account = self._accounts.get(principal)
        if account is None:
            publisher = self.sequencer.publisher(principal)
            account = self._accounts[principal] = Account(publisher, is_limited(principal), now)
        if not account.connects.take(now):
            self.offences.add(principal, status.CONNECTION, "it connects too often")
            return False
        if len(account.peers) >= SESSIONS_MAX:
            for ended in [known for known in account.peers if not is_there(known)]:
                self._forget(ended)
        if len(account.peers) >= SESSIONS_MAX:
            idle = (known for known in account.peers if self._sessions[known].answers.none)
            if (oldest := next(idle, None)) is None:
                reason = f"it has {SESSIONS_MAX} connections, on which all answers are unread"
                self.offences.add(principal, status.CONNECTION, reason)
                return False
            self._forget(oldest)
        account.peers.append(peer)
        self._sessions[peer] = Session(peer, account, now)
        return True

    def _forget(self, peer: bytes) -> None:
        session = self._sessions.pop(peer)
        session.account.peers.remove(peer)
        if self._speaking.get(session.publisher.name) is session:
            del self._speaking[session.publisher.name]

    def connections(self) -> dict[str, int]:
        """How many connections of each principal are known."""
        return {name: len(known.peers) for name, known in self._accounts.items() if known.peers}

    def cut_off(self) -> None:
        """All connections are gone."""
        for peer in list(self._sessions):
            self._forget(peer)

    def bind(self, bounds: Mapping[str, Set[str]]) -> None:
        """From now on these principals may be in these federations only; all others in all."""
        self._bounds = {name: federations for name, federations in bounds.items() if federations}
        self.sequencer.close_topics()

    def may_be_in(self, principal: str, lane: str) -> bool:
        """Tell whether a principal has anything to do with the federation of a lane or topic."""
        bounds = self._bounds.get(principal)
        return bounds is None or lane.partition("/")[0] in bounds

    # ---- Messages ---------------------------------------------------------------------

    def handle(self, peer: bytes, parts: Sequence[bytes], now: float) -> list[Effect]:
        """Take one message of a known connection. Never raises for what a peer sends."""
        session = self._sessions[peer]
        try:
            if not session.welcomed and parts[:1] != [frames.HELLO]:
                return self._say(session, SayHello(), now)
            if parts[0] == frames.PUBLISH:
                return self._publish(session, parts, now)
            request = frames.parse_request(parts)
            if isinstance(request, Fetch):
                return self._fetch(session, request, now)
            if isinstance(request, Receipt):
                session.answers.acknowledge(request.number)
                return []
            if isinstance(request, Beat):
                return self._beat(session, request, now)
            if isinstance(request, CursorReport):
                return self._cursor(session, request)
            if isinstance(request, StatusRequest):
                return self._status(session, now)
            return self._hello(session, request, now)
        except PeerError as error:
            publish = parts[:1] == [frames.PUBLISH]
            cause = status.INVALID if publish else status.MALFORMED
            return self._refuse(session, cause, str(error), now)

    def take_offences(self) -> list[Offence]:
        """What was refused to whom since the last time, for the logs: at most 64 lines."""
        return self.offences.take()

    def _refuse(self, session: Session, cause: str, reason: str, now: float) -> list[Effect]:
        """Nothing was consumed."""
        self.offences.add(session.publisher.name, cause, reason)
        if not session.refusals.take(now):
            return []
        return [Reply(session.peer, Reject(REFUSED, 0, reason))]

    def _say(self, session: Session, message: frames.Reply, now: float) -> list[Effect]:
        """Say it, unless the same was said just now."""
        return [] if session.repeats(message, now) else [Reply(session.peer, message)]

    def _hello(self, session: Session, hello: Hello, now: float) -> list[Effect]:
        publisher = session.publisher
        if not session.hellos.take(now):
            self.offences.add(publisher.name, status.CONNECTION, "it says hello too often")
            return []
        if hello.protocol != frames.PROTOCOL:
            reason = (
                f"protocol {hello.protocol} of {hello.software[:64]!r} is not spoken here; "
                f"{self._software} speaks {frames.PROTOCOL}"
            )
            return self._refuse(session, status.CONNECTION, reason, now)
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

    def _publish(self, session: Session, parts: Sequence[bytes], now: float) -> list[Effect]:
        if now < self._blocked_until:
            self.offences.count(self._blocked_cause)
            return self._say(session, Busy(RETRY_MS, 0, self._blocked_reason), now)
        publisher, gate = session.publisher, session.account.gate
        if gate is not None:
            if shut_s := gate.shut_s(now):
                reason = f"{publisher.name} publishes over {PUBLISHES_PER_S:.0f} events a second"
                self.offences.add(publisher.name, status.RATE_LIMITED, reason)
                return self._say(session, Busy(math.ceil(shut_s * 1000), 0, reason), now)
            gate.spend(REPEAT_COST, now)
        crc, data = frames.parse_publish(parts)
        if zlib.crc32(data) != crc:
            self.offences.count(status.DAMAGED)
            expected = publisher.expected(session.epoch)
            return self._say(session, Nack(session.epoch, expected), now)
        envelope = parse_envelope(data)
        if envelope.publisher != publisher.name:
            reason = (
                f"an event of {envelope.publisher[:80]!r} came from {publisher.name}; a principal "
                "publishes in its own name only"
            )
            return self._refuse(session, status.FORGED, reason, now)
        epoch, sequence = envelope.epoch, envelope.sequence
        order = self.sequencer.order(publisher, epoch, sequence)
        if order is Order.NEXT:
            self._speaking[publisher.name] = session
            if gate is not None:
                gate.spend(PublishRate.cost(len(data)) - REPEAT_COST, now)
            topic, cause = publisher.topics.get(envelope.topic), status.POISON
            fault = envelope_fault(envelope)
            if topic is None and fault is None:
                cause, fault = self._open_topic(publisher, envelope)
                topic = publisher.topics.get(envelope.topic)
            if fault is None and topic is not None:
                self.sequencer.append(publisher, topic, crc, data)
            else:
                self.sequencer.refuse(publisher, str(fault), data, cause)
            return []
        if order is Order.DUPLICATE:
            self._speaking[publisher.name] = session
            # What is stored is acknowledged again; what is in flight will be when it is stored.
            stored = publisher.stored(epoch)
            return self._say(session, Ack(epoch, stored), now) if sequence <= stored else []
        if order is Order.GAP:
            return self._say(session, Nack(epoch, publisher.expected(epoch)), now)
        fenced = self._fenced(publisher, epoch, sequence)
        self.offences.add(publisher.name, status.FENCED, fenced.reason)
        return self._say(session, fenced, now)

    def _open_topic(self, publisher: Publisher, envelope: Envelope) -> tuple[str, str | None]:
        """Return why it cannot be published to, if it cannot, behind the cause."""
        if fault := topic_fault(envelope.topic):
            return status.POISON, fault
        topic = parse_topic(envelope.topic)
        if not (may_publish(publisher.name, topic) and self.may_be_in(publisher.name, str(topic))):
            fault = f"{publisher.name} may not publish under {envelope.topic!r}"
            return status.FORBIDDEN_TOPIC, fault
        opened = self.sequencer.open_topic(publisher, envelope.topic, topic.federation)
        return status.POISON, opened

    def _fenced(self, publisher: Publisher, epoch: int, sequence: int) -> Reject:
        return Reject(
            FENCED, sequence, f"epoch {epoch} is over: {publisher.name} has epoch {publisher.epoch}"
        )

    def _fetch(self, session: Session, fetch: Fetch, now: float) -> list[Effect]:
        session.answers.acknowledge(fetch.receipt)
        reader = session.publisher.name
        if not (may_read(reader, fetch.lane) and self.may_be_in(reader, fetch.lane)):
            reason = f"{reader} may not read {fetch.lane!r}"
            return self._refuse(session, status.LANE, reason, now)
        held = session.answers.ask() if session.fetches.take(now) else "it fetches too often"
        if held is not None:
            self.offences.add(reader, status.HELD, held)
            return [Reply(session.peer, Busy(RETRY_MS, fetch.request, held))]
        head = self.sequencer.durable_head
        lane = self.sequencer.lane(fetch.lane)
        if lane is None or lane.durable <= fetch.after:
            return [Reply(session.peer, FetchedBatch(fetch.request, head, head, 0, ()))]
        return [
            Read(session.peer, fetch, lane.federation is None, lane.id, lane.durable, head),
        ]

    def answered(self, peer: bytes, receipt: int, answer_bytes: int) -> None:
        """A fetch was answered: with so many bytes, or with 0 if no batch went to the socket."""
        if session := self._sessions.get(peer):
            session.answers.answered(receipt, answer_bytes)

    def _beat(self, session: Session, beat: Beat, now: float) -> list[Effect]:
        try:
            topic = parse_topic(beat.topic)
        except ValueError as error:
            raise PeerError(str(error)) from error
        sender = session.publisher.name
        allowed = may_publish(sender, topic) and self.may_be_in(sender, beat.topic)
        if topic.kind not in TRANSIENT_KINDS or not allowed:
            reason = f"{sender} may not send beats under {beat.topic!r}"
            return self._refuse(session, status.BEAT, reason, now)
        if not session.beats.take(now):
            self.offences.count(status.BEAT)
            return []
        return [Forward(beat)]

    def _cursor(self, session: Session, report: CursorReport) -> list[Effect]:
        reader, known = session.publisher.name, self.sequencer.lane(report.lane)
        # One beyond the log is of a reader that has seen another past: it has not read this one.
        if (
            known
            and may_read(reader, report.lane)
            and report.sequence <= self.sequencer.durable_head
        ):
            self.sequencer.report(reader, report.lane, report.sequence)
        return []

    def _status(self, session: Session, now: float) -> list[Effect]:
        if not may_ask_status(session.publisher.name):
            reason = f"{session.publisher.name} may not ask for the status"
            return self._refuse(session, status.STATUS, reason, now)
        if not session.statuses.take(now):
            self.offences.count(status.STATUS)
            return []
        return [TellStatus(session.peer)]

    # ---- Batches ---------------------------------------------------------------------------

    def committed(self, batch: Batch) -> list[Effect]:
        """The batch is on disk: now its events may be published, after these answers."""
        effects: list[Effect] = []
        moved = self.sequencer.committed(batch)
        self.stored += len(batch.appends)
        for refused in batch.refused:
            self.offences.add(refused.publisher, refused.cause, refused.reason)
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
        self.offences.count(cause, self.sequencer.undecided)
        for account in self._accounts.values():
            if account.gate is not None:
                account.gate.give_back(account.publisher.undecided)
        busy = Busy(RETRY_MS, 0, reason)
        speaking = (self._speaking.get(publisher.name) for publisher in self.sequencer.failed())
        return [Reply(session.peer, busy) for session in speaking if session is not None]
