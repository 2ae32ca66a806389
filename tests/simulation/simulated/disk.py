"""Disks that keep what was committed, and the outbox of a publisher on one.

Law 1: a commit is whole or not at all. A process that dies loses nothing that was committed; a
power cut loses the newest commits that were not synced, and never one before a synced one, as
SQLite's write-ahead log has it.
Law 2: an event has its place in the outbox in the transaction of what caused it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from google.protobuf.message import Message

from metisfl.proto.envelope import build_envelope
from metisfl.proto.events import encode
from simulated.scheduler import Node

__all__ = ["Changes", "Disk", "Outbox"]

Changes = dict[Hashable, Any]


class Disk:
    """One machine's database and, beside it, files whose loss in a power cut is their own."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._now: dict[Hashable, Any] = {}
        self._undo: list[Changes] = []  # of commits that a power cut may lose, oldest first
        self.files: dict[Hashable, tuple[Any, bool]] = {}  # content, and whether it was synced

    def get(self, key: Hashable, default: Any = None) -> Any:
        return self._now.get(key, default)

    def holds(self, key: Hashable) -> bool:
        return key in self._now

    def commit(self, changes: Changes, *, sync: bool = True) -> None:
        """Store all changes; None deletes. The node may die just before or just after."""
        self._node.crash_point(likelier=3)
        now = self._now
        self._undo.append({key: now.get(key) for key in changes})
        _put(now, changes)
        if sync:
            self._undo.clear()
        self._node.crash_point(likelier=3)

    def power_cut(self) -> None:
        """Lose what may be lost, by chance."""
        choose = self._node.scheduler.random
        for _ in range(choose.randint(0, len(self._undo))):
            _put(self._now, self._undo.pop())
        self._undo.clear()
        for name in [name for name, (_, synced) in self.files.items() if not synced]:
            if choose.random() < 0.5:
                del self.files[name]

    def read(self, name: Hashable) -> Any:
        """The content of a file, or None."""
        found = self.files.get(name)
        return None if found is None else found[0]


def _put(now: Changes, changes: Changes) -> None:
    for key, value in changes.items():
        if value is None:
            now.pop(key, None)
        else:
            now[key] = value


class Outbox:
    """What broker/outbox.py does, on a simulated disk. Opened anew in each life of its node."""

    def __init__(self, disk: Disk, publisher: str) -> None:
        self._disk, self.publisher = disk, publisher
        self.epoch = 1
        self.acked: int = disk.get("acked", 0)
        self._deleted = self.acked

    def append(
        self, changes: Changes, topic: str, event: Message, correlation_id: str = ""
    ) -> None:
        """Add an event to the changes that it is committed with."""
        kind, payload = encode(event)
        self._delete(changes)
        sequence = changes.get("last", self.last()) + 1
        changes["last"] = sequence
        changes["row", sequence] = build_envelope(
            event_id=sequence.to_bytes(16, "little"),
            topic=topic,
            publisher=self.publisher,
            epoch=self.epoch,
            sequence=sequence,
            created_unix_ns=1,
            type=kind,
            correlation_id=correlation_id,
            payload=payload,
        )

    def last(self) -> int:
        last: int = self._disk.get("last", 0)
        return last

    def rows(self, after: int, count: int) -> list[tuple[int, bytes]]:
        """(sequence, envelope) of the `count` events that follow `after`."""
        numbers = range(after + 1, min(after + count, self.last()) + 1)
        found = ((number, self._disk.get(("row", number))) for number in numbers)
        return [(number, envelope) for number, envelope in found if envelope is not None]

    def acknowledge(self, sequence: int) -> None:
        self.acked = sequence

    def tidy(self, *, sync: bool) -> None:
        """Delete what the broker has, in a transaction of its own."""
        changes: Changes = {}
        self._delete(changes)
        if changes:
            self._disk.commit(changes, sync=sync)

    def cursor(self, lane: str) -> int:
        cursor: int = self._disk.get(("cursor", lane), 0)
        return cursor

    def advance(self, changes: Changes, lane: str, sequence: int) -> None:
        assert sequence >= self.cursor(lane), f"the cursor of {lane} would go back to {sequence}"
        changes["cursor", lane] = sequence

    def _delete(self, changes: Changes) -> None:
        if self.acked > self._deleted:
            for number in range(self._deleted + 1, self.acked + 1):
                changes["row", number] = None
            changes["acked"] = self.acked
            self._deleted = self.acked
