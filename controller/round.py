"""The run and its rounds, as a fold of the log.

Rule 1: `apply` is the only way state changes, and it takes logged events alone. A controller that
restarts replays the log and has the state that it had, bit for bit.
Rule 2: an event that is late, repeated or not the publisher's to send is data: it is named and
dropped, never raised.
What an answer does to its task is in answers.py, what the state calls for next in scheduling.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from metisfl.controller import answers
from metisfl.controller.plan import largest, refusal, uncounted
from metisfl.controller.record import record_of
from metisfl.controller.state import Logged, Phase, Run, Status, Task, missing, present
from metisfl.proto import events_pb2 as pb
from metisfl.proto.events import REASON_CHARACTERS_MAX, may_send
from metisfl.proto.records import Missing, pack_record, record_digest

__all__ = ["MODELS_KEPT", "apply"]

MODELS_KEPT: Final = 3  # the current one, and those that a slow learner may still be fetching


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
    after, dropped = transition(run, event)
    return (run if after is run else _recorded(after)), dropped


def _recorded(run: Run) -> Run:
    """Name the record of a round that has just become complete."""
    record = record_of(run)
    if record is None or record.round == run.recorded:
        return run
    digest = record_digest(pack_record(record))
    return replace(run, record=digest, previous_record=run.record, recorded=record.round)


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
        absent=MappingProxyType(
            {name: why for name, why in run.absent.items() if name in run.gone}
        ),
        declared=run.declared,
        gone=run.gone,
        refused=run.refused,
        opened_ns=event.at_ns,
    ), ""


def _learner_joined(run: Run, event: Logged) -> tuple[Run, str]:
    joined = event.message
    assert isinstance(joined, pb.LearnerJoined)
    name = joined.learner
    if run.terms and joined.examples > (most := answers.examples_max(run, name)):
        run = _out_of_round(
            run,
            name,
            f"declares {joined.examples} examples while a round is open "
            f"in which it may weigh {most:.0f}",
            event,
        )
    run = replace(run, declared=MappingProxyType({**run.declared, name: joined.examples}))
    if name in run.members:
        return run, ""
    return replace(
        run,
        asking=run.asking | {name},
        absent=_without(run.absent, name),
        gone=run.gone - {name},
    ), ""


def _out_of_round(run: Run, name: str, reason: str, event: Logged) -> Run:
    """Without what this learner might still answer in the open round.

    The room for weights in an encrypted sum was dealt when the round was opened: who took more of
    it now would take it from others. What is in already weighs what it weighs.
    """
    for task in run.tasks.values():
        over = task.status in (Status.COMPLETED, Status.FAILED) or task.kind != pb.TRAIN
        if task.learner == name and not over and not run.stopped:
            run = answers.put(run, answers.failed(task, reason, event))
    return run


def _learner_left(run: Run, event: Logged) -> tuple[Run, str]:
    left = event.message
    assert isinstance(left, pb.LearnerLeft)
    name, reason = left.learner, f"left: {left.reason or 'no reason given'}"
    for task in run.tasks.values():
        if task.learner == name and not task.settled:
            gone = replace(
                task,
                status=Status.LEFT,
                reason=reason[:REASON_CHARACTERS_MAX],
                settled_ns=event.at_ns,
            )
            run = answers.put(run, gone)
    return replace(
        run,
        asking=run.asking - {name},
        members=run.members - {name},
        absent=_with(run.absent, name, reason),
        gone=run.gone | {name},
    ), ""


def _peer_expelled(run: Run, event: Logged) -> tuple[Run, str]:
    principal = event.message.principal  # type: ignore[attr-defined]
    role, _, name = principal.partition(":")
    if role != "learner" or name not in run.members | run.asking:
        return run, ""
    left = pb.LearnerLeft(learner=name, reason="expelled by the operator of the broker")
    return _learner_left(run, Logged(left, event.publisher, event.at_ns))


def _member_admitted(run: Run, event: Logged) -> tuple[Run, str]:
    name = _learner(event)
    return replace(
        run,
        asking=run.asking - {name},
        members=run.members | {name},
        absent=_without(run.absent, name),
        gone=run.gone - {name},
    ), ""


def _round_opened(run: Run, event: Logged) -> tuple[Run, str]:
    opened = event.message
    assert isinstance(opened, pb.RoundOpened)
    if why := _stale(run, opened.run_id):
        return run, why
    if run.phase is Phase.TRAINING:
        if not _opens_again(run, opened):
            return run, f"round {opened.round} opened while round {run.round} is open"
    elif opened.round != (0 if run.phase is Phase.GATHERING else run.round + 1):
        return run, f"round {opened.round} opened after round {run.round}"
    kind = pb.INITIALISE if opened.round == 0 else pb.TRAIN
    invited = {i.learner for i in opened.invited}
    kept = (t for t in run.tasks.values() if opened.keeps_updates and t.learner not in invited)
    tasks = [*kept, *(Task(i.task_id, i.learner, kind) for i in opened.invited)]
    return replace(
        run,
        phase=Phase.TRAINING,
        round=opened.round,
        attempt=opened.attempt,
        rescaled=_rescaled(run, opened),
        reference_weight=opened.reference_weight or 1.0,
        exponents=tuple(opened.exponents),
        left_out=_left_out(run, opened),
        opened_ns=run.opened_ns if opened.attempt else event.at_ns,
        tasks=_by_id(tasks if kind == pb.INITIALISE else _without_uncounted(run, tasks, event)),
        tried=run.tried | invited if opened.round == 0 else run.tried,
    ), ""


def _without_uncounted(run: Run, tasks: Sequence[Task], event: Logged) -> list[Task]:
    """The tasks of a round; who cannot count for what it declared is not asked and is told why."""
    assert run.plan is not None
    out = uncounted(run.plan, run.terms, {t.learner: run.declared_by(t.learner) for t in tasks})
    return [
        answers.failed(task, out[task.learner], event)
        if task.status is Status.INVITED and task.learner in out
        else task
        for task in tasks
    ]


def _stale(run: Run, run_id: str) -> str:
    """Why an event of this run comes too late; "" if the run is under way.

    Two decisions may be on their way at once, and the log may put another event before each.
    """
    if run.plan is not None and run.plan.run_id == run_id:
        return ""
    return f"of run {run_id}, which is not under way"


def _opens_again(run: Run, opened: pb.RoundOpened) -> bool:
    """Whether the open round may be opened anew.

    For larger exponents, for want of a quorum, for a smaller reference weight, or for want of an
    initial model.
    """
    if opened.round != run.round or not run.settled:
        return False
    if opened.attempt:
        exceeded = any(task.status is Status.EXCEEDED for task in run.tasks.values())
        lighter = opened.reference_weight < run.reference_weight
        due = opened.keeps_updates or exceeded or lighter
        return opened.attempt == run.attempt + 1 and due
    return run.round == 0 and not any(task.counts for task in run.tasks.values())


def _rescaled(run: Run, opened: pb.RoundOpened) -> int:
    """How often the round was opened again for larger exponents."""
    if not opened.attempt:
        return 0
    return run.rescaled if opened.keeps_updates else run.rescaled + 1


def _left_out(run: Run, opened: pb.RoundOpened) -> Mapping[str, Missing]:
    """Who was asked in an earlier attempt at this round and is not any more, and why."""
    if not opened.attempt:
        return MappingProxyType({})
    if opened.keeps_updates:
        return run.left_out
    invited = {one.learner for one in opened.invited}
    gone = {task.learner: missing(task) for task in run.tasks.values()}
    return MappingProxyType(
        {name: why for name, why in {**run.left_out, **gone}.items() if name not in invited}
    )


def _round_closed(run: Run, event: Logged) -> tuple[Run, str]:
    closed = event.message
    assert isinstance(closed, pb.RoundClosed)
    if why := _stale(run, closed.run_id):
        return run, why
    if closed.round != run.round:
        return run, f"round {closed.round} closed while {run.round} is open"
    counted = {one.task_id: one.update_digest for one in closed.counted}
    if counted != {t.task_id: t.stored_digest for t in run.tasks.values() if t.counts}:
        return run, f"round {closed.round} closed with other updates than count now"
    joint = run.terms.sites if run.terms else ()
    after = replace(
        run,
        phase=Phase.OPENING if joint else Phase.EVALUATING,
        model_digest=closed.model_digest,
        initialiser=run.initialiser or closed.counted[0].learner,
        partials_digest=b"",
        trained=run.tasks,
        tasks=_asked(run, pb.OPEN, joint) if joint else _evaluations(run),
        closed=closed,
        closed_ns=event.at_ns,
        recent_models=_recent(run, closed.model_digest),
        exponents=largest(task.exponents for task in run.tasks.values() if task.counts),
    )
    return (_released(after, run.stopped, event) if run.stopped else after), ""


def _run_stopped(run: Run, event: Logged) -> tuple[Run, str]:
    stopped = event.message
    assert isinstance(stopped, pb.RunStopped)
    if why := _stale(run, stopped.run_id):
        return run, why
    why = f"stopped by {event.publisher}: {stopped.reason or 'no reason given'}"
    return _released(run, why[:REASON_CHARACTERS_MAX], event), ""


def _released(run: Run, why: str, event: Logged) -> Run:
    """Stopping: nobody is asked anything more, and what was answered stays."""
    tasks = _by_id(answers.stopped(task, why, event) for task in run.tasks.values())
    return replace(run, phase=Phase.STOPPING, stopped=why, tasks=tasks)


def _model_opened(run: Run, event: Logged) -> tuple[Run, str]:
    opened = event.message
    assert isinstance(opened, pb.ModelOpened)
    if why := _stale(run, opened.run_id):
        return run, why
    if opened.model_digest != run.model_digest:
        return run, f"round {opened.round} opened while the model of {run.round} is closed"
    after = replace(
        run,
        phase=Phase.EVALUATING,
        partials_digest=opened.partials_digest,
        opened_digest=opened.model_digest,
        tasks=_evaluations(run),
        recent_models=_recent(run, opened.partials_digest),
    )
    return (_released(after, run.stopped, event) if run.stopped else after), ""


def _recent(run: Run, digest: bytes) -> tuple[bytes, ...]:
    """The newest models, under a joint key with what opens each, and now this one."""
    files = 2 if run.terms and run.terms.sites else 1
    return (*run.recent_models, digest)[-MODELS_KEPT * files :]


def _evaluations(run: Run) -> Mapping[str, Task]:
    """Whoever is here scores the model of a round; nobody does the initial one."""
    assert run.plan is not None
    return _asked(run, pb.EVALUATE, present(run, run.plan) if run.round > 0 else ())


def _asked(run: Run, kind: pb.TaskKind, names: Iterable[str]) -> Mapping[str, Task]:
    assert run.plan is not None
    prefix = f"{run.plan.run_id}.{run.round}.{pb.TaskKind.Name(kind).lower()}"
    return _by_id(Task(f"{prefix}.{name}", name, kind) for name in names)


def _run_finished(run: Run, event: Logged) -> tuple[Run, str]:
    finished = event.message
    assert isinstance(finished, pb.RunFinished)
    if finished.run_id in run.refused:
        return replace(run, refused=_without(run.refused, finished.run_id)), ""
    running = run.phase in _RUNNING or run.phase is Phase.STOPPING
    if not running or run.plan is None or run.plan.run_id != finished.run_id:
        return run, f"run {finished.run_id} is not under way"
    return replace(run, phase=Phase.FINISHED, finished=finished), ""


_ANY = frozenset(Phase)
_RUNNING = frozenset({Phase.GATHERING, Phase.TRAINING, Phase.OPENING, Phase.EVALUATING})
_WORKING = _RUNNING - {Phase.GATHERING}
# A fold that was under way when the run was stopped comes to its end, and its round counts.
_FOLDING = frozenset({Phase.TRAINING, Phase.STOPPING})

# event: the phases in which it counts, what it does
_TRANSITIONS: Mapping[str, tuple[frozenset[Phase], Callable[[Run, Logged], tuple[Run, str]]]] = (
    MappingProxyType(
        {
            "RunStarted": (_ANY, _run_started),
            "LearnerJoined": (_ANY, _learner_joined),
            "LearnerLeft": (_ANY, _learner_left),
            "MemberAdmitted": (_ANY, _member_admitted),
            "PeerExpelled": (_ANY, _peer_expelled),
            "RoundOpened": (_RUNNING, _round_opened),
            "TaskAssigned": (_WORKING, answers.task_assigned),
            "TaskCancelled": (_WORKING, answers.task_cancelled),
            "TaskCompleted": (_WORKING, answers.task_completed),
            "TaskFailed": (_WORKING, answers.task_failed),
            "UpdateStored": (_WORKING, answers.update_stored),
            "UpdateUnusable": (_FOLDING | {Phase.OPENING}, answers.update_unusable),
            "LeaseEnded": (_RUNNING, answers.lease_ended),
            "RoundClosed": (_FOLDING, _round_closed),
            "RunStopped": (_RUNNING, _run_stopped),
            "ModelOpened": (frozenset({Phase.OPENING, Phase.STOPPING}), _model_opened),
            "RunFinished": (_ANY, _run_finished),
            "ScaleExceeded": (frozenset({Phase.TRAINING}), answers.scale_exceeded),
        }
    )
)


def _learner(event: Logged) -> str:
    name: str = event.message.learner  # type: ignore[attr-defined]
    return name


def _by_id(tasks: Iterable[Task]) -> Mapping[str, Task]:
    return MappingProxyType({task.task_id: task for task in tasks})


def _with(reasons: Mapping[str, str], key: str, reason: str) -> Mapping[str, str]:
    return MappingProxyType({**reasons, key: reason})


def _without(reasons: Mapping[str, str], key: str) -> Mapping[str, str]:
    return MappingProxyType({name: why for name, why in reasons.items() if name != key})
