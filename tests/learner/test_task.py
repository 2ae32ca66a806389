"""Every accepted task is reported once, or its round is over first; one task at a time."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from metisfl.learner import task as t
from metisfl.proto import events_pb2 as pb

DIGEST = bytes(32)


def assigned(round_number: int, kind: str = "train", learner: str = "ada") -> pb.TaskAssigned:
    return pb.TaskAssigned(
        task_id=f"r.{round_number}.{kind}",
        run_id="r",
        round=round_number,
        kind={"initialise": pb.INITIALISE, "train": pb.TRAIN, "evaluate": pb.EVALUATE}[kind],
        learner=learner,
        model_digest=b"" if kind == "initialise" else DIGEST,
    )


def outcome(kind: int) -> t.Outcome:
    return t.Outcome(b"" if kind == pb.EVALUATE else DIGEST, 10, 2, {"loss": 1.0}, 0.1)


def answer(effect: t.Effect) -> t.Event | None:
    """What happens when an effect succeeds."""
    if isinstance(effect, t.Fetch):
        return t.Fetched(effect.task.task_id)
    if isinstance(effect, t.Work):
        return t.Done(effect.task.task_id, outcome(effect.task.kind))
    if isinstance(effect, t.Upload):
        return t.Uploaded(effect.task.task_id)
    return None


def test_a_training_task_is_fetched_trained_uploaded_and_reported() -> None:
    tasks, seen = t.Tasks("ada"), []
    event: t.Event | None = t.Assigned(assigned(1))
    while event is not None:
        tasks, effects = t.handle(tasks, event)
        seen += [type(effect).__name__ for effect in effects]
        event = answer(effects[0]) if effects else None
    assert seen == ["Fetch", "Work", "Upload", "Report"]
    _, effects = t.handle(tasks, t.RoundOver("r", 1))
    assert effects == (t.Discard("r.1.train"),), "the update is kept until its round is closed"


def test_an_evaluation_survives_the_closing_of_its_round() -> None:
    tasks, _ = t.handle(t.Tasks("ada"), t.Assigned(assigned(1, "evaluate")))
    after, effects = t.handle(tasks, t.RoundOver("r", 1))
    assert (after, effects) == (tasks, ())


def test_a_cancelled_task_is_stopped_and_the_next_one_starts() -> None:
    tasks, _ = t.handle(t.Tasks("ada"), t.Assigned(assigned(1)))
    tasks, nothing = t.handle(tasks, t.Assigned(assigned(2)))
    assert nothing == (), "one task at a time"
    tasks, effects = t.handle(tasks, t.Cancelled("r.1.train"))
    assert effects == (t.Stop("r.1.train"), t.Discard("r.1.train"), t.Fetch(assigned(2)))


def test_a_failure_is_reported_with_its_reason_and_the_learner_goes_on() -> None:
    tasks, _ = t.handle(t.Tasks("ada"), t.Assigned(assigned(1)))
    tasks, effects = t.handle(tasks, t.Failed("r.1.train", "the app raised ValueError: no rows"))
    assert isinstance(effects[0], t.Report)
    assert effects[0].message.reason.endswith("no rows")
    _, effects = t.handle(tasks, t.Assigned(assigned(2)))
    assert effects == (t.Fetch(assigned(2)),)


def test_a_restarted_learner_sends_a_trained_update_and_does_not_train_again() -> None:
    tasks, _ = t.handle(t.Tasks("ada"), t.Assigned(assigned(1)))
    tasks, _ = t.handle(tasks, t.Fetched("r.1.train"))
    assert t.resume(tasks) == (t.Work(assigned(1)),), "work that was cut is done again"
    tasks, _ = t.handle(tasks, t.Done("r.1.train", outcome(pb.TRAIN)))
    assert t.resume(tasks) == (t.Upload(assigned(1), DIGEST),)
    tasks, _ = t.handle(tasks, t.Uploaded("r.1.train"))
    assert t.resume(tasks) == ()


def test_an_update_that_a_power_cut_took_is_made_again() -> None:
    tasks, _ = t.handle(t.Tasks("ada"), t.Assigned(assigned(1)))
    tasks, _ = t.handle(tasks, t.Fetched("r.1.train"))
    tasks, _ = t.handle(tasks, t.Done("r.1.train", outcome(pb.TRAIN)))
    tasks, effects = t.handle(tasks, t.Lost("r.1.train"))
    tasks.validate()
    assert effects == (t.Fetch(assigned(1)),)
    assert t.handle(tasks, t.Lost("r.1.train")) == (tasks, ()), "once"


def test_only_what_belongs_to_a_run_ends_with_it() -> None:
    other = pb.TaskAssigned()
    other.CopyFrom(assigned(1))
    other.task_id, other.run_id = "other.1.train", "other"
    tasks, _ = t.handle(t.Tasks("ada"), t.Assigned(assigned(1)))
    tasks, _ = t.handle(tasks, t.Assigned(other))
    assert t.handle(tasks, t.RoundOver("a third", 9)) == (tasks, ())
    tasks, effects = t.handle(tasks, t.RunOver("r"))
    assert effects == (t.Stop("r.1.train"), t.Discard("r.1.train"), t.Fetch(other))
    tasks, _ = t.handle(tasks, t.RunOver("other"))
    assert not tasks.jobs


def test_another_learners_task_is_not_taken() -> None:
    assert t.handle(t.Tasks("ada"), t.Assigned(assigned(1, learner="bob"))) == (t.Tasks("ada"), ())


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_every_history_reports_each_task_once_or_its_round_is_over(seed: int) -> None:
    rng, tasks, last_round = random.Random(seed), t.Tasks("ada"), 0
    pending: list[t.Effect] = []
    accepted: set[str] = set()
    gone: set[str] = set()
    reported: list[str] = []
    moves = [
        "assign",
        "assign",
        "repeat",
        "answer",
        "answer",
        "answer",
        "fail",
        "over",
        "stop",
        "lost",
    ]
    for _ in range(60):
        move = rng.choice(moves)
        event: t.Event | None = None
        if move == "assign":
            last_round += rng.randrange(2)
            task = assigned(last_round, rng.choice(["train", "evaluate", "initialise"]))
            if task.task_id not in gone:
                event = t.Assigned(task)
                accepted.add(task.task_id)
        elif move == "repeat" and tasks.jobs:
            event = t.Assigned(rng.choice(list(tasks.jobs.values())).assigned)
        elif move == "answer" and pending:
            event = answer(pending.pop(rng.randrange(len(pending))))
        elif move == "fail" and pending:
            event = t.Failed(pending.pop(rng.randrange(len(pending))).task.task_id, "x")
        elif move == "over":
            event = t.RoundOver("r", max(last_round - rng.randrange(3), 0))
        elif move == "lost":
            uploads = [effect for effect in pending if isinstance(effect, t.Upload)]
            if uploads:
                pending.remove(uploads[0])
                event = t.Lost(uploads[0].task.task_id)
        elif move == "stop":
            event = t.Cancelled(f"r.{last_round}.train")
        if event is None:
            continue
        before = tasks
        tasks, effects = t.handle(tasks, event)
        tasks.validate()
        gone |= set(before.jobs) - set(tasks.jobs)
        pending += [e for e in effects if isinstance(e, (t.Fetch, t.Work, t.Upload))]
        reported += [e.message.task_id for e in effects if isinstance(e, t.Report)]
    assert accepted == set(tasks.jobs) | gone, "no task disappears but by cancelling or closing"
    assert len(set(reported)) == len(reported), "a task is reported once"
    left = {key for key, job in tasks.jobs.items() if job.stage is not t.Stage.REPORTED}
    assert accepted - gone - left <= set(reported)
