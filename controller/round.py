"""The run and its rounds, as a fold of the log.

Rule 1: `apply` is the only way state changes, and it takes logged events alone. A controller that
restarts replays the log and has the state that it had, bit for bit.
Rule 2: an event that is late, repeated or not the publisher's to send is data: it is named and
dropped, never raised.
What the state calls for next is in scheduling.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from metisfl.controller.plan import largest, refusal
from metisfl.controller.state import Logged, Phase, Run, Status, Task, present
from metisfl.proto import events_pb2 as pb
from metisfl.proto.ckks import weights_fit
from metisfl.proto.events import REASON_CHARACTERS_MAX, may_send

__all__ = ["apply"]


def apply(run: Run, event: Logged) -> tuple[Run, str]:
    """Return the state after an event, and why the event was dropped ("" if it was not)."""
    kind = event.message.DESCRIPTOR.name
    if kind not in _TRANSITIONS:
        return run, ""  # not for the controller
    phases, transition = _TRANSITIONS[kind]
    if not may_send(event.publisher, event.message):
        return run, f"{event.publisher} may not send {kind}"
    if run.phase not in phases:
        return run, f"{kind} while {run.phase.value}"
    return transition(run, event)


def _run_started(run: Run, event: Logged) -> tuple[Run, str]:
    plan = event.message
    assert isinstance(plan, pb.RunStarted)
    if run.plan is not None and run.plan.run_id == plan.run_id:
        return run, f"run {plan.run_id} was started before"
    if run.plan is not None and run.phase is not Phase.FINISHED:
        why = f"asked for while run {run.plan.run_id} is {run.phase.value}; wait for its end"
    else:
        why = refusal(plan, run.terms)
    if why:
        return replace(run, refused=_with(run.refused, plan.run_id, why)), why
    return Run(
        run.federation,
        run.terms,
        Phase.GATHERING,
        plan,
        asking=run.asking,
        members=run.members,
        declared=run.declared,
        refused=run.refused,
        opened_ns=event.at_ns,
    ), ""


def _learner_joined(run: Run, event: Logged) -> tuple[Run, str]:
    joined = event.message
    assert isinstance(joined, pb.LearnerJoined)
    name = joined.learner
    run = replace(run, declared=MappingProxyType({**run.declared, name: joined.examples}))
    if name in run.members:
        return run, ""
    return replace(run, asking=run.asking | {name}, absent=_without(run.absent, name)), ""


def _learner_left(run: Run, event: Logged) -> tuple[Run, str]:
    left = event.message
    assert isinstance(left, pb.LearnerLeft)
    name, reason = left.learner, f"left: {left.reason or 'no reason given'}"
    for task in run.tasks.values():
        if task.learner == name and not task.settled:
            run = _put(run, _failed(task, reason, event))
    return replace(
        run,
        asking=run.asking - {name},
        members=run.members - {name},
        absent=_with(run.absent, name, reason),
    ), ""


def _member_admitted(run: Run, event: Logged) -> tuple[Run, str]:
    name = _learner(event)
    return replace(
        run,
        asking=run.asking - {name},
        members=run.members | {name},
        absent=_without(run.absent, name),
    ), ""


def _round_opened(run: Run, event: Logged) -> tuple[Run, str]:
    opened = event.message
    assert isinstance(opened, pb.RoundOpened)
    if run.phase is Phase.TRAINING:
        if not _opens_again(run, opened):
            return run, f"round {opened.round} opened while round {run.round} is open"
    elif opened.round != (0 if run.phase is Phase.GATHERING else run.round + 1):
        return run, f"round {opened.round} opened after round {run.round}"
    kind = pb.INITIALISE if opened.round == 0 else pb.TRAIN
    return replace(
        run,
        phase=Phase.TRAINING,
        round=opened.round,
        attempt=opened.attempt,
        reference_weight=opened.reference_weight or 1.0,
        exponents=tuple(opened.exponents),
        left_out=_left_out(run, opened),
        opened_ns=run.opened_ns if opened.attempt else event.at_ns,
        tasks=_by_id(Task(i.task_id, i.learner, kind) for i in opened.invited),
        tried=run.tried | {i.learner for i in opened.invited} if opened.round == 0 else run.tried,
    ), ""


def _opens_again(run: Run, opened: pb.RoundOpened) -> bool:
    """Whether the open round may be opened anew: for larger exponents, or in vain so far."""
    if opened.round != run.round or not all(task.settled for task in run.tasks.values()):
        return False
    if opened.attempt:
        exceeded = any(task.status is Status.EXCEEDED for task in run.tasks.values())
        return exceeded and opened.attempt == run.attempt + 1
    return run.round == 0 and not any(task.counts for task in run.tasks.values())


def _left_out(run: Run, opened: pb.RoundOpened) -> Mapping[str, str]:
    """Who was asked in an earlier attempt at this round and is not any more, and why."""
    if not opened.attempt:
        return MappingProxyType({})
    invited = {one.learner for one in opened.invited}
    gone = {task.learner: task.reason for task in run.tasks.values()}
    return MappingProxyType(
        {name: why for name, why in {**run.left_out, **gone}.items() if name not in invited}
    )


def _task_assigned(run: Run, event: Logged) -> tuple[Run, str]:
    message = event.message
    assert isinstance(message, pb.TaskAssigned)
    task = run.tasks.get(message.task_id)
    if task is None or task.status is not Status.INVITED:
        return run, "assigned before"
    return _put(run, replace(task, status=Status.ASSIGNED, assigned_ns=event.at_ns)), ""


def _task_cancelled(run: Run, event: Logged) -> tuple[Run, str]:
    task = run.tasks.get(event.message.task_id)  # type: ignore[attr-defined]
    if task is None:
        return run, "cancelled after its round"
    return _put(run, replace(task, cancelled=True)), ""


def _task_completed(run: Run, event: Logged) -> tuple[Run, str]:
    done = event.message
    assert isinstance(done, pb.TaskCompleted)
    task = run.tasks.get(done.task_id)
    if why := _unexpected(task, event):
        return run, why
    assert task is not None
    if task.kind == pb.TRAIN and not done.examples:
        return _put(run, _failed(task, "trained on no examples", event)), ""
    if run.terms and task.kind != pb.EVALUATE and (why := _misfit(run, task, done)):
        return _put(run, _failed(task, why, event)), ""
    completed = replace(
        task,
        status=Status.COMPLETED,
        completion=done,
        exponents=tuple(done.exponents) if run.terms else (),
        settled_ns=event.at_ns,
    )
    return _put(run, _check_digest(completed)), ""


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


def _scale_exceeded(run: Run, event: Logged) -> tuple[Run, str]:
    exceeded = event.message
    assert isinstance(exceeded, pb.ScaleExceeded)
    task = run.tasks.get(exceeded.task_id)
    if why := _unexpected(task, event):
        return run, why
    assert task is not None
    needed = tuple(exceeded.exponents)
    known = run.exponents or (0,) * (_tensors(run) or len(needed))
    if run.terms is None or task.kind == pb.EVALUATE:
        why = "reports that a scale was exceeded where there is none"
    elif run.plan is None or run.attempt >= len(run.plan.learners):
        # An honest site exceeds at most once in a round: the next attempt has its exponents.
        why = "does not fit, though the round was opened again as often as there are learners"
    elif len(needed) != len(known) or all(n <= k for n, k in zip(needed, known, strict=True)):
        why = "reports that its update does not fit, and exponents in which it does"
    if why:
        return _put(run, _failed(task, why, event)), ""
    return _put(run, replace(
        task,
        status=Status.EXCEEDED,
        exponents=needed,
        reason=f"tensor {exceeded.tensor!r} does not fit the round's exponents",
        settled_ns=event.at_ns,
    )), ""  # fmt: skip


def _task_failed(run: Run, event: Logged) -> tuple[Run, str]:
    failed = event.message
    assert isinstance(failed, pb.TaskFailed)
    task = run.tasks.get(failed.task_id)
    if why := _unexpected(task, event):
        return run, why
    assert task is not None
    return _put(run, _failed(task, failed.reason or "no reason given", event)), ""


def _update_stored(run: Run, event: Logged) -> tuple[Run, str]:
    stored = event.message
    assert isinstance(stored, pb.UpdateStored)
    task = run.tasks.get(stored.task_id)
    if task is None or task.learner != stored.learner or task.kind == pb.EVALUATE:
        return run, "stored for a task that is not open"
    if task.status not in (Status.ASSIGNED, Status.COMPLETED) or task.stored_digest:
        return run, f"stored for a task that is {task.status.value}"
    return _put(run, _check_digest(replace(
        task, stored_digest=stored.digest, settled_ns=event.at_ns
    ))), ""  # fmt: skip


def _update_unusable(run: Run, event: Logged) -> tuple[Run, str]:
    unusable = event.message
    assert isinstance(unusable, pb.UpdateUnusable)
    task = run.tasks.get(unusable.task_id)
    if task is None or not task.counts:
        return run, "unusable after its round, or told before"
    return _put(run, _failed(task, unusable.reason, event)), ""


def _lease_ended(run: Run, event: Logged) -> tuple[Run, str]:
    ended = event.message
    assert isinstance(ended, pb.LeaseEnded)
    name, reason = ended.learner, f"silent for {ended.silent_s:.1f} s, longer than its lease"
    if not ended.task_id:
        if run.phase is Phase.GATHERING and name not in run.members | run.asking:
            return replace(run, absent=_with(run.absent, name, f"has not joined: {reason}")), ""
        return run, "joined before its lease ended"
    task = run.tasks.get(ended.task_id)
    if task is None or task.settled:
        return run, "settled before its lease ended"
    if task.status is Status.COMPLETED:
        reason = "the update that it reported has not come within its lease"
    lapsed = replace(task, status=Status.LAPSED, reason=reason, settled_ns=event.at_ns)
    return _put(run, lapsed), ""


def _round_closed(run: Run, event: Logged) -> tuple[Run, str]:
    closed = event.message
    assert isinstance(closed, pb.RoundClosed)
    if closed.round != run.round:
        return run, f"round {closed.round} closed while {run.round} is open"
    assert run.plan is not None
    prefix = f"{run.plan.run_id}.{run.round}.evaluate"
    scored = present(run, run.plan) if run.round > 0 else []
    return replace(
        run,
        phase=Phase.EVALUATING,
        model_digest=closed.model_digest,
        initialiser=run.initialiser or closed.counted[0].learner,
        trained=run.tasks,
        tasks=_by_id(Task(f"{prefix}.{name}", name, pb.EVALUATE) for name in scored),
        closed=closed,
        closed_ns=event.at_ns,
        exponents=largest(task.exponents for task in run.tasks.values() if task.counts),
    ), ""


def _run_finished(run: Run, event: Logged) -> tuple[Run, str]:
    finished = event.message
    assert isinstance(finished, pb.RunFinished)
    if finished.run_id in run.refused:
        return replace(run, refused=_without(run.refused, finished.run_id)), ""
    if run.phase not in _RUNNING or run.plan is None or run.plan.run_id != finished.run_id:
        return run, f"run {finished.run_id} is not under way"
    return replace(run, phase=Phase.FINISHED, finished=finished), ""


_ANY = frozenset(Phase)
_RUNNING = frozenset({Phase.GATHERING, Phase.TRAINING, Phase.EVALUATING})
_WORKING = frozenset({Phase.TRAINING, Phase.EVALUATING})

# event: the phases in which it counts, what it does
_TRANSITIONS: Mapping[str, tuple[frozenset[Phase], Callable[[Run, Logged], tuple[Run, str]]]] = (
    MappingProxyType(
        {
            "RunStarted": (_ANY, _run_started),
            "LearnerJoined": (_ANY, _learner_joined),
            "LearnerLeft": (_ANY, _learner_left),
            "MemberAdmitted": (_ANY, _member_admitted),
            "RoundOpened": (_RUNNING, _round_opened),
            "TaskAssigned": (_WORKING, _task_assigned),
            "TaskCancelled": (_WORKING, _task_cancelled),
            "TaskCompleted": (_WORKING, _task_completed),
            "TaskFailed": (_WORKING, _task_failed),
            "UpdateStored": (_WORKING, _update_stored),
            "UpdateUnusable": (frozenset({Phase.TRAINING}), _update_unusable),
            "LeaseEnded": (_RUNNING, _lease_ended),
            "RoundClosed": (frozenset({Phase.TRAINING}), _round_closed),
            "RunFinished": (_ANY, _run_finished),
            "ScaleExceeded": (frozenset({Phase.TRAINING}), _scale_exceeded),
        }
    )
)


def _learner(event: Logged) -> str:
    name: str = event.message.learner  # type: ignore[attr-defined]
    return name


def _by_id(tasks: Iterable[Task]) -> Mapping[str, Task]:
    return MappingProxyType({task.task_id: task for task in tasks})


def _put(run: Run, task: Task) -> Run:
    return replace(run, tasks=MappingProxyType({**run.tasks, task.task_id: task}))


def _with(reasons: Mapping[str, str], key: str, reason: str) -> Mapping[str, str]:
    return MappingProxyType({**reasons, key: reason})


def _without(reasons: Mapping[str, str], key: str) -> Mapping[str, str]:
    return MappingProxyType({name: why for name, why in reasons.items() if name != key})


def _failed(task: Task, reason: str, event: Logged) -> Task:
    cut = reason[:REASON_CHARACTERS_MAX]
    return replace(task, status=Status.FAILED, reason=cut, settled_ns=event.at_ns)


def _check_digest(task: Task) -> Task:
    if task.kind == pb.EVALUATE or task.completion is None or not task.stored_digest:
        return task
    if task.completion.update_digest == task.stored_digest:
        return task
    reason = "the update that was stored is not the one that was reported"
    return replace(task, status=Status.FAILED, reason=reason)


def _unexpected(task: Task | None, event: Logged) -> str:
    if task is None:
        return "late: its round is over"
    if task.learner != _learner(event):
        return f"{_learner(event)} does not hold this task"
    if task.status is not Status.ASSIGNED:
        return f"late or repeated: the task is {task.status.value}"
    return ""
