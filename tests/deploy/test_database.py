"""What belongs together is committed together, and a bad place is named."""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from metisfl.deploy import database
from metisfl.deploy.database import open_database, sole_process, transaction
from metisfl.proto.errors import DiskFull, MachineError


def test_a_transaction_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    with closing(open_database(tmp_path / "db")) as connection:
        connection.execute("CREATE TABLE t (x)")
        with transaction(connection):
            connection.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(ValueError, match="cut"), transaction(connection):
            _write_and_fail(connection)
    with closing(open_database(tmp_path / "db")) as connection:
        assert connection.execute("SELECT x FROM t").fetchall() == [(1,)]


def _write_and_fail(connection: sqlite3.Connection) -> None:
    connection.execute("INSERT INTO t VALUES (2)")
    raise ValueError("cut")


def test_every_commit_is_on_disk_before_it_returns(tmp_path: Path) -> None:
    with closing(open_database(tmp_path / "db")) as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_folder_that_is_not_there_is_the_machines_fault(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="the folder must exist") as caught:
        open_database(tmp_path / "missing" / "db")
    assert not isinstance(caught.value, DiskFull)


def test_a_full_disk_takes_nothing_and_is_no_broken_one(tmp_path: Path) -> None:
    with closing(open_database(tmp_path / "db")) as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.execute("PRAGMA max_page_count = 4")  # SQLite says the same of a full disk
        with pytest.raises(DiskFull, match=r"db: .*full; make room"), transaction(connection):
            connection.executemany("INSERT INTO t VALUES (randomblob(?))", [(1,), (100_000,)])
        assert connection.execute("SELECT x FROM t").fetchall() == []
        with transaction(connection):
            connection.execute("INSERT INTO t VALUES (2)")


def test_another_writer_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database.os, "posix_fallocate", no_room)
    with (
        closing(open_database(tmp_path / "db")) as one,
        closing(sqlite3.connect(tmp_path / "db", isolation_level=None, timeout=0.0)) as other,
    ):
        one.execute("BEGIN IMMEDIATE")
        with pytest.raises(MachineError, match="no other process") as caught, transaction(other):
            pytest.fail("both write")
        assert not isinstance(caught.value, DiskFull)


def test_of_a_file_that_cannot_be_made_the_disk_is_asked_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite does not say."""
    unusable = tmp_path / "db"
    unusable.mkdir()
    with pytest.raises(MachineError, match="must exist and be writable"):
        open_database(unusable)
    monkeypatch.setattr(database.os, "posix_fallocate", no_room)
    with pytest.raises(DiskFull, match="make room"):
        open_database(unusable)


def no_room(*_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_home_without_room_is_found_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database.os, "posix_fallocate", no_room)
    with pytest.raises(DiskFull, match="bytes are free; make room"), sole_process(tmp_path, "x"):
        pytest.fail("it has no room")
    monkeypatch.undo()
    with sole_process(tmp_path, "x"):
        assert [one.name for one in tmp_path.iterdir()] == ["lock"], "the trial is gone"


def test_a_home_has_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        sole_process(tmp_path, "learner"),
        pytest.raises(MachineError, match=f"in use by another learner, process {os.getpid()}"),
        sole_process(tmp_path, "learner"),
    ):
        pass
    with sole_process(tmp_path, "learner"):
        pass
