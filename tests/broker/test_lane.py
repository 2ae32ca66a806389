"""lane.py: each record once, in order, whatever is dropped and however slow the reader."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metisfl.broker.lane import READY_RECORDS_MAX, Lane
from metisfl.broker.window import HistoryLost
from metisfl.proto.frames import Busy, Fetch, FetchedBatch, Head, Header, RawRecord

NOW = 1000.0


def record(sequence: int, previous: int = 0, whole: int | None = None, size: int = 1) -> RawRecord:
    whole = previous if whole is None else whole
    return RawRecord(b"f/task/l1/", Header(0, 1, sequence, previous, whole, 0), bytes(size))


def caught_up(cursor: int = 0, name: str = "f/task/l1/") -> Lane:
    """A lane that has asked the log once and was told that it has all."""
    lane = Lane(name, cursor)
    answer(lane, head=cursor)
    lane.head(Head(1, cursor), NOW)
    lane.take()
    return lane


def answer(
    lane: Lane, *records: RawRecord, head: int, through: int | None = None, floor: int = 0
) -> None:
    fetch = lane.wanted(NOW, 1)
    assert fetch is not None, "the lane does not ask"
    lane.batch(
        FetchedBatch(fetch.request, head, head if through is None else through, floor, records)
    )


def taken(lane: Lane) -> list[int]:
    return [record.header.sequence for record in lane.take()[0]]


def test_a_lane_begins_with_the_log() -> None:
    lane = Lane("f/task/l1/", 5)
    assert lane.wanted(NOW, 7) == Fetch(7, 5, 256, "f/task/l1/")
    assert lane.wanted(NOW, 8) is None, "one question at a time"


def test_a_live_record_that_follows_applies_at_once() -> None:
    lane = caught_up(5)
    lane.live(record(9, previous=5))
    lane.live(record(9, previous=5))
    lane.live(record(3))
    lane.live(record(12, previous=9))
    assert taken(lane) == [9, 12], "each once, and none from before"
    assert lane.wanted(NOW, 2) is None


def test_the_two_kinds_of_lane_follow_their_own_chain() -> None:
    topic, federation = caught_up(5), caught_up(5, "f/")
    for lane in (topic, federation):
        lane.live(record(9, previous=2, whole=8))
    assert taken(topic) == [9]
    assert taken(federation) == []


def test_a_gap_is_fetched_and_what_came_meanwhile_follows_it() -> None:
    lane = caught_up(5)
    lane.live(record(9, previous=7))
    lane.live(record(11, previous=9))
    assert taken(lane) == []
    assert not lane.caught_up
    answer(lane, record(7, previous=5), record(9, previous=7), head=10)
    assert taken(lane) == [7, 9, 11]
    assert lane.caught_up
    assert lane.wanted(NOW, 2) is None


def test_a_live_record_that_follows_does_not_wait_for_a_fetch() -> None:
    lane = Lane("f/task/l1/", 5)
    lane.wanted(NOW, 1)
    lane.live(record(9, previous=5))
    assert taken(lane) == [9]


def test_an_empty_answer_moves_the_cursor() -> None:
    lane = Lane("f/task/l1/", 5)
    answer(lane, head=40)
    assert lane.cursor == 40
    lane.live(record(41, previous=30))
    assert taken(lane) == [41]


def test_a_long_log_is_read_answer_by_answer() -> None:
    lane = Lane("f/task/l1/", 0)
    answer(lane, record(1), record(2, 1), head=9, through=2)
    assert not lane.caught_up
    answer(lane, record(6, 2), head=9)
    assert taken(lane) == [1, 2, 6]
    assert lane.caught_up


def test_an_empty_lane_says_that_there_is_no_more() -> None:
    lane = Lane("f/task/l1/", 0)
    assert not lane.news
    answer(lane, head=0)
    assert lane.news
    assert lane.take() == ([], 0, 0)
    assert not lane.news, "told once"


def test_a_head_ahead_of_the_cursor_is_looked_into_after_half_a_second() -> None:
    lane = caught_up(5)
    lane.head(Head(1, 8), NOW)
    lane.head(Head(1, 8), NOW + 0.4)
    assert lane.wanted(NOW + 0.4, 2) is None
    assert lane.wanted(NOW + 0.5, 2) == Fetch(2, 5, 256, "f/task/l1/")


def test_a_record_that_comes_in_time_makes_the_look_superfluous() -> None:
    lane = caught_up(5)
    lane.head(Head(1, 8), NOW)
    lane.live(record(8, previous=5))
    assert lane.wanted(NOW + 10, 2) is None


def test_the_first_head_after_a_subscription_is_looked_into_at_once() -> None:
    lane = caught_up(5)
    lane.head(Head(1, 5, link_up=True), NOW)
    answer(lane, head=5)
    lane.head(Head(1, 6), NOW)
    assert lane.wanted(NOW, 2) is not None, "6 may have come before the subscription was heard"


@pytest.mark.parametrize("head", [Head(2, 5), Head(1, 5, link_up=True)])
def test_a_new_broker_or_a_new_link_is_looked_into_at_once(head: Head) -> None:
    lane = caught_up(5)
    lane.head(head, NOW)
    assert not lane.caught_up
    assert lane.wanted(NOW, 2) is not None


def test_a_new_connection_asks_again() -> None:
    lane = Lane("f/", 5)
    lane.wanted(NOW, 1)
    lane.welcomed()
    assert lane.wanted(NOW, 2) is not None
    lane.batch(FetchedBatch(1, 3, 3, 0, ()))
    assert lane.cursor == 5, "an answer from the old connection is void"


def test_a_lost_question_is_asked_again() -> None:
    lane = Lane("f/", 5)
    lane.wanted(NOW, 1)
    assert lane.wanted(NOW + 1.9, 2) is None
    assert lane.wanted(NOW + 2, 2) is not None


def test_busy_is_asked_again_after_its_pause() -> None:
    lane = Lane("f/", 5)
    lane.wanted(NOW, 1)
    assert not lane.busy(Busy(250, 9, "x"), NOW), "another lane's"
    assert lane.busy(Busy(250, 1, "x"), NOW)
    assert lane.wanted(NOW + 0.2, 2) is None
    assert lane.wanted(NOW + 0.3, 2) is not None


def test_an_answer_that_takes_longer_than_the_patience_is_still_the_answer() -> None:
    """Else a big answer over a slow line would never do: each came to a question given up."""
    lane = Lane("f/", 5)
    first = lane.wanted(NOW, 1)
    assert lane.wanted(NOW + 3, 2) == first, "the same question is the same"
    assert lane.busy(Busy(250, 1, "the first is on its way"), NOW + 3)
    lane.batch(FetchedBatch(1, 6, 6, 0, (record(6, 5),)))
    assert taken(lane) == [6]
    lane.batch(FetchedBatch(1, 6, 6, 0, (record(6, 5),)))
    assert taken(lane) == [], "once"


def test_another_question_has_another_number() -> None:
    lane = Lane("f/", 5)
    lane.wanted(NOW, 1)
    lane.live(record(6, 5))
    assert lane.wanted(NOW + 3, 2) == Fetch(2, 6, 256, "f/")


def test_a_log_that_ends_before_the_cursor_is_an_error() -> None:
    lane = Lane("f/", 5)
    with pytest.raises(HistoryLost, match="ends at 4, but lane f/ was read up to 5 before"):
        answer(lane, head=4)


def test_a_reader_behind_the_floor_jumps_and_is_told_once() -> None:
    lane = Lane("f/", 5)
    answer(lane, record(31, 30), record(32, 31), head=32, floor=30)
    assert lane.cursor == 32
    ready, through, trimmed_to = lane.take()
    assert [r.header.sequence for r in ready] == [31, 32]
    assert (through, trimmed_to) == (32, 30)
    assert lane.take() == ([], 32, 0)


def test_a_lane_of_which_nothing_is_left_still_tells() -> None:
    lane = Lane("f/task/l1/", 0)
    answer(lane, head=100, floor=30)
    assert lane.news
    assert lane.take() == ([], 100, 30)
    assert lane.caught_up
    lane.live(record(101, 30))
    assert taken(lane) == [101]


def test_what_went_after_it_was_read_is_not_told() -> None:
    """It came live while the log was asked, and was trimmed before the log answered."""
    lane = Lane("f/", 5)
    lane.wanted(NOW, 1)
    lane.live(record(6, 5))
    lane.batch(FetchedBatch(1, 9, 9, 6, ()))
    assert lane.take()[2] == 0


def test_a_slow_reader_holds_the_log_back_and_misses_nothing() -> None:
    lane = caught_up()
    total = 3 * READY_RECORDS_MAX
    for sequence in range(1, total + 1):
        lane.live(record(sequence, sequence - 1))
    assert len(lane.ready) == READY_RECORDS_MAX
    assert lane.wanted(NOW + 10, 2) is None, "there is no room for an answer"
    assert taken(lane) == list(range(1, READY_RECORDS_MAX + 1))
    assert taken(lane) == list(range(READY_RECORDS_MAX + 1, 2 * READY_RECORDS_MAX + 1))
    assert lane.wanted(NOW + 10, 2) == Fetch(2, 2 * READY_RECORDS_MAX, 256, "f/task/l1/")


def test_one_record_dropped_for_want_of_room_is_missed_at_once() -> None:
    lane = caught_up()
    for sequence in range(1, 2 * READY_RECORDS_MAX + 2):
        assert lane.caught_up
        lane.live(record(sequence, sequence - 1))
    assert not lane.caught_up


def test_big_records_fill_the_room_sooner() -> None:
    lane = caught_up()
    for sequence in range(1, 200):
        lane.live(record(sequence, sequence - 1, size=256 * 1024))
    assert len(lane.ready) == 32


class World:
    """A log, a live socket that drops, answers that are late or lost, a reader that dawdles."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lane = Lane(self.random.choice(["f/task/l1/", "f/"]), 0)
        self.now, self.request = NOW, 0
        self.log: list[tuple[RawRecord, bool]] = []
        self.read: list[int] = []
        self.asked: list[Fetch] = []

    def in_lane(self, mine: bool) -> bool:
        return mine or self.lane.name == "f/"

    def publish(self) -> None:
        mine = self.random.random() < 0.5
        topic = max((r.header.sequence for r, m in self.log if m == mine), default=0)
        made = record(len(self.log) + 1, topic, len(self.log))
        self.log.append((made, mine))
        if self.in_lane(mine) and self.random.random() < 0.7:
            self.lane.live(made)

    def ask(self) -> None:
        if fetch := self.lane.wanted(self.now, self.request + 1):
            self.request += 1
            if self.random.random() < 0.8:
                self.asked.append(fetch)

    def answer(self) -> None:
        if not self.asked:
            return
        fetch = self.asked.pop(0)
        behind = [r for r, mine in self.log[fetch.after :] if self.in_lane(mine)]
        limit = self.random.randrange(1, 4)
        some = behind[:limit]
        head = len(self.log)
        through = some[-1].header.sequence if len(behind) > limit else head
        if self.random.random() < 0.8:
            self.lane.batch(FetchedBatch(fetch.request, head, through, 0, tuple(some)))

    def head(self) -> None:
        self.lane.head(Head(1, len(self.log), link_up=self.random.random() < 0.1), self.now)

    def reconnect(self) -> None:
        self.asked.clear()
        self.lane.welcomed()

    def take(self) -> None:
        records, through, _ = self.lane.take()
        self.read += [record.header.sequence for record in records]
        assert not self.read or through >= self.read[-1]

    def wait(self) -> None:
        self.now += 0.3

    def run(self, steps: int) -> None:
        likely = {
            self.publish: 6,
            self.ask: 4,
            self.answer: 3,
            self.head: 1,
            self.reconnect: 0.2,
            self.take: 2,
            self.wait: 1,
        }
        for _ in range(steps):
            self.random.choices(list(likely), list(likely.values()))[0]()

    def settle(self) -> None:
        for _ in range(3 * len(self.log) + 20):
            for act in (self.head, self.wait, self.ask, self.answer, self.take):
                act()

    @property
    def expected(self) -> list[int]:
        return [r.header.sequence for r, mine in self.log if self.in_lane(mine)]


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_the_reader_gets_the_lane_in_order_each_record_once(seed: int) -> None:
    world = World(seed)
    world.run(200)
    assert world.read == world.expected[: len(world.read)], "out of order, a hole, or twice"
    world.settle()
    assert world.read == world.expected, "something never came"
    assert world.lane.caught_up or world.lane.wanted(world.now, 0) is None
