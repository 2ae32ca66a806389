"""SQLite keeps any value in any place of a damaged log; whoever reads it says what is wrong."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from log_batches import batch, events

from metisfl.broker import schema
from metisfl.broker.reading import LogReader
from metisfl.broker.schema import DamagedLog
from metisfl.broker.store import Store


@pytest.mark.parametrize(
    ("table", "column", "value", "what"),
    [
        ("trimmed", "floor", b"\0", "does not say to where it was trimmed"),
        ("event", "envelope", "event 6", "record 6 has a field that cannot be"),
        ("event", "crc", 0.5, "record 6 has a field that cannot be"),
        ("event", "logged_unix_ns", -1, "record 6 has a field that cannot be"),
        ("event", "previous_in_topic", b"", "record 6 has a field that cannot be"),
        ("topic", "name", b"f/done/l1/", "is no row of `select id, name"),
        ("topic", "federation", 7, "a topic is of a federation that it does not hold"),
        ("federation", "name", b"f/", "is no row of `select id, name"),
        ("publisher", "epoch", "one", "is no row of `select name, epoch"),
    ],
)
def test_a_value_that_cannot_be_is_named(
    tmp_path: Path, table: str, column: str, value: object, what: str
) -> None:
    store = Store(tmp_path)
    store.append(batch(events(6), watermarks=[("learner:l1", 1, 6)]))
    store.close()
    path = tmp_path / "events.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        newest = f"where rowid = (select max(rowid) from {table})"
        connection.execute(f"update {table} set {column} = ? {newest}", (value,))
    with closing(schema.connect(path)) as connection:
        with pytest.raises(DamagedLog, match=what) as raised:
            LogReader(connection, path).recovered()
        assert str(path) in str(raised.value)
