"""dispatch.py: what each message leads to, law by law; test_sequencer.py has them in any order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metisfl.broker import sequencer
from metisfl.broker.dispatch import SESSIONS_MAX, Forward, Read, Reply
from metisfl.broker.sequencer import Recovered
from metisfl.proto import frames
from metisfl.proto.events_pb2 import Hello, Welcome
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


# ---- One law after the other ---------------------------------------------------------


def test_an_event_is_acknowledged_when_it_is_on_disk_and_not_before(desk: Any) -> None:
    assert desk.publish(L1, 1, 2) == []
    assert desk.commit() == [Ack(1, 2)]
    assert desk.stored == [b"learner:l1 1 1", b"learner:l1 1 2"]


def test_one_batch_gives_each_publisher_one_answer(desk: Any) -> None:
    desk.publish(L1, 1, 2, 3)
    desk.publish(L2, 1)
    assert sorted(desk.commit(), key=str) == [Ack(1, 1), Ack(1, 3)]


def test_a_repeated_event_is_acknowledged_again_and_stored_once(desk: Any) -> None:
    desk.publish(L1, 1)
    desk.commit()
    assert desk.publish(L1, 1) == [Ack(1, 1)]
    desk.commit()
    assert len(desk.log) == 1


def test_a_repeat_of_what_is_not_stored_yet_is_not_acknowledged(desk: Any) -> None:
    desk.publish(L1, 1)
    assert desk.publish(L1, 1) == []
    assert desk.commit() == [Ack(1, 1)]


def test_the_answer_goes_to_the_connection_that_spoke_last(desk: Any) -> None:
    desk.publish(L1, 1)
    desk.hello(L1, peer=b"again")
    desk.send(b"again", desk.message(desk.envelope(L1, 1, 1)))
    batch = desk.dispatch.sequencer.seal(1)
    assert batch is not None
    assert desk.dispatch.committed(batch) == [Reply(b"again", Ack(1, 1))]


def test_a_hole_is_asked_for_once(desk: Any) -> None:
    assert desk.publish(L1, 2, 3, 4) == [Nack(1, 1)]
    desk.now += 1
    assert desk.publish(L1, 5) == [Nack(1, 1)]
    assert desk.commit() == []


def test_damage_is_not_consumed(desk: Any) -> None:
    data = desk.envelope(L1, 1, 1)
    assert desk.send(L1, [frames.PUBLISH, bytes(4), data]) == [Nack(1, 1)]
    assert desk.publish(L1, 1) == []
    assert desk.commit() == [Ack(1, 1)]


def test_a_newer_epoch_starts_at_one_and_ends_the_older(desk: Any) -> None:
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


def test_a_client_with_an_old_epoch_is_told_at_hello(desk: Any) -> None:
    desk.publish(L1, 1, epoch=5)
    desk.commit()
    welcome, reject = desk.hello(L1, epoch=4, peer=b"zombie")
    assert isinstance(welcome, Welcome)
    assert isinstance(reject, Reject)
    assert reject.code == FENCED


def test_a_forged_name_is_refused_and_moves_nobodys_watermark(desk: Any) -> None:
    (reject,) = desk.send(L1, desk.message(desk.envelope(L2, 1, 1)))
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
    desk: Any, fields: dict[str, object]
) -> None:
    poison = desk.envelope(L1, 1, 1, **fields)
    assert desk.send(L1, desk.message(poison)) == []
    assert desk.publish(L1, 2) == []
    batch = desk.dispatch.sequencer.seal(1)
    assert batch is not None
    assert [(r.publisher, r.sequence, r.envelope) for r in batch.refused] == [(L1, 1, poison)]
    reject, ack = desk.committed(batch)
    assert isinstance(reject, Reject)
    assert (reject.code, reject.sequence, ack) == (POISON, 1, Ack(1, 2))
    assert desk.stored == [b"learner:l1 1 2"]


def test_refused_events_alone_do_not_make_the_disk_work(desk: Any) -> None:
    """However many there are, they go with the next event, or when they are due."""
    for sequence in range(1, 51):
        desk.send(L1, desk.message(desk.envelope(L1, 1, sequence, version=2)))
        assert desk.dispatch.sequencer.seal(1) is None, "a poison event is worth no commit"
    desk.publish(L2, 1)
    batch = desk.dispatch.sequencer.seal(1)
    assert len(batch.refused) == 50, "an event waits for no poison"
    desk.committed(batch)
    desk.send(L1, desk.message(desk.envelope(L1, 1, 51, version=2)))
    desk.dispatch.sequencer.leftovers_due()
    assert len(desk.dispatch.sequencer.seal(1).refused) == 1


@pytest.mark.parametrize(
    "parts",
    [
        [b"P"],
        [b"P", bytes(4), b"\xff", b""],
        [b"P", frames.pack_crc(b"\xff no protobuf"), b"\xff no protobuf"],
        [b"P", frames.pack_crc(b""), b""],
        [b"P", bytes(4), bytes(256 * 1024 + 1)],
        [b"Q", b"x"],
        [b""],
        [b"F", bytes(24), b"../etc/"],
        [bytes([byte]) for byte in range(5)],
    ],
)
def test_what_is_not_understood_is_refused_and_consumes_nothing(
    desk: Any, parts: list[bytes]
) -> None:
    (reject,) = desk.send(L1, parts)
    assert isinstance(reject, Reject)
    assert (reject.code, reject.sequence) == (REFUSED, 0)
    assert desk.publish(L1, 1) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([b"H", b"P", b"F", b"C", b"B", b"", b"W"]),
    st.lists(st.binary(max_size=40), max_size=4),
)
def test_no_message_raises_anything(desk: Any, kind: bytes, rest: list[bytes]) -> None:
    desk.now += 1
    for effect in desk.dispatch.handle(L1.encode(), [kind, *rest], desk.now):
        assert isinstance(effect, Reply | Read | Forward)


def test_refusals_are_rationed(desk: Any) -> None:
    answers = [desk.send(L1, [b"Q"]) for _ in range(100)]
    assert sum(map(len, answers)) == 20, "a burst of two seconds' worth, then silence"
    desk.now += 1
    assert len(desk.send(L1, [b"Q"])) == 1


def test_nothing_is_taken_before_hello(desks: Any) -> None:
    desk = desks()
    desk.connect(b"p", L1)
    assert desk.send(b"p", [b""]) == [SayHello()], "the empty message of a new connection"
    desk.now += 1
    assert desk.send(b"p", desk.message(desk.envelope(L1, 1, 1))) == [SayHello()]
    assert desk.commit() == []


def test_hello_tells_how_far_the_publisher_is(desk: Any) -> None:
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


def test_another_protocol_is_refused(desks: Any) -> None:
    desk = desks()
    desk.connect(b"p", L1)
    (reject,) = desk.send(b"p", frames.pack_hello(Hello(protocol=99, software="future")))
    assert isinstance(reject, Reject)
    assert "protocol 99 of 'future'" in reject.reason


def test_a_ninth_connection_takes_the_place_of_the_oldest(desks: Any) -> None:
    desk = desks()
    for number in range(SESSIONS_MAX + 1):
        desk.hello(L1, peer=bytes([number]))
    assert [desk.dispatch.knows(bytes([n])) for n in range(3)] == [False, True, True]


# ---- Reading, beats, cursors ------------------------------------------------------------


def fetch(lane: str, after: int = 0, request: int = 4) -> list[bytes]:
    return frames.pack_fetch(Fetch(request, after, 256, lane))


def test_a_lane_without_news_is_answered_without_the_disk(desk: Any) -> None:
    assert desk.send(L1, fetch("f/task/l1/")) == [FetchedBatch(4, 0, 0, 0, ())]
    desk.publish(L2, 1)
    desk.commit()
    assert desk.send(L1, fetch("f/task/l1/")) == [FetchedBatch(4, 1, 1, 0, ())]
    assert desk.send(CONTROLLER, fetch("f/", after=1)) == [FetchedBatch(4, 1, 1, 0, ())]
    assert desk.send(CONTROLLER, fetch("f/", after=9)) == [FetchedBatch(4, 1, 1, 0, ())]


def test_a_lane_with_news_is_read_up_to_what_is_on_disk(desk: Any) -> None:
    desk.publish(CONTROLLER, 1)
    desk.commit()
    desk.publish(CONTROLLER, 2)
    (topic,) = desk.dispatch.handle(L1.encode(), fetch("f/task/l1/"), desk.now)
    (whole,) = desk.dispatch.handle(CONTROLLER.encode(), fetch("f/"), desk.now)
    assert isinstance(topic, Read)
    assert isinstance(whole, Read)
    assert (topic.of_federation, topic.lane_head, topic.head) == (False, 1, 1)
    assert (whole.of_federation, whole.lane_head, whole.head) == (True, 1, 1)


def test_nobody_reads_what_is_not_theirs(desk: Any) -> None:
    for lane in ("f/task/l2/", "f/done/l2/", "f/"):
        (reject,) = desk.send(L1, fetch(lane))
        assert isinstance(reject, Reject)
        assert f"may not read {lane!r}" in reject.reason


def test_beats_are_forwarded_up_to_a_rate(desk: Any) -> None:
    beat = Beat("f/beat/l1/", "Progress", b"p")
    effects = [
        desk.dispatch.handle(L1.encode(), frames.pack_beat(beat), desk.now) for _ in range(300)
    ]
    assert [e for e in effects if e] == [[Forward(beat)]] * 200
    desk.now += 1
    assert desk.dispatch.handle(L1.encode(), frames.pack_beat(beat), desk.now) == [Forward(beat)]
    assert desk.commit() == []


@pytest.mark.parametrize("topic", ["f/beat/l2/", "f/done/l1/", "nonsense"])
def test_a_beat_of_another_is_refused(desk: Any, topic: str) -> None:
    (reject,) = desk.send(L1, frames.pack_beat(Beat(topic, "Progress", b"")))
    assert isinstance(reject, Reject)


def test_cursors_go_to_disk_with_events_or_when_due(desk: Any) -> None:
    desk.publish(CONTROLLER, 1)
    desk.commit()
    desk.send(L1, frames.pack_cursor(CursorReport(1, "f/task/l1/")))
    assert desk.dispatch.sequencer.seal(1) is None, "a cursor alone is not worth a commit"
    desk.dispatch.sequencer.leftovers_due()
    batch = desk.dispatch.sequencer.seal(1)
    assert batch is not None
    assert batch.cursors == [(L1, "f/task/l1/", 1)]
    assert desk.committed(batch) == []
    desk.send(L1, frames.pack_cursor(CursorReport(1, "f/task/l2/")))
    desk.send(L1, frames.pack_cursor(CursorReport(1, "nowhere/run/all/")))
    desk.dispatch.sequencer.leftovers_due()
    assert desk.dispatch.sequencer.seal(1) is None, "not its lane, and a lane that is not there"


def test_a_cursor_beyond_the_log_is_not_believed(desk: Any) -> None:
    """Its reader has seen another past; of this one it has not read what is to come."""
    desk.publish(CONTROLLER, 1)
    desk.commit()
    desk.send(CONTROLLER, frames.pack_cursor(CursorReport(2, "f/")))
    desk.dispatch.sequencer.leftovers_due()
    assert desk.dispatch.sequencer.seal(1) is None


# ---- Batches ------------------------------------------------------------------------------


def test_a_second_batch_waits_for_the_first_unless_it_is_full(desk: Any) -> None:
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


def test_what_cannot_be_stored_was_never_there(desk: Any) -> None:
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


def test_a_cursor_survives_the_failure_of_its_batch(desk: Any) -> None:
    """Nobody reports it again, and a full log waits for nothing else."""
    desk.publish(CONTROLLER, 1)
    desk.commit()
    desk.send(CONTROLLER, frames.pack_cursor(CursorReport(1, "f/")))
    desk.publish(L1, 1)
    failing = desk.dispatch.sequencer.seal(1)
    assert failing is not None
    assert failing.cursors == [(CONTROLLER, "f/", 1)]
    desk.dispatch.failed("disk full", desk.now)
    desk.dispatch.sequencer.leftovers_due()
    again = desk.dispatch.sequencer.seal(1)
    assert again is not None
    assert (again.cursors, again.appends) == ([(CONTROLLER, "f/", 1)], [])


def test_it_goes_on_where_the_disk_says(desks: Any) -> None:
    recovered = Recovered(
        head=7,
        federations=[(1, "f/", 7)],
        topics=[(2, "f/done/l1/", 1, 5), (3, "f/task/l1/", 1, 7)],
        watermarks=[(L1, 3, 20)],
    )
    desk = desks(recovered)
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
