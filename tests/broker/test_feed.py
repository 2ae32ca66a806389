"""feed.py: the lanes of one client share its connection, and acknowledge what came over it."""

from __future__ import annotations

from collections import Counter, deque

from hypothesis import given, settings
from hypothesis import strategies as st

from metisfl.broker.feed import Readers
from metisfl.broker.lane import ANSWER_S
from metisfl.broker.session import Answers
from metisfl.proto.frames import (
    ANSWER_BYTES_MAX,
    FETCHES_MAX,
    Busy,
    Fetch,
    FetchedBatch,
    Head,
    Receipt,
)

NOW = 1000.0
LANES = [f"f/task/l{number}/" for number in range(15)]


def readers(lanes: list[str]) -> Readers:
    made = Readers(on_taken=lambda: None)
    for lane in lanes:
        made.read_lane(lane, 0)
    return made


def batch(fetch: Fetch, receipt: int, left: int = 0) -> FetchedBatch:
    """An answer that says that there is more, if anything is left."""
    through = fetch.after + 1
    return FetchedBatch(fetch.request, through + left, through, 0, (), receipt)


def test_all_lanes_together_ask_for_no_more_at_a_time_than_is_answered() -> None:
    client = readers(LANES)
    asked = list(client.wanted(NOW))
    assert len(asked) == FETCHES_MAX
    assert list(client.wanted(NOW)) == []
    client.fetched(batch(asked[0], 71), NOW)
    assert [fetch.receipt for fetch in client.wanted(NOW)] == [71]


def test_every_lane_has_its_turn_although_the_first_never_have_enough() -> None:
    client = readers(LANES)
    asked = deque(client.wanted(NOW))
    turns = Counter(fetch.lane for fetch in asked)
    for receipt in range(1, 4 * len(LANES) - FETCHES_MAX + 1):
        client.fetched(batch(asked.popleft(), receipt, left=1000), NOW)
        for fetch in client.wanted(NOW):
            asked.append(fetch)
            turns[fetch.lane] += 1
    assert turns == dict.fromkeys(LANES, 4)


def test_a_lane_without_an_answer_asks_again_and_stands_in_nobodys_way() -> None:
    client = readers(LANES[:6])
    asked = list(client.wanted(NOW))
    again = list(client.wanted(NOW + ANSWER_S))
    assert again == asked
    client.fetched(batch(asked[3], 5), NOW)
    assert [fetch.lane for fetch in client.wanted(NOW)] == [LANES[4]]


def test_a_lane_that_was_put_off_leaves_its_turn_to_the_next() -> None:
    client = readers(LANES[:5])
    asked = list(client.wanted(NOW))
    client.fetched(Busy(250, asked[0].request, "later"), NOW)
    assert [fetch.lane for fetch in client.wanted(NOW)] == [LANES[4]]


def test_a_receipt_is_shown_once_and_only_if_no_fetch_has_shown_it() -> None:
    client = readers(LANES[:1])
    assert client.receipt() is None, "nothing has come"
    (fetch,) = client.wanted(NOW)
    client.fetched(batch(fetch, 9), NOW)
    assert client.receipt() == Receipt(9)
    assert client.receipt() is None
    client.live(Head(1, 0, link_up=True), NOW)
    (fetch,) = client.wanted(NOW)
    client.fetched(batch(fetch, 10, left=1), NOW)
    assert [fetch.receipt for fetch in client.wanted(NOW)] == [10]
    assert client.receipt() is None, "the fetch has shown it"


def test_a_new_connection_has_no_receipts() -> None:
    client = readers(LANES[:1])
    (fetch,) = client.wanted(NOW)
    client.fetched(batch(fetch, 9), NOW)
    client.welcomed()
    assert client.receipt() is None
    assert [fetch.receipt for fetch in client.wanted(NOW)] == [0]


@settings(deadline=None)
@given(st.integers(1, 15), st.lists(st.booleans(), max_size=80))
def test_the_broker_never_puts_an_honest_reader_off(lanes: int, arrives: list[bool]) -> None:
    """However many lanes, and whoever of the two is faster; all answers as big as they get."""
    client, broker, receipts = readers(LANES[:lanes]), Answers(), 0
    on_their_way: list[FetchedBatch] = []
    for comes in arrives:
        if comes and on_their_way:
            client.fetched(on_their_way.pop(0), NOW)
        for fetch in client.wanted(NOW):
            broker.acknowledge(fetch.receipt)
            assert broker.ask() is None
            receipts += 1
            broker.answered(receipts, ANSWER_BYTES_MAX)
            on_their_way.append(batch(fetch, receipts, left=1000))
    assert receipts >= min(lanes, FETCHES_MAX) * bool(arrives)
