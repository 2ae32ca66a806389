"""The log's database: its tables, how it is opened, and what its errors mean.

Rule: what a commit says is on disk is on disk (`synchronous=FULL`). An error of SQLite says either
that there is no room or no access, which may pass, or that the file is damaged, which does not.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

from metisfl.deploy.database import is_full
from metisfl.proto.errors import DiskFull, MachineError

__all__ = [
    "PAGE_BYTES",
    "WAL_LIMIT_BYTES",
    "DamagedLog",
    "LogFull",
    "StorageFull",
    "checkpoint",
    "connect",
    "damaged",
    "explained",
    "prepare",
]

SCHEMA_VERSION: Final = 2
PAGE_BYTES: Final = 8192
BUSY_MS: Final = 5000
WAL_LIMIT_BYTES: Final = 64 * 1024 * 1024

# `trimmed` of a lane is its newest record that is in the log no more; `trimmed.floor` is the log's.
_SCHEMA: Final = """
create table federation (
    id integer primary key, name text not null unique, trimmed integer not null default 0);
create table topic (
    id integer primary key, name text not null unique,
    federation integer not null references federation, trimmed integer not null default 0);
create table event (
    sequence integer primary key, topic integer not null, federation integer not null,
    previous_in_topic integer not null, previous_in_federation integer not null,
    logged_unix_ns integer not null, crc integer not null, envelope blob not null);
create index event_topic on event (topic);
create index event_federation on event (federation);
create table trimmed (one integer primary key check (one = 1), floor integer not null);
insert into trimmed values (1, 0);
create table publisher (
    name text primary key, epoch integer not null, sequence integer not null);
create table cursor (
    reader text not null, lane text not null, sequence integer not null,
    primary key (reader, lane)) without rowid;
create table refused (
    id integer primary key, publisher text not null, epoch integer not null,
    sequence integer not null, reason text not null, envelope blob not null);
"""


class StorageFull(DiskFull):
    """The batch could not be stored and none of its events was; it may work later."""


class LogFull(StorageFull):
    """There is room on the disk, but the log may not take more of it."""


class DamagedLog(MachineError):
    """The log does not hold what was stored in it."""


def connect(path: Path) -> sqlite3.Connection:
    """A connection for one thread at a time. Raises sqlite3.Error."""
    connection = sqlite3.connect(
        path, isolation_level=None, check_same_thread=False, timeout=BUSY_MS / 1000
    )
    connection.execute(f"pragma page_size = {PAGE_BYTES}")
    if connection.execute("pragma page_count").fetchone() == (0,):
        # Lets the file shrink when much was trimmed; only a file without a page can still be told.
        connection.execute("pragma auto_vacuum = incremental")
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = full")
    connection.execute("pragma wal_autocheckpoint = 0")
    connection.execute(f"pragma journal_size_limit = {WAL_LIMIT_BYTES}")
    return connection


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Make the tables of a new log. Raises MachineError for the format of another release."""
    (version,) = connection.execute("pragma user_version").fetchone()
    if version not in (0, SCHEMA_VERSION):
        raise MachineError(
            f"{path} has format {version}; this release knows {SCHEMA_VERSION}: "
            "install the release that wrote it, or a newer one"
        )
    if version == 0:
        connection.executescript(
            f"begin immediate; {_SCHEMA} pragma user_version = {SCHEMA_VERSION}; commit"
        )


def checkpoint(connection: sqlite3.Connection) -> tuple[int, int]:
    """Move the write-ahead log into the database as far as possible beside a writer.

    Returns how many pages the log holds and how many of them were moved; (0, 0) when it could not
    be tried now.
    """
    try:
        busy, pages, moved = connection.execute("pragma wal_checkpoint(passive)").fetchone()
    except sqlite3.OperationalError:
        return 0, 0  # no room: the log keeps what it holds
    return (0, 0) if busy else (pages, moved)


def damaged(path: Path, what: str) -> DamagedLog:
    return DamagedLog(
        f"{path} is damaged: {what}. Restore it from a copy; `metisfl-broker --check` "
        "tells whether a log is whole"
    )


def explained(error: sqlite3.Error, path: Path) -> MachineError:
    if is_full(error, path):
        return DiskFull(f"{path} cannot be used: {error}; make room on that disk")
    if isinstance(error, sqlite3.OperationalError):
        return MachineError(f"{path} cannot be used: {error}; look at the disk and its permissions")
    return DamagedLog(f"{path} is damaged: {error}. Restore it from a copy")
