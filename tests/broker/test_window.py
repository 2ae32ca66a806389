"""window.py: what a publisher does with what the broker says, and with its silence."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metisfl.broker.window import (
    WINDOW_EVENTS,
    EventRejected,
    Fenced,
    HelloWanted,
    HistoryLost,
    Patience,
    Window,
)
from metisfl.proto.errors import PeerError, UserError
from metisfl.proto.events_pb2 import Welcome
from metisfl.proto.frames import (
    FENCED,
    POISON,
    PROTOCOL,
    REFUSED,
    Ack,
    Busy,
    Nack,
    Reject,
    SayHello,
)

NOW = 1000.0


def welcome(stored: int, **fields: object) -> Welcome:
    good: dict[str, object] = {"protocol": PROTOCOL, "principal": "learner:l1"}
    return Welcome(publisher_sequence=stored, **{**good, **fields})  # type: ignore[arg-type]


def window(last: int, acked: int = 0, *, welcomed: bool = True) -> Window:
    made = Window(principal="learner:l1", epoch=1, acked=acked, last=last, now=NOW)
    if welcomed:
        made.handle(welcome(acked), NOW)
    return made


def send_all(window: Window, now: float = NOW) -> list[int]:
    after, count = window.sendable(now)
    for sequence in range(after + 1, after + count + 1):
        window.was_sent(sequence)
    return list(range(after + 1, after + count + 1))


def test_nothing_goes_out_before_the_welcome() -> None:
    unknown = window(last=3, welcomed=False)
    assert send_all(unknown) == []
    assert unknown.handle(SayHello(), NOW) == HelloWanted()
    assert send_all(unknown) == []
    unknown.handle(welcome(0), NOW)
    assert send_all(unknown) == [1, 2, 3]


def test_no_more_than_the_window_is_on_its_way() -> None:
    full = window(last=1000)
    assert len(send_all(full)) == WINDOW_EVENTS == 256
    assert send_all(full) == []
    full.handle(Ack(1, 10), NOW)
    assert send_all(full) == list(range(257, 267))


def test_an_ack_covers_all_before_it_and_never_goes_back() -> None:
    sent = window(last=9)
    send_all(sent)
    sent.handle(Ack(1, 5), NOW)
    sent.handle(Ack(1, 3), NOW)
    sent.handle(Ack(2, 9), NOW)
    assert sent.acked == 5, "an older ack and one of another epoch change nothing"


def test_a_nack_sends_again_from_where_the_broker_is() -> None:
    sent = window(last=9)
    send_all(sent)
    sent.handle(Nack(1, 4), NOW)
    assert send_all(sent) == [4, 5, 6, 7, 8, 9]
    assert sent.acked == 0, "what the broker has is not yet on its disk"


def test_a_new_connection_sends_again_what_the_broker_does_not_have() -> None:
    sent = window(last=9)
    send_all(sent)
    sent.handle(Ack(1, 2), NOW)
    assert sent.handle(SayHello(), NOW) == HelloWanted()
    assert send_all(sent) == []
    sent.handle(welcome(6), NOW)
    assert sent.acked == 6, "the ack for these was lost with the old connection"
    assert send_all(sent) == [7, 8, 9]


def test_busy_waits_and_sends_again() -> None:
    sent = window(last=3)
    send_all(sent)
    sent.handle(Busy(250, 0, "disk full"), NOW)
    assert send_all(sent, NOW + 0.2) == []
    assert send_all(sent, NOW + 0.3) == [1, 2, 3]


def test_a_rejected_event_is_told_and_the_rest_goes_on() -> None:
    sent = window(last=3)
    send_all(sent)
    assert sent.handle(Reject(POISON, 2, "bad"), NOW) == EventRejected(2, "bad")
    sent.handle(Ack(1, 3), NOW)
    assert sent.acked == 3
    assert sent.handle(Reject(POISON, 2, "bad"), NOW) is None, "told again, late"


@pytest.mark.parametrize(
    ("reply", "error", "told"),
    [
        (Reject(FENCED, 0, "epoch 1 is over"), Fenced, "newer database"),
        (Reject(REFUSED, 0, "no such lane"), PeerError, "no such lane"),
        (welcome(4), HistoryLost, "ends at 3: its database was restored"),
        (welcome(0), HistoryLost, "acknowledged all up to 2 before: its log was lost"),
        (Nack(1, 1), HistoryLost, "expects event 1 of learner:l1"),
        (welcome(2, protocol=99), PeerError, "speaks protocol 99, this client"),
        (welcome(2, principal="learner:l2"), UserError, "knows this key as 'learner:l2'"),
    ],
)
def test_what_cannot_heal_is_raised(reply: object, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        window(last=3, acked=2).handle(reply, NOW)  # type: ignore[arg-type]


def test_silence_reopens_the_connection_and_waits_longer_each_time() -> None:
    sent = window(last=1)
    send_all(sent)
    assert not sent.must_reopen(NOW + 0.9)
    assert sent.must_reopen(NOW + 1)
    sent.reopened(NOW + 1)
    assert not sent.must_reopen(NOW + 2.9)
    assert sent.must_reopen(NOW + 3)
    sent.handle(SayHello(), NOW + 3.5)
    assert sent.must_reopen(NOW + 4.5), "somebody answered: the wait is short again"


def test_silence_of_an_idle_connection_means_nothing() -> None:
    idle = window(last=1)
    send_all(idle)
    idle.handle(Ack(1, 1), NOW)
    assert not idle.must_reopen(NOW + 1000)
    idle.appended(2, NOW + 1000)
    send_all(idle, NOW + 1000)
    assert not idle.must_reopen(NOW + 1000.9)
    assert idle.must_reopen(NOW + 1001)


def test_a_pause_is_not_silence() -> None:
    sent = window(last=1)
    send_all(sent)
    sent.handle(Busy(5000, 0, "disk full"), NOW)
    assert not sent.must_reopen(NOW + 4.9)


def test_patience_doubles_up_to_its_bound() -> None:
    patience = Patience(1.0, 5.0, 0.0)
    ends = [now for now in range(40) if patience.ended(float(now))]
    assert ends == [1, 3, 7, 12, 17, 22, 27, 32, 37]


@given(st.integers(0, 2**32))
def test_whatever_is_lost_all_is_acknowledged_in_the_end(seed: int) -> None:
    """Frames and answers are lost at random; the broker takes each event once, in order."""
    chance = random.Random(seed)
    stored: list[int] = []
    sender, now = window(last=60, welcomed=False), NOW
    connected = False
    for _ in range(2000):
        now += 0.1
        if not connected:
            connected = sender.handle(SayHello(), now) == HelloWanted()
            sender.handle(welcome(len(stored)), now)
        after, count = sender.sendable(now)
        for sequence in range(after + 1, after + count + 1):
            sender.was_sent(sequence)
            if chance.random() < 0.8:
                if sequence == len(stored) + 1:
                    stored.append(sequence)
                elif sequence > len(stored) and chance.random() < 0.5:
                    sender.handle(Nack(1, len(stored) + 1), now)
        if chance.random() < 0.2:
            sender.handle(Ack(1, len(stored)), now)
        if sender.must_reopen(now):
            sender.reopened(now)
            connected = False
        assert 0 <= sender.acked <= len(stored)
        assert sender.acked <= sender.sent <= sender.acked + WINDOW_EVENTS
        if sender.acked == sender.last:
            break
    assert stored == list(range(1, 61))
    assert sender.acked == 60
