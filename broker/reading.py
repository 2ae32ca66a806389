"""What is read of the log on disk: a lane, the end of it, or all of it.

Rule: what is read was checked: each record against its checksum, each lane against its chain of
predecessors. A log with a damaged or missing record is an error that names it, never a shorter log.
Only what was trimmed may be missing: a prefix of the log, whose end is read in the same snapshot.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from metisfl.broker.schema import DamagedLog, damaged, explained
from metisfl.broker.sequencer import Recovered

__all__ = ["Found", "LogReader", "Stored"]

TAIL_EVENTS: Final = 1000  # looked at before a log is served

_FIELDS: Final = (
    "select sequence, topic.name, previous_in_topic, previous_in_federation, logged_unix_ns, crc,"
    " envelope from event join topic on topic.id = event.topic"
)
_READ: Final = (
    _FIELDS + " where event.{lane} = ? and sequence > ? and sequence <= ? order by sequence limit ?"
)
_READ_TOPIC: Final = _READ.format(lane="topic")
_READ_FEDERATION: Final = _READ.format(lane="federation")
_READ_ALL: Final = f"{_FIELDS} where sequence > ? and sequence <= ? order by sequence"
_FLOOR: Final = "select coalesce((select floor from trimmed), -1)"
_ENDS: Final = (
    "select coalesce((select min(sequence) from event), 0),"
    " coalesce((select max(sequence) from event), 0)"
)
# From each lane's index, without touching its events.
_HEAD: Final = "coalesce((select max(sequence) from event where event.{lane} = {lane}.id), trimmed)"


class Stored(NamedTuple):
    """One record as it is on disk, checked against its checksum."""

    sequence: int
    topic: str
    previous_in_topic: int
    previous_in_federation: int
    logged_unix_ns: int
    crc: int
    envelope: bytes


_TYPES: Final = (int, str, int, int, int, int, bytes)  # of Stored


class Found(NamedTuple):
    """The next records of a lane. They cover it up to `through`.

    `floor`: 0, or the lane's newest record that was asked for and had been trimmed.
    """

    records: list[Stored]
    through: int
    floor: int


class LogReader:
    """Reads over a connection that it has for itself."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection, self._path = connection, path
        connection.execute("pragma query_only = on")

    def recovered(self) -> Recovered:
        """Return what the log holds. Raises DamagedLog if its end is not what was stored."""
        with self._snapshot() as floor:
            read = self._connection.execute
            first, head = read(_ENDS).fetchone()
            if first != (floor + 1 if head > floor else 0):
                raise self._damaged(f"its first record is {first}, but it was trimmed to {floor}")
            found = Recovered(
                head=max(head, floor),
                federations=self._all(
                    f"select id, name, {_HEAD.format(lane='federation')} from federation",
                    (int, str, int),
                ),
                topics=self._all(
                    f"select id, name, federation, {_HEAD.format(lane='topic')} from topic",
                    (int, str, int, int),
                ),
                watermarks=self._all(
                    "select name, epoch, sequence from publisher", (str, int, int)
                ),
            )
            known = {number for number, _, _ in found.federations}
            if not known >= {federation for _, _, federation, _ in found.topics}:
                raise self._damaged("a topic is of a federation that it does not hold")
            for _ in self._checked(max(floor, found.head - TAIL_EVENTS), found.head):
                pass
        return found

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
    ) -> Found:
        """Return the records of a lane behind `after`, as far as the limits let them.

        At least one record, if there is any, whatever its size. `lane_head` is the lane's newest
        record and `head` the log's, both on disk already. Raises DamagedLog.
        """
        found: list[Stored] = []
        with self._snapshot() as floor:
            lost = self._trimmed(of_federation, lane_id) if after < floor else 0
            covered, size, previous = head, 0, max(after, floor)
            query = _READ_FEDERATION if of_federation else _READ_TOPIC
            for record in self._rows(query, (lane_id, after, head, max_events)):
                size += len(record.envelope)
                if found and size > max_bytes:
                    break
                before = (
                    record.previous_in_federation if of_federation else record.previous_in_topic
                )
                if before > previous or (found and before != previous):
                    raise self._damaged(f"record {before}, before {record.sequence}, is missing")
                previous = record.sequence
                found.append(record)
        if previous < lane_head:
            covered = previous
            if len(found) < max_events and size <= max_bytes:
                raise self._damaged(f"the records behind {previous} to {lane_head} are missing")
        return Found(found, covered, lost if lost > after else 0)

    def check(self) -> tuple[int, int]:
        """Read everything; return the number of records and up to where the log was trimmed.

        Raises DamagedLog.
        """
        try:
            (verdict,) = self._connection.execute("pragma integrity_check(1)").fetchone()
        except sqlite3.Error as error:
            raise explained(error, self._path) from error
        if verdict != "ok":
            raise self._damaged(verdict)
        head = self.recovered().head
        with self._snapshot() as floor:
            return sum(1 for _ in self._checked(floor, head)), floor

    @contextmanager
    def _snapshot(self) -> Iterator[int]:
        """What is read inside is of one moment; gives what was trimmed by then."""
        try:
            self._connection.execute("begin")
            try:
                (floor,) = self._connection.execute(_FLOOR).fetchone()
                if type(floor) is not int or floor < 0:
                    raise self._damaged("it does not say to where it was trimmed")
                yield floor
            finally:
                # An open one would keep the write-ahead log from being reused.
                self._connection.execute("rollback")
        except sqlite3.Error as error:
            raise explained(error, self._path) from error

    def _all(self, query: str, kinds: tuple[type, ...]) -> list[Any]:
        """All rows, whose values are of these types: SQLite would keep any in any place."""
        rows = self._connection.execute(query).fetchall()
        for row in rows:
            if tuple(map(type, row)) != kinds:
                raise self._damaged(f"{row!r:.200} is no row of `{query}`")
        return rows

    def _trimmed(self, of_federation: bool, lane_id: int) -> int:
        table = "federation" if of_federation else "topic"
        query = f"select trimmed from {table} where id = ?"
        (trimmed,) = self._connection.execute(query, (lane_id,)).fetchone()
        return int(trimmed)

    def _checked(self, after: int, head: int) -> Iterator[Stored]:
        """The records in `after`+1..`head`, of which none is missing."""
        expected = after
        for record in self._rows(_READ_ALL, (after, head)):
            expected += 1
            if record.sequence != expected:
                raise self._damaged(f"record {expected} is missing")
            yield record
        if expected != head:
            raise self._damaged(f"record {expected + 1} is missing")

    def _rows(self, query: str, values: Sequence[int]) -> Iterator[Stored]:
        cursor = self._connection.execute(query, values)
        try:
            for row in cursor:
                record = Stored(*row)
                if tuple(map(type, row)) != _TYPES or min(row[2:6]) < 0:
                    raise self._damaged(f"record {record.sequence} has a field that cannot be")
                if zlib.crc32(record.envelope) != record.crc:
                    raise self._damaged(f"record {record.sequence} does not match its checksum")
                yield record
        finally:
            cursor.close()

    def _damaged(self, what: str) -> DamagedLog:
        return damaged(self._path, what)
