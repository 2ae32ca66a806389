"""dispatch.py against peers without measure: what each bound keeps out, and whom it spares."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metisfl.broker.dispatch import SESSIONS_MAX, Read, Reply
from metisfl.broker.session import (
    OUTSTANDING_ANSWERS_MAX,
    OUTSTANDING_BYTES_MAX,
    PUBLISHES_BURST,
    SHUT_S,
)
from metisfl.proto import frames
from metisfl.proto.frames import (
    ANSWER_BYTES_MAX,
    FETCHES_MAX,
    Ack,
    Busy,
    Fetch,
    FetchedBatch,
    Receipt,
    Reject,
)

L1, L2, CONTROLLER, DRIVER = "learner:l1", "learner:l2", "controller", "driver:d"
MINE = "f/task/l1/"


def fetch(request: int = 4, receipt: int = 0, after: int = 0) -> list[bytes]:
    return frames.pack_fetch(Fetch(request, after, 256, MINE, receipt))


@pytest.fixture
def stocked(desk: Any) -> Any:
    """A desk with a record for learner l1."""
    desk.publish(CONTROLLER, 1)
    desk.commit()
    return desk


def answer(desk: Any, peer: bytes, parts: list[bytes], size: int = ANSWER_BYTES_MAX) -> int:
    """Send a fetch and give its answer; returns its receipt, or 0 if it was put off."""
    (effect,) = desk.dispatch.handle(peer, parts, desk.now)
    if isinstance(effect, Reply) and isinstance(effect.message, Busy):
        return 0
    desk.receipts += 1
    desk.dispatch.answered(peer, desk.receipts, size)
    return int(desk.receipts)


# ---- Reading -------------------------------------------------------------------------------


def test_fetches_that_wait_for_the_disk_are_few(stocked: Any) -> None:
    for _ in range(FETCHES_MAX):
        (read,) = stocked.dispatch.handle(L1.encode(), fetch(), stocked.now)
        assert isinstance(read, Read)
    (busy,) = stocked.send(L1, fetch(request=77))
    assert isinstance(busy, Busy)
    assert busy.request == 77
    stocked.dispatch.answered(L1.encode(), 1, 0)
    (read,) = stocked.dispatch.handle(L1.encode(), fetch(), stocked.now)
    assert isinstance(read, Read)


def test_who_does_not_read_gets_four_big_answers_and_no_more(stocked: Any) -> None:
    given_out = [answer(stocked, L1.encode(), fetch()) for _ in range(100)]
    assert sum(map(bool, given_out)) == FETCHES_MAX
    assert not answer(stocked, L1.encode(), fetch(receipt=123456)), "a guess is no receipt"
    assert answer(stocked, L1.encode(), fetch(receipt=given_out[FETCHES_MAX - 1]))
    assert stocked.dispatch.offences.requests["fetch_held"] == 97


def test_a_receipt_alone_counts_as_much_as_one_with_a_fetch(stocked: Any) -> None:
    receipts = [answer(stocked, L1.encode(), fetch()) for _ in range(FETCHES_MAX)]
    assert stocked.send(L1, frames.pack_receipt(Receipt(receipts[-1]))) == []
    assert answer(stocked, L1.encode(), fetch())


def test_empty_answers_are_bounded_too(stocked: Any) -> None:
    replies = [stocked.send(L1, fetch(after=9))[0] for _ in range(OUTSTANDING_ANSWERS_MAX)]
    assert all(isinstance(reply, FetchedBatch) for reply in replies)
    (held,) = stocked.send(L1, fetch(after=9))
    assert isinstance(held, Busy)


def test_a_receipt_of_another_connection_is_none(stocked: Any) -> None:
    stocked.hello(L1, peer=b"other")
    mine = [answer(stocked, L1.encode(), fetch()) for _ in range(FETCHES_MAX)]
    assert answer(stocked, b"other", fetch())
    assert not answer(stocked, L1.encode(), fetch(receipt=stocked.receipts))
    assert answer(stocked, L1.encode(), fetch(receipt=mine[0]))


def test_fetches_have_a_rate(stocked: Any) -> None:
    receipt = taken = 0
    while True:
        known, receipt = receipt, answer(stocked, L1.encode(), fetch(receipt=receipt), size=100)
        if not receipt:
            break
        taken += 1
    assert 1000 <= taken <= 2000, "over a burst of as many as the disk has in a second"
    stocked.now += 1
    assert answer(stocked, L1.encode(), fetch(receipt=known), size=100)


messages = st.one_of(
    st.tuples(st.just("fetch"), st.integers(0, 40)),
    st.tuples(st.just("empty"), st.integers(0, 40)),
    st.tuples(st.just("receipt"), st.integers(0, 40)),
    st.tuples(st.just("answer"), st.sampled_from([0, 1000, ANSWER_BYTES_MAX])),
    st.tuples(st.just("hello"), st.integers(0, 9)),
    st.tuples(st.just("connect"), st.integers(0, 9)),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(messages, max_size=120))
def test_whatever_a_peer_sends_what_it_left_unread_is_bounded(
    desks: Any, steps: list[tuple[str, int]]
) -> None:
    """Counted here, by connection: what was handed to it and what it has shown to have read."""
    desk = desks()
    desk.hello(CONTROLLER)
    desk.publish(CONTROLLER, 1)
    desk.commit()
    unread: dict[bytes, list[tuple[int, int]]] = {}
    reads: list[bytes] = []
    peer = b"0"
    assert desk.connect(peer, L1)
    for step, value in steps:
        desk.now += 0.05
        if step == "connect":
            peer = b"%d" % value
            if not desk.dispatch.knows(peer) and not desk.connect(peer, L1):
                continue
        parts = {
            "hello": lambda: frames.pack_hello(
                frames.Hello(protocol=frames.PROTOCOL, software="t", epoch=1)
            ),
            "fetch": lambda value=value: fetch(receipt=value),
            "empty": lambda value=value: fetch(receipt=value, after=9),
            "receipt": lambda value=value: frames.pack_receipt(Receipt(value)),
        }.get(step)
        if step == "answer" and reads:
            reader = reads.pop(0)
            desk.receipts += 1
            desk.dispatch.answered(reader, desk.receipts, value)
            unread.setdefault(reader, []).append((desk.receipts, value))
        elif parts is not None and desk.dispatch.knows(peer):
            if step != "hello":
                held = unread.setdefault(peer, [])
                known = [at for at, (receipt, _) in enumerate(held) if receipt == value]
                del held[: known[0] + 1 if known else 0]
            for effect in desk.dispatch.handle(peer, parts(), desk.now):
                if isinstance(effect, Read):
                    reads.append(effect.peer)
                elif isinstance(effect, Reply) and isinstance(effect.message, FetchedBatch):
                    desk.receipts += 1
                    desk.dispatch.answered(peer, desk.receipts, 300)
                    unread.setdefault(peer, []).append((desk.receipts, 300))
        for name, held in unread.items():
            total = sum(size for _, size in held)
            assert total <= OUTSTANDING_BYTES_MAX, f"{name!r} holds {total} bytes of the memory"


# ---- Connections ---------------------------------------------------------------------------


def test_connections_of_one_principal_have_a_rate_and_others_do_not_notice(desks: Any) -> None:
    desk = desks()
    made = [desk.connect(b"%d" % number, L1) for number in range(1000)]
    assert sum(made) == 20, "a burst of two seconds' worth"
    assert desk.connect(b"another", L2)
    desk.now += 1
    assert sum(desk.connect(b"later %d" % number, L1) for number in range(1000)) == 10
    assert len(desk.dispatch.connections()) == 2
    assert desk.dispatch.connections()[L1] == SESSIONS_MAX


def test_hellos_have_a_rate(desk: Any) -> None:
    assert sum(len(desk.hello(L1)) for _ in range(100)) == 9, "one went before"
    desk.now += 1
    assert len(desk.hello(L1)) == 1
    assert len(desk.hello(L2)) == 1


def test_a_connection_that_has_ended_goes_first(desks: Any) -> None:
    desk = desks()
    for number in range(SESSIONS_MAX):
        desk.hello(L1, peer=b"%d" % number)
    desk.ended = {b"3", b"5"}
    assert desk.connect(b"new", L1)
    known = [desk.dispatch.knows(b"%d" % number) for number in range(SESSIONS_MAX)]
    assert known == [number not in (3, 5) for number in range(SESSIONS_MAX)]


def test_a_connection_that_owes_a_receipt_keeps_its_place(desks: Any) -> None:
    """Else it would come back with a clean slate, and what it left unread would not count."""
    desk = desks()
    for number in range(SESSIONS_MAX):
        desk.hello(L1, peer=b"%d" % number)
        if number != 4:
            desk.send(b"%d" % number, fetch(after=9))
    assert desk.connect(b"new", L1)
    assert not desk.dispatch.knows(b"4"), "the only one that owes nothing"
    desk.dispatch.handle(b"new", fetch(after=9), desk.now)
    desk.hello(L1, peer=b"new")
    desk.send(b"new", fetch(after=9))
    assert not desk.connect(b"newer", L1)
    assert desk.dispatch.offences.requests["connection"] == 1
    desk.send(b"6", frames.pack_receipt(Receipt(6)))
    assert desk.connect(b"newer", L1)


# ---- Publishing -----------------------------------------------------------------------------


def publish_all(desk: Any, principal: str, total: int) -> int:
    """As a client does: on from the first that is not stored. Returns how often it was told off."""
    busy, stored = 0, 0
    for _ in range(10_000):
        if stored >= total:
            return busy
        for reply in desk.publish(principal, *range(stored + 1, min(total, stored + 256) + 1)):
            if isinstance(reply, Busy):
                busy += 1
                assert reply.request == 0
                assert reply.retry_ms <= 1000
                wait_s = reply.retry_ms / 1000
        for reply in desk.commit():
            if isinstance(reply, Ack):
                stored = reply.sequence
        if busy:
            desk.now += wait_s
    raise AssertionError(f"{stored} of {total} events were stored, and it does not go on")


def test_who_publishes_too_fast_is_told_and_loses_nothing(desk: Any) -> None:
    started, total = desk.now, 3000
    assert publish_all(desk, L1, total) > 0
    assert desk.stored == [b"learner:l1 1 %d" % number for number in range(1, total + 1)]
    took_s = desk.now - started
    assert 4 <= took_s <= 8, f"1000 events over the burst at 200 a second took {took_s} s"
    assert desk.dispatch.offences.events["rate_limited"] > 0
    assert desk.dispatch.offences.offenders[L1] > 0


def test_the_controller_is_held_to_no_rate(desk: Any) -> None:
    assert publish_all(desk, CONTROLLER, 10 * int(PUBLISHES_BURST)) == 0


def test_the_rate_is_the_principals_and_not_the_connections(desk: Any) -> None:
    publish_all(desk, L1, int(PUBLISHES_BURST))
    desk.publish(L1, *range(2001, 2257))
    desk.hello(L1, peer=b"another way")
    (busy,) = desk.send(b"another way", desk.message(desk.envelope(L1, 1, 9000)))
    assert isinstance(busy, Busy)
    assert desk.publish(L2, 1) == [], "others publish"


def test_a_full_disk_is_not_the_publishers_fault(desk: Any) -> None:
    """What failed is sent again and again, and none of it counts."""
    for _ in range(100):
        desk.now += 0.3
        desk.publish(L1, *range(1, 257))
        desk.dispatch.sequencer.seal(1)
        desk.dispatch.failed("disk full", desk.now)
    assert desk.dispatch.offences.events["rate_limited"] == 0


def test_repeats_and_forgeries_have_a_rate_too(desk: Any) -> None:
    forged = desk.message(desk.envelope(L2, 1, 1))
    for _ in range(50_000):
        desk.send(L1, forged)
    counted = desk.dispatch.offences.events
    assert counted["forged"] <= PUBLISHES_BURST / 0.1 + 1
    assert counted["rate_limited"] == 50_000 - counted["forged"]


def test_a_busy_answer_is_not_repeated_for_each_event(desk: Any) -> None:
    publish_all(desk, L1, int(PUBLISHES_BURST))
    answers = desk.publish(L1, *range(2001, 2257))
    assert [type(reply) for reply in answers] == [Busy]
    assert 0 < answers[0].retry_ms <= SHUT_S * 1000


def test_no_bound_ends_an_honest_client(desk: Any) -> None:
    """A rate is answered with Busy, or not at all: a Reject would be for good."""
    replies = desk.publish(L1, *range(1, 5000))
    replies += [reply for _ in range(300) for reply in desk.hello(L1)]
    replies += [reply for _ in range(300) for reply in desk.send(L1, fetch(after=9))]
    assert not [reply for reply in replies if isinstance(reply, Reject)]
