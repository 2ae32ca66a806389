"""What belongs together is committed together, and a bad place is named."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from metisfl.deploy.database import open_database, sole_process, transaction
from metisfl.proto.errors import MachineError


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
    with pytest.raises(MachineError, match="the folder must exist"):
        open_database(tmp_path / "missing" / "db")


def test_a_home_has_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        sole_process(tmp_path, "learner"),
        pytest.raises(MachineError, match=f"in use by another learner, process {os.getpid()}"),
        sole_process(tmp_path, "learner"),
    ):
        pass
    with sole_process(tmp_path, "learner"):
        pass
