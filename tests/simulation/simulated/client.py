"""A node's client of the broker: what broker/client.py, feed.py and link.py do, around the real
Window, Patience and Lane.

Law: it sends and acknowledges what the cores say, and decides nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from google.protobuf.message import Message

from metisfl.broker.lane import Lane
from metisfl.broker.window import EventRejected, HelloWanted, Patience, Window
from metisfl.proto import frames
from metisfl.proto.events import encode
from metisfl.proto.events_pb2 import Envelope, Hello, Welcome
from metisfl.proto.frames import Beat, Busy, Fetch, FetchedBatch, Head, RawRecord, Receipt
from metisfl.proto.topics import HEADS
from simulated.disk import Outbox
from simulated.invariants import Invariants
from simulated.network import Connection, Network
from simulated.scheduler import Broken, Node

__all__ = ["Client", "OnBatch"]

TICK_S: Final = 0.4  # the real one looks every 0.1 s
TIDY_TICKS: Final = 3
LIVE_SILENCE_S: Final = 5.0
RECONNECT_S: Final = (0.05, 1.0)

Records = Sequence[tuple[int, Envelope, Message]]  # when it was logged, the event
OnBatch = Callable[[Records, int, bool, int], None]
"""Takes what a broker.client.Batch holds."""


class Client:
    """One life of a node's client."""

    def __init__(
        self, node: Node, network: Network, outbox: Outbox, invariants: Invariants
    ) -> None:
        self._node, self._network, self._outbox = node, network, outbox
        self._invariants = invariants
        self.principal = outbox.publisher
        now = node.now
        self.window = Window(
            principal=self.principal,
            epoch=outbox.epoch,
            acked=outbox.acked,
            last=outbox.last(),
            now=now,
        )
        self._live_patience = Patience(LIVE_SILENCE_S, LIVE_SILENCE_S, now)
        self.lanes: dict[str, tuple[Lane, OnBatch]] = {}
        self._beats: dict[str, Callable[[Beat], None]] = {}
        self._prefixes = [HEADS]
        self._reported: dict[str, int] = {}
        self._request = self._receipt = self._shown = 0
        self._ticks = 0
        self._reading = False
        self.tidy_sync = True  # how the owner's last transaction was synced
        self._links: dict[str, Connection] = {}
        self._connect("ingress")
        self._connect("live")
        node.later(TICK_S, self._tick)

    @property
    def drained(self) -> bool:
        return self.window.acked >= self._outbox.last()

    def read(self, lane: str, on_batch: OnBatch) -> None:
        """Read a lane from the outbox's cursor on."""
        cursor = self._outbox.cursor(lane)
        self._invariants.begins(self._node.name, lane, cursor)
        self.lanes[lane] = (Lane(lane, cursor), on_batch)
        self._subscribe(lane.encode())
        self._settle()

    def beats(self, prefix: str, on_beat: Callable[[Beat], None]) -> None:
        self._beats[prefix] = on_beat
        self._subscribe(prefix.encode())

    def beat(self, topic: str, event: Message) -> None:
        if self.window.welcomed:
            kind, payload = encode(event)
            self._send(frames.pack_beat(Beat(topic, kind, payload)))

    def flush(self) -> None:
        self.window.appended(self._outbox.last(), self._node.now)
        self._pump()

    # ---- Connections ------------------------------------------------------------------

    def _connect(self, door: str) -> None:
        self._links[door] = self._network.connect(
            door, self._node, self.principal, self._arrived, self._is_up, self._is_cut
        )

    def _is_up(self, connection: Connection) -> None:
        if connection.kind == "ingress":
            self._network.probe(connection)
        else:
            for prefix in self._prefixes:
                self._network.subscribe(connection, prefix)

    def _is_cut(self, connection: Connection) -> None:
        connection.route = b""  # from now on its socket says that nobody is there
        if self._links.get(connection.kind) is connection:
            delay_s = self._node.scheduler.random.uniform(*RECONNECT_S)
            self._node.later(delay_s, self._again, connection)

    def _again(self, connection: Connection) -> None:
        if self._links[connection.kind] is connection:
            self._connect(connection.kind)

    def _reopen(self) -> None:
        for connection in self._links.values():
            connection.close()
        self._connect("ingress")
        self._connect("live")

    def _subscribe(self, prefix: bytes) -> None:
        self._prefixes.append(prefix)
        if self._links["live"].route:
            self._network.subscribe(self._links["live"], prefix)

    def _send(self, parts: list[bytes]) -> bool:
        link = self._links["ingress"]
        if not link.route:
            return False
        link.to_server(parts)
        return True

    # ---- What arrives ------------------------------------------------------------------

    def _arrived(self, connection: Connection, message: Any) -> None:
        if connection.kind == "live":
            self._on_live(message)
            if isinstance(message, Beat):
                return
        else:
            self._on_reply(message)
        self._settle()

    def _on_reply(self, reply: Any) -> None:
        now, window = self._node.now, self.window
        if isinstance(reply, FetchedBatch):
            self._receipt = reply.receipt
            for lane, _ in self.lanes.values():
                lane.batch(reply)
            return
        if isinstance(reply, Busy) and reply.request:
            for lane, _ in self.lanes.values():
                lane.busy(reply, now)
            return
        effect = window.handle(reply, now)
        if isinstance(effect, HelloWanted):
            hello = Hello(protocol=frames.PROTOCOL, software="simulated", epoch=window.epoch)
            self._send(frames.pack_hello(hello))
        elif isinstance(effect, EventRejected):
            raise Broken("I1", f"the broker refuses an event of {self.principal}: {effect.reason}")
        elif isinstance(reply, Welcome):
            self._reported.clear()
            self._receipt = self._shown = 0
            for lane, _ in self.lanes.values():
                lane.welcomed()
        self._invariants.acknowledged(self.principal, window.acked)
        self._outbox.acknowledge(window.acked)

    def _on_live(self, item: RawRecord | Beat | Head) -> None:
        self._live_patience.heard(self._node.now)
        if isinstance(item, RawRecord):
            topic = item.topic.decode()
            for name in (topic, topic[: topic.find("/") + 1]):
                if name in self.lanes:
                    self.lanes[name][0].live(item)
        elif isinstance(item, Beat):
            for prefix, on_beat in self._beats.items():
                if item.topic.startswith(prefix):
                    on_beat(item)
        else:
            for lane, _ in self.lanes.values():
                lane.head(item, self._node.now)

    def _settle(self) -> None:
        self._pump()
        self._ask()
        if not self._reading and any(lane.news for lane, _ in self.lanes.values()):
            self._reading = True  # the readers are tasks of the same loop: their turn comes
            self._node.later(0.0, self._read)

    def _read(self) -> None:
        self._reading = False
        for name, (lane, on_batch) in list(self.lanes.items()):
            while lane.news:
                raw, through, trimmed_to = lane.take()
                self._ask()
                caught_up = lane.caught_up and not lane.ready
                records = [
                    (one.header.logged_unix_ns, *self._invariants.opened(one.envelope))
                    for one in raw
                ]
                numbers = [one.header.sequence for one in raw]
                if trimmed_to:
                    self._node.say("missed", name, "to", trimmed_to)
                self._invariants.applies(self._node.name, name, numbers, through, trimmed_to)
                on_batch(records, through, caught_up, trimmed_to)

    def _tick(self) -> None:
        now = self._node.now
        if self.window.must_reopen(now) or self._live_patience.ended(now):
            self._reopen()
            self.window.reopened(now)
            self._live_patience.heard(now)
        self._ticks += 1
        if self.window.welcomed and self._receipt != self._shown:
            self._shown = self._receipt
            self._send(frames.pack_receipt(Receipt(self._receipt)))
        if self._ticks % TIDY_TICKS == 0:
            self._outbox.tidy(sync=self.tidy_sync)
            self._report_cursors()
        self._settle()
        self._node.later(TICK_S, self._tick)

    # ---- What goes out --------------------------------------------------------------------

    def _pump(self) -> None:
        after, count = self.window.sendable(self._node.now)
        if count <= 0:
            return
        for sequence, envelope in self._outbox.rows(after, count):
            if not self._send([frames.PUBLISH, frames.pack_crc(envelope), envelope]):
                return
            self.window.was_sent(sequence)

    def _ask(self) -> None:
        if not self.window.welcomed:
            return
        for lane, _ in self.lanes.values():
            fetch: Fetch | None = lane.wanted(self._node.now, self._request + 1)
            if fetch is not None:
                self._request += 1
                self._shown = self._receipt
                self._send(frames.pack_fetch(replace(fetch, receipt=self._receipt)))

    def _report_cursors(self) -> None:
        for name in self.lanes:
            cursor = self._outbox.cursor(name)
            if self.window.welcomed and cursor != self._reported.get(name, 0):
                self._send(frames.pack_cursor(frames.CursorReport(cursor, name)))
                self._reported[name] = cursor
