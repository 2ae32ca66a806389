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

__all__ = ["hold_folder", "open_database", "sole_process", "transaction"]


def open_database(path: Path) -> sqlite3.Connection:
    """Open or create a state database. Raises MachineError if the file cannot be used."""
    try:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
    except sqlite3.Error as error:
        raise MachineError(f"{path}: {error}; the folder must exist and be writable") from None
    return connection


def hold_folder(folder: Path, who: str) -> int:
    """Own `folder` until the returned descriptor is closed, or this process is gone.

    `who` names what holds it, for people: "broker". Raises MachineError if another one has it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MachineError(f"{folder} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise MachineError(
            f"{folder} is in use by another {who}, process {holder}: stop that one, or give this "
            "one another --home"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


@contextmanager
def sole_process(home: Path, who: str) -> Iterator[None]:
    """Hold a daemon's home while the block runs; see `hold_folder`."""
    descriptor = hold_folder(home, who)
    try:
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
