"""Every accepted task is reported once, or its round is over or opened again first; one task at a
time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metisfl.learner import task as t
from metisfl.proto import events_pb2 as pb

DIGEST = bytes(32)


def assigned(
    round_number: int, kind: str = "train", learner: str = "ada", attempt: int = 0
) -> pb.TaskAssigned:
    return pb.TaskAssigned(
        task_id=f"r.{round_number}.{kind}" + (f".again{attempt}" if attempt else ""),
        run_id="r",
        round=round_number,
        kind={"initialise": pb.INITIALISE, "train": pb.TRAIN, "evaluate": pb.EVALUATE}[kind],
        learner=learner,
        model_digest=b"" if kind == "initialise" else DIGEST,
        attempt=attempt,
    )


def outcome(kind: int) -> t.Outcome:
    return t.Outcome(b"" if kind == pb.EVALUATE else DIGEST, 10, 2, {"loss": 1.0}, 0.1)


TRAINED = t.Outcome(b"", 10, 2, {"loss": 1.0}, 0.1, (0, 12), b"t" * 32)
SEALED = replace(TRAINED, update_digest=DIGEST)


def asked(task: pb.TaskAssigned) -> tuple[str, int, int]:
    return task.run_id, task.round, task.kind


IDLE = t.Tasks("ada")


def after(*events: t.Event, tasks: t.Tasks = IDLE) -> t.Tasks:
    """The state after these events, checked on the way."""
    for event in events:
        tasks, _ = t.handle(tasks, event)
        tasks.validate()
    return tasks


TRAINING = after(t.Assigned(assigned(1)), t.Fetched("r.1.train"))


def answer(effect: t.Effect, *, encrypted: bool = False) -> t.Event | None:
    """What happens when an effect succeeds."""
    if isinstance(effect, t.Fetch):
        return t.Fetched(effect.task.task_id)
    if isinstance(effect, t.Work):
        sealed = encrypted and effect.task.kind != pb.EVALUATE
        return t.Done(effect.task.task_id, SEALED if sealed else outcome(effect.task.kind))
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
    assert (after.jobs, effects) == (tasks.jobs, ())


def test_a_task_that_is_read_after_the_end_of_its_round_is_not_begun() -> None:
    """Assignments and the ends of rounds come by two lanes."""
    tasks, _ = t.handle(t.Tasks("ada"), t.RoundOver("r", 2))
    for late in (assigned(1), assigned(2), assigned(1, "evaluate")):
        assert t.handle(tasks, t.Assigned(late)) == (tasks, ())
    for due in (assigned(2, "evaluate"), assigned(3)):
        assert t.handle(tasks, t.Assigned(due))[1], "its round is not over"
    tasks, _ = t.handle(tasks, t.RunOver("r"))
    assert t.handle(tasks, t.Assigned(assigned(9, "evaluate"))) == (tasks, ())


def test_what_is_left_of_a_run_whose_end_was_never_read_goes_with_the_next_runs_first_task() -> (
    None
):
    tasks, _ = t.handle(t.Tasks("ada"), t.Assigned(assigned(1)))
    tasks, _ = t.handle(tasks, t.Failed("r.1.train", "no rows"))
    newer = pb.TaskAssigned()
    newer.CopyFrom(assigned(1))
    newer.task_id, newer.run_id = "s.1.train", "s"
    tasks, effects = t.handle(tasks, t.Assigned(newer))
    assert effects == (t.Discard("r.1.train"), t.Fetch(newer))
    assert list(tasks.jobs) == ["s.1.train"]


def test_few_runs_are_remembered() -> None:
    tasks = t.Tasks("ada")
    for number in range(20):
        tasks, _ = t.handle(tasks, t.RunOver(f"run{number}"))
    assert list(tasks.over) == [f"run{number}" for number in range(16, 20)]


def test_a_cancelled_task_is_stopped() -> None:
    tasks, _ = t.handle(t.Tasks("ada"), t.Assigned(assigned(1)))
    tasks, effects = t.handle(tasks, t.Cancelled("r.1.train"))
    assert (tasks, effects) == (t.Tasks("ada"), (t.Stop("r.1.train"), t.Discard("r.1.train")))


def test_the_next_task_takes_the_place_of_the_one_before_whose_end_was_never_read() -> None:
    tasks, _ = t.handle(t.Tasks("ada"), t.Assigned(assigned(1)))
    tasks, effects = t.handle(tasks, t.Assigned(assigned(2)))
    assert effects == (t.Stop("r.1.train"), t.Discard("r.1.train"), t.Fetch(assigned(2)))
    assert t.handle(tasks, t.Assigned(assigned(1))) == (tasks, ()), "an older one comes too late"
    tasks, effects = t.handle(tasks, t.Assigned(assigned(2, "evaluate")))
    assert effects[:2] == (t.Stop("r.2.train"), t.Discard("r.2.train"))
    assert t.handle(tasks, t.Assigned(assigned(2, attempt=1))) == (tasks, ())


def test_a_failure_is_reported_with_its_reason_and_the_learner_goes_on() -> None:
    tasks, _ = t.handle(t.Tasks("ada"), t.Assigned(assigned(1)))
    tasks, effects = t.handle(tasks, t.Failed("r.1.train", "the app raised ValueError: no rows"))
    assert isinstance(effects[0], t.Report)
    assert effects[0].message.reason.endswith("no rows")
    _, effects = t.handle(tasks, t.Assigned(assigned(2)))
    assert effects == (t.Discard("r.1.train"), t.Fetch(assigned(2)))


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


def test_an_update_that_does_not_fit_is_reported_and_what_is_trained_is_kept() -> None:
    tasks, effects = t.handle(TRAINING, t.Exceeded("r.1.train", TRAINED, "bn/variance"))
    tasks.validate()
    report = pb.ScaleExceeded(
        task_id="r.1.train", learner="ada", tensor="bn/variance", exponents=[0, 12]
    )
    assert effects == (t.Report(report),)
    assert tasks.jobs["r.1.train"] == t.Job(assigned(1), t.Stage.REPORTED, TRAINED)
    assert t.resume(tasks) == ()
    for other in (tasks, after(t.Assigned(assigned(1)))):
        assert t.handle(other, t.Exceeded("r.1.train", TRAINED, "bn/variance")) == (other, ())


def test_a_completion_says_which_exponents_the_update_needed() -> None:
    tasks = after(t.Done("r.1.train", SEALED), tasks=TRAINING)
    _, (report, *_) = t.handle(tasks, t.Uploaded("r.1.train"))
    assert isinstance(report, t.Report)
    assert report.message.exponents == [0, 12]


def test_a_later_attempt_seals_again_what_was_trained() -> None:
    again = assigned(1, attempt=1)
    for tasks, stopped in (
        (after(t.Exceeded("r.1.train", TRAINED, "w"), tasks=TRAINING), ()),
        (after(t.Done("r.1.train", SEALED), tasks=TRAINING), (t.Stop("r.1.train"),)),
        (after(t.Done("r.1.train", SEALED), t.Uploaded("r.1.train"), tasks=TRAINING), ()),
    ):
        later, effects = t.handle(tasks, t.Assigned(again))
        later.validate()
        assert effects == (*stopped, t.Discard("r.1.train"), t.Work(again, TRAINED))
        assert later.jobs == {again.task_id: t.Job(again, t.Stage.WORKING, TRAINED)}
        assert t.resume(later) == (t.Work(again, TRAINED),)
        _, effects = t.handle(later, t.Done(again.task_id, SEALED))
        assert effects == (t.Upload(again, DIGEST),)


def test_a_later_attempt_starts_anew_where_nothing_was_trained() -> None:
    again = assigned(1, attempt=1)
    failed = after(t.Failed("r.1.train", "no rows"), tasks=TRAINING)
    uploading = after(t.Done("r.1.train", outcome(pb.TRAIN)), tasks=TRAINING)  # plain: no trained
    for tasks, stopped in ((TRAINING, True), (failed, False), (uploading, True)):
        stop = (t.Stop("r.1.train"),) if stopped else ()
        later, effects = t.handle(tasks, t.Assigned(again))
        later.validate()
        assert effects == (*stop, t.Discard("r.1.train"), t.Fetch(again))


def test_an_attempt_that_is_not_later_changes_nothing() -> None:
    tasks = after(t.Assigned(assigned(1, attempt=2)))
    for attempt in (0, 1, 2):
        task = assigned(1, attempt=attempt)
        task.task_id += ".other"
        assert t.handle(tasks, t.Assigned(task)) == (tasks, ())


def test_what_a_power_cut_took_is_sealed_again_or_trained_again() -> None:
    tasks = after(t.Done("r.1.train", SEALED), tasks=TRAINING)
    tasks, effects = t.handle(tasks, t.Lost("r.1.train"))
    tasks.validate()
    assert effects == (t.Work(assigned(1), TRAINED),), "the update is gone"
    tasks, effects = t.handle(tasks, t.Lost("r.1.train"))
    tasks.validate()
    assert effects == (t.Fetch(assigned(1)),), "and so is the trained model"


def test_only_what_belongs_to_a_run_ends_with_it() -> None:
    tasks, _ = t.handle(t.Tasks("ada"), t.Assigned(assigned(1)))
    for end in (t.RoundOver("another", 9), t.RunOver("another")):
        after, effects = t.handle(tasks, end)
        assert (after.jobs, effects) == (tasks.jobs, ())
    tasks, effects = t.handle(tasks, t.RunOver("r"))
    assert effects == (t.Stop("r.1.train"), t.Discard("r.1.train"))
    assert not tasks.jobs


def test_another_learners_task_is_not_taken() -> None:
    assert t.handle(t.Tasks("ada"), t.Assigned(assigned(1, learner="bob"))) == (t.Tasks("ada"), ())


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_every_history_reports_each_task_once_or_its_round_is_over(seed: int) -> None:
    rng, tasks, last_round, attempt = random.Random(seed), t.Tasks("ada"), 0, 0
    encrypted = rng.random() < 0.7
    pending: list[t.Effect] = []
    accepted: set[str] = set()
    gone: set[str] = set()
    reported: list[str] = []
    moves = ["assign", "assign", "again", "repeat", "answer", "answer", "answer", "exceed"]
    moves += ["fail", "over", "stop", "lost"]
    for _ in range(60):
        move = rng.choice(moves)
        event: t.Event | None = None
        if move == "assign":
            if rng.randrange(2):
                last_round, attempt = last_round + 1, 0
            task = assigned(last_round, rng.choice(["train", "evaluate", "initialise"]))
            event = None if task.task_id in gone else t.Assigned(task)
        elif move == "again":
            attempt += rng.randrange(2)
            task = assigned(last_round, attempt=attempt)
            event = None if task.task_id in gone else t.Assigned(task)
        elif move == "repeat" and tasks.jobs:
            event = t.Assigned(rng.choice(list(tasks.jobs.values())).assigned)
        elif move == "answer" and pending:
            event = answer(pending.pop(rng.randrange(len(pending))), encrypted=encrypted)
        elif move == "exceed" and encrypted:
            works = [one for one in pending if isinstance(one, t.Work)]
            work = next((one for one in works if one.task.kind != pb.EVALUATE), None)
            if work is not None:
                pending.remove(work)
                event = t.Exceeded(work.task.task_id, TRAINED, "w")
        elif move == "fail" and pending:
            event = t.Failed(pending.pop(rng.randrange(len(pending))).task.task_id, "x")
        elif move == "over":
            event = t.RoundOver("r", max(last_round - rng.randrange(3), 0))
        elif move == "lost":
            made = [
                one
                for one in pending
                if isinstance(one, t.Upload) or (isinstance(one, t.Work) and one.outcome)
            ]
            if made:
                pending.remove(made[0])
                event = t.Lost(made[0].task.task_id)
        elif move == "stop":
            event = t.Cancelled(f"r.{last_round}.train")
        if event is None:
            continue
        before = tasks
        tasks, effects = t.handle(tasks, event)
        tasks.validate()
        accepted |= set(tasks.jobs)
        gone |= set(before.jobs) - set(tasks.jobs)
        begun = [e for e in effects if isinstance(e, (t.Fetch, t.Work, t.Upload))]
        pending += begun
        reported += [e.message.task_id for e in effects if isinstance(e, t.Report)]
        assert all(tasks.jobs[effect.task.task_id].active for effect in begun)
        if not isinstance(event, t.Lost):
            made_before = {asked(job.assigned) for job in before.jobs.values() if job.outcome}
            for effect in begun if encrypted else ():
                if isinstance(effect, t.Fetch) or (
                    isinstance(effect, t.Work) and not effect.outcome
                ):
                    assert asked(effect.task) not in made_before, "what is trained stays trained"
    assert accepted == set(tasks.jobs) | gone, "no task disappears but by cancelling or closing"
    assert len(set(reported)) == len(reported), "a task is reported once"
    left = {key for key, job in tasks.jobs.items() if job.stage is not t.Stage.REPORTED}
    assert accepted - gone - left <= set(reported)


@pytest.mark.parametrize("outcome", ["COMPLETED", "FAILED", "STOPPED"])
def test_a_run_is_over_however_it_ends_and_not_before(outcome: str) -> None:
    end = pb.RunFinished(run_id="r", outcome=pb.RunFinished.Outcome.Value(outcome))
    assert t.told_by(end) == t.RunOver("r")
    assert t.told_by(pb.RunStopped(run_id="r")) is None, "the controller says when"
