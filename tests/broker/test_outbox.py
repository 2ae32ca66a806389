"""outbox.py: events and cursors share the fate of the transaction that they were written in."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from metisfl.broker import outbox as module
from metisfl.broker.outbox import Outbox
from metisfl.proto.envelope import parse_envelope
from metisfl.proto.errors import MachineError, UserError
from metisfl.proto.events_pb2 import Heartbeat, TaskFailed

TOPIC = "f/done/l1/"


def event(number: int = 1) -> TaskFailed:
    return TaskFailed(task_id=f"task-{number}", learner="l1", reason="r")


@pytest.fixture(params=[None, "", "IMMEDIATE"], ids=["explicit", "implicit", "immediate"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """Each way in which sqlite3 can begin transactions."""
    connection = sqlite3.connect(tmp_path / "state.db", isolation_level=request.param)
    yield connection
    connection.close()


def append(database: sqlite3.Connection, outbox: Outbox, count: int = 1) -> list[int]:
    with database:
        if database.isolation_level is None:
            database.execute("begin")
        return [outbox.append(TOPIC, event(n), correlation_id="run") for n in range(count)]


def test_events_are_numbered_without_holes(database: sqlite3.Connection) -> None:
    outbox = Outbox(database, "learner:l1")
    assert append(database, outbox, 3) == [1, 2, 3]
    assert append(database, outbox) == [4]
    assert outbox.last() == 4
    assert [row[0] for row in outbox.rows(1, 2)] == [2, 3]


def test_a_row_is_the_envelope_that_will_be_stored(database: sqlite3.Connection) -> None:
    outbox = Outbox(database, "learner:l1")
    append(database, outbox, 2)
    _, (sequence, crc, data) = outbox.rows(0, 9)
    envelope = parse_envelope(data)
    assert zlib.crc32(data) == int.from_bytes(crc, "little")
    assert (envelope.sequence, envelope.epoch, envelope.publisher) == (
        sequence,
        outbox.epoch,
        "learner:l1",
    )
    assert (envelope.topic, envelope.type, envelope.correlation_id) == (TOPIC, "TaskFailed", "run")
    assert TaskFailed.FromString(envelope.payload) == event(1)


def test_what_is_rolled_back_was_never_there(database: sqlite3.Connection) -> None:
    outbox = Outbox(database, "learner:l1")
    append(database, outbox, 2)
    if database.isolation_level is None:
        database.execute("begin")
    assert outbox.append(TOPIC, event()) == 3
    assert outbox.in_transaction
    database.rollback()
    assert append(database, outbox) == [3]


def test_it_goes_on_after_a_restart(database: sqlite3.Connection) -> None:
    first = Outbox(database, "learner:l1")
    append(database, first, 3)
    first.acknowledge(2)
    first.tidy()
    again = Outbox(database, "learner:l1")
    assert (again.epoch, again.acked, again.last()) == (first.epoch, 2, 3)
    assert append(database, again) == [4]


def test_numbers_go_on_when_everything_was_acknowledged(database: sqlite3.Connection) -> None:
    outbox = Outbox(database, "learner:l1")
    append(database, outbox, 3)
    outbox.acknowledge(3)
    outbox.tidy()
    assert outbox.rows(0, 9) == []
    assert Outbox(database, "learner:l1").last() == 3
    assert append(database, outbox) == [4]


def test_acknowledged_rows_go_with_the_next_append(database: sqlite3.Connection) -> None:
    outbox = Outbox(database, "learner:l1")
    append(database, outbox, 3)
    outbox.acknowledge(2)
    assert len(outbox.rows(0, 9)) == 3
    append(database, outbox)
    assert [row[0] for row in outbox.rows(0, 9)] == [3, 4]


def test_a_rolled_back_deletion_is_made_up_for(database: sqlite3.Connection) -> None:
    outbox = Outbox(database, "learner:l1")
    append(database, outbox, 3)
    outbox.acknowledge(2)
    if database.isolation_level is None:
        database.execute("begin")
    outbox.append(TOPIC, event())
    database.rollback()
    outbox.acknowledge(3)
    assert append(database, outbox) == [4]
    assert [row[0] for row in outbox.rows(0, 9)] == [4]


def test_a_new_database_has_a_newer_epoch(tmp_path: Path) -> None:
    epochs = []
    for name in ("a", "b"):
        with closing(sqlite3.connect(tmp_path / name)) as database:
            epochs.append(Outbox(database, "learner:l1").epoch)
    assert epochs[0] < epochs[1]


def test_a_database_has_one_publisher(database: sqlite3.Connection) -> None:
    Outbox(database, "learner:l1")
    with pytest.raises(UserError, match="the outbox of 'learner:l1', not of 'learner:l2'"):
        Outbox(database, "learner:l2")


def test_an_event_outside_of_a_transaction_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "x", isolation_level=None)) as database:
        outbox = Outbox(database, "learner:l1")
        with pytest.raises(ValueError, match="inside the transaction"):
            outbox.append(TOPIC, event())


@pytest.mark.parametrize(
    ("topic", "message", "told"),
    [
        ("f/done/l1", event(), "is not federation/kind/subject/"),
        ("f/beat/l1/", Heartbeat(learner="l1", state="idle"), "is transient"),
        (TOPIC, TaskFailed(learner="l1"), "task_id has 0 characters"),
    ],
)
def test_what_a_broker_would_refuse_is_not_accepted(
    database: sqlite3.Connection, topic: str, message: TaskFailed, told: str
) -> None:
    outbox = Outbox(database, "learner:l1")
    database.execute("begin")
    with pytest.raises(ValueError, match=told):
        outbox.append(topic, message)
    database.rollback()
    assert outbox.last() == 0


def test_an_outbox_is_bounded(
    database: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OUTBOX_EVENTS_MAX", 3)
    outbox = Outbox(database, "learner:l1")
    append(database, outbox, 3)
    with pytest.raises(MachineError, match="3 events of learner:l1 wait for the broker"):
        append(database, outbox)
    outbox.acknowledge(1)
    assert append(database, outbox) == [4]


def test_a_cursor_moves_with_the_effects_and_never_back(database: sqlite3.Connection) -> None:
    outbox = Outbox(database, "learner:l1")
    assert outbox.cursor("f/") == 0
    with database:
        outbox.advance("f/", 5)
        outbox.advance("f/task/l1/", 2)
    database.execute("begin")
    outbox.advance("f/", 9)
    database.rollback()
    assert (outbox.cursor("f/"), outbox.cursor("f/task/l1/")) == (5, 2)
    with pytest.raises(ValueError, match="stands at 5; 4 is behind it"):
        outbox.advance("f/", 4)
