"""The broker as the other processes see it: publish through an outbox, read lanes in order.

Rule 1: a broker that is away, restarts or answers late is no event for the caller: publishing waits
in the outbox, reading waits in the iterator. What cannot heal by itself (a refused key's name, a
lost history, a newer self elsewhere) is raised by every method from then on.
Rule 2: everything runs in the caller's event loop and thread, and nothing blocks either.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

import structlog
from google.protobuf.message import Message

from metisfl.broker.access import may_ask_status
from metisfl.broker.credentials import Claim, ClientKeys, Credentials, Handshakes
from metisfl.broker.feed import Batch, Feed, Readers, Record
from metisfl.broker.link import Guard, Link
from metisfl.broker.outbox import Outbox
from metisfl.broker.status import BrokerStatus, parse_status
from metisfl.broker.trouble import Rejected, Trouble
from metisfl.broker.waiters import Waiters
from metisfl.broker.window import WINDOW_EVENTS, EventRejected, HelloWanted, Patience, Window
from metisfl.proto import frames
from metisfl.proto.envelope import parse_envelope
from metisfl.proto.errors import MachineError, PeerError, UserError
from metisfl.proto.events import encode
from metisfl.proto.events_pb2 import Hello, Welcome
from metisfl.proto.frames import Beat
from metisfl.proto.topics import HEADS

__all__ = [
    "Batch",
    "Beat",
    "BrokerClient",
    "BrokerStatus",
    "Claim",
    "ClientKeys",
    "Credentials",
    "Feed",
    "Handshakes",
    "Outbox",
    "Record",
    "Rejected",
]

log = structlog.get_logger()

TICK_S: Final = 0.1
TIDY_TICKS: Final = 10
LIVE_SILENCE_S: Final = 5.0  # the broker sends a head every second


class BrokerClient:
    """One connection pair to the broker, for all lanes of one principal.

    Use as `async with`. Publishing: append to the outbox in your transaction, commit, `flush()`.
    """

    def __init__(
        self,
        *,
        ingress: str,
        live: str,
        keys: Credentials,
        principal: str,
        outbox: Outbox,
        software: str,
        on_reject: Callable[[Rejected], None] | None = None,
    ) -> None:
        """`on_reject` is called for each event that the broker refuses for good; it is logged too.

        Raises ValueError if the outbox belongs to another principal.
        """
        if outbox.publisher != principal:
            raise ValueError(f"the outbox of {outbox.publisher} cannot publish for {principal}")
        self._ingress, self._principal, self._software = ingress, principal, software
        self._outbox = outbox
        self._on_reject = on_reject
        self._readers = Readers(on_taken=self._ask)
        self._reported: dict[str, int] = {}
        self._waiters = Waiters()
        self._failure: BaseException | None = None
        self._ticks = 0
        self._timer: asyncio.TimerHandle | None = None
        self._guard = Guard(self._fail)
        now = time.monotonic()
        self._window = Window(
            principal=principal,
            epoch=outbox.epoch,
            acked=outbox.acked,
            last=outbox.last(),
            now=now,
        )
        self._live_patience = Patience(LIVE_SILENCE_S, LIVE_SILENCE_S, now)
        self._trouble = Trouble(ingress, principal, now)
        self._link = Link(
            ingress=ingress,
            live=live,
            keys=keys,
            on_reply=self._on_reply,
            on_live=self._on_live,
            on_settled=self._settle,
            guard=self._guard,
        )

    async def __aenter__(self) -> BrokerClient:
        """Open the sockets and go on; nobody waits for the broker here."""
        self._link.open()
        self._link.subscribe(HEADS)
        self._tick()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the sockets. What is not acknowledged stays in the outbox for the next time."""
        if self._failure is None:
            self._outbox.tidy()
            self._end(ValueError("the client is closed"), StopAsyncIteration())

    @property
    def connected(self) -> bool:
        """True while the broker knows us and answers, as far as can be told."""
        return self._failure is None and self._window.welcomed

    def flush(self) -> None:
        """Send what the outbox holds, as far as the window allows. Call it after the commit."""
        self._raise_failure()
        if self._outbox.in_transaction:
            raise ValueError("flush comes after the commit, not before it")
        self._window.appended(self._outbox.last(), time.monotonic())
        with self._guard:
            self._pump(time.monotonic())
        self._raise_failure()

    async def drained(self, timeout_s: float) -> None:
        """Wait until everything that is in the outbox now is acknowledged.

        Raises MachineError when that takes longer than `timeout_s`, and what ended the client.
        """
        self.flush()
        target = self._window.last
        if self._window.acked >= target:
            return
        try:
            await asyncio.wait_for(self._waiters.acked(target), timeout_s)
        except asyncio.TimeoutError:
            raise MachineError(
                f"{target - self._window.acked} events of {self._principal} were not acknowledged "
                f"by the broker at {self._ingress} within {timeout_s} s; they stay in the outbox"
            ) from None

    async def room(self) -> int:
        """Wait until the window has room and return how many events it takes at once.

        For whoever publishes faster than the broker stores: append no more than this at a time.
        """
        while True:
            self._raise_failure()
            waiting = self._window.last - self._window.acked
            if waiting < WINDOW_EVENTS:
                return WINDOW_EVENTS - waiting
            await self._waiters.acked(self._window.acked + 1)

    def records(self, lane: str) -> Feed[Batch]:
        """Read a lane from `outbox.cursor(lane)` on. One reader for each lane.

        The next batch comes whether or not the caller has moved the cursor. Raises ValueError for
        a name that is no lane, or one that is read already.
        """
        self._raise_failure()
        feed = self._readers.read_lane(lane, self._outbox.cursor(lane))
        self._link.subscribe(lane.encode())
        return feed

    def beats(self, prefix: str) -> Feed[Beat]:
        """Read transient events whose topic starts with `prefix`, which ends in `/`.

        They are not stored: what comes while nobody is connected is lost, and when the reader is
        slow the oldest of 1024 makes room.
        """
        self._raise_failure()
        feed = self._readers.read_beats(prefix)
        self._link.subscribe(prefix.encode())
        return feed

    def beat(self, topic: str, event: Message) -> None:
        """Publish a transient event: at once or not at all. Raises ValueError if it is no event."""
        self._raise_failure()
        kind, payload = encode(event)
        if len(payload) > frames.BEAT_BYTES_MAX:
            raise ValueError(f"beat has {len(payload)} bytes; at most {frames.BEAT_BYTES_MAX}")
        if self._window.welcomed:
            self._link.send(*frames.pack_beat(Beat(topic, kind, payload)))

    async def status(self, timeout_s: float) -> BrokerStatus:
        """Ask how the broker is: for the controller and drivers.

        Raises UserError for another principal, MachineError when no answer comes in `timeout_s`.
        """
        self._raise_failure()
        if not may_ask_status(self._principal):
            raise UserError(f"{self._principal} may not ask for the broker's status")
        waiter = self._waiters.status()
        self._ask_status()
        try:
            return await asyncio.wait_for(waiter, timeout_s)
        except asyncio.TimeoutError:
            why = self._trouble.refusal or "is it running and reachable?"
            raise MachineError(
                f"the broker at {self._ingress} did not tell its status within {timeout_s} s: {why}"
            ) from None

    # ---- What arrives ------------------------------------------------------------------

    def _on_reply(self, parts: list[bytes]) -> None:
        now = time.monotonic()
        try:
            reply = frames.parse_reply(parts)
        except PeerError as error:
            log.warning("message of the broker ignored", error=str(error))
            return
        if isinstance(reply, frames.FetchedBatch):
            self._readers.fetched(reply, now)
            return
        if isinstance(reply, frames.StatusAnswer):
            self._tell_status(reply)
            return
        if isinstance(reply, frames.Busy):
            self._trouble.busy(reply.reason)
            if reply.request:
                self._readers.fetched(reply, now)
                return
        effect = self._window.handle(reply, now)
        if isinstance(effect, HelloWanted):
            self._say_hello()
        elif isinstance(effect, EventRejected):
            self._tell_rejected(effect)
        elif isinstance(reply, Welcome):
            self._welcomed(reply)
        self._outbox.acknowledge(self._window.acked)
        if self._window.acked == self._window.last:
            self._trouble.not_busy()

    def _on_live(self, parts: list[bytes]) -> None:
        now = time.monotonic()
        self._live_patience.heard(now)
        try:
            item = frames.parse_live(parts)
        except PeerError as error:
            log.warning("live message ignored", error=str(error))
            return
        self._readers.live(item, now)

    def _settle(self) -> None:
        """After messages came: send what may go, ask for what is missing, wake who waits."""
        now = time.monotonic()
        self._pump(now)
        self._ask()
        self._readers.wake()
        self._waiters.settle(self._window.acked)

    def _tick(self) -> None:
        with self._guard:
            now = time.monotonic()
            self._trouble.refused(self._link.why_refused())
            if self._window.must_reopen(now) or self._live_patience.ended(now):
                self._link.reopen()
                self._window.reopened(now)
                self._live_patience.heard(now)
            if not self._window.welcomed:
                self._trouble.silent(now)
            self._ticks += 1
            self._acknowledge()
            if self._ticks % TIDY_TICKS == 0:
                self._ask_status()
                if not self._outbox.in_transaction:
                    self._outbox.tidy()
                    self._report_cursors()
            self._settle()
        if self._failure is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    # ---- What goes out --------------------------------------------------------------------

    def _pump(self, now: float) -> None:
        after, count = self._window.sendable(now)
        if count <= 0 or self._outbox.in_transaction:
            return
        send = self._link.send
        for sequence, crc, envelope in self._outbox.rows(after, count):
            if not send(frames.PUBLISH, crc, envelope):
                return
            self._window.was_sent(sequence)

    def _ask(self) -> None:
        if self._window.welcomed:
            for fetch in self._readers.wanted(time.monotonic()):
                self._link.send(*frames.pack_fetch(fetch))

    def _acknowledge(self) -> None:
        """Let the broker forget the answers that came, when there is nothing more to fetch."""
        if self._window.welcomed and (receipt := self._readers.receipt()):
            self._link.send(*frames.pack_receipt(receipt))

    def _ask_status(self) -> None:
        if self._window.welcomed and self._waiters.want_status:
            self._link.send(frames.STATUS)

    def _say_hello(self) -> None:
        hello = Hello(
            protocol=frames.PROTOCOL, software=self._software[:64], epoch=self._outbox.epoch
        )
        self._link.send(*frames.pack_hello(hello))

    def _welcomed(self, welcome: Welcome) -> None:
        self._trouble.welcomed(welcome.software)
        self._reported.clear()
        self._readers.welcomed()
        self._ask_status()

    def _report_cursors(self) -> None:
        """Tell the broker how far each lane is applied: what a controller has not read is kept."""
        for name in self._readers.lanes:
            cursor = self._outbox.cursor(name)
            if self._window.welcomed and cursor != self._reported.get(name, 0):
                self._link.send(*frames.pack_cursor(frames.CursorReport(cursor, name)))
                self._reported[name] = cursor

    def _tell_status(self, answer: frames.StatusAnswer) -> None:
        try:
            self._waiters.told(parse_status(answer.body))
        except PeerError as error:
            log.warning("message of the broker ignored", error=str(error))

    # ---- What goes wrong ----------------------------------------------------------------------

    def _tell_rejected(self, effect: EventRejected) -> None:
        for sequence, _, envelope in self._outbox.rows(effect.sequence - 1, 1):
            if sequence != effect.sequence:
                continue
            event = parse_envelope(envelope)
            rejected = Rejected(
                sequence, event.topic, event.type, event.correlation_id, effect.reason
            )
            self._trouble.rejected(rejected)
            if self._on_reject is not None:
                self._on_reject(rejected)

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._end(error, error)

    def _end(self, failure: BaseException, told_readers: BaseException) -> None:
        self._failure = failure
        if self._timer is not None:
            self._timer.cancel()
        self._link.close()
        self._readers.end(told_readers)
        self._waiters.end(failure)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
