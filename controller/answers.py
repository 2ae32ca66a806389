"""What an answer, or silence, does to the task that it is about.

Rule: the first answer holds. What comes later, from somebody else or for another round is named and
dropped; an answer that cannot be right fails its learner and nobody else.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType

from metisfl.controller.state import Logged, Phase, Run, Status, Task
from metisfl.proto import events_pb2 as pb
from metisfl.proto.ckks import weights_fit
from metisfl.proto.events import REASON_CHARACTERS_MAX

__all__ = [
    "examples_max",
    "failed",
    "lease_ended",
    "put",
    "scale_exceeded",
    "stopped",
    "task_assigned",
    "task_cancelled",
    "task_completed",
    "task_failed",
    "update_stored",
    "update_unusable",
]


def task_assigned(run: Run, event: Logged) -> tuple[Run, str]:
    message = event.message
    assert isinstance(message, pb.TaskAssigned)
    task = run.tasks.get(message.task_id)
    if task is None or task.status is not Status.INVITED:
        return run, "assigned before"
    return put(run, replace(task, status=Status.ASSIGNED, assigned_ns=event.at_ns)), ""


def task_cancelled(run: Run, event: Logged) -> tuple[Run, str]:
    task = run.tasks.get(event.message.task_id)  # type: ignore[attr-defined]
    if task is None:
        return run, "cancelled after its round"
    if run.phase is Phase.OPENING and run.plan is not None and run.plan.waits_for_quorum:
        return put(run, Task(task.task_id, task.learner, task.kind)), ""  # it is asked again
    return put(run, replace(task, cancelled=True)), ""


def task_completed(run: Run, event: Logged) -> tuple[Run, str]:
    done = event.message
    assert isinstance(done, pb.TaskCompleted)
    task = _awaited(run, done.task_id, done.learner)
    if isinstance(task, str):
        return run, task
    if task.kind == pb.TRAIN and not done.examples:
        return put(run, failed(task, "trained on no examples", event)), ""
    if why := _beyond_bound(run, task, done):
        return put(run, failed(task, why, event)), ""
    if task.kind == pb.TRAIN and done.examples > (most := examples_max(run, task.learner)):
        why = (
            f"reports {done.examples} examples, more than the {most:.0f} that it may weigh: a "
            "learner declares what it trains on when it joins"
        )
        return put(run, failed(task, why, event)), ""
    if run.terms and task.kind in (pb.INITIALISE, pb.TRAIN) and (why := _misfit(run, task, done)):
        return put(run, failed(task, why, event)), ""
    completed = replace(
        task,
        status=Status.COMPLETED,
        completion=done,
        exponents=tuple(done.exponents) if run.terms else (),
        settled_ns=event.at_ns,
    )
    return put(run, _check_digest(completed)), ""


def _beyond_bound(run: Run, task: Task, done: pb.TaskCompleted) -> str:
    """Why this answer counts for more examples than the run allows; "" if it does not."""
    assert run.plan is not None
    most = run.plan.max_examples
    weights = (value for name, value in done.metrics.items() if name.endswith(".examples"))
    reported = max(done.examples, run.declared_by(task.learner), *weights)
    if not most or reported <= most or task.kind == pb.INITIALISE:
        return ""
    return (
        f"reports or declares {reported:.0f} examples; this run counts nobody with more than "
        f"max_examples, {most}"
    )


def examples_max(run: Run, learner: str) -> float:
    """The most examples that a learner may report.

    Those that it has declared. In an encrypted round who has not, while others have, counts for no
    more than their mean: the sum of all weights is bounded, and nobody takes others' room in it.
    """
    if declared := run.declared_by(learner):
        return declared
    others = run.terms and any(run.declared_by(task.learner) for task in run.tasks.values())
    return run.reference_weight if others else math.inf


def _misfit(run: Run, task: Task, done: pb.TaskCompleted) -> str:
    """Why an encrypted update cannot be part of the sum; "" if it can."""
    if (known := _tensors(run)) and len(done.exponents) != known:
        return f"reports {len(done.exponents)} exponents; the model has {known}"
    if task.kind == pb.INITIALISE:
        return ""
    others = [t.completion for t in run.tasks.values() if t.status is Status.COMPLETED]
    examples = sum(other.examples for other in others if other is not None)
    total = (examples + done.examples) / run.reference_weight
    assert run.terms is not None
    if not weights_fit(total, run.terms.weight_sum_max):
        return (
            f"its weight of {done.examples / run.reference_weight:.3g} brings the sum of weights "
            f"to {total:.4g}; the key allows {run.terms.weight_sum_max}: declare the examples that "
            "are trained on, or make a key for more learners"
        )
    return ""


def _tensors(run: Run) -> int:
    """How many float tensors the model has, as far as anyone has said; 0: nobody has."""
    said = (run.exponents, *(task.exponents for task in run.tasks.values()))
    return next((len(exponents) for exponents in said if exponents), 0)


def scale_exceeded(run: Run, event: Logged) -> tuple[Run, str]:
    exceeded = event.message
    assert isinstance(exceeded, pb.ScaleExceeded)
    task = _awaited(run, exceeded.task_id, exceeded.learner)
    if isinstance(task, str):
        return run, task
    needed = tuple(exceeded.exponents)
    known = run.exponents or (0,) * (_tensors(run) or len(needed))
    why = ""
    if run.terms is None or task.kind == pb.EVALUATE:
        why = "reports that a scale was exceeded where there is none"
    elif run.plan is None or run.rescaled >= len(run.plan.learners):
        # An honest site exceeds at most once in a round: the next attempt has its exponents.
        why = "does not fit, though the round was opened again as often as there are learners"
    elif len(needed) != len(known) or all(n <= k for n, k in zip(needed, known, strict=True)):
        why = "reports that its update does not fit, and exponents in which it does"
    if why:
        return put(run, failed(task, why, event)), ""
    return put(run, replace(
        task,
        status=Status.EXCEEDED,
        exponents=needed,
        reason=f"tensor {exceeded.tensor!r} does not fit the round's exponents",
        settled_ns=event.at_ns,
    )), ""  # fmt: skip


def task_failed(run: Run, event: Logged) -> tuple[Run, str]:
    told = event.message
    assert isinstance(told, pb.TaskFailed)
    task = _awaited(run, told.task_id, told.learner)
    if isinstance(task, str):
        return run, task
    return put(run, failed(task, told.reason or "no reason given", event)), ""


def update_stored(run: Run, event: Logged) -> tuple[Run, str]:
    stored = event.message
    assert isinstance(stored, pb.UpdateStored)
    task = run.tasks.get(stored.task_id)
    if task is None or task.learner != stored.learner or task.kind == pb.EVALUATE:
        return run, "stored for a task that is not open"
    if task.status not in (Status.ASSIGNED, Status.COMPLETED) or task.stored_digest:
        return run, f"stored for a task that is {task.status.value}"
    return put(run, _check_digest(replace(
        task, stored_digest=stored.digest, settled_ns=event.at_ns
    ))), ""  # fmt: skip


def update_unusable(run: Run, event: Logged) -> tuple[Run, str]:
    unusable = event.message
    assert isinstance(unusable, pb.UpdateUnusable)
    task = run.tasks.get(unusable.task_id)
    if task is None or not task.counts:
        return run, "unusable after its round, or told before"
    return put(run, failed(task, unusable.reason, event)), ""


def lease_ended(run: Run, event: Logged) -> tuple[Run, str]:
    ended = event.message
    assert isinstance(ended, pb.LeaseEnded)
    name, reason = ended.learner, f"silent for {ended.silent_s:.1f} s, longer than its lease"
    if not ended.task_id:
        if run.phase is Phase.GATHERING and name not in run.members | run.asking:
            absent = {**run.absent, name: f"has not joined: {reason}"}
            return replace(run, absent=MappingProxyType(absent)), ""
        return run, "joined before its lease ended"
    task = run.tasks.get(ended.task_id)
    if task is None or task.settled:
        return run, "settled before its lease ended"
    if task.status is Status.COMPLETED:
        reason = "the update that it reported has not come within its lease"
    lapsed = replace(task, status=Status.LAPSED, reason=reason, settled_ns=event.at_ns)
    return put(run, lapsed), ""


def put(run: Run, task: Task) -> Run:
    return replace(run, tasks=MappingProxyType({**run.tasks, task.task_id: task}))


def failed(task: Task, reason: str, event: Logged) -> Task:
    """The task without an answer that counts, for this reason."""
    cut = reason[:REASON_CHARACTERS_MAX]
    return replace(task, status=Status.FAILED, reason=cut, settled_ns=event.at_ns)


def stopped(task: Task, reason: str, event: Logged) -> Task:
    """The task as the end of its run leaves it: what was not answered will not be."""
    if task.settled:
        return task
    return replace(task, status=Status.STOPPED, reason=reason, settled_ns=event.at_ns)


def _check_digest(task: Task) -> Task:
    if task.kind == pb.EVALUATE or task.completion is None or not task.stored_digest:
        return task
    if task.completion.update_digest == task.stored_digest:
        return task
    reason = "the update that was stored is not the one that was reported"
    return replace(task, status=Status.FAILED, reason=reason)


def _awaited(run: Run, task_id: str, learner: str) -> Task | str:
    """The task that this learner may answer now, or why there is none."""
    task = run.tasks.get(task_id)
    if task is None:
        return "late: its round is over"
    if task.learner != learner:
        return f"{learner} does not hold this task"
    if task.status is not Status.ASSIGNED:
        return f"late or repeated: the task is {task.status.value}"
    return task
