"""Attacks on the ingress by who is let in: what is published, and how it is put on the wire."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from typing import Any, Final

from raw_curve import RawCurve

from attacks.target import Attack, End, Socket, Tally, Target, answers, dealer, sent
from metisfl.proto import events_pb2 as pb
from metisfl.proto import frames, topics
from metisfl.proto.bulk import MESSAGE_BYTES_MAX as BULK_BYTES_MAX
from metisfl.proto.events import EVENT_TYPES
from metisfl.proto.events_pb2 import Envelope
from metisfl.proto.frames import FetchedBatch, Reject

PAYLOAD_BYTES: Final = 190 * 1024
PART_BYTES: Final = 250 * 1024
OTHERS: Final = ("ada", "bob", "cyd")


class Ingress:
    """One connection to the broker, which has said hello; `epoch` is the newest there is."""

    def __init__(self, socket: Socket, target: Target, tell: Tally, *, keeps: bool = False) -> None:
        """Who `keeps` what is not acknowledged can have it sent again with `settle`."""
        self.socket, self.target, self.tell = socket, target, tell
        self.epoch, self.sequence = 0, 0
        self._keeps = keeps
        self._kept: dict[int, bytes] = {}

    def hello(self, *, reads_only: bool = False) -> None:
        """Begin a newer epoch; who only reads leaves the last one as it is."""
        self.epoch, self.sequence = 0 if reads_only else time.time_ns(), 0
        hello = pb.Hello(protocol=frames.PROTOCOL, software="attack", epoch=self.epoch)
        sent(self.socket, frames.pack_hello(hello))
        self.take(200)

    def envelope(self, topic: str, kind: str, payload: bytes = b"", **fields: Any) -> bytes:
        """The next one, or one with other fields."""
        self.sequence += 1
        good: dict[str, Any] = {
            "version": 1,
            "event_id": os.urandom(16),
            "topic": topic,
            "publisher": self.target.principal,
            "epoch": self.epoch,
            "sequence": self.sequence,
            "type": kind,
            "payload": payload,
        }
        return Envelope(**{**good, **fields}).SerializeToString()

    def publish(self, data: bytes) -> None:
        if self._keeps:
            self._kept[self.sequence] = data
        self.send([frames.PUBLISH, frames.pack_crc(data), data])

    def settle(self, end: End) -> None:
        """See to it that all that was published is acknowledged."""
        while self._kept and not end.come:
            until = time.monotonic() + 0.5
            while self._kept and time.monotonic() < until and not end.come:
                self.take(50)
            for data in list(self._kept.values()):
                self.send([frames.PUBLISH, frames.pack_crc(data), data])

    def send(self, parts: list[bytes]) -> None:
        self.tell("sent" if sent(self.socket, parts) else "not taken")

    def take(self, wait_ms: int = 0) -> list[frames.Reply]:
        """What was answered; a fenced or lost connection goes on in a newer epoch."""
        replies = []
        for parts in answers(self.socket, wait_ms):
            reply = frames.parse_reply(parts)
            replies.append(reply)
            self.tell(f"answered {type(reply).__name__}")
            if isinstance(reply, Reject):
                self.tell.said[f"code {reply.code}"] = reply.reason
                if reply.code == frames.FENCED and self.epoch:
                    self.epoch, self.sequence = time.time_ns(), 0
            elif isinstance(reply, frames.Ack):
                kept = self._kept.items()
                self._kept = {number: data for number, data in kept if number > reply.sequence}
            elif isinstance(reply, frames.Nack) and reply.epoch == self.epoch and not self._keeps:
                self.sequence = reply.expected - 1
        return replies

    def fetch(self, lane: str, after: int = 0, request: int = 1) -> FetchedBatch | None:
        """The next records of a lane, and a receipt for them; None if there is no such answer."""
        self.send(frames.pack_fetch(frames.Fetch(request, after, 256, lane)))
        until = time.monotonic() + 2
        while time.monotonic() < until:
            for reply in self.take(100):
                if isinstance(reply, FetchedBatch) and reply.request == request:
                    self.send(frames.pack_receipt(frames.Receipt(reply.receipt)))
                    return reply
                if isinstance(reply, frames.SayHello | frames.Busy):
                    return None
        return None


def _topics(target: Target) -> list[str]:
    """Those that a learner may not publish to."""
    f = target.federation
    own = [topics.run_topic(f), topics.access_topic(f), topics.ledger_topic(f, "all")]
    own += [topics.task_topic(f, target.name), "hb/", f"{f}/", f"{f}/done/all/", "x" * 150]
    for name in OTHERS:
        own += [topics.task_topic(f, name), topics.done_topic(f, name)]
        own += [topics.member_topic(f, name), topics.ledger_topic(f, name)]
    return own


def others_topics(target: Target, end: End, tell: Tally) -> None:
    """Events of every type under topics that are not the attacker's, stored and transient."""
    with dealer(target, target.ingress, "broker") as socket:
        ingress = Ingress(socket, target, tell)
        ingress.hello()
        while not end.wait(0.01):
            topic, kind = random.choice(_topics(target)), random.choice(list(EVENT_TYPES))
            ingress.publish(ingress.envelope(topic, kind))
            beat = topics.beat_topic(target.federation, random.choice(OTHERS))
            ingress.send([frames.BEAT, beat.encode(), b"Progress", b""])
            ingress.take()


def forged(target: Target, end: End, tell: Tally) -> None:
    """Events in the names of others, among them envelopes of others that were read."""
    with dealer(target, target.ingress, "broker") as socket:
        ingress = Ingress(socket, target, tell)
        ingress.hello(reads_only=True)
        names = ["controller", "broker", "driver:local", *(f"learner:{name}" for name in OTHERS)]
        theirs: tuple[bytes, ...] = ()
        while not end.wait(0.002):
            if not theirs and (batch := ingress.fetch(topics.run_topic(target.federation))):
                theirs = tuple(record.envelope for record in batch.records)
            for envelope in theirs:
                ingress.publish(envelope)
            name = random.choice(names)
            topic = topics.done_topic(target.federation, name.rpartition(":")[2])
            fields = {"publisher": name, "epoch": random.choice([1, 2**62]), "sequence": 1}
            ingress.publish(ingress.envelope(topic, "TaskFailed", **fields))
            ingress.take()


def replayed(target: Target, end: End, tell: Tally) -> None:
    """What was sent once comes again: doubled, shuffled, with holes, of earlier connections."""
    recorded: list[bytes] = []
    topic = topics.done_topic(target.federation, target.name)
    while not end.come:
        with dealer(target, target.ingress, "broker") as socket:
            ingress = Ingress(socket, target, tell)
            ingress.hello()
            fresh = [ingress.envelope(topic, "TaskFailed") for _ in range(40)]
            recorded = [*fresh, *recorded[:200]]
            until = time.monotonic() + 2
            while time.monotonic() < until and not end.wait(0.02):
                for envelope in random.choices(recorded, k=20):
                    ingress.publish(envelope)
                far = ingress.envelope(topic, "TaskFailed", sequence=random.randrange(1, 2**63))
                old = ingress.envelope(topic, "TaskFailed", epoch=random.randrange(1, 1000))
                ingress.publish(far)
                ingress.publish(old)
                ingress.take()


def bomb_bytes(size: int = PAYLOAD_BYTES) -> Iterator[bytes]:
    """At most `size` bytes that are large, deep or many when they are read as protobuf."""
    room = size - 16
    packed = _varint(room) + bytes(room)
    yield b"\x42" + packed  # a number a byte, in field 8
    yield b"\x0a" + packed  # in field 1, a text or a message
    yield b"\x42\x00" * (room // 2)
    yield b"\x40" + b"\xff" * room  # a number that does not end
    yield b"\x0b" * room  # groups in groups
    yield b"\x32\x02\x0a\x00" * (room // 4)  # entries of a map
    yield b"\x0a\x00" * (room // 2)  # empty messages, or texts
    yield b"\x32\x0c\x0a\x01a\x11" + bytes(6) + b"\xf0\x7f"  # an infinite metric
    yield b"\xfa\xff\xff\xff\x0f" + packed  # of an unknown field
    yield os.urandom(room)


def _varint(value: int) -> bytes:
    data = b""
    while value > 127:
        data, value = data + bytes([value & 127 | 128]), value >> 7
    return data + bytes([value])


def bombs(target: Target, end: End, tell: Tally) -> None:
    """Payloads of events, envelopes and greetings that unfold."""
    own = [
        topics.done_topic(target.federation, target.name),
        topics.member_topic(target.federation, target.name),
    ]
    with dealer(target, target.ingress, "broker") as socket:
        ingress = Ingress(socket, target, tell)
        ingress.hello()
        while not end.come:
            for payload in bomb_bytes():
                topic, kind = random.choice(own), random.choice(["TaskCompleted", "LearnerJoined"])
                ingress.publish(ingress.envelope(topic, kind, payload))
                beat = topics.beat_topic(target.federation, target.name).encode()
                ingress.send([frames.BEAT, beat, b"Progress", payload[: 60 * 1024]])
                ingress.publish(payload)
                ingress.send([frames.HELLO, payload[:1000]])
                if end.wait(0.05):
                    break
                ingress.take()


def mutated(target: Target, end: End, tell: Tally) -> None:
    """Frames with some bits turned, parts doubled or left out, and what was never a frame."""
    f, name = target.federation, target.name
    with dealer(target, target.ingress, "broker") as socket:
        ingress = Ingress(socket, target, tell)
        ingress.hello()
        while not end.wait(0.001):
            done = pb.TaskCompleted(task_id="r.1.train.ada", learner=name, examples=1)
            payload = _turned(done.SerializeToString())
            data = ingress.envelope(topics.done_topic(f, name), "TaskCompleted", payload)
            fetch = frames.pack_fetch(frames.Fetch(1, 0, 9, topics.run_topic(f)))
            parts = random.choice([[frames.PUBLISH, frames.pack_crc(data), data], fetch])
            if random.random() < 0.5:  # good sums around bad events, and bad frames
                ingress.publish(_turned(data))
            else:
                parts = [_turned(part) if random.random() < 0.3 else part for part in parts]
                parts = random.choice([parts, parts[::-1], parts * 3, parts[:1], [os.urandom(99)]])
                ingress.send(parts)
            ingress.take()


def _turned(data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.randrange(1, 4)):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def oversized(target: Target, end: End, tell: Tally) -> None:
    """Parts of 257 KiB and more, by who may connect."""
    while not end.wait(0.01):
        for endpoint, whose, limit in _by_hand(target):
            _poured(target, endpoint, whose, tell, iter([(bytes(limit + 1), False)]))


def endless_event(target: Target, end: End, tell: Tally) -> None:
    """A message to the broker that never ends: another part follows, for as long as it is taken."""
    _endless(target, end, tell, _by_hand(target)[0])


def endless_update(target: Target, end: End, tell: Tally) -> None:
    """The same to the controller's bulk endpoint."""
    _endless(target, end, tell, _by_hand(target)[1])


def _endless(target: Target, end: End, tell: Tally, door: tuple[str, str, int]) -> None:
    def parts() -> Iterator[tuple[bytes, bool]]:
        while not end.come:
            yield bytes(PART_BYTES), True

    while not end.wait(0.1):
        _poured(target, *door[:2], tell, parts())


def _by_hand(target: Target) -> tuple[tuple[str, str, int], ...]:
    """The doors that take messages, whose they are, and the most that a part may have."""
    return (
        (target.ingress, "broker", frames.MESSAGE_BYTES_MAX),
        (target.bulk, "controller", BULK_BYTES_MAX),
    )


def _poured(
    target: Target, endpoint: str, whose: str, tell: Tally, parts: Iterator[tuple[bytes, bool]]
) -> None:
    """Connect past libzmq's own client, send the parts, see what becomes of the connection."""
    try:
        link = RawCurve(endpoint, target.identity(), target.server(whose))
    except (OSError, AssertionError):
        tell("not let in")
        return
    tell("let in")
    link.socket.settimeout(5)
    try:
        for body, more in parts:
            link.part(body, more=more)
            tell("bytes", len(body))
        while link.socket.recv(65536):
            pass
        tell("cut off")
    except TimeoutError:
        tell("not taken")
    except OSError:
        tell("cut off")
    finally:
        link.close()


ATTACKS: Final[dict[str, Attack]] = {
    "others-topics": others_topics,
    "forged": forged,
    "replayed": replayed,
    "bombs": bombs,
    "mutated": mutated,
    "oversized": oversized,
    "endless-event": endless_event,
    "endless-update": endless_update,
}
