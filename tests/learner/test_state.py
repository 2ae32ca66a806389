"""What was saved is what is loaded, and an interrupted transaction left nothing behind."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import msgpack
import pytest

from metisfl.deploy.database import open_database
from metisfl.learner import task as t
from metisfl.learner.state import TaskTable
from metisfl.proto import events_pb2 as pb
from metisfl.proto.errors import MachineError

TASK = pb.TaskAssigned(
    task_id="r.1.train.ada", run_id="r", round=1, kind=pb.TRAIN, learner="ada", model_digest=b"d"
)
OUTCOME = t.Outcome(bytes(32), 10, 2, {"loss": 0.5}, 0.1)
EXCEEDED = t.Outcome(b"", 10, 2, {"loss": 0.5}, 0.1, (0, 12, 3), b"t" * 32)


def test_a_task_comes_back_as_it_was(tmp_path: Path) -> None:
    with closing(open_database(tmp_path / "db")) as connection:
        table, tasks = TaskTable(connection), t.Tasks("ada")
        for event in (
            t.Assigned(TASK),
            t.Fetched(TASK.task_id),
            t.Done(TASK.task_id, OUTCOME),
            t.Uploaded(TASK.task_id),
        ):
            before = tasks
            tasks, _ = t.handle(tasks, event)
            table.save(before, tasks)
            assert TaskTable(connection).load("ada") == tasks
        before = tasks
        tasks, _ = t.handle(tasks, t.RoundOver("r", 1))
        table.save(before, tasks)
        assert table.load("ada").jobs == tasks.jobs


def test_what_is_trained_and_to_be_sealed_again_comes_back(tmp_path: Path) -> None:
    again = pb.TaskAssigned()
    again.CopyFrom(TASK)
    again.task_id, again.attempt, again.privacy = "r.1.train.again1.ada", 1, "ckks"
    again.exponents.extend([0, 12, 3])
    with closing(open_database(tmp_path / "db")) as connection:
        table, tasks = TaskTable(connection), t.Tasks("ada")
        for event in (
            t.Assigned(TASK),
            t.Fetched(TASK.task_id),
            t.Exceeded(TASK.task_id, EXCEEDED, "w"),
            t.Assigned(again),
        ):
            before = tasks
            tasks, _ = t.handle(tasks, event)
            table.save(before, tasks)
            assert table.load("ada") == tasks
    assert tasks.jobs == {again.task_id: t.Job(again, t.Stage.WORKING, EXCEEDED)}


def test_the_database_of_a_release_that_knew_no_exponents_is_read(tmp_path: Path) -> None:
    fields = ("update_digest", "examples", "batches", "metrics", "training_s")
    packed = msgpack.packb({name: getattr(OUTCOME, name) for name in fields})
    with closing(open_database(tmp_path / "db")) as connection:
        table = TaskTable(connection)
        connection.execute(
            "INSERT INTO task (task_id, assigned, stage, outcome) VALUES (?, ?, ?, ?)",
            (TASK.task_id, TASK.SerializeToString(), "uploading", packed),
        )
        expected = t.Job(TASK, t.Stage.UPLOADING, OUTCOME)
        assert table.load("ada").jobs == {TASK.task_id: expected}


def test_a_transaction_that_was_not_committed_did_not_happen(tmp_path: Path) -> None:
    with closing(open_database(tmp_path / "db")) as connection:
        table = TaskTable(connection)
        connection.execute("BEGIN")
        table.save(t.Tasks("ada"), t.handle(t.Tasks("ada"), t.Assigned(TASK))[0])
    with closing(open_database(tmp_path / "db")) as connection:
        assert TaskTable(connection).load("ada") == t.Tasks("ada")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("assigned", b"\xff"),
        ("assigned", None),
        ("stage", "asleep"),
        ("outcome", b"\xc1"),
        ("outcome", msgpack.packb({"batches": 2})),
        ("outcome", msgpack.packb([1])),
        ("outcome", 7),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, column: str, value: object) -> None:
    with closing(open_database(tmp_path / "db")) as connection:
        table = TaskTable(connection)
        connection.execute("DROP TABLE task")  # SQLite itself would keep NULL out of the column
        connection.execute("CREATE TABLE task (position, task_id UNIQUE, assigned, stage, outcome)")
        tasks, _ = t.handle(t.Tasks("ada"), t.Assigned(TASK))
        table.save(t.Tasks("ada"), tasks)
        connection.execute(f"UPDATE task SET {column} = ?", (value,))
        with pytest.raises(MachineError, match=r"the row of task 'r\.1"):
            table.load("ada")
