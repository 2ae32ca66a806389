"""What was saved is what is loaded, and an interrupted transaction left nothing behind."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from metisfl.deploy.database import open_database
from metisfl.learner import task as t
from metisfl.learner.state import TaskTable
from metisfl.proto import events_pb2 as pb

TASK = pb.TaskAssigned(
    task_id="r.1.train.ada", run_id="r", round=1, kind=pb.TRAIN, learner="ada", model_digest=b"d"
)
OUTCOME = t.Outcome(bytes(32), 10, 2, {"loss": 0.5}, 0.1)


def test_tasks_come_back_as_they_were_in_their_order(tmp_path: Path) -> None:
    second = pb.TaskAssigned(task_id="a.2", run_id="r", round=2, kind=pb.TRAIN, learner="ada")
    with closing(open_database(tmp_path / "db")) as connection:
        table, tasks = TaskTable(connection), t.Tasks("ada")
        for event in (
            t.Assigned(TASK),
            t.Assigned(second),
            t.Fetched(TASK.task_id),
            t.Done(TASK.task_id, OUTCOME),
        ):
            before = tasks
            tasks, _ = t.handle(tasks, event)
            table.save(before, tasks)
        assert TaskTable(connection).load("ada") == tasks
        assert list(table.load("ada").jobs) == [TASK.task_id, "a.2"]
        before = tasks
        tasks, _ = t.handle(tasks, t.RoundOver("r", 1))
        table.save(before, tasks)
        assert table.load("ada") == tasks


def test_a_transaction_that_was_not_committed_did_not_happen(tmp_path: Path) -> None:
    with closing(open_database(tmp_path / "db")) as connection:
        table = TaskTable(connection)
        connection.execute("BEGIN")
        table.save(t.Tasks("ada"), t.handle(t.Tasks("ada"), t.Assigned(TASK))[0])
    with closing(open_database(tmp_path / "db")) as connection:
        assert TaskTable(connection).load("ada") == t.Tasks("ada")
