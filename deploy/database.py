"""The state database of a daemon: SQLite, durable at every commit.

Rule: state, outbox and cursors of a process live in one database, so that what belongs together is
one transaction. Transactions are explicit: nothing is committed by accident.
A full disk is never taken for a broken one: it ends the process with nothing lost, to be started
again when there is room.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final

from metisfl.proto.errors import FULL, DiskFull, MachineError, machine_error

__all__ = [
    "file_of",
    "hold_folder",
    "is_full",
    "need_room",
    "open_database",
    "sole_process",
    "transaction",
]

ROOM_BYTES: Final = 1 << 20
"""What a daemon has at least when it starts: a few commits, and SQLite's shared index of 32 kB."""


def open_database(path: Path) -> sqlite3.Connection:
    """Open or create a state database. Raises DiskFull, MachineError if it cannot be used."""
    try:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
    except sqlite3.Error as error:
        if is_full(error, path):
            raise DiskFull(f"{path}: {error}; make room on that disk") from None
        raise MachineError(f"{path}: {error}; the folder must exist and be writable") from None
    return connection


def file_of(connection: sqlite3.Connection) -> Path:
    """The file behind a connection."""
    return Path(connection.execute("PRAGMA database_list").fetchone()[2])


def is_full(error: sqlite3.Error, path: Path) -> bool:
    """Whether an error of the database at `path` says that its disk is full.

    SQLite says so of writes. Of a file that it cannot make or enlarge otherwise, as when it opens
    a database, it only says that this went wrong: then the disk is asked.
    """
    # The codes of its errors come with Python 3.11; their texts are as old as SQLite 3.
    said = str(error)
    if said in ("disk I/O error", "unable to open database file"):
        return not _has_room(path.parent)
    return said == "database or disk is full"


def need_room(folder: Path) -> None:
    """Raise DiskFull unless the disk of `folder` takes ROOM_BYTES."""
    if not _has_room(folder):
        raise DiskFull(f"{folder}: less than {ROOM_BYTES} bytes are free; make room on that disk")


def _has_room(folder: Path) -> bool:
    """Found out by taking it, since a quota and a file system's own reserve show nowhere else."""
    try:
        with TemporaryFile(dir=folder) as trial:
            os.posix_fallocate(trial.fileno(), 0, ROOM_BYTES)
    except OSError as error:
        return error.errno not in FULL
    return True


def hold_folder(folder: Path, who: str) -> int:
    """Own `folder` until the returned descriptor is closed, or this process is gone.

    `who` names what holds it, for people: "broker". Raises MachineError if another one has it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise machine_error(f"{folder} cannot be used: {error.strerror}", error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise MachineError(
            f"{folder} is in use by another {who}, process {holder}: stop that one, or give this "
            "one another --home"
        ) from None
    holder = f"{os.getpid()}\n"
    try:
        os.ftruncate(descriptor, os.pwrite(descriptor, holder.encode(), 0))
    except OSError as error:
        os.close(descriptor)
        raise machine_error(f"{folder} cannot be used: {error.strerror}", error) from error
    return descriptor


@contextmanager
def sole_process(home: Path, who: str) -> Iterator[None]:
    """Hold a daemon's home while the block runs; see `hold_folder`. Raises DiskFull, too."""
    descriptor = hold_folder(home, who)
    try:
        need_room(home)  # before it loads for seconds only to end at its first commit
        yield
    finally:
        os.close(descriptor)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit what the block wrote, all of it or nothing.

    Raises DiskFull, and MachineError if the disk or another process does not let it.
    """
    try:
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            yield
    except sqlite3.OperationalError as error:
        path = file_of(connection)
        if is_full(error, path):
            raise DiskFull(f"{path}: {error}; make room on that disk") from error
        raise MachineError(
            f"{path}: {error}; repair the disk, and let no other process use the file"
        ) from error
