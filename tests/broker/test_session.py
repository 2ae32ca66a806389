"""session.py: what may come in a second, and what a reader may leave unread."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metisfl.broker.session import (
    EVENT_BYTES,
    OUTSTANDING_ANSWERS_MAX,
    OUTSTANDING_BYTES_MAX,
    PUBLISHES_BURST,
    PUBLISHES_PER_S,
    SHUT_S,
    Answers,
    PublishRate,
)
from metisfl.proto.frames import ANSWER_BYTES_MAX, FETCHES_MAX

NOW = 100.0


def through(gate: PublishRate, now: float, most: int = 100_000) -> int:
    """How many events go through at once."""
    for number in range(most):
        if gate.shut_s(now):
            return number
        gate.spend(1, now)
    raise AssertionError("there is no end to it")


def test_a_gate_lets_a_burst_through_and_then_shuts() -> None:
    gate = PublishRate(NOW)
    assert through(gate, NOW) == PUBLISHES_BURST
    assert gate.shut_s(NOW) == SHUT_S, "and says for how long"


def test_whoever_waits_as_told_gets_some_through_each_time() -> None:
    gate, now = PublishRate(NOW), NOW
    through(gate, now)
    for _ in range(20):
        now += gate.shut_s(now)
        assert through(gate, now) == PUBLISHES_PER_S * SHUT_S


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 17)), max_size=60))
def test_whatever_the_pace_no_more_goes_through_than_the_rate(
    steps: list[tuple[float, int]],
) -> None:
    gate, now, spent = PublishRate(NOW), NOW, 0
    for wait_s, cost in steps:
        now += wait_s
        for _ in range(500):
            if not gate.shut_s(now):
                gate.spend(cost, now)
                spent += cost
        allowed = PUBLISHES_BURST + PUBLISHES_PER_S * (now - NOW)
        assert spent <= allowed + 17, "the last one may be a big one"


def test_a_big_event_counts_for_many() -> None:
    assert PublishRate.cost(200) == 1
    assert PublishRate.cost(16 * EVENT_BYTES) == 17


def test_what_came_to_nothing_is_given_back() -> None:
    gate = PublishRate(NOW)
    for _ in range(1000):
        gate.spend(1, NOW)
    gate.give_back(1000)
    assert through(gate, NOW) == PUBLISHES_BURST


def test_a_reader_that_shows_its_receipts_is_never_put_off() -> None:
    """It has four fetches on their way, all answers are as big as they get, and come in order."""
    answers = Answers()
    for _ in range(FETCHES_MAX):
        assert answers.ask() is None
    for receipt in range(1, 500):
        answers.answered(receipt, ANSWER_BYTES_MAX)
        answers.acknowledge(receipt)
        assert answers.ask() is None


def test_who_does_not_read_is_put_off_until_it_shows_a_receipt() -> None:
    answers = Answers()
    for receipt in range(1, 1 + FETCHES_MAX):
        assert answers.ask() is None
        answers.answered(receipt, ANSWER_BYTES_MAX)
    assert "were not acknowledged; at most 8388608 bytes" in str(answers.ask())
    answers.acknowledge(77)
    answers.acknowledge(0)
    assert answers.ask() is not None, "a receipt that nobody was given acknowledges nothing"
    answers.acknowledge(2)
    assert answers.bytes == (FETCHES_MAX - 2) * ANSWER_BYTES_MAX, "all up to the one that is shown"
    assert answers.ask() is None
    answers.acknowledge(1)
    assert answers.bytes == (FETCHES_MAX - 2) * ANSWER_BYTES_MAX, "an old receipt changes nothing"


def test_small_answers_are_counted_too() -> None:
    answers = Answers()
    for receipt in range(1, 1 + OUTSTANDING_ANSWERS_MAX):
        assert answers.ask() is None
        answers.answered(receipt, 100)
    assert answers.ask() is not None
    answers.acknowledge(OUTSTANDING_ANSWERS_MAX)
    assert answers.none


def test_an_answer_that_did_not_go_out_is_not_outstanding() -> None:
    answers = Answers()
    for receipt in range(1, 1000):
        assert answers.ask() is None
        answers.answered(receipt, 0)
    assert answers.none


asks = st.just(("ask", 0))
acknowledgements = st.tuples(st.just("acknowledge"), st.integers(0, 300))
gives = st.tuples(st.just("answer"), st.sampled_from([0, 100, 100_000, ANSWER_BYTES_MAX]))


@pytest.mark.parametrize("guesses", [False, True])
@given(st.data())
def test_whatever_is_asked_the_outstanding_bytes_are_bounded(
    guesses: bool, data: st.DataObject
) -> None:
    answers, receipt = Answers(), 1000
    steps = st.one_of(asks, gives, acknowledgements) if guesses else st.one_of(asks, gives)
    for step, value in data.draw(st.lists(steps, max_size=300)):
        if step == "ask":
            answers.ask()
        elif step == "acknowledge":
            before = answers.bytes
            answers.acknowledge(value)
            assert answers.bytes == before, "a guess"
        elif answers.waiting:
            receipt += 1
            answers.answered(receipt, value)
        promised = answers.waiting * ANSWER_BYTES_MAX
        assert answers.bytes + promised <= OUTSTANDING_BYTES_MAX
