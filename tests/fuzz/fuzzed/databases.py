"""What is found in this machine's own databases after its disk has done its worst.

Rule: SQLite checks the structure of a file and nothing of what is in it; so any value may stand in
any place. Whoever reads it says MachineError, or gives what can be used.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import msgpack
from log_batches import batch, events
from round_world import World, plan

from fuzzed.target import Target, file_named, refused
from metisfl.broker import schema
from metisfl.broker.reading import LogReader
from metisfl.broker.sequencer import Sequencer
from metisfl.broker.store import Store
from metisfl.controller.snapshot import pack, unpack
from metisfl.deploy.database import transaction
from metisfl.learner import task as t
from metisfl.learner.state import TaskTable
from metisfl.proto import events_pb2 as pb
from metisfl.proto.errors import MachineError

__all__ = ["TARGETS"]

TABLES: Final = {
    "event": (
        *("sequence", "topic", "federation", "previous_in_topic", "previous_in_federation"),
        *("logged_unix_ns", "crc", "envelope"),
    ),
    "topic": ("id", "name", "federation", "trimmed"),
    "federation": ("id", "name", "trimmed"),
    "trimmed": ("one", "floor"),
    "publisher": ("name", "epoch", "sequence"),
    "cursor": ("reader", "lane", "sequence"),
}
VALUES: Final = (None, -1, 0, 1, 2, 2**31, 2**63 - 1, -(2**63), 0.5, "", "f/", "\0", b"", b"\xff")


def log(data: bytes) -> bool:
    """Six events, then changes of four bytes each: table, row, column, value."""
    with closing(_log()) as connection:
        for place in range(0, len(data) - 3, 4):
            table = [*TABLES][data[place] % len(TABLES)]
            columns = TABLES[table]
            column, value = columns[data[place + 2] % len(columns)], data[place + 3]
            with _impossible():
                connection.execute(
                    f"update {table} set {column} = ? where rowid = ?",
                    (_value(value, data[place:]), data[place + 1] % 8),
                )
        return _read(connection)


def log_changes() -> Iterator[bytes]:
    yield b""
    yield bytes([4, 1, 2, 3])


def _value(which: int, more: bytes) -> object:
    if which < len(VALUES):
        return VALUES[which]
    return more if which % 2 else more.decode(errors="replace")


class _impossible:
    """Some changes SQLite refuses: a second row of one key."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, sqlite3.Error)


def _log() -> sqlite3.Connection:
    """The log of `batch(events(6))` in memory, in tables that hold anything."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    loose = schema._SCHEMA.replace(" not null", "").replace(" check (one = 1)", "")
    connection.executescript(
        loose.replace(" without rowid", "").replace("references federation", "")
    )
    for event in events(6):
        row = (*event[:5], 1001, *event[5:7])
        connection.execute("insert into event values (?,?,?,?,?,?,?,?)", row)
    connection.execute("insert into federation values (1, 'f/', 0)")
    for number, name, of in batch(()).topics:
        connection.execute("insert into topic values (?,?,?,0)", (number, name, of))
    connection.execute("insert into publisher values ('learner:l1', 1, 6)")
    connection.execute("insert into cursor values ('controller', 'f/', 3)")
    return connection


def _read(connection: sqlite3.Connection) -> bool:
    """Everything that is read of a log, as `metisfl-broker --check` and a start do."""
    reader = LogReader(connection, Path("events.db"))
    with refused(MachineError):
        count, floor = reader.check()
        assert floor >= 0
        assert count >= 0
        recovered = reader.recovered()
        Sequencer(recovered)
        for number, _, head in recovered.federations:
            reader.read_lane(
                of_federation=True,
                lane_id=number,
                lane_head=head,
                after=0,
                head=recovered.head,
                max_events=256,
                max_bytes=1 << 22,
            )
        return True
    return False


def log_file(data: bytes) -> bool:
    """The file of a whole log, damaged: four bytes each, three for the place, one to change it."""
    whole = bytearray(_whole_log())
    for place in range(0, len(data) - 3, 4):
        whole[int.from_bytes(data[place : place + 3], "little") % len(whole)] ^= data[place + 3]
    path = file_named("damaged.db", whole)
    with refused(MachineError):
        try:
            connection = schema.connect(path)
        except sqlite3.Error as error:
            raise schema.explained(error, path) from None
        with closing(connection):
            return _read(connection)
    return False


_whole: list[bytes] = []


def _whole_log() -> bytes:
    if not _whole:
        folder = file_named("place", b"").parent / "log"
        store = Store(folder)
        store.append(batch(events(6), watermarks=[("learner:l1", 1, 6)], cursors=[]))
        store.checkpoint()
        store.close()
        _whole.append((folder / "events.db").read_bytes())
    return _whole[0]


def log_damages() -> Iterator[bytes]:
    yield b""
    yield bytes(4)


def snapshot(data: bytes) -> bool:
    with refused(MachineError):
        unpack(data, None)
        return True
    return False


def snapshots() -> Iterator[bytes]:
    world = World()
    yield pack(world.run)
    world.start(plan())
    yield pack(world.run)
    world.complete("r1.0.initialise.ada")
    world.perform_all()
    for name in ("ada", "bob"):
        world.complete(f"r1.1.train.{name}")
    yield pack(world.run)


def tasks(data: bytes) -> bool:
    """A learner's row: stage, outcome and assignment, each behind its length in one byte."""
    stage, outcome, assigned = _cells(data)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        table = TaskTable(connection)
        row = ("r.1.train.ada", assigned, stage.decode(errors="replace"), outcome or None)
        connection.execute("INSERT INTO task VALUES (1, ?, ?, ?, ?)", row)
        with refused(MachineError):
            found = table.load("ada")
            with transaction(connection):
                table.save(t.Tasks("ada"), found)
            assert table.load("ada") == found
            return True
    return False


def _cells(data: bytes) -> tuple[bytes, bytes, bytes]:
    stage, rest = data[1 : 1 + data[0]] if data else b"", data[1 + (data[0] if data else 0) :]
    return stage, rest[1 : 1 + rest[0]] if rest else b"", rest[1 + (rest[0] if rest else 0) :]


def task_rows() -> Iterator[bytes]:
    assigned = pb.TaskAssigned(
        task_id="r.1.train.ada", run_id="r", round=1, kind=pb.TRAIN, learner="ada"
    ).SerializeToString()
    done: dict[str, Any] = dict(
        update_digest=bytes(32), examples=10, batches=2, metrics={"loss": 0.5}, training_s=0.1
    )
    for stage, outcome in ((t.Stage.WORKING, b""), (t.Stage.UPLOADING, msgpack.packb(done))):
        cells = (stage.value.encode(), outcome)
        yield b"".join(bytes([len(cell)]) + cell for cell in cells) + assigned


TARGETS = (
    Target("log-rows", log, log_changes, 64),
    Target("log-file", log_file, log_damages, 256),
    Target("snapshot", snapshot, snapshots, 1 << 16),
    Target("tasks", tasks, task_rows, 1 << 12),
)
