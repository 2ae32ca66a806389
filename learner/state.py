"""The learner's tasks on disk.

Rule: tasks, outbox and cursors share one database, and a change of the tasks, the report that it
caused and the cursor of the event that caused it are one transaction. After a crash either all of
it happened or none.
"""

from __future__ import annotations

import sqlite3
from types import MappingProxyType

import msgpack
from google.protobuf.message import DecodeError

from metisfl.deploy.database import transaction
from metisfl.learner.task import Job, Mark, Outcome, Stage, Tasks
from metisfl.proto import events_pb2 as pb
from metisfl.proto.errors import MachineError

__all__ = ["TaskTable"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS task (
    position INTEGER PRIMARY KEY,
    task_id TEXT NOT NULL UNIQUE,
    assigned BLOB NOT NULL,
    stage TEXT NOT NULL,
    outcome BLOB
)
"""
_MARKS = """
CREATE TABLE IF NOT EXISTS mark (
    run_id TEXT PRIMARY KEY,
    given_round INTEGER NOT NULL,
    given_digest BLOB NOT NULL,
    opened_round INTEGER NOT NULL
)
"""


class TaskTable:
    """Loads and saves `Tasks`; the caller owns the connection and its transactions."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        with transaction(connection):
            connection.execute(_SCHEMA)
            connection.execute(_MARKS)

    def load(self, learner: str) -> Tasks:
        """Return the tasks as they were last saved. Raises MachineError for a damaged row."""
        jobs = {}
        rows = self._connection.execute(
            "SELECT task_id, assigned, stage, outcome FROM task ORDER BY position"
        )
        for task_id, assigned, stage, outcome in rows:
            try:
                task = pb.TaskAssigned.FromString(assigned)
                jobs[task_id] = Job(task, Stage(stage), _unpack_outcome(outcome))
            except (DecodeError, msgpack.UnpackException, ValueError, TypeError) as error:
                raise MachineError(
                    f"the row of task {task_id!r:.80} in learner.db is damaged: {error}; delete it "
                    "from the table `task`: the round goes on without this task"
                ) from None
        marks = {
            run_id: Mark(*values)
            for run_id, *values in self._connection.execute("SELECT * FROM mark ORDER BY rowid")
        }
        return Tasks(learner, MappingProxyType(jobs), marks=MappingProxyType(marks))

    def save(self, before: Tasks, after: Tasks) -> None:
        """Write what differs, inside the caller's transaction."""
        for run_id, mark in after.marks.items():
            if before.marks.get(run_id) is not mark:
                self._connection.execute(
                    "INSERT OR REPLACE INTO mark VALUES (?, ?, ?, ?)",
                    (run_id, mark.given_round, mark.given_digest, mark.opened_round),
                )
        for task_id in before.jobs.keys() - after.jobs.keys():
            self._connection.execute("DELETE FROM task WHERE task_id = ?", (task_id,))
        for task_id, job in after.jobs.items():
            if before.jobs.get(task_id) is not job:
                row = (
                    task_id,
                    job.assigned.SerializeToString(),
                    job.stage.value,
                    _pack_outcome(job),
                )
                self._connection.execute(
                    "INSERT INTO task (task_id, assigned, stage, outcome) VALUES (?, ?, ?, ?) "
                    "ON CONFLICT (task_id) DO UPDATE SET "
                    "stage = excluded.stage, outcome = excluded.outcome",
                    row,
                )


def _pack_outcome(job: Job) -> bytes | None:
    if job.outcome is None:
        return None
    packed: bytes = msgpack.packb(
        {
            "update_digest": job.outcome.update_digest,
            "examples": job.outcome.examples,
            "batches": job.outcome.batches,
            "metrics": dict(job.outcome.metrics),
            "training_s": job.outcome.training_s,
            "exponents": job.outcome.exponents,
            "trained_digest": job.outcome.trained_digest,
        }
    )
    return packed


def _unpack_outcome(packed: bytes | None) -> Outcome | None:
    """Older releases wrote fewer fields; the defaults say what they meant."""
    if packed is None:
        return None
    return Outcome(**msgpack.unpackb(packed, use_list=False))
