"""store.py and writer.py: what is stored is there, whole and checked; what is not, is not."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import zmq
from log_batches import batch, events, read

from metisfl.broker import reading
from metisfl.broker import writer as writer_module
from metisfl.broker.schema import DamagedLog, StorageFull
from metisfl.broker.sequencer import Recovered, Refused
from metisfl.broker.store import Store
from metisfl.broker.writer import Outcome, Writer
from metisfl.proto.errors import MachineError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "log")
    yield store
    store.close()


def tampered(store: Store, *statements: str) -> Store:
    """Close the store, change its file behind its back, open it again."""
    store.close()
    with closing(sqlite3.connect(store.path)) as database, database:
        for statement in statements:
            database.execute(statement)
    return Store(store.folder)


def test_an_empty_log_is_empty(store: Store) -> None:
    assert store.reader.recovered() == Recovered(head=0, federations=[], topics=[], watermarks=[])
    assert store.reader.check()[0] == 0


@pytest.mark.parametrize("count", [1, 3, 255, 256, 257, 512])
def test_what_was_stored_is_read_after_a_restart(store: Store, count: int) -> None:
    store.append(batch(events(count), watermarks=[("learner:l1", 7, count)]))
    store.close()
    with closing(Store(store.folder)) as again:
        found = again.reader.recovered()
        assert (found.head, found.watermarks) == (count, [("learner:l1", 7, count)])
        assert found.federations == [(1, "f/", count)]
        assert again.reader.check()[0] == count
        records, through = read(again, head=count, max_events=1000)
        assert [r.envelope for r in records] == [place.envelope for place in events(count)]
        assert through == count
        assert records[0][:6] == (1, "f/done/l1/", 0, 0, 1001, events(1)[0].crc)


def test_each_lane_is_read_by_its_own_chain(store: Store) -> None:
    store.append(batch(events(10)))
    found = store.reader.recovered()
    assert found.topics == [(2, "f/done/l1/", 1, 10), (3, "f/task/l1/", 1, 9)]
    tasks, through = read(store, "f/task/l1/", head=10, lane_head=9)
    assert [r.sequence for r in tasks] == [3, 6, 9]
    assert through == 10, "the lane is covered to the end of the log"
    tasks, _ = read(store, "f/task/l1/", after=4, head=10, lane_head=9)
    assert [r.sequence for r in tasks] == [6, 9]


def test_reading_stops_at_the_limits_and_says_where(store: Store) -> None:
    store.append(batch(events(10, size=100)))
    records, through = read(store, head=10, max_events=4)
    assert ([r.sequence for r in records], through) == ([1, 2, 3, 4], 4)
    records, through = read(store, after=4, head=10, max_bytes=250)
    assert ([r.sequence for r in records], through) == ([5, 6], 6)
    records, through = read(store, after=6, head=10, max_bytes=1)
    assert ([r.sequence for r in records], through) == ([7], 7), "one record at least"
    records, through = read(store, after=9, head=10, max_events=1)
    assert ([r.sequence for r in records], through) == ([10], 10)


def test_what_is_not_committed_yet_is_not_read(store: Store) -> None:
    store.append(batch(events(10)))
    records, through = read(store, head=4, lane_head=4)
    assert ([r.sequence for r in records], through) == ([1, 2, 3, 4], 4)


def test_reading_a_lane_uses_its_index(store: Store) -> None:
    with closing(sqlite3.connect(store.path)) as database:
        for column, query in (
            ("topic", reading._READ_TOPIC),
            ("federation", reading._READ_FEDERATION),
        ):
            plan = database.execute(f"explain query plan {query}", (1, 5, 9, 256)).fetchall()
            search = f"SEARCH event USING INDEX event_{column} ({column}=? AND rowid>? AND rowid<?)"
            assert search in [row[3] for row in plan]
            assert not any("TEMP B-TREE" in row[3] for row in plan), "sorted by hand"


def test_watermarks_and_cursors_move(store: Store) -> None:
    store.append(batch([], watermarks=[("a", 1, 1), ("b", 1, 5)], cursors=[("a", "f/", 3)]))
    store.append(batch([], watermarks=[("a", 2, 1)], cursors=[("a", "f/", 4)]))
    assert sorted(store.reader.recovered().watermarks) == [("a", 2, 1), ("b", 1, 5)]
    with closing(sqlite3.connect(store.path)) as database:
        assert database.execute("select * from cursor").fetchall() == [("a", "f/", 4)]


def test_refused_events_are_kept_shortened(store: Store) -> None:
    store.append(batch([], refused=[Refused("a", 1, 2, "why", bytes(10_000))]))
    with closing(sqlite3.connect(store.path)) as database:
        row = database.execute("select publisher, epoch, sequence, reason, envelope from refused")
        assert row.fetchall() == [("a", 1, 2, "why", bytes(4096))]


def test_a_folder_has_one_broker(store: Store) -> None:
    with pytest.raises(MachineError) as error:
        Store(store.folder)
    assert f"{store.folder} is in use by another broker, process {os.getpid()}" in str(error.value)
    store.close()
    Store(store.folder).close()


def test_a_killed_broker_leaves_its_folder_free(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib; from metisfl.broker.store import Store; "
        "Store(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-I", "-c", script, str(tmp_path)], timeout=30)
    assert ended.returncode == -9
    Store(tmp_path).close()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="file cannot be used"):
        Store(tmp_path / "file")


# ---- Damage ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("update event set envelope = x'00' where sequence = 7", "record 7 does not match"),
        ("update event set crc = 1 where sequence = 10", "record 10 does not match"),
        ("delete from event where sequence = 5", "record 5 is missing"),
    ],
)
def test_a_damaged_log_is_not_opened_for_service(store: Store, statement: str, told: str) -> None:
    store.append(batch(events(10)))
    with (
        closing(tampered(store, statement)) as damaged,
        pytest.raises(DamagedLog, match=told) as error,
    ):
        damaged.reader.recovered()
    assert str(store.path) in str(error.value)


@pytest.mark.parametrize(
    ("statement", "lane", "told"),
    [
        ("update event set envelope = x'00' where sequence = 6", "f/task/l1/", "record 6 does not"),
        ("delete from event where sequence = 3", "f/task/l1/", "record 3, before 6, is missing"),
        ("delete from event where sequence = 6", "f/task/l1/", "record 6, before 9, is missing"),
        ("delete from event where sequence = 9", "f/task/l1/", "behind 6 to 9 are missing"),
        ("delete from event where sequence = 10", "f/", "behind 9 to 10 are missing"),
    ],
)
def test_a_lane_is_never_served_shorter(store: Store, statement: str, lane: str, told: str) -> None:
    store.append(batch(events(10)))
    with (
        closing(tampered(store, statement)) as damaged,
        pytest.raises(DamagedLog, match=told),
    ):
        read(damaged, lane, head=10, lane_head=9 if lane == "f/task/l1/" else 10)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "events.db").write_bytes(b"something else entirely " * 100)
    with pytest.raises(DamagedLog, match=r"events.db is damaged: file is not a database"):
        Store(tmp_path)
    (tmp_path / "events.db").unlink()
    Store(tmp_path).close()


def test_torn_pages_are_found(store: Store) -> None:
    store.append(batch(events(2000)))
    store.close()
    with store.path.open("r+b") as file:
        file.seek(5 * 8192)
        file.write(os.urandom(8192 * 3))
    with pytest.raises(DamagedLog), closing(Store(store.folder)) as damaged:
        damaged.reader.check()


def test_a_log_of_a_later_release_is_left_alone(store: Store) -> None:
    with pytest.raises(MachineError, match="has format 9; this release knows 2"):
        tampered(store, "pragma user_version = 9")


# ---- No room -------------------------------------------------------------------------------


def test_what_does_not_fit_is_not_stored_at_all_and_fits_later(store: Store) -> None:
    store.append(batch(events(3), watermarks=[("learner:l1", 1, 3)]))
    (pages,) = store._writer.execute("pragma page_count").fetchone()
    store._writer.execute(f"pragma max_page_count = {pages}")
    more = batch(events(500, first=4), watermarks=[("learner:l1", 1, 503)])
    with pytest.raises(StorageFull, match=r"cannot be stored \(database or disk is full\)"):
        store.append(more)
    assert store.reader.recovered().watermarks == [("learner:l1", 1, 3)]
    assert store.reader.check()[0] == 3
    store._writer.execute("pragma max_page_count = 1000000")
    store.append(more)
    assert store.reader.check()[0] == 503


@pytest.fixture
def writer(store: Store) -> Iterator[Writer]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    writer = Writer(store, context)
    yield writer
    writer.close()
    context.destroy(linger=0)


def outcomes(writer: Writer, count: int) -> list[Outcome]:
    found: list[Outcome] = []
    while len(found) < count:
        assert writer.signal.poll(10_000), f"{len(found)} of {count} outcomes after 10 s"
        found += writer.outcomes()
    return found


def test_the_writer_stores_in_order_and_tells(store: Store, writer: Writer) -> None:
    first, second = batch(events(2)), batch(events(2, first=3), number=2)
    writer.submit(first)
    writer.submit(second)
    assert outcomes(writer, 2) == [Outcome(first, None), Outcome(second, None)]
    assert store.reader.check()[0] == 4


def test_after_a_failure_its_generation_is_dropped(store: Store, writer: Writer) -> None:
    store._writer.execute("pragma max_page_count = 16")
    failing = batch(events(500, size=500))
    writer.submit(failing)
    writer.submit(batch(events(1), number=2))
    again = batch(events(1), number=3, generation=1)
    writer.submit(again)
    failed, stored = outcomes(writer, 2)
    assert (failed.batch, stored) == (failing, Outcome(again, None))
    assert isinstance(failed.failure, StorageFull)
    assert store.reader.check()[0] == 1


def test_the_writer_finishes_what_it_was_given(store: Store, writer: Writer) -> None:
    for number in range(3):
        writer.submit(batch(events(100, first=1 + 100 * number), number=number))
    writer.close()
    assert len(writer.outcomes()) == 3
    assert store.reader.check()[0] == 300


def test_the_write_ahead_log_stays_bounded_under_a_load_without_a_pause(
    store: Store, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "CHECKPOINT_BYTES", 100_000)
    monkeypatch.setattr(writer_module, "WAL_LIMIT_BYTES", 1_000_000)
    made = events(20_000)
    for number in range(200):
        writer.submit(batch(made[100 * number : 100 * number + 100], number=number))
    outcomes(writer, 200)
    size = (store.folder / "events.db-wal").stat().st_size
    assert 0 < size < 5_000_000, "200 batches of 10 pages and more, and none was let go"
    assert store.reader.check()[0] == 20_000
