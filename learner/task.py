"""The life of a learner's task: fetching, working, uploading, reported, forgotten.

Rule 1: every task that is accepted is reported exactly once, unless it is cancelled, replaced by a
later one, or its round is over first.
Rule 2: a learner has one task. The next one takes its place: it says that what was asked before is
over, also to a learner that has not read so (the log was trimmed, or the end is in another lane).
Rule 3: what is late, repeated or unknown changes nothing.
Rule 4: `resume` gives the effects of a state that came back from disk: a trained update is sent,
never trained again; work that was cut is done again, from the same inputs.
Rule 5: a round asks for one thing of a kind. It may be opened again, since an update did not fit
into its exponents; then the later attempt takes the earlier one's place, and what is trained is
sealed again, not trained again.
Rule 6: of one round this site makes one partial, and only of a model whose word about this site's
own update is true. What may have left is never made again: from many of them the key could be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Final

from metisfl.learner.task_events import (
    Answer,
    Assigned,
    Cancelled,
    Discard,
    Done,
    Effect,
    Event,
    Exceeded,
    Failed,
    Fetch,
    Fetched,
    Lost,
    Opened,
    Outcome,
    Report,
    RoundOver,
    RunOver,
    Stop,
    Upload,
    Uploaded,
    Work,
    told_by,
)
from metisfl.proto import events_pb2 as pb
from metisfl.proto.ckks import JOINT
from metisfl.proto.events import REASON_CHARACTERS_MAX

__all__ = [
    "Answer",
    "Assigned",
    "Cancelled",
    "Discard",
    "Done",
    "Effect",
    "Event",
    "Exceeded",
    "Failed",
    "Fetch",
    "Fetched",
    "Job",
    "Lost",
    "Mark",
    "Opened",
    "Outcome",
    "Report",
    "RoundOver",
    "RunOver",
    "Stage",
    "Stop",
    "Tasks",
    "Upload",
    "Uploaded",
    "Work",
    "handle",
    "resume",
    "told_by",
]


RUNS_REMEMBERED: Final = 4
NONE_OVER: Final = (-1, 0)


class Stage(Enum):
    FETCHING = "fetching"
    WORKING = "working"
    UPLOADING = "uploading"
    REPORTED = "reported"


@dataclass(frozen=True, slots=True)
class Job:
    """A task and how far it is. An outcome before UPLOADING: it is trained, and to be sealed."""

    assigned: pb.TaskAssigned
    stage: Stage = Stage.FETCHING
    outcome: Outcome | None = None

    @property
    def active(self) -> bool:
        return self.stage is not Stage.REPORTED


@dataclass(frozen=True, slots=True)
class Mark:
    """How far this site is in a run: the last update that it gave, the last round it opened."""

    given_round: int = -1
    given_digest: bytes = b""
    opened_round: int = -1


@dataclass(frozen=True, slots=True)
class Tasks:
    """All jobs of a learner, by task id, oldest first."""

    learner: str
    jobs: Mapping[str, Job] = MappingProxyType({})
    over: Mapping[str, tuple[float, int]] = MappingProxyType({})
    """The newest step known to be over, by run: its round (inf: the whole run) and its rank.
    Assignments come by another lane and may be read later. It is not kept on disk: who asks for
    what is over asks in vain."""
    marks: Mapping[str, Mark] = MappingProxyType({})
    """By run, kept for good; only of runs whose models are opened by all sites together."""

    def validate(self) -> None:
        """Assert what holds between any two events."""
        assert len(self.jobs) <= 1, "a task takes the place of the one before it"
        for job in self.jobs.values():
            if job.stage is Stage.FETCHING:
                assert job.outcome is None, "what is trained needs no model"
            if job.stage is Stage.WORKING and job.outcome is not None:
                assert job.outcome.trained_digest
                assert not job.outcome.update_digest
            if job.stage is Stage.UPLOADING:
                assert job.outcome is not None
                assert job.outcome.update_digest


def handle(tasks: Tasks, event: Event) -> tuple[Tasks, tuple[Effect, ...]]:
    """Return the state after an event and what to do."""
    if isinstance(event, Assigned):
        return _assigned(tasks, event.task)
    if isinstance(event, (RoundOver, Opened)):
        kind = pb.OPEN if isinstance(event, Opened) else pb.TRAIN
        tasks = _note_over(tasks, event.run_id, (event.round, _RANK[kind]))
        return _forget(tasks, lambda job: _is_over(tasks, job.assigned))
    if isinstance(event, RunOver):
        tasks = _note_over(tasks, event.run_id, (math.inf, 0))
        return _forget(tasks, lambda job: job.assigned.run_id == event.run_id)
    if isinstance(event, Cancelled):
        return _forget(tasks, lambda job: job.assigned.task_id == event.task_id and not _left(job))
    job = tasks.jobs.get(event.task_id)
    if job is None or not job.active:
        return tasks, ()
    if isinstance(event, Failed):
        return _report(tasks, job, _failure(tasks, job, event.reason))
    if isinstance(event, Fetched) and job.stage is Stage.FETCHING:
        return _put(tasks, replace(job, stage=Stage.WORKING)), (Work(job.assigned),)
    if isinstance(event, Done) and job.stage is Stage.WORKING:
        return _worked(tasks, job, event.outcome)
    if isinstance(event, Exceeded) and job.stage is Stage.WORKING:
        exceeded = pb.ScaleExceeded(
            task_id=event.task_id,
            learner=tasks.learner,
            tensor=event.tensor,
            exponents=event.outcome.exponents,
        )
        return _report(tasks, replace(job, outcome=event.outcome), exceeded)
    if isinstance(event, Uploaded) and job.stage is Stage.UPLOADING:
        assert job.outcome is not None
        tasks = _marked(tasks, job, job.outcome)
        return _report(tasks, job, _completed(tasks, job, job.outcome))
    if isinstance(event, Lost) and job.assigned.kind == pb.OPEN:
        return _report(tasks, job, _failure(tasks, job, "the partial is lost, and is made once"))
    if isinstance(event, Lost) and job.outcome is not None:
        left = _unsealed(job.outcome) if job.stage is Stage.UPLOADING else None
        again = _started(replace(job, outcome=left))
        return _put(tasks, again), _begin(again)
    return tasks, ()


def resume(tasks: Tasks) -> tuple[Effect, ...]:
    """Return what to do in a state that was read back from disk."""
    return tuple(effect for job in tasks.jobs.values() if job.active for effect in _begin(job))


def _assigned(tasks: Tasks, task: pb.TaskAssigned) -> tuple[Tasks, tuple[Effect, ...]]:
    if task.learner != tasks.learner or _is_over(tasks, task):
        return tasks, ()
    outcome = None
    for before in tasks.jobs.values():
        if before.assigned.task_id == task.task_id and task.kind == pb.OPEN:
            return _asked_again(tasks, before)
        if before.assigned.run_id == task.run_id and _place(before.assigned) >= _place(task):
            return tasks, ()
        if _asked(before.assigned) == _asked(task):
            outcome = _unsealed(before.outcome)
    tasks, effects = _forget(tasks, lambda job: True)
    job = _started(Job(task, outcome=outcome))
    opened = tasks.marks.get(task.run_id, Mark()).opened_round
    if task.kind == pb.OPEN and task.round <= opened:
        why = f"this site has opened round {opened} of this run; it opens each round once, in order"
        tasks, reports = _report(tasks, job, _failure(tasks, job, why))
        return tasks, (*effects, *reports)
    return _put(tasks, job), (*effects, *_begin(job))


def _asked_again(tasks: Tasks, job: Job) -> tuple[Tasks, tuple[Effect, ...]]:
    """A partial is awaited still: it, or what was said of it, may have come too late to count."""
    if job.active:
        return tasks, ()
    again = _started(job) if job.outcome is None else replace(job, stage=Stage.UPLOADING)
    return _put(tasks, again), _begin(again)


def _asked(task: pb.TaskAssigned) -> tuple[str, int, int]:
    """What a task asks for, whichever attempt it is."""
    return task.run_id, task.round, task.kind


_RANK: Final = {pb.INITIALISE: 0, pb.TRAIN: 0, pb.OPEN: 1, pb.EVALUATE: 2}


def _place(task: pb.TaskAssigned) -> tuple[int, int, int]:
    """Where a task stands in its run."""
    return task.round, _RANK[task.kind], task.attempt


def _unsealed(outcome: Outcome | None) -> Outcome | None:
    """What is left of an outcome without its update; None where all has to be done again."""
    if outcome is None or not outcome.trained_digest:
        return None
    return replace(outcome, update_digest=b"")


def _worked(tasks: Tasks, job: Job, outcome: Outcome) -> tuple[Tasks, tuple[Effect, ...]]:
    if job.assigned.kind == pb.EVALUATE:
        return _report(tasks, job, _completed(tasks, job, outcome))
    uploading = replace(job, stage=Stage.UPLOADING, outcome=outcome)
    if job.assigned.kind == pb.OPEN:  # from here on it may leave this site
        tasks = _marked(tasks, job, outcome)
    return _put(tasks, uploading), _begin(uploading)


def _completed(tasks: Tasks, job: Job, outcome: Outcome) -> pb.TaskCompleted:
    return pb.TaskCompleted(
        task_id=job.assigned.task_id,
        learner=tasks.learner,
        update_digest=outcome.update_digest,
        examples=outcome.examples,
        batches=outcome.batches,
        metrics=dict(outcome.metrics),
        training_s=outcome.training_s,
        exponents=outcome.exponents,
    )


def _left(job: Job) -> bool:
    """Whether a partial may have left this site: its round's end alone makes it superfluous."""
    return job.assigned.kind == pb.OPEN and job.outcome is not None


def _failure(tasks: Tasks, job: Job, reason: str) -> pb.TaskFailed:
    return pb.TaskFailed(
        task_id=job.assigned.task_id,
        learner=tasks.learner,
        reason=reason[:REASON_CHARACTERS_MAX],
    )


def _marked(tasks: Tasks, job: Job, outcome: Outcome) -> Tasks:
    """With a note of what this site has given in a run that all sites open together."""
    task = job.assigned
    if task.privacy != JOINT:
        return tasks
    mark = tasks.marks.get(task.run_id, Mark())
    if task.kind == pb.OPEN:
        mark = replace(mark, opened_round=task.round)
    else:
        mark = replace(mark, given_round=task.round, given_digest=outcome.update_digest)
    return replace(tasks, marks=MappingProxyType({**tasks.marks, task.run_id: mark}))


def _report(tasks: Tasks, job: Job, message: Answer) -> tuple[Tasks, tuple[Effect, ...]]:
    return _put(tasks, replace(job, stage=Stage.REPORTED)), (Report(message),)


def _note_over(tasks: Tasks, run_id: str, step: tuple[float, int]) -> Tasks:
    """Remember it with what is known of the run before that one."""
    newest = max(step, tasks.over.get(run_id, NONE_OVER))
    known = {key: value for key, value in tasks.over.items() if key != run_id}
    last = dict([*known.items()][-(RUNS_REMEMBERED - 1) :])
    return replace(tasks, over=MappingProxyType({**last, run_id: newest}))


def _is_over(tasks: Tasks, task: pb.TaskAssigned) -> bool:
    """Updates of a closed round are done with; its evaluation is only about to begin."""
    return (task.round, _RANK[task.kind]) <= tasks.over.get(task.run_id, NONE_OVER)


def _forget(tasks: Tasks, over: Callable[[Job], bool]) -> tuple[Tasks, tuple[Effect, ...]]:
    gone = [job for job in tasks.jobs.values() if over(job)]
    if not gone:
        return tasks, ()
    left = {key: job for key, job in tasks.jobs.items() if job not in gone}
    stops = tuple(Stop(job.assigned.task_id) for job in gone if job.active)
    discards = tuple(Discard(job.assigned.task_id) for job in gone)
    return replace(tasks, jobs=MappingProxyType(left)), stops + discards


def _started(job: Job) -> Job:
    """The job at its first stage. What is trained needs no model."""
    needs_model = job.assigned.model_digest and job.outcome is None
    return replace(job, stage=Stage.FETCHING if needs_model else Stage.WORKING)


def _begin(job: Job) -> tuple[Effect, ...]:
    if job.stage is Stage.FETCHING:
        return (Fetch(job.assigned),)
    if job.stage is Stage.WORKING:
        return (Work(job.assigned, job.outcome),)
    assert job.stage is Stage.UPLOADING
    assert job.outcome is not None
    return (Upload(job.assigned, job.outcome.update_digest),)


def _put(tasks: Tasks, job: Job) -> Tasks:
    jobs = {**tasks.jobs, job.assigned.task_id: job}
    return replace(tasks, jobs=MappingProxyType(jobs))
