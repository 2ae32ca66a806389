"""dispatch.py and sequencer.py: whatever arrives in whatever order, the laws hold."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metisfl.broker import sequencer
from metisfl.broker.dispatch import FETCHES_MAX, SESSIONS_MAX, Dispatch, Forward, Read, Reply
from metisfl.broker.sequencer import Append, Batch, Recovered
from metisfl.proto import frames
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
)

L1, L2, CONTROLLER = "learner:l1", "learner:l2", "controller"


def envelope(publisher: str, epoch: int, sequence: int, **fields: object) -> bytes:
    """An event as its publisher would send it, but for `fields`."""
    name = publisher.partition(":")[2]
    good: dict[str, object] = {
        "version": 1,
        "event_id": bytes(16),
        "topic": f"f/done/{name}/" if name else "f/task/l1/",
        "publisher": publisher,
        "epoch": epoch,
        "sequence": sequence,
        "type": "TaskFailed",
        "payload": f"{publisher} {epoch} {sequence}".encode(),
    }
    return Envelope(**{**good, **fields}).SerializeToString()  # type: ignore[arg-type]


def publish(data: bytes) -> list[bytes]:
    return [frames.PUBLISH, frames.pack_crc(data), data]


class Desk:
    """A dispatch with its disk: batches are committed on demand, answers come by principal."""

    def __init__(self, recovered: Recovered | None = None) -> None:
        self.dispatch = Dispatch(recovered or Recovered(), incarnation=9, software="broker")
        self.log: list[Append] = []
        self.now = 100.0
        self.epochs: dict[str, int] = {}

    def hello(self, principal: str, epoch: int = 1, peer: bytes = b"") -> list[frames.Reply]:
        peer = peer or principal.encode()
        if not self.dispatch.knows(peer):
            self.dispatch.connect(peer, principal, self.now)
        hello = Hello(protocol=frames.PROTOCOL, software="test", epoch=epoch)
        return self.send(peer, frames.pack_hello(hello))

    def send(self, peer: str | bytes, parts: list[bytes]) -> list[frames.Reply]:
        peer = peer.encode() if isinstance(peer, str) else peer
        effects = self.dispatch.handle(peer, parts, self.now)
        assert all(isinstance(e, Reply) and e.peer == peer for e in effects), effects
        return [effect.message for effect in effects if isinstance(effect, Reply)]

    def publish(self, principal: str, *sequences: int, epoch: int = 1) -> list[frames.Reply]:
        return [
            reply
            for sequence in sequences
            for reply in self.send(principal, publish(envelope(principal, epoch, sequence)))
        ]

    def commit(self) -> list[frames.Reply]:
        """Seal, store, and return what the publishers are told."""
        batch = self.dispatch.sequencer.seal(1)
        return self.committed(batch) if batch else []

    def committed(self, batch: Batch) -> list[frames.Reply]:
        self.log.extend(batch.appends)
        return [e.message for e in self.dispatch.committed(batch) if isinstance(e, Reply)]

    @property
    def stored(self) -> list[bytes]:
        return [Envelope.FromString(place.envelope).payload for place in self.log]


@pytest.fixture
def desk() -> Desk:
    desk = Desk()
    for principal in (L1, L2, CONTROLLER):
        desk.hello(principal)
    return desk


# ---- One law after the other ---------------------------------------------------------


def test_an_event_is_acknowledged_when_it_is_on_disk_and_not_before(desk: Desk) -> None:
    assert desk.publish(L1, 1, 2) == []
    assert desk.commit() == [Ack(1, 2)]
    assert desk.stored == [b"learner:l1 1 1", b"learner:l1 1 2"]


def test_one_batch_gives_each_publisher_one_answer(desk: Desk) -> None:
    desk.publish(L1, 1, 2, 3)
    desk.publish(L2, 1)
    assert sorted(desk.commit(), key=str) == [Ack(1, 1), Ack(1, 3)]


def test_a_repeated_event_is_acknowledged_again_and_stored_once(desk: Desk) -> None:
    desk.publish(L1, 1)
    desk.commit()
    assert desk.publish(L1, 1) == [Ack(1, 1)]
    desk.commit()
    assert len(desk.log) == 1


def test_a_repeat_of_what_is_not_stored_yet_is_not_acknowledged(desk: Desk) -> None:
    desk.publish(L1, 1)
    assert desk.publish(L1, 1) == []
    assert desk.commit() == [Ack(1, 1)]


def test_the_answer_goes_to_the_connection_that_spoke_last(desk: Desk) -> None:
    desk.publish(L1, 1)
    desk.hello(L1, peer=b"again")
    desk.send(b"again", publish(envelope(L1, 1, 1)))
    batch = desk.dispatch.sequencer.seal(1)
    assert batch is not None
    assert desk.dispatch.committed(batch) == [Reply(b"again", Ack(1, 1))]


def test_a_hole_is_asked_for_once(desk: Desk) -> None:
    assert desk.publish(L1, 2, 3, 4) == [Nack(1, 1)]
    desk.now += 1
    assert desk.publish(L1, 5) == [Nack(1, 1)]
    assert desk.commit() == []


def test_damage_is_not_consumed(desk: Desk) -> None:
    data = envelope(L1, 1, 1)
    assert desk.send(L1, [frames.PUBLISH, bytes(4), data]) == [Nack(1, 1)]
    assert desk.publish(L1, 1) == []
    assert desk.commit() == [Ack(1, 1)]


def test_a_newer_epoch_starts_at_one_and_ends_the_older(desk: Desk) -> None:
    desk.publish(L1, 1, 2)
    desk.commit()
    assert desk.publish(L1, 3, epoch=5) == [Nack(5, 1)]
    assert desk.publish(L1, 1, epoch=5) == []
    assert desk.commit() == [Ack(5, 1)]
    (reject,) = desk.publish(L1, 3, epoch=1)
    assert isinstance(reject, Reject)
    assert (reject.code, reject.sequence) == (FENCED, 3)
    desk.commit()
    assert len(desk.log) == 3


def test_a_client_with_an_old_epoch_is_told_at_hello(desk: Desk) -> None:
    desk.publish(L1, 1, epoch=5)
    desk.commit()
    welcome, reject = desk.hello(L1, epoch=4, peer=b"zombie")
    assert isinstance(welcome, Welcome)
    assert isinstance(reject, Reject)
    assert reject.code == FENCED


def test_a_forged_name_is_refused_and_moves_nobodys_watermark(desk: Desk) -> None:
    (reject,) = desk.send(L1, publish(envelope(L2, 1, 1)))
    assert isinstance(reject, Reject)
    assert reject.code == REFUSED
    assert "'learner:l2' came from learner:l1" in reject.reason
    assert desk.publish(L1, 1) == desk.publish(L2, 1) == [], "both go on with their first event"


@pytest.mark.parametrize(
    "fields",
    [
        {"topic": "f/done/l1"},
        {"topic": "f/done/l2/"},
        {"topic": "f/beat/l1/"},
        {"type": "no type"},
        {"version": 2},
        {"event_id": b"short"},
        {"payload": bytes(193 * 1024)},
        {"correlation_id": "x" * 201},
    ],
)
def test_a_poison_event_is_put_aside_and_the_next_goes_on(
    desk: Desk, fields: dict[str, object]
) -> None:
    poison = envelope(L1, 1, 1, **fields)
    assert desk.send(L1, publish(poison)) == []
    assert desk.publish(L1, 2) == []
    batch = desk.dispatch.sequencer.seal(1)
    assert batch is not None
    assert [(r.publisher, r.sequence, r.envelope) for r in batch.refused] == [(L1, 1, poison)]
    reject, ack = desk.committed(batch)
    assert isinstance(reject, Reject)
    assert (reject.code, reject.sequence, ack) == (POISON, 1, Ack(1, 2))
    assert desk.stored == [b"learner:l1 1 2"]


@pytest.mark.parametrize(
    "parts",
    [
        [b"P"],
        [b"P", bytes(4), b"\xff", b""],
        publish(b"\xff\xff no protobuf"),
        publish(b""),
        publish(bytes(256 * 1024 + 1)),
        [b"Q", b"x"],
        [b""],
        [b"F", bytes(16), b"../etc/"],
        [bytes([byte]) for byte in range(5)],
    ],
)
def test_what_is_not_understood_is_refused_and_consumes_nothing(
    desk: Desk, parts: list[bytes]
) -> None:
    (reject,) = desk.send(L1, parts)
    assert isinstance(reject, Reject)
    assert (reject.code, reject.sequence) == (REFUSED, 0)
    assert desk.publish(L1, 1) == []


def test_refusals_are_rationed(desk: Desk) -> None:
    answers = [desk.send(L1, [b"Q"]) for _ in range(100)]
    assert sum(map(len, answers)) == 20, "a burst of two seconds' worth, then silence"
    desk.now += 1
    assert len(desk.send(L1, [b"Q"])) == 1


def test_nothing_is_taken_before_hello() -> None:
    desk = Desk()
    desk.dispatch.connect(b"p", L1, desk.now)
    assert desk.send(b"p", [b""]) == [SayHello()], "the empty message of a new connection"
    desk.now += 1
    assert desk.send(b"p", publish(envelope(L1, 1, 1))) == [SayHello()]
    assert desk.commit() == []


def test_hello_tells_how_far_the_publisher_is(desk: Desk) -> None:
    desk.publish(L1, 1, 2)
    (before,) = desk.hello(L1)
    desk.commit()
    (after,) = desk.hello(L1)
    (other,) = desk.hello(L1, epoch=7)
    assert isinstance(before, Welcome)
    assert isinstance(after, Welcome)
    assert isinstance(other, Welcome)
    assert (before.publisher_sequence, after.publisher_sequence) == (0, 2)
    assert other.publisher_sequence == 0, "another epoch starts anew"
    assert (after.head, after.incarnation, after.principal) == (2, 9, L1)


def test_another_protocol_is_refused() -> None:
    desk = Desk()
    desk.dispatch.connect(b"p", L1, desk.now)
    (reject,) = desk.send(b"p", frames.pack_hello(Hello(protocol=2, software="future")))
    assert isinstance(reject, Reject)
    assert "protocol 2 of 'future'" in reject.reason


def test_a_ninth_connection_takes_the_place_of_the_oldest() -> None:
    desk = Desk()
    for number in range(SESSIONS_MAX + 1):
        desk.hello(L1, peer=bytes([number]))
    assert [desk.dispatch.knows(bytes([n])) for n in range(3)] == [False, True, True]


def test_who_is_no_longer_listed_is_forgotten(desk: Desk) -> None:
    desk.dispatch.keep_only({L2})
    assert not desk.dispatch.knows(L1.encode())
    assert desk.dispatch.knows(L2.encode())


# ---- Reading, beats, cursors ------------------------------------------------------------


def fetch(lane: str, after: int = 0, request: int = 4) -> list[bytes]:
    return frames.pack_fetch(Fetch(request, after, 256, lane))


def test_a_lane_without_news_is_answered_without_the_disk(desk: Desk) -> None:
    assert desk.send(L1, fetch("f/task/l1/")) == [FetchedBatch(4, 0, 0, ())]
    desk.publish(L2, 1)
    desk.commit()
    assert desk.send(L1, fetch("f/task/l1/")) == [FetchedBatch(4, 1, 1, ())]
    assert desk.send(CONTROLLER, fetch("f/", after=1)) == [FetchedBatch(4, 1, 1, ())]
    assert desk.send(CONTROLLER, fetch("f/", after=9)) == [FetchedBatch(4, 1, 1, ())]


def test_a_lane_with_news_is_read_up_to_what_is_on_disk(desk: Desk) -> None:
    desk.publish(CONTROLLER, 1)
    desk.commit()
    desk.publish(CONTROLLER, 2)
    (topic,) = desk.dispatch.handle(L1.encode(), fetch("f/task/l1/"), desk.now)
    (whole,) = desk.dispatch.handle(CONTROLLER.encode(), fetch("f/"), desk.now)
    assert isinstance(topic, Read)
    assert isinstance(whole, Read)
    assert (topic.of_federation, topic.lane_head, topic.head) == (False, 1, 1)
    assert (whole.of_federation, whole.lane_head, whole.head) == (True, 1, 1)


def test_too_many_fetches_at_once_are_put_off(desk: Desk) -> None:
    desk.publish(CONTROLLER, 1)
    desk.commit()
    for _ in range(FETCHES_MAX):
        assert desk.dispatch.handle(L1.encode(), fetch("f/task/l1/"), desk.now)
    (busy,) = desk.send(L1, fetch("f/task/l1/", request=77))
    assert isinstance(busy, Busy)
    assert busy.request == 77
    desk.dispatch.answered(L1.encode())
    (read,) = desk.dispatch.handle(L1.encode(), fetch("f/task/l1/"), desk.now)
    assert isinstance(read, Read)


def test_nobody_reads_what_is_not_theirs(desk: Desk) -> None:
    for lane in ("f/task/l2/", "f/done/l2/", "f/"):
        (reject,) = desk.send(L1, fetch(lane))
        assert isinstance(reject, Reject)
        assert f"may not read {lane!r}" in reject.reason


def test_beats_are_forwarded_up_to_a_rate(desk: Desk) -> None:
    beat = Beat("f/beat/l1/", "Progress", b"p")
    effects = [
        desk.dispatch.handle(L1.encode(), frames.pack_beat(beat), desk.now) for _ in range(300)
    ]
    assert [e for e in effects if e] == [[Forward(beat)]] * 200
    desk.now += 1
    assert desk.dispatch.handle(L1.encode(), frames.pack_beat(beat), desk.now) == [Forward(beat)]
    assert desk.commit() == []


@pytest.mark.parametrize("topic", ["f/beat/l2/", "f/done/l1/", "nonsense"])
def test_a_beat_of_another_is_refused(desk: Desk, topic: str) -> None:
    (reject,) = desk.send(L1, frames.pack_beat(Beat(topic, "Progress", b"")))
    assert isinstance(reject, Reject)


def test_cursors_go_to_disk_with_events_or_when_due(desk: Desk) -> None:
    desk.publish(CONTROLLER, 1)
    desk.commit()
    desk.send(L1, frames.pack_cursor(CursorReport(1, "f/task/l1/")))
    assert desk.dispatch.sequencer.seal(1) is None, "a cursor alone is not worth a commit"
    desk.dispatch.sequencer.cursors_due()
    batch = desk.dispatch.sequencer.seal(1)
    assert batch is not None
    assert batch.cursors == [(L1, "f/task/l1/", 1)]
    assert desk.committed(batch) == []
    desk.send(L1, frames.pack_cursor(CursorReport(1, "f/task/l2/")))
    desk.send(L1, frames.pack_cursor(CursorReport(1, "nowhere/run/all/")))
    desk.dispatch.sequencer.cursors_due()
    assert desk.dispatch.sequencer.seal(1) is None, "not its lane, and a lane that is not there"


# ---- Batches ------------------------------------------------------------------------------


def test_a_second_batch_waits_for_the_first_unless_it_is_full(desk: Desk) -> None:
    desk.publish(L1, 1)
    first = desk.dispatch.sequencer.seal(1)
    desk.publish(L1, *range(2, 1 + sequencer.BATCH_EVENTS_MAX))
    assert desk.dispatch.sequencer.seal(1) is None
    desk.publish(L1, 1 + sequencer.BATCH_EVENTS_MAX)
    assert desk.dispatch.sequencer.full
    second = desk.dispatch.sequencer.seal(1)
    assert first is not None
    assert second is not None
    desk.publish(L1, *range(2 + sequencer.BATCH_EVENTS_MAX, 2 + 2 * sequencer.BATCH_EVENTS_MAX))
    assert desk.dispatch.sequencer.seal(1) is None, "two in flight are enough"
    assert desk.committed(first) == [Ack(1, 1)]
    assert desk.committed(second) == [Ack(1, 513)]


def test_what_cannot_be_stored_was_never_there(desk: Desk) -> None:
    desk.publish(L1, 1)
    desk.commit()
    desk.publish(L1, 2)
    desk.publish(L2, 1)
    failing = desk.dispatch.sequencer.seal(1)
    desk.publish(CONTROLLER, 1)
    told = {e.peer: e.message for e in desk.dispatch.failed("disk full", desk.now)}  # type: ignore[union-attr]
    assert told == {p.encode(): Busy(250, 0, "disk full") for p in (L1, L2, CONTROLLER)}
    assert failing is not None

    desk.now += 0.1
    assert desk.publish(L1, 2) == [Busy(250, 0, "disk full")], "for a moment nothing is tried"
    desk.now += 0.2
    assert desk.publish(L1, 2) == desk.publish(L2, 1) == []
    assert sorted(desk.commit(), key=str) == [Ack(1, 1), Ack(1, 2)]
    assert [place.sequence for place in desk.log] == [1, 2, 3]
    assert desk.log[1].previous_in_topic == 1


def test_it_goes_on_where_the_disk_says(desk: Desk) -> None:
    recovered = Recovered(
        head=7,
        federations=[(1, "f/", 7)],
        topics=[(2, "f/done/l1/", 1, 5), (3, "f/task/l1/", 1, 7)],
        watermarks=[(L1, 3, 20)],
    )
    desk = Desk(recovered)
    (welcome,) = desk.hello(L1, epoch=3)
    assert isinstance(welcome, Welcome)
    assert (welcome.head, welcome.publisher_sequence) == (7, 20)
    desk.hello(L2)
    assert desk.publish(L1, 20, 21, epoch=3) == [Ack(3, 20)]
    assert desk.publish(L2, 1) == []
    desk.commit()
    first, second = desk.log
    assert first[:5] == (8, 2, 1, 5, 7)
    assert second[:5] == (9, 4, 1, 0, 8), "a new topic has a number of its own"


# ---- Any order ---------------------------------------------------------------------------


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
        self.desk = Desk()
        self.sources = [Source(name) for name in (L1, L2, CONTROLLER)]
        self.in_flight: list[Batch] = []
        for source in self.sources:
            self.desk.hello(source.name)

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
                self.hear(source, self.desk.send(source.name, publish(event)))

    def disorder(self, source: Source) -> None:
        """Events of any epoch: late, again, or far too early."""
        sent = [event for events in source.events.values() for event in events]
        for event in self.random.choices(sent, k=5) if sent else ():
            self.hear(source, self.desk.send(source.name, publish(event)))

    def forge(self, source: Source) -> None:
        victim = self.random.choice(self.sources)
        events = victim.events[victim.epoch]
        if victim is not source and events:
            for reply in self.desk.send(source.name, publish(events[-1])):
                assert isinstance(reply, Reject | Busy)

    def reconnect(self, source: Source) -> None:
        welcome = self.desk.hello(source.name, epoch=source.epoch)[0]
        assert isinstance(welcome, Welcome)
        assert welcome.publisher_sequence >= source.acked

    def lose_the_database(self, source: Source) -> None:
        source.epoch += 1
        source.events[source.epoch] = []
        source.acked = 0

    def seal(self, _: Source) -> None:
        if batch := self.desk.dispatch.sequencer.seal(1):
            self.in_flight.append(batch)

    def commit(self, _: Source) -> None:
        if self.in_flight:
            batch = self.in_flight.pop(0)
            self.desk.log.extend(batch.appends)
            for effect in self.desk.dispatch.committed(batch):
                assert isinstance(effect, Reply)
                (source,) = [s for s in self.sources if s.name.encode() == effect.peer]
                self.hear(source, [effect.message])

    def fail(self, _: Source) -> None:
        if self.in_flight:
            self.in_flight.clear()
            self.desk.dispatch.failed("disk full", self.desk.now)
        self.desk.now += 0.3

    def hear(self, source: Source, replies: list[frames.Reply]) -> None:
        for reply in replies:
            if isinstance(reply, Ack) and reply.epoch == source.epoch:
                source.acked = max(source.acked, reply.sequence)

    def settle(self) -> None:
        """Network and disk behave at last."""
        self.desk.now += 1
        while self.in_flight:
            self.commit(self.sources[0])
        for source in self.sources:
            for event in source.events[source.epoch]:
                self.desk.send(source.name, publish(event))
        self.seal(self.sources[0])
        self.commit(self.sources[0])

    def check(self) -> None:
        origins = [origin(place.envelope) for place in self.desk.log]
        for source in self.sources:
            epochs = [epoch for name, epoch in origins if name == source.name]
            assert epochs == sorted(epochs), f"{source.name}: an epoch came back"
            for epoch, events in source.events.items():
                mine = [
                    place.envelope
                    for place, of in zip(self.desk.log, origins, strict=True)
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
        for number, place in enumerate(self.desk.log, start=1):
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
        stored = {place.envelope for place in world.desk.log}
        missing = [e for e in source.events[source.epoch] if not poison(e) and e not in stored]
        assert not missing, f"{source.name}: never arrived though all was well at last"
