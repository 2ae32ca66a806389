"""Trimming of the log on disk, a slice at a time, by the thread that writes it.

Rule: what is deleted and up to where are one transaction, so the log is always what follows its
floor, without holes. Each lane keeps the number of its newest record that went: its chain goes on
from there, and a reader that lacked it can be told.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final, NamedTuple

from metisfl.broker import retention
from metisfl.broker.retention import Aged, Limits, Pin
from metisfl.broker.schema import PAGE_BYTES, explained

__all__ = ["Slice", "Trimmer"]

CONTROLLER: Final = "controller"
ROW_BYTES: Final = 128  # what an event takes beyond its envelope, about

_OLDEST: Final = (
    f"select sequence, logged_unix_ns, length(envelope) + {ROW_BYTES} from event"
    " order by sequence limit ?"
)
_PINS: Final = """
select name, read, unread from (
    select federation.name as name, coalesce(cursor.sequence, 0) as read,
        (select event.sequence from event where event.federation = federation.id
            and event.sequence > coalesce(cursor.sequence, 0)
            order by event.sequence limit 1) as unread
    from federation left join cursor on cursor.reader = ? and cursor.lane = federation.name)
where unread is not null
"""
_MARK: Final = """
update {lane} set trimmed = newest
from (select {lane} as id, max(sequence) as newest from event not indexed
    where sequence <= ? group by {lane}) as gone
where {lane}.id = gone.id
"""


class Slice(NamedTuple):
    """What one turn did: how many events went, and about how much was written for that."""

    events: int
    bytes: int


class Trimmer:
    """Uses the writer's connection, between its transactions."""

    def __init__(self, connection: sqlite3.Connection, path: Path, limits: Limits) -> None:
        self._connection, self._path, self._limits = connection, path, limits
        self._pin: Pin | None = None
        self.floor: int = connection.execute("select max(floor) from trimmed").fetchone()[0]

    @property
    def limit_bytes(self) -> int:
        return self._limits.log_bytes

    def log_bytes(self) -> int:
        """What the log takes, without pages that wait to be used again."""
        pages, free = self._pages()
        return (pages - free) * PAGE_BYTES

    def refusal(self) -> str | None:
        """Return why no more events may be stored, or None."""
        size = self.log_bytes()
        if size < self._limits.log_bytes:
            return None
        self._pin = retention.lowest(self._pins())
        return retention.full_because(size, self._pin, self._limits)

    def trim(self, now_unix_ns: int) -> Slice | None:
        """Delete one slice of what may go, durably. None when nothing is due or there is no room.

        Raises DamagedLog.
        """
        execute = self._connection.execute
        try:
            size, oldest = self.log_bytes(), self._oldest(1)
            if not retention.worth_a_look(size, oldest, self._limits, now_unix_ns):
                return None
            oldest = self._oldest(retention.SLICE_EVENTS)
            to = retention.trim_to(size, oldest, self._pins(), self._limits, now_unix_ns)
            if not to:
                return None
            execute("begin immediate")
            for lane in ("topic", "federation"):
                execute(_MARK.format(lane=lane), (to,))
            events = execute("delete from event where sequence <= ?", (to,)).rowcount
            execute("update trimmed set floor = ?", (to,))
            execute("commit")
        except sqlite3.OperationalError:
            self._roll_back()
            return None
        except sqlite3.DatabaseError as error:
            self._roll_back()
            raise explained(error, self._path) from error
        self.floor = to
        return Slice(events, sum(record.bytes for record in oldest if record.sequence <= to))

    def give_back(self) -> Slice | None:
        """Let the file shrink by a part of what it holds for nothing. None when it holds little.

        Raises DamagedLog.
        """
        try:
            pages = retention.pages_to_give_back(*self._pages())
            if not pages:
                return None
            self._connection.execute(f"pragma incremental_vacuum({pages})").fetchall()
        except sqlite3.OperationalError:
            return None
        except sqlite3.DatabaseError as error:
            raise explained(error, self._path) from error
        return Slice(0, pages * PAGE_BYTES)

    def _pages(self) -> tuple[int, int]:
        execute = self._connection.execute
        (pages,) = execute("pragma page_count").fetchone()
        (free,) = execute("pragma freelist_count").fetchone()
        return pages, free

    def _oldest(self, count: int) -> list[Aged]:
        return [Aged(*row) for row in self._connection.execute(_OLDEST, (count,))]

    def _pins(self) -> list[Pin]:
        return [Pin(*row) for row in self._connection.execute(_PINS, (CONTROLLER,))]

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("rollback")
