"""A site makes one partial of a round, whatever dies, is lost or is asked for again."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from metisfl.deploy.database import transaction
from metisfl.learner import task as t
from metisfl.learner.assignment import job_of
from metisfl.learner.home import Home
from metisfl.learner.state import TaskTable
from metisfl.proto import events_pb2 as pb

MODEL, UPDATE, PARTIAL = b"m" * 32, b"u" * 32, b"p" * 32
KINDS = {"initialise": pb.INITIALISE, "train": pb.TRAIN, "open": pb.OPEN, "evaluate": pb.EVALUATE}


def assigned(number: int, kind: str, *, run: str = "r", attempt: int = 0) -> pb.TaskAssigned:
    return pb.TaskAssigned(
        task_id=f"{run}.{number}.{kind}.ada",
        run_id=run,
        round=number,
        kind=KINDS[kind],
        learner="ada",
        model_digest=b"" if kind == "initialise" else MODEL,
        attempt=attempt,
        privacy="ckks-threshold",
    )


def handled(tasks: t.Tasks, *events: t.Event) -> tuple[t.Tasks, list[t.Effect]]:
    effects: list[t.Effect] = []
    for event in events:
        tasks, caused = t.handle(tasks, event)
        tasks.validate()
        effects += caused
    return tasks, effects


def done(task: pb.TaskAssigned, digest: bytes) -> tuple[t.Event, ...]:
    outcome = t.Outcome(digest, 10, 2, {}, 0.1, (), b"t" * 32)
    return t.Assigned(task), t.Fetched(task.task_id), t.Done(task.task_id, outcome)


def reasons(effects: list[t.Effect]) -> list[str]:
    reports = (one.message for one in effects if isinstance(one, t.Report))
    return [message.reason for message in reports if isinstance(message, pb.TaskFailed)]


GIVEN, _ = handled(t.Tasks("ada"), *done(assigned(1, "train"), UPDATE), t.Uploaded("r.1.train.ada"))
CLOSED, _ = handled(GIVEN, t.RoundOver("r", 1))
OPENED, _ = handled(CLOSED, *done(assigned(1, "open"), PARTIAL))


def test_a_closed_round_is_opened_before_it_is_scored() -> None:
    tasks, effects = handled(CLOSED, t.Assigned(assigned(1, "open")))
    assert effects == [t.Fetch(assigned(1, "open"))]
    tasks, effects = handled(tasks, t.Fetched("r.1.open.ada"))
    assert effects == [t.Work(assigned(1, "open"))]
    tasks, _ = handled(OPENED, t.Uploaded("r.1.open.ada"), t.Opened("r", 1))
    assert not tasks.jobs, "an opened model needs no partial any more"
    _, effects = handled(tasks, t.Assigned(assigned(1, "open")))
    assert not effects, "it is over"
    _, effects = handled(tasks, t.Assigned(assigned(1, "evaluate")))
    assert effects == [t.Fetch(assigned(1, "evaluate"))]


@pytest.mark.parametrize("number", [0, 1])
def test_a_round_that_was_opened_is_never_opened_again(number: int) -> None:
    """Not under another attempt, nor an earlier one: many partials would show the key."""
    tasks = replace(OPENED, jobs=t.Tasks("ada").jobs, over=t.Tasks("ada").over)
    again = assigned(number, "open", attempt=1)
    _, effects = handled(tasks, t.Assigned(again))
    assert not [one for one in effects if isinstance(one, (t.Fetch, t.Work, t.Upload))]
    assert "opens each round once" in reasons(effects)[0]


def test_another_run_opens_its_own_rounds() -> None:
    _, effects = handled(OPENED, t.Assigned(assigned(1, "open", run="s")))
    assert t.Fetch(assigned(1, "open", run="s")) in effects


def test_a_partial_that_was_cut_before_it_could_leave_is_made_again() -> None:
    tasks, _ = handled(CLOSED, t.Assigned(assigned(1, "open")), t.Fetched("r.1.open.ada"))
    assert t.resume(tasks) == (t.Work(assigned(1, "open")),)


def test_a_partial_that_may_have_left_is_sent_again_and_never_made_again() -> None:
    assert t.resume(OPENED) == (t.Upload(assigned(1, "open"), PARTIAL),)
    _, effects = handled(OPENED, t.Lost("r.1.open.ada"))
    assert reasons(effects) == ["the partial is lost, and is made once"]
    assert not [one for one in effects if isinstance(one, t.Work)]


def test_a_cancelled_partial_is_made_anew_only_if_it_cannot_have_left() -> None:
    """A site that was silent for its lease is asked for the same again."""
    working, _ = handled(CLOSED, t.Assigned(assigned(1, "open")), t.Fetched("r.1.open.ada"))
    _, effects = handled(working, t.Cancelled("r.1.open.ada"), t.Assigned(assigned(1, "open")))
    assert effects[-1] == t.Fetch(assigned(1, "open"))
    again = t.Cancelled("r.1.open.ada"), t.Assigned(assigned(1, "open"))
    assert handled(OPENED, *again) == (OPENED, []), "what may have left is given up"
    told, reports = handled(OPENED, t.Uploaded("r.1.open.ada"))
    sent_again, effects = handled(told, *again, t.Uploaded("r.1.open.ada"))
    assert effects == [t.Upload(assigned(1, "open"), PARTIAL), *reports], "it came too late before"
    assert sent_again == told


def test_what_was_given_and_opened_outlives_the_process() -> None:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        table = TaskTable(connection)
        with transaction(connection):
            table.save(t.Tasks("ada"), OPENED)
        assert table.load("ada").marks == OPENED.marks
        assert OPENED.marks["r"] == t.Mark(1, UPDATE, 1)


def test_the_job_says_which_update_of_its_own_the_sum_may_name(tmp_path) -> None:  # type: ignore[no-untyped-def]
    home = Home(tmp_path)
    own = {}
    for number in (1, 2):
        opening = job_of(assigned(number, "open"), home, None, OPENED.marks["r"]).opening
        assert opening is not None
        own[number] = opening.own
    assert own == {1: ("ada", UPDATE), 2: ("ada", b"")}, "it has given none in round 2"
    task = assigned(1, "train")
    task.partials_digest = PARTIAL
    opening = job_of(task, home, None, OPENED.marks["r"]).opening
    assert opening is not None
    assert opening.partials_path == home.model_path(PARTIAL)


def test_a_plain_run_leaves_no_marks() -> None:
    task = assigned(1, "train")
    task.privacy = "ckks"
    tasks, _ = handled(t.Tasks("ada"), *done(task, UPDATE), t.Uploaded(task.task_id))
    assert not tasks.marks
