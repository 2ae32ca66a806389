"""sequencer.py, through dispatch.py: whatever arrives in whatever order, the laws hold."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from metisfl.broker.dispatch import Dispatch, Reply
from metisfl.broker.sequencer import Append, Batch, Recovered
from metisfl.proto import frames
from metisfl.proto.events_pb2 import Envelope, Hello, Welcome
from metisfl.proto.frames import Ack, Busy, Reject

PUBLISHERS = ("learner:l1", "learner:l2", "controller")


def envelope(publisher: str, epoch: int, sequence: int, **fields: object) -> bytes:
    good: dict[str, object] = {
        "version": 1,
        "event_id": bytes(16),
        "publisher": publisher,
        "epoch": epoch,
        "sequence": sequence,
        "type": "TaskFailed",
    }
    return Envelope(**{**good, **fields}).SerializeToString()  # type: ignore[arg-type]


@dataclass
class Source:
    """A publisher as the model sees it: what it accepted in each epoch, poison or not."""

    name: str
    epoch: int = 1
    events: dict[int, list[bytes]] = field(default_factory=lambda: {1: []})
    acked: int = 0


class World:
    """Three publishers, a network that does what it likes, a disk that fails now and then."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.dispatch = Dispatch(Recovered(), incarnation=1, software="broker")
        self.log: list[Append] = []
        self.now = 100.0
        self.sources = [Source(name) for name in PUBLISHERS]
        self.in_flight: list[Batch] = []
        for source in self.sources:
            self.hello(source)

    def hello(self, source: Source) -> frames.Reply:
        peer = source.name.encode()
        if not self.dispatch.knows(peer):
            assert self.dispatch.connect(peer, source.name, self.now, lambda _: True)
        hello = Hello(protocol=frames.PROTOCOL, software="test", epoch=source.epoch)
        (answer, *_) = self.dispatch.handle(peer, frames.pack_hello(hello), self.now)
        assert isinstance(answer, Reply)
        return answer.message

    def send(self, source: Source, event: bytes) -> list[frames.Reply]:
        message = [frames.PUBLISH, frames.pack_crc(event), event]
        effects = self.dispatch.handle(source.name.encode(), message, self.now)
        return [effect.message for effect in effects if isinstance(effect, Reply)]

    def step(self) -> None:
        likely = {
            self.accept: 6,
            self.send_on: 8,
            self.disorder: 4,
            self.forge: 1,
            self.reconnect: 1,
            self.lose_the_database: 0.3,
            self.seal: 4,
            self.commit: 4,
            self.fail: 0.6,
        }
        (act,) = self.random.choices(list(likely), list(likely.values()))
        act(self.random.choice(self.sources))

    def accept(self, source: Source) -> None:
        """New events in the outbox: of federation f, of g, or poison."""
        events = source.events[source.epoch]
        subject = source.name.partition(":")[2]
        for kind in self.random.choices("fgp", [4, 2, 1], k=self.random.randrange(1, 6)):
            topic = f"{kind}/done/{subject}/" if subject else f"{kind}/task/l1/"
            fields: dict[str, object] = {"type": "not a type"} if kind == "p" else {"topic": topic}
            events.append(envelope(source.name, source.epoch, len(events) + 1, **fields))

    def send_on(self, source: Source) -> None:
        """What a client does: what is not acknowledged, in order; some of it is lost."""
        for event in source.events[source.epoch][source.acked :][:20]:
            if self.random.random() < 0.95:
                self.hear(source, self.send(source, event))

    def disorder(self, source: Source) -> None:
        """Events of any epoch: late, again, or far too early."""
        sent = [event for events in source.events.values() for event in events]
        for event in self.random.choices(sent, k=5) if sent else ():
            self.hear(source, self.send(source, event))

    def forge(self, source: Source) -> None:
        victim = self.random.choice(self.sources)
        events = victim.events[victim.epoch]
        if victim is not source and events:
            for reply in self.send(source, events[-1]):
                assert isinstance(reply, Reject | Busy)

    def reconnect(self, source: Source) -> None:
        welcome = self.hello(source)
        assert isinstance(welcome, Welcome)
        assert welcome.publisher_sequence >= source.acked

    def lose_the_database(self, source: Source) -> None:
        source.epoch += 1
        source.events[source.epoch] = []
        source.acked = 0

    def seal(self, _: Source) -> None:
        if batch := self.dispatch.sequencer.seal(1):
            self.in_flight.append(batch)

    def commit(self, _: Source) -> None:
        if self.in_flight:
            batch = self.in_flight.pop(0)
            self.log.extend(batch.appends)
            for effect in self.dispatch.committed(batch):
                assert isinstance(effect, Reply)
                (source,) = [s for s in self.sources if s.name.encode() == effect.peer]
                self.hear(source, [effect.message])

    def fail(self, _: Source) -> None:
        if self.in_flight:
            self.in_flight.clear()
            self.dispatch.failed("disk full", self.now)
        self.now += 0.3

    def hear(self, source: Source, replies: list[frames.Reply]) -> None:
        for reply in replies:
            if isinstance(reply, Ack) and reply.epoch == source.epoch:
                source.acked = max(source.acked, reply.sequence)

    def settle(self) -> None:
        """Network and disk behave at last."""
        self.now += 1
        while self.in_flight:
            self.commit(self.sources[0])
        for source in self.sources:
            for event in source.events[source.epoch]:
                self.send(source, event)
        self.seal(self.sources[0])
        self.commit(self.sources[0])

    def check(self) -> None:
        origins = [origin(place.envelope) for place in self.log]
        for source in self.sources:
            epochs = [epoch for name, epoch in origins if name == source.name]
            assert epochs == sorted(epochs), f"{source.name}: an epoch came back"
            for epoch, events in source.events.items():
                mine = [
                    place.envelope
                    for place, of in zip(self.log, origins, strict=True)
                    if of == (source.name, epoch)
                ]
                good = [event for event in events if not poison(event)]
                assert mine == good[: len(mine)], (
                    f"{source.name}, epoch {epoch}: order, hole, twice"
                )
                if epoch == source.epoch:
                    stored = set(mine)
                    lost = [e for e in events[: source.acked] if e not in stored and not poison(e)]
                    assert not lost, f"{source.name}: acknowledged but not stored"
        heads: dict[object, int] = {}
        for number, place in enumerate(self.log, start=1):
            assert place.sequence == number
            topic, federation = ("topic", place.topic_id), ("federation", place.federation_id)
            assert place.previous_in_topic == heads.get(topic, 0)
            assert place.previous_in_federation == heads.get(federation, 0)
            heads[topic] = heads[federation] = number


def origin(event: bytes) -> tuple[str, int]:
    parsed = Envelope.FromString(event)
    return parsed.publisher, parsed.epoch


def poison(event: bytes) -> bool:
    return Envelope.FromString(event).type == "not a type"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_any_order_gives_a_log_in_order_without_holes_each_event_once(seed: int) -> None:
    """Repeats, losses, reorders, forgeries, new epochs, commits and failures, from one seed."""
    world = World(seed)
    for _ in range(200):
        world.step()
    world.check()
    world.settle()
    world.check()
    for source in world.sources:
        stored = {place.envelope for place in world.log}
        missing = [e for e in source.events[source.epoch] if not poison(e) and e not in stored]
        assert not missing, f"{source.name}: never arrived though all was well at last"
