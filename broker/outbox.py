"""A publisher's events and a reader's cursors, inside the database of the state they belong to.

Rule: an event is accepted when the caller's transaction commits, together with the state change
that caused it; a cursor moves in the transaction that holds the effects of what was read. So
neither can be lost or come twice when the process dies.

An epoch is one life of this database: a site that lost its folder starts a newer one, and whatever
still publishes from the older is refused.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import suppress
from typing import Final

from google.protobuf.message import Message

from metisfl.proto.envelope import build_envelope
from metisfl.proto.errors import DiskFull, MachineError, UserError
from metisfl.proto.events import encode
from metisfl.proto.frames import pack_crc

__all__ = ["OUTBOX_EVENTS_MAX", "Outbox"]

OUTBOX_EVENTS_MAX: Final = 1_000_000

_TABLES: Final = (
    """create table if not exists outbox_epoch (
        one integer primary key check (one = 1), publisher text not null, epoch integer not null,
        acked integer not null)""",
    """create table if not exists outbox (
        sequence integer primary key, crc blob not null, envelope blob not null)""",
    """create table if not exists lane_cursor (
        lane text primary key, sequence integer not null)""",
)
_NEXT: Final = (
    "select 1 + max(acked, coalesce((select max(sequence) from outbox), 0)), acked"
    " from outbox_epoch"
)
_DELETE: Final = "delete from outbox where sequence <= ?"


class Outbox:
    """Rows wait in `connection`'s database until the broker has them on disk.

    Use it in the thread and between the transactions of its owner; nothing else may write to its
    tables. Any sqlite3 isolation level but `autocommit=False` will do.
    """

    def __init__(self, connection: sqlite3.Connection, publisher: str) -> None:
        """Create the tables.

        Raises UserError if they belong to another publisher, DiskFull.
        """
        if connection.in_transaction:
            raise ValueError("an outbox is opened outside of transactions")
        self._connection = connection
        try:
            for table in _TABLES:
                connection.execute(table)
            connection.execute(
                "insert or ignore into outbox_epoch values (1, ?, ?, 0)",
                (publisher, time.time_ns()),
            )
            if connection.in_transaction:
                connection.commit()
        except sqlite3.OperationalError as error:
            text = f"the outbox of {publisher}: {error}; make room or repair the disk"
            kind = DiskFull if str(error) == "database or disk is full" else MachineError
            raise kind(text) from error
        owner, epoch, acked = connection.execute(
            "select publisher, epoch, acked from outbox_epoch"
        ).fetchone()
        if owner != publisher:
            raise UserError(f"this database is the outbox of {owner!r}, not of {publisher!r}")
        self.publisher = publisher
        self.epoch: Final[int] = epoch
        self._acked: int = acked
        self._deleted: int = acked

    @property
    def in_transaction(self) -> bool:
        """True while rows may be visible that will never be accepted: nothing may be sent now."""
        return self._connection.in_transaction

    @property
    def acked(self) -> int:
        """Sequence up to which the broker has everything on disk."""
        return self._acked

    def append(self, topic: str, event: Message, *, correlation_id: str = "") -> int:
        """Add an event in the caller's transaction and return its sequence.

        Raises ValueError for an event or topic that breaks a limit, MachineError when a million
        events wait for the broker.
        """
        kind, payload = encode(event)
        execute = self._connection.execute
        if self._connection.isolation_level is None and not self._connection.in_transaction:
            raise ValueError("an event is appended inside the transaction that causes it")
        if self._acked > self._deleted:
            self._delete()
        sequence, acked = execute(_NEXT).fetchone()
        if sequence - acked > OUTBOX_EVENTS_MAX:
            raise MachineError(
                f"{OUTBOX_EVENTS_MAX} events of {self.publisher} wait for the broker and no more "
                "are taken: is the broker running and reachable?"
            )
        envelope = build_envelope(
            event_id=os.urandom(16),
            topic=topic,
            publisher=self.publisher,
            epoch=self.epoch,
            sequence=sequence,
            created_unix_ns=time.time_ns(),
            type=kind,
            correlation_id=correlation_id,
            payload=payload,
        )
        execute("insert into outbox values (?, ?, ?)", (sequence, pack_crc(envelope), envelope))
        return int(sequence)

    def last(self) -> int:
        """Sequence of the newest event, 0 before the first."""
        return int(self._connection.execute(_NEXT).fetchone()[0]) - 1

    def rows(self, after: int, count: int) -> list[tuple[int, bytes, bytes]]:
        """Return (sequence, crc, envelope) of the `count` events that follow `after`."""
        return self._connection.execute(
            "select sequence, crc, envelope from outbox where sequence > ? order by sequence"
            " limit ?",
            (after, count),
        ).fetchall()

    def acknowledge(self, sequence: int) -> None:
        """Remember that the broker has all up to `sequence`; rows go with the next append."""
        self._acked = sequence

    def tidy(self) -> None:
        """Delete acknowledged rows now, in a transaction of its own; not now if that fails."""
        if self._acked == self._deleted or self._connection.in_transaction:
            return
        with suppress(sqlite3.OperationalError), self._connection:
            if self._connection.isolation_level is None:
                self._connection.execute("begin immediate")
            self._delete()

    def cursor(self, lane: str) -> int:
        """Log sequence up to which `lane` was read and applied, 0 before the first."""
        found = self._connection.execute(
            "select sequence from lane_cursor where lane = ?", (lane,)
        ).fetchone()
        return int(found[0]) if found else 0

    def advance(self, lane: str, sequence: int) -> None:
        """Move the cursor of `lane` in the caller's transaction, with the effects of the records.

        Raises ValueError if it would go back.
        """
        if sequence < (now := self.cursor(lane)):
            raise ValueError(
                f"the cursor of lane {lane!r} stands at {now}; {sequence} is behind it"
            )
        self._connection.execute(
            "insert into lane_cursor values (?, ?)"
            " on conflict (lane) do update set sequence = excluded.sequence",
            (lane, sequence),
        )

    def _delete(self) -> None:
        # Idempotent and never needed for correctness: if the transaction is rolled back, the rows
        # stay until the next one, and the broker knows them already.
        self._connection.execute(_DELETE, (self._acked,))
        self._connection.execute("update outbox_epoch set acked = ?", (self._acked,))
        self._deleted = self._acked
