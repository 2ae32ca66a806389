"""The thread that owns both sockets: messages in, effects out.

Rule: it never waits for anything but its poller. What has arrived goes to the writer as one batch;
answers and live records go out only for what has come back from there. What cannot be sent to a
peer at once is dropped: it is in the log, and the peer asks again.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import structlog
import zmq

from metisfl.broker import status
from metisfl.broker.access import Subscriptions
from metisfl.broker.dispatch import Dispatch, Effect, Forward, Read, Reply
from metisfl.broker.doors import Doors
from metisfl.broker.offences import Offence
from metisfl.broker.reception import Mailbox
from metisfl.broker.schema import DamagedLog, LogFull, StorageFull
from metisfl.broker.sequencer import Batch
from metisfl.broker.store import Store
from metisfl.broker.writer import Writer
from metisfl.deploy.handshakes import Monitors
from metisfl.deploy.memory_guard import LOOK_S
from metisfl.proto import frames
from metisfl.proto.enrolment import INVITED
from metisfl.proto.envelope import INTEGER_MAX
from metisfl.proto.frames import Ack, Busy, Head, Header
from metisfl.proto.topics import HEADS

__all__ = ["Loop"]

DRAIN_MESSAGES: Final = 512
HEAD_GAP_S: Final = 0.02  # between heads sent for new subscriptions
DAMAGE_RETRY_MS: Final = 5000
NOTHING: Final = Ack(0, 0)  # no publisher has the epoch 0
LINES_PER_TICK: Final = 20
HEARD_MAX: Final = 4096
CALM_S: Final = 1.0  # a disk at its limit takes one batch and refuses the next

log = structlog.get_logger()


class Loop:
    """Call `turn` for ever and `tick` about once a second."""

    def __init__(
        self,
        *,
        doors: Doors,
        stop_descriptor: int,
        dispatch: Dispatch,
        store: Store,
        writer: Writer,
        incarnation: int,
        insecure: bool = False,
    ) -> None:
        """`insecure` is told to who asks how the broker is, and changes nothing here."""
        self._insecure = insecure
        self._doors = doors
        self._dispatch, self._sequencer = dispatch, dispatch.sequencer
        self._store, self._writer = store, writer
        self._incarnation = incarnation
        self._subscriptions = Subscriptions()
        self.invited = Mailbox()
        self._reads: deque[Read] = deque()
        self._failure: StorageFull | None = None
        self._full_since_unix_ns = 0
        self._failed_at = self._stored_at = 0.0
        self._head_due = False
        self._head_at = 0.0
        self._lines = 0
        self.dropped = 0
        self.cuts = 0
        self.heard: Counter[str] = Counter()
        """On how many connections of each principal a whole message came, since the start."""
        self.on_look: Callable[[float], None] = lambda now: None
        """Called at least each LOOK_S, with the steady clock's time."""
        self._looked_at = 0.0
        self._poller = zmq.Poller()
        self._monitors = Monitors(self._poller)
        self._poller.register(stop_descriptor, zmq.POLLIN)
        self._poller.register(writer.signal, zmq.POLLIN)
        self._take_up()

    def cut_off(self, reason: str) -> None:
        """Cut every connection; who is welcome is back at once. Raises MachineError."""
        log.warning("all connections are cut; peers come back by themselves", reason=reason)
        self.cuts += 1
        self._monitors.close()
        for socket in (self._live, self._ingress):
            self._poller.unregister(socket)
        self._doors.reopen(Head(self._incarnation, self._sequencer.durable_head))
        self._dispatch.cut_off()
        self._subscriptions = Subscriptions()
        self._reads.clear()
        self._take_up()

    def _take_up(self) -> None:
        self._ingress, self._live = self._doors.ingress, self._doors.live
        self._reading = True
        for socket in (self._live, self._ingress):
            self._poller.register(socket, zmq.POLLIN)
        self._monitors.open(self._live, self._ingress)

    def turn(self, timeout_ms: int) -> None:
        """Wait for something to do, and do it."""
        if self._reading is self._sequencer.full:
            self._reading = not self._reading
            self._poller.modify(self._ingress, zmq.POLLIN if self._reading else 0)
        if self._reads:
            timeout_ms = 0
        elif self._head_due:
            timeout_ms = min(timeout_ms, int(HEAD_GAP_S * 1000))
        ready = dict(self._poller.poll(min(timeout_ms, int(LOOK_S * 1000))))
        now = time.monotonic()
        self._monitors.drain(ready, now)
        if self._writer.signal in ready:
            self._take_outcomes(now)
        if self._live in ready:
            self._take_subscriptions()
        if self._ingress in ready:
            self._take_messages(now)
        if batch := self._sequencer.seal(time.time_ns()):
            self._writer.submit(batch)
        if self._reads:
            self._answer(self._reads.popleft())
        if self._head_due and now - self._head_at >= HEAD_GAP_S:
            self._send_head(now)
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            self.on_look(now)

    def tick(self) -> list[Offence]:
        """Tell subscribers how long the log is, and let cursors go to disk.

        Returns who was refused what since the last time, which is logged already.
        """
        now = time.monotonic()
        self._send_head(now)
        self._sequencer.leftovers_due()
        offences = [*self._dispatch.take_offences(), *self._strangers()]
        for offence in offences:
            times = f" ({offence.times} times)" if offence.times > 1 else ""
            self._complain(f"{offence.cause} refused", offence.principal, offence.reason + times)
        if self._failure is not None and self._has_room(now):
            self._failure, self._full_since_unix_ns = None, 0
            log.info("events are stored again")
        if self._lines > LINES_PER_TICK:
            log.warning("more of the same was not logged", lines=self._lines - LINES_PER_TICK)
        self._lines = 0
        return offences

    def finish(self) -> None:
        """Store what was handed to the writer and answer for it; take nothing more."""
        self._monitors.close()
        self._writer.close()
        self._take_outcomes(time.monotonic())

    def reply(self, messages: Iterable[tuple[bytes, Sequence[bytes]]]) -> None:
        """Send each to its connection; what cannot be sent at once is dropped."""
        for peer, parts in messages:
            self._send(peer, parts)

    def _strangers(self) -> list[Offence]:
        told = self._monitors.told()
        self._dispatch.offences.count(status.HANDSHAKE, sum(times for _, times in told))
        reason = "it connects and shows no key"
        return [Offence(address, status.HANDSHAKE, reason, times) for address, times in told]

    # ---- In ---------------------------------------------------------------------------

    def _take_messages(self, now: float) -> None:
        ingress, dispatch = self._ingress, self._dispatch
        for _ in range(DRAIN_MESSAGES):
            if self._sequencer.full:
                return
            try:
                peer = ingress.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            if dispatch.knows(peer):
                parts = self._rest(ingress.recv())
            else:
                frame = ingress.recv(copy=False)
                parts = self._rest(frame.bytes)
                user = str(frame.get("User-Id"))
                if user in self.heard or len(self.heard) < HEARD_MAX:
                    self.heard[user] += 1
                if user.startswith(INVITED):
                    self.invited.put(peer, user, parts)
                    continue
                if not dispatch.connect(peer, user, now, self._is_there):
                    continue
            if effects := dispatch.handle(peer, parts, now):
                self._perform(effects)

    def _rest(self, part: bytes) -> list[bytes]:
        """The parts of one message, of which at most one too many is kept."""
        parts, more = [part], self._ingress.getsockopt(zmq.RCVMORE)
        while more:
            part = self._ingress.recv()
            if len(parts) < frames.PARTS_MAX:
                parts.append(part)
            more = self._ingress.getsockopt(zmq.RCVMORE)
        return parts

    def _take_subscriptions(self) -> None:
        for _ in range(DRAIN_MESSAGES):
            try:
                frame = self._live.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            message = frame.bytes
            kind, prefix = message[:1], message[1:]
            if kind == b"\x01":
                principal = str(frame.get("User-Id"))
                lane = prefix.decode("ascii", errors="replace")
                if prefix == HEADS or self._dispatch.may_be_in(principal, lane):
                    refusal = self._subscriptions.subscribe(principal, prefix)
                else:
                    refusal = f"{principal} may not be in the federation of {lane[:80]!r}"
                if refusal:
                    self._dispatch.offences.add(principal, status.SUBSCRIPTION, refusal)
                else:
                    self._live.setsockopt(zmq.SUBSCRIBE, prefix)
                    self._head_due = True  # the first thing that it hears for sure
            elif kind == b"\x00":
                self._subscriptions.unsubscribe(prefix)
                self._live.setsockopt(zmq.UNSUBSCRIBE, prefix)

    def _take_outcomes(self, now: float) -> None:
        for outcome in self._writer.outcomes():
            if outcome.failure is None:
                if outcome.batch.appends:
                    self._stored_at = now
                self._perform(self._dispatch.committed(outcome.batch))
                self._publish(outcome.batch)
            elif not isinstance(outcome.failure, StorageFull):
                raise outcome.failure
            else:
                reason = str(outcome.failure)
                if self._failure is None:
                    log.error("events cannot be stored", reason=reason)
                    self._full_since_unix_ns = time.time_ns()
                self._failure, self._failed_at = outcome.failure, now
                limit = isinstance(outcome.failure, LogFull)
                cause = status.LOG_LIMIT if limit else status.FULL_DISK
                self._perform(self._dispatch.failed(reason, now, cause))

    def _has_room(self, now: float) -> bool:
        """After a failure: events are stored, or would be."""
        if self._failed_at + CALM_S < self._stored_at:
            return True
        disk = self._writer.disk
        limit_is_all = isinstance(self._failure, LogFull) and disk.log_bytes < disk.log_limit_bytes
        return limit_is_all and self._failed_at + CALM_S < now

    # ---- Out ----------------------------------------------------------------------------

    def _perform(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Reply):
                message = effect.message
                if isinstance(message, frames.FetchedBatch):
                    head, through = message.head, message.through
                    self._give(effect.peer, message.request, head, through, 0, ())
                else:
                    self._send(effect.peer, frames.pack_reply(message))
            elif isinstance(effect, Read):
                self._reads.append(effect)
            elif isinstance(effect, Forward):
                self._live.send_multipart(frames.pack_live_beat(effect.beat))
            else:
                answer = frames.StatusAnswer(status.pack_status(self._status()))
                self._send(effect.peer, frames.pack_reply(answer))

    def _publish(self, batch: Batch) -> None:
        send, pack, more = self._live.send, frames.pack_header, zmq.SNDMORE
        incarnation, logged = self._incarnation, batch.logged_unix_ns
        for sequence, _, _, in_topic, in_federation, crc, envelope, topic in batch.appends:
            send(topic, more)
            send(pack(Header(crc, incarnation, sequence, in_topic, in_federation, logged)), more)
            send(envelope)

    def _answer(self, read: Read) -> None:
        fetch = read.fetch
        try:
            records, through, floor = self._store.reader.read_lane(
                of_federation=read.of_federation,
                lane_id=read.lane_id,
                lane_head=read.lane_head,
                after=fetch.after,
                head=read.head,
                max_events=fetch.max_events,
                max_bytes=frames.FETCH_BYTES_MAX,
            )
        except DamagedLog as error:
            self._complain("fetch refused", read.peer.hex(), str(error))
            self._send(
                read.peer, frames.pack_reply(Busy(DAMAGE_RETRY_MS, fetch.request, str(error)))
            )
            self._dispatch.answered(read.peer, 0, 0)
        else:
            flat: list[bytes] = []
            for record in records:
                header = Header(
                    record.crc,
                    self._incarnation,
                    record.sequence,
                    record.previous_in_topic,
                    record.previous_in_federation,
                    record.logged_unix_ns,
                )
                flat += (record.topic.encode(), frames.pack_header(header), record.envelope)
            self._give(read.peer, fetch.request, read.head, through, floor, flat)

    def _give(
        self,
        peer: bytes,
        request: int,
        head: int,
        through: int,
        floor: int,
        records: Sequence[bytes],
    ) -> None:
        """Answer a fetch; the receipt is what its reader alone learns, by reading the answer."""
        receipt = 1 + secrets.randbelow(INTEGER_MAX)
        parts = frames.pack_batch(request, head, through, floor, receipt, records)
        sent = self._send(peer, parts)
        self._dispatch.answered(peer, receipt, frames.memory_bytes(parts) if sent else 0)

    def _send(self, peer: bytes, parts: Sequence[bytes]) -> bool:
        """Hand it to the socket; False if the peer is slow or gone."""
        try:
            self._ingress.send_multipart([peer, *parts], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self.dropped += 1
            return False
        return True

    def _is_there(self, peer: bytes) -> bool:
        """False if this connection has ended. It is asked with an answer that means nothing."""
        try:
            self._ingress.send_multipart([peer, *frames.pack_reply(NOTHING)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return error.errno == zmq.EAGAIN
        return True

    def _status(self) -> status.BrokerStatus:
        dispatch, disk = self._dispatch, self._writer.disk
        return status.BrokerStatus(
            incarnation=self._incarnation,
            head=self._sequencer.durable_head,
            floor=disk.floor,
            log_bytes=disk.log_bytes,
            log_limit_bytes=disk.log_limit_bytes,
            disk_free_bytes=disk.free_bytes,
            events_stored=dispatch.stored,
            events_refused=dict(dispatch.offences.events),
            full_since_unix_ns=self._full_since_unix_ns,
            full_reason=str(self._failure or ""),
            connections=dispatch.connections(),
            messages_dropped=self.dropped,
            insecure=self._insecure,
            requests_refused=dict(dispatch.offences.requests),
            offenders=dict(dispatch.offences.offenders),
        )

    def _send_head(self, now: float) -> None:
        self._head_due, self._head_at = False, now
        head = frames.pack_head(Head(self._incarnation, self._sequencer.durable_head))
        self._live.send_multipart(head)
        self._live.setsockopt(zmq.XPUB_WELCOME_MSG, b"".join(head))

    def _complain(self, what: str, who: str, reason: str) -> None:
        self._lines += 1
        if self._lines <= LINES_PER_TICK:
            log.warning(what, who=who, reason=reason)
