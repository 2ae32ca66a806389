"""The state database of a daemon: SQLite, durable at every commit.

Rule: state, outbox and cursors of a process live in one database, so that what belongs together is
one transaction. Transactions are explicit: nothing is committed by accident.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metisfl.proto.errors import MachineError

__all__ = ["open_database", "sole_process", "transaction"]


def open_database(path: Path) -> sqlite3.Connection:
    """Open or create a state database. Raises MachineError if the file cannot be used."""
    try:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
    except sqlite3.Error as error:
        raise MachineError(f"{path}: {error}; the folder must exist and be writable") from None
    return connection


@contextmanager
def sole_process(home: Path) -> Iterator[None]:
    """Hold a daemon's folder for this process. Raises MachineError if another one has it."""
    path = home / "lock"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MachineError(
            f"{home} is in use by another process: stop that one, or give this one another --home"
        ) from None
    else:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit what the block wrote, all of it or nothing.

    Raises MachineError if the disk or another process does not let it.
    """
    try:
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            yield
    except sqlite3.OperationalError as error:
        path = connection.execute("PRAGMA database_list").fetchone()[2]
        raise MachineError(
            f"{path}: {error}; make room or repair the disk, and let no other process use the file"
        ) from error
