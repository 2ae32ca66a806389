"""The log on disk: one SQLite database in a folder that one broker owns.

Rule 1: `append` returns only when the batch is on disk, whole; if it raises StorageFull nothing of
it is. Events, watermarks and new topics go in one transaction.
Rule 2: what is read was checked: each record against its checksum, each lane against its chain of
predecessors. A log with a damaged or missing record is an error that names it, never a shorter log.

Threads: one connection writes, one reads, one checkpoints; each is used by one thread at a time.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

from metisfl.broker.sequencer import Batch, Recovered
from metisfl.deploy.database import hold_folder
from metisfl.proto.errors import MachineError

__all__ = ["DamagedLog", "StorageFull", "Store", "Stored"]

SCHEMA_VERSION: Final = 1
PAGE_BYTES: Final = 8192
BUSY_MS: Final = 5000
WAL_LIMIT_BYTES: Final = 64 * 1024 * 1024
REFUSED_KEPT: Final = 10_000
REFUSED_BYTES: Final = 4096  # kept of each refused envelope
ROWS_AT_ONCE: Final = (256, 64, 16, 4, 1)

_SCHEMA: Final = """
create table federation (id integer primary key, name text not null unique);
create table topic (
    id integer primary key, name text not null unique,
    federation integer not null references federation);
create table event (
    sequence integer primary key, topic integer not null, federation integer not null,
    previous_in_topic integer not null, previous_in_federation integer not null,
    logged_unix_ns integer not null, crc integer not null, envelope blob not null);
create index event_topic on event (topic);
create index event_federation on event (federation);
create table publisher (
    name text primary key, epoch integer not null, sequence integer not null);
create table cursor (
    reader text not null, lane text not null, sequence integer not null,
    primary key (reader, lane)) without rowid;
create table refused (
    id integer primary key, publisher text not null, epoch integer not null,
    sequence integer not null, reason text not null, envelope blob not null);
"""
_UPSERT_WATERMARK: Final = (
    "on conflict (name) do update set epoch = excluded.epoch, sequence = excluded.sequence"
)
_UPSERT_CURSOR: Final = "on conflict (reader, lane) do update set sequence = excluded.sequence"
_READ: Final = (
    "select sequence, topic.name, previous_in_topic, previous_in_federation, logged_unix_ns, crc,"
    " envelope from event join topic on topic.id = event.topic"
    " where event.{lane} = ? and sequence > ? and sequence <= ? order by sequence limit ?"
)
_READ_TOPIC: Final = _READ.format(lane="topic")
_READ_FEDERATION: Final = _READ.format(lane="federation")
# From each lane's index, without touching its events.
_HEAD: Final = "coalesce((select max(sequence) from event where event.{lane} = {lane}.id), 0)"


class StorageFull(MachineError):
    """The batch could not be stored and nothing of it was; it may work later."""


class DamagedLog(MachineError):
    """The log does not hold what was stored in it."""


class Stored(NamedTuple):
    """One record as it is on disk, checked against its checksum."""

    sequence: int
    topic: str
    previous_in_topic: int
    previous_in_federation: int
    logged_unix_ns: int
    crc: int
    envelope: bytes


class Store:
    """Opens or creates the log in `folder`.

    Raises MachineError if another broker has the folder or it cannot be written, DamagedLog.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "events.db"
        self._lock = hold_folder(folder, "broker")
        self._connections: list[sqlite3.Connection] = []
        try:
            self._writer = self.connect()
            self._prepare()
            self._reader = self.connect()
            self._reader.execute("pragma query_only = on")
        except sqlite3.Error as error:
            self.close()
            raise _explained(error, self.path) from error
        except MachineError:
            self.close()
            raise

    def connect(self) -> sqlite3.Connection:
        """A connection for one more thread; `close` closes it."""
        connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, timeout=BUSY_MS / 1000
        )
        self._connections.append(connection)
        connection.execute(f"pragma page_size = {PAGE_BYTES}")
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = full")
        connection.execute("pragma wal_autocheckpoint = 0")
        connection.execute(f"pragma journal_size_limit = {WAL_LIMIT_BYTES}")
        return connection

    def close(self) -> None:
        """Close everything and free the folder; harmless when repeated."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def recovered(self) -> Recovered:
        """Return what the log holds. Raises DamagedLog if its end is not what was stored."""
        read = self._reader.execute
        try:
            head = read("select coalesce(max(sequence), 0) from event").fetchone()[0]
            found = Recovered(
                head=head,
                federations=read(
                    f"select id, name, {_HEAD.format(lane='federation')} from federation"
                ).fetchall(),
                topics=read(
                    f"select id, name, federation, {_HEAD.format(lane='topic')} from topic"
                ).fetchall(),
                watermarks=read("select name, epoch, sequence from publisher").fetchall(),
            )
        except sqlite3.Error as error:
            raise _explained(error, self.path) from error
        for _ in self._checked(max(0, head - 1000), head):
            pass
        return found

    def append(self, batch: Batch) -> None:
        """Store a batch, durably. Raises StorageFull, after which nothing of it is stored."""
        execute = self._writer.execute
        try:
            execute("begin immediate")
            self._insert("insert or ignore into federation", batch.federations)
            self._insert("insert or ignore into topic", batch.topics)
            self._insert(
                "insert into event",
                [(*place[:5], batch.logged_unix_ns, *place[5:7]) for place in batch.appends],
            )
            self._insert("insert into publisher", batch.watermarks, _UPSERT_WATERMARK)
            self._insert("insert into cursor", batch.cursors, _UPSERT_CURSOR)
            if batch.refused:
                self._insert_refused(batch)
            execute("commit")
        except sqlite3.OperationalError as error:
            if self._writer.in_transaction:
                execute("rollback")
            raise StorageFull(
                f"{self.path}: events cannot be stored ({error}); make room on that disk, the "
                "broker goes on by itself"
            ) from error
        except sqlite3.DatabaseError as error:
            raise _explained(error, self.path) from error

    def checkpoint(self) -> tuple[int, int]:
        """Move the write-ahead log into the database, in the writer's thread; see `checkpoint`."""
        return checkpoint(self._writer)

    def read_lane(
        self,
        *,
        of_federation: bool,
        lane_id: int,
        lane_head: int,
        after: int,
        head: int,
        max_events: int,
        max_bytes: int,
    ) -> tuple[list[Stored], int]:
        """Return the records of a lane behind `after`, and the sequence that they cover it to.

        At least one record, if there is any, whatever its size. `lane_head` is the lane's newest
        record and `head` the log's, both on disk already. Raises DamagedLog.
        """
        found: list[Stored] = []
        covered, size, previous = head, 0, after
        rows = self._rows(
            _READ_FEDERATION if of_federation else _READ_TOPIC, (lane_id, after, head, max_events)
        )
        for record in rows:
            size += len(record.envelope)
            if found and size > max_bytes:
                break
            before = record.previous_in_federation if of_federation else record.previous_in_topic
            if before > previous or (found and before != previous):
                raise self._damaged(f"record {before}, before {record.sequence}, is missing")
            previous = record.sequence
            found.append(record)
        if previous < lane_head:
            covered = previous
            if len(found) < max_events and size <= max_bytes:
                raise self._damaged(f"the records behind {previous} to {lane_head} are missing")
        return found, covered

    def check(self) -> int:
        """Read everything; return the number of records. Raises DamagedLog."""
        try:
            (verdict,) = self._reader.execute("pragma integrity_check(1)").fetchone()
        except sqlite3.Error as error:
            raise _explained(error, self.path) from error
        if verdict != "ok":
            raise self._damaged(verdict)
        head = self.recovered().head
        return sum(1 for _ in self._checked(0, head))

    def _checked(self, after: int, head: int) -> Iterator[Stored]:
        """The records in `after`+1..`head`, of which none is missing."""
        expected = after
        query = (
            "select sequence, topic.name, previous_in_topic, previous_in_federation,"
            " logged_unix_ns, crc, envelope from event join topic on topic.id = event.topic"
            " where sequence > ? and sequence <= ? order by sequence"
        )
        for record in self._rows(query, (after, head)):
            expected += 1
            if record.sequence != expected:
                raise self._damaged(f"record {expected} is missing")
            yield record
        if expected != head:
            raise self._damaged(f"record {expected + 1} is missing")

    def _rows(self, query: str, values: Sequence[int]) -> Iterator[Stored]:
        cursor = self._reader.execute(query, values)
        try:
            for row in cursor:
                record = Stored(*row)
                if zlib.crc32(record.envelope) != record.crc:
                    raise self._damaged(f"record {record.sequence} does not match its checksum")
                yield record
        except sqlite3.Error as error:
            raise _explained(error, self.path) from error
        finally:
            cursor.close()  # an open one would keep the write-ahead log from being reused

    def _insert(self, into: str, rows: Sequence[tuple[object, ...]], conflict: str = "") -> None:
        # Many rows in one statement: each statement lets go of the interpreter lock once, and a
        # busy thread takes its time to give it back.
        done = 0
        while done < len(rows):
            count = next(size for size in ROWS_AT_ONCE if size <= len(rows) - done)
            statement = _statement(into, len(rows[0]), count, conflict)
            chunk = rows[done : done + count]
            self._writer.execute(statement, [value for row in chunk for value in row])
            done += count

    def _insert_refused(self, batch: Batch) -> None:
        self._writer.executemany(
            "insert into refused values (null, ?, ?, ?, ?, ?)",
            [
                (entry.publisher, entry.epoch, entry.sequence, entry.reason[:1000],
                 entry.envelope[:REFUSED_BYTES])
                for entry in batch.refused
            ],
        )  # fmt: skip
        self._writer.execute(
            "delete from refused where id <= (select max(id) from refused) - ?", (REFUSED_KEPT,)
        )

    def _prepare(self) -> None:
        (version,) = self._writer.execute("pragma user_version").fetchone()
        if version not in (0, SCHEMA_VERSION):
            raise MachineError(
                f"{self.path} has format {version}; this release knows {SCHEMA_VERSION}: "
                "install the release that wrote it, or a newer one"
            )
        if version == 0:
            self._writer.executescript(
                f"begin immediate; {_SCHEMA} pragma user_version = {SCHEMA_VERSION}; commit"
            )

    def _damaged(self, what: str) -> DamagedLog:
        return DamagedLog(
            f"{self.path} is damaged: {what}. Restore it from a copy; `metisfl-broker --check` "
            "tells whether a log is whole"
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


@lru_cache(maxsize=64)
def _statement(into: str, columns: int, rows: int, conflict: str) -> str:
    row = f"({','.join('?' * columns)})"
    return f"{into} values {','.join([row] * rows)} {conflict}"


def _explained(error: sqlite3.Error, path: Path) -> MachineError:
    if isinstance(error, sqlite3.OperationalError):
        return MachineError(f"{path} cannot be used: {error}; look at the disk and its permissions")
    return DamagedLog(f"{path} is damaged: {error}. Restore it from a copy")
