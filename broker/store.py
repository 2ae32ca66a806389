"""The log on disk: one SQLite database in a folder that one broker owns.

Rule: `append` returns only when the batch is on disk, whole; if it raises StorageFull none of its
events is. Events, watermarks and new topics go in one transaction.

Threads: one connection writes and trims, one reads, one checkpoints; each is used by one thread at
a time.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

from metisfl.broker import schema
from metisfl.broker.reading import LogReader
from metisfl.broker.retention import Limits
from metisfl.broker.schema import LogFull, StorageFull, explained
from metisfl.broker.sequencer import Batch
from metisfl.broker.trimming import Trimmer
from metisfl.deploy.database import hold_folder
from metisfl.proto.errors import MachineError

__all__ = ["Store"]

REFUSED_KEPT: Final = 10_000
REFUSED_BYTES: Final = 4096  # kept of each refused envelope
ROWS_AT_ONCE: Final = (256, 64, 16, 4, 1)

_UPSERT_WATERMARK: Final = (
    "on conflict (name) do update set epoch = excluded.epoch, sequence = excluded.sequence"
)
_UPSERT_CURSOR: Final = "on conflict (reader, lane) do update set sequence = excluded.sequence"


class Store:
    """Opens or creates the log in `folder`: `append` to it, `reader` and `trimmer` do the rest.

    Raises MachineError if another broker has the folder or it cannot be written, DamagedLog.
    """

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        self.folder = folder
        self.path = folder / "events.db"
        self._lock = hold_folder(folder, "broker")
        self._connections: list[sqlite3.Connection] = []
        try:
            self._writer = self.connect()
            schema.prepare(self._writer, self.path)
            self.trimmer = Trimmer(self._writer, self.path, limits or Limits())
            self.reader = LogReader(self.connect(), self.path)
        except sqlite3.Error as error:
            self.close()
            raise explained(error, self.path) from error
        except MachineError:
            self.close()
            raise

    def connect(self) -> sqlite3.Connection:
        """A connection for one more thread; `close` closes it."""
        connection = schema.connect(self.path)
        self._connections.append(connection)
        return connection

    def close(self) -> None:
        """Close everything and free the folder; harmless when repeated."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def append(self, batch: Batch) -> None:
        """Store a batch, durably.

        Raises StorageFull, after which none of its events is stored; LogFull if it is for the
        limit of the log, and then the cursors are stored: they may be what makes room.
        """
        execute = self._writer.execute
        try:
            full = self.trimmer.refusal() if batch.appends else None
            execute("begin immediate")
            if full is None:
                self._insert("insert or ignore into federation (id, name)", batch.federations)
                self._insert("insert or ignore into topic (id, name, federation)", batch.topics)
                self._insert(
                    "insert into event",
                    [(*place[:5], batch.logged_unix_ns, *place[5:7]) for place in batch.appends],
                )
                self._insert("insert into publisher", batch.watermarks, _UPSERT_WATERMARK)
                if batch.refused:
                    self._insert_refused(batch)
            self._insert("insert into cursor", batch.cursors, _UPSERT_CURSOR)
            execute("commit")
        except sqlite3.OperationalError as error:
            if self._writer.in_transaction:
                execute("rollback")
            raise StorageFull(
                f"{self.path}: events cannot be stored ({error}); make room on that disk, the "
                "broker goes on by itself"
            ) from error
        except sqlite3.DatabaseError as error:
            raise explained(error, self.path) from error
        if full is not None:
            raise LogFull(f"{self.path}: {full}")

    def give_up(self, federation: str) -> int:
        """Count everything of a federation as read by its controller; return up to where.

        For one whose controller never comes back. Raises MachineError if there is no such one.
        """
        lane = f"{federation}/"
        execute = self._writer.execute
        head = self.reader.recovered().head
        if not execute("select 1 from federation where name = ?", (lane,)).fetchone():
            raise MachineError(f"{self.path} holds nothing of a federation {federation!r}")
        execute(f"insert into cursor values ('controller', ?, ?) {_UPSERT_CURSOR}", (lane, head))
        return head

    def checkpoint(self) -> tuple[int, int]:
        """Move the write-ahead log into the database, in the writer's thread; see `checkpoint`."""
        return schema.checkpoint(self._writer)

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


@lru_cache(maxsize=64)
def _statement(into: str, columns: int, rows: int, conflict: str) -> str:
    row = f"({','.join('?' * columns)})"
    return f"{into} values {','.join([row] * rows)} {conflict}"
