"""The newest snapshot, in the controller's database.

Rule: the caller saves it in the transaction that moves the lane's cursor: the two are one fact.
"""

from __future__ import annotations

import sqlite3

from metisfl.controller.snapshot import pack, unpack
from metisfl.controller.state import Run, Terms
from metisfl.deploy.database import transaction

__all__ = ["SnapshotTable"]

_SCHEMA = "CREATE TABLE IF NOT EXISTS snapshot (lane TEXT PRIMARY KEY, state BLOB NOT NULL)"


class SnapshotTable:
    """One row for each lane. The caller owns the connection and its transactions."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        with transaction(connection):
            connection.execute(_SCHEMA)

    def load(self, lane: str, terms: Terms | None) -> Run | None:
        """The state at the lane's cursor, or None. Raises MachineError if it cannot be read."""
        row = self._connection.execute(
            "SELECT state FROM snapshot WHERE lane = ?", (lane,)
        ).fetchone()
        return None if row is None else unpack(row[0], terms)

    def save(self, lane: str, run: Run) -> None:
        """Write the state, inside the caller's transaction."""
        self._connection.execute(
            "INSERT INTO snapshot VALUES (?, ?) "
            "ON CONFLICT (lane) DO UPDATE SET state = excluded.state",
            (lane, pack(run)),
        )
