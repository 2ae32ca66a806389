"""trimming.py with store.py and reading.py: a log without its beginning is a whole log."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from log_batches import TOPICS, batch, events, read

from metisfl.broker import trimming
from metisfl.broker.reading import Found
from metisfl.broker.retention import SLICE_EVENTS, Limits
from metisfl.broker.schema import DamagedLog, LogFull
from metisfl.broker.store import Store
from metisfl.proto.errors import MachineError

DAY_NS = 86_400 * 10**9
LATE = 30 * DAY_NS  # the batches are stamped soon after the beginning of time
READ = ("controller", "f/", 1_000_000)  # its controller is far ahead


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "log")
    yield store
    store.close()


def trimmed(store: Store, now: int = LATE) -> int:
    """Trim until nothing is due; return how many events went."""
    gone = 0
    while (done := store.trimmer.trim(now)) is not None:
        gone += done.events
    return gone


def fetched(store: Store, lane: str, after: int, head: int, lane_head: int) -> Found:
    return store.reader.read_lane(
        of_federation=lane == "f/",
        lane_id=TOPICS.get(lane, 1),
        lane_head=lane_head,
        after=after,
        head=head,
        max_events=256,
        max_bytes=1 << 22,
    )


def reopened(store: Store) -> Store:
    store.close()
    return Store(store.folder)


def test_old_events_go_and_the_rest_is_a_whole_log(store: Store) -> None:
    store.append(batch(events(10), cursors=[("controller", "f/", 7)]))
    assert trimmed(store, now=DAY_NS) == 0, "kept for a week"
    assert trimmed(store) == 7
    assert store.trimmer.floor == 7
    with closing(reopened(store)) as again:
        assert again.trimmer.floor == 7
        assert again.reader.check() == (3, 7)
        found = again.reader.recovered()
        assert (found.head, found.federations) == (10, [(1, "f/", 10)])
        assert found.topics == [(2, "f/done/l1/", 1, 10), (3, "f/task/l1/", 1, 9)]
        again.append(batch(events(5, first=11), number=2))
        assert again.reader.check() == (8, 7)


def test_a_log_of_which_everything_went_goes_on_where_it_was(store: Store) -> None:
    store.append(batch(events(10), cursors=[READ]))
    assert trimmed(store) == 10
    with closing(reopened(store)) as again:
        found = again.reader.recovered()
        assert (found.head, found.federations) == (10, [(1, "f/", 10)])
        assert found.topics == [(2, "f/done/l1/", 1, 10), (3, "f/task/l1/", 1, 9)]
        assert again.reader.check() == (0, 10)
        again.append(batch(events(5, first=11), number=2))
        assert [r.sequence for r in read(again, after=10, head=15)[0]] == [11, 12, 13, 14, 15]


def test_a_reader_behind_the_floor_gets_what_is_left_and_is_told(store: Store) -> None:
    store.append(batch(events(10), cursors=[("controller", "f/", 7)]))
    trimmed(store)
    whole = fetched(store, "f/", 2, 10, 10)
    assert ([r.sequence for r in whole.records], whole.through, whole.floor) == ([8, 9, 10], 10, 7)
    tasks = fetched(store, "f/task/l1/", 0, 10, 9)
    assert ([r.sequence for r in tasks.records], tasks.through, tasks.floor) == ([9], 10, 6)


def test_a_reader_of_whose_lane_nothing_is_gone_is_not_alarmed(store: Store) -> None:
    store.append(batch(events(10), cursors=[("controller", "f/", 8)]))
    trimmed(store)
    tasks = fetched(store, "f/task/l1/", 6, 10, 9)
    assert ([r.sequence for r in tasks.records], tasks.floor) == ([9], 0), "7 and 8 are no tasks"
    assert fetched(store, "f/", 8, 10, 10).floor == 0


def test_a_lane_of_which_nothing_is_left_is_no_damage(store: Store) -> None:
    store.append(batch(events(10), cursors=[READ]))
    trimmed(store)
    assert fetched(store, "f/task/l1/", 3, 10, 9) == Found([], 10, 9)
    assert fetched(store, "f/task/l1/", 9, 10, 9) == Found([], 10, 0)


def test_nothing_goes_while_a_controller_has_read_nothing(store: Store) -> None:
    store.append(batch(events(10), cursors=[("driver:x", "f/", 10), ("controller", "g/", 10)]))
    assert trimmed(store) == 0


def test_a_federation_without_news_for_its_controller_holds_nothing_back(store: Store) -> None:
    """Its controller may be gone for good: what it would read next is not there yet."""
    store.append(batch(events(10), cursors=[("controller", "f/", 10)]))
    store._writer.execute("insert into federation values (9, 'g/', 0)")
    assert trimmed(store) == 10


def test_a_federation_that_is_given_up_holds_nothing_back(store: Store) -> None:
    store.append(batch(events(10)))
    assert trimmed(store) == 0
    with pytest.raises(MachineError, match="holds nothing of a federation 'g'"):
        store.give_up("g")
    assert store.give_up("f") == 10
    assert trimmed(store) == 10


def test_much_is_trimmed_slice_by_slice(store: Store) -> None:
    count = 2 * SLICE_EVENTS + 10
    store.append(batch(events(count), cursors=[READ]))
    slices = []
    while (done := store.trimmer.trim(LATE)) is not None:
        slices.append(done.events)
        store.reader.check()
    assert slices == [SLICE_EVENTS, SLICE_EVENTS, 10]


def test_who_is_reading_while_the_log_is_trimmed_reads_it_as_it_was(store: Store) -> None:
    store.append(batch(events(10), cursors=[READ]))
    with store.reader._snapshot() as floor:
        assert trimmed(store) == 10
        kept = [record.sequence for record in store.reader._checked(floor, 10)]
    assert kept == list(range(1, 11))
    assert store.reader.check() == (0, 10)


def test_a_hole_behind_the_floor_is_still_damage(store: Store) -> None:
    store.append(batch(events(10), cursors=[("controller", "f/", 4)]))
    trimmed(store)
    store._writer.execute("delete from event where sequence in (5, 6)")
    with pytest.raises(DamagedLog, match="first record is 7, but it was trimmed to 4"):
        store.reader.check()
    with pytest.raises(DamagedLog, match="record 6, before 7, is missing"):
        fetched(store, "f/", 4, 10, 10)


def test_trimming_looks_at_no_more_than_it_must(store: Store) -> None:
    queries: list[tuple[str, object]] = [
        (trimming._OLDEST, 9),
        (trimming._PINS, "controller"),
        (trimming._MARK.format(lane="topic"), 9),
        (trimming._MARK.format(lane="federation"), 9),
    ]
    with closing(sqlite3.connect(store.path)) as database:
        for query, value in queries:
            plan = database.execute(f"explain query plan {query}", (value,)).fetchall()
            told = [row[3] for row in plan if " event" in row[3]]
            assert told == ["SCAN event"] or all("SEARCH event" in step for step in told), told


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("update trimmed set floor = 6", "first record is 5, but it was trimmed to 6"),
        ("update trimmed set floor = 3", "first record is 5, but it was trimmed to 3"),
        ("update trimmed set floor = 4096", "first record is 5, but it was trimmed to 4096"),
        ("delete from trimmed", "does not say to where it was trimmed"),
    ],
)
def test_a_floor_that_is_not_the_logs_is_damage(store: Store, statement: str, told: str) -> None:
    store.append(batch(events(10), cursors=[("controller", "f/", 4)]))
    trimmed(store)
    store._writer.execute(statement)
    with closing(reopened(store)) as again, pytest.raises(DamagedLog, match=told):
        again.reader.recovered()


# ---- The limit ----------------------------------------------------------------------------

SMALL = Limits(log_bytes=400_000)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "small", SMALL)
    yield store
    store.close()


def fill(store: Store, *, head: int = 0) -> int:
    """Store events until the log takes no more; return its head."""
    while True:
        try:
            store.append(batch(events(50, size=500, first=head + 1), number=head))
        except LogFull:
            return head
        head += 50


def test_a_log_at_its_limit_takes_no_events_and_goes_on_when_there_is_room(small: Store) -> None:
    head = fill(small)
    assert small.trimmer.log_bytes() < SMALL.log_bytes + 100_000, "one batch over it at most"
    assert trimmed(small, now=DAY_NS) == 0
    with pytest.raises(LogFull, match=r"the controller of federation f has read nothing yet"):
        small.append(batch(events(1, first=head + 1), number=head))
    assert small.reader.check() == (head, 0), "nothing of what was refused is there"

    small.append(batch([], cursors=[("controller", "f/", head)]))
    assert trimmed(small, now=DAY_NS) > 0
    assert 2 * small.trimmer.log_bytes() < SMALL.log_bytes * 1.1, "down to half, young as they are"
    small.append(batch(events(10, first=head + 1), number=head))
    assert small.reader.check()[0] + small.trimmer.floor == head + 10


def test_a_cursor_comes_through_even_in_a_batch_that_is_refused(small: Store) -> None:
    """It may be what makes room; who reported it does not report it again."""
    head = fill(small)
    with pytest.raises(LogFull):
        small.append(
            batch(events(9, first=head + 1), cursors=[READ], watermarks=[("learner:l1", 1, 9)])
        )
    assert small.reader.recovered().watermarks == []
    assert trimmed(small, now=DAY_NS) > 0


def test_a_log_that_is_filled_and_trimmed_for_long_does_not_grow(small: Store) -> None:
    head, most = 0, 0
    for _ in range(12):
        head = fill(small, head=head)
        small.append(batch([], cursors=[("controller", "f/", head)]))
        trimmed(small, now=DAY_NS)
        small.checkpoint()
        most = max(most, small.path.stat().st_size)
    assert head > 3000, "hardly anything was stored: this test shows nothing"
    assert most < 2 * SMALL.log_bytes, "freed pages are used again"


def test_a_file_that_holds_little_any_more_shrinks(store: Store) -> None:
    store.append(batch(events(5000, size=500), cursors=[READ]))
    store.checkpoint()
    before = store.path.stat().st_size
    trimmed(store)
    while store.trimmer.give_back() is not None:
        pass
    store.checkpoint()
    assert store.path.stat().st_size < before / 4
    assert store.reader.check() == (0, 5000)


def test_a_disk_without_room_only_puts_trimming_off(store: Store) -> None:
    store.append(batch(events(10), cursors=[READ]))
    store._writer.execute("pragma query_only = on")
    assert store.trimmer.trim(LATE) is None
    store._writer.execute("pragma query_only = off")
    assert trimmed(store) == 10
