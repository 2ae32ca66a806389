"""The run and its rounds, as a fold of the log.

Rule 1: `apply` is the only way state changes, and it takes logged events alone. A controller that
restarts replays the log and has the state that it had, bit for bit.
Rule 2: an event that is late, repeated or not the publisher's to send is data: it is named and
dropped, never raised.
What the state calls for next is in scheduling.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Final

from google.protobuf.message import Message

from metisfl.proto import events_pb2 as pb
from metisfl.proto.events import PAYLOAD_BYTES_MAX, REASON_CHARACTERS_MAX, may_send

__all__ = ["Logged", "Phase", "Run", "Status", "Task", "apply", "present"]

PRIVACY_MODES: Final = ("plain",)


class Phase(Enum):
    IDLE = "idle"
    GATHERING = "gathering"  # waiting for the learners to join
    TRAINING = "training"  # a round is open (round 0 builds the initial model)
    EVALUATING = "evaluating"  # a round is closed, its model is being scored
    FINISHED = "finished"


class Status(Enum):
    INVITED = "invited"
    ASSIGNED = "assigned"
    COMPLETED = "completed"
    FAILED = "failed"
    LAPSED = "lapsed"


@dataclass(frozen=True, slots=True)
class Logged:
    """A checked event with what the broker says of it: who sent it and when it was stored."""

    message: Message
    publisher: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class Task:
    """What one learner was asked, and what came of it. Times are the log's, in Unix ns."""

    task_id: str
    learner: str
    kind: int
    status: Status = Status.INVITED
    assigned_ns: int = 0
    settled_ns: int = 0
    completion: pb.TaskCompleted | None = None
    stored_digest: bytes = b""
    reason: str = ""
    cancelled: bool = False

    @property
    def settled(self) -> bool:
        """Nothing more is expected: it failed, lapsed, or its answer is complete."""
        if self.status is Status.COMPLETED:
            return self.kind == pb.EVALUATE or bool(self.stored_digest)
        return self.status in (Status.FAILED, Status.LAPSED)

    @property
    def counts(self) -> bool:
        return self.settled and self.status is Status.COMPLETED


@dataclass(frozen=True, slots=True)
class Run:
    """The controller's whole state. Frozen: a new one for every event."""

    federation: str
    phase: Phase = Phase.IDLE
    plan: pb.RunStarted | None = None
    asking: frozenset[str] = frozenset()  # joined, not yet admitted
    members: frozenset[str] = frozenset()
    absent: Mapping[str, str] = MappingProxyType({})  # left or did not join in time: why, by name
    round: int = 0
    model_digest: bytes = b""
    tasks: Mapping[str, Task] = MappingProxyType({})  # of this phase, by task id
    trained: Mapping[str, Task] = MappingProxyType({})  # of the last closed round
    tried: frozenset[str] = frozenset()  # asked in vain for the initial model
    opened_ns: int = 0
    closed_ns: int = 0
    closed: pb.RoundClosed | None = None
    finished: pb.RunFinished | None = None
    refused: Mapping[str, str] = MappingProxyType({})  # runs asked for in vain, not told yet: why

    def validate(self) -> None:
        """Assert what holds between any two events."""
        assert self.members.isdisjoint(self.asking)
        assert self.absent.keys().isdisjoint(self.asking | self.members)
        assert (self.plan is None) == (self.phase is Phase.IDLE)
        assert (self.finished is not None) == (self.phase is Phase.FINISHED)
        learners = [task.learner for task in self.tasks.values()]
        assert len(set(learners)) == len(learners), "a learner has one task at a time"
        for task in self.tasks.values():
            assert task.status is not Status.COMPLETED or task.completion is not None
        if self.closed is not None:
            counted = [one.learner for one in self.closed.counted]
            missing = [one.learner for one in self.closed.missing]
            assert sorted(counted) == counted, "the fold order is the order of names"
            assert sorted(counted + missing) == sorted(t.learner for t in self.trained.values())


# ---- What happened -------------------------------------------------------------


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
    if why := _refusal(run, plan):
        return replace(run, refused=_with(run.refused, plan.run_id, why)), why
    fresh = Run(run.federation, asking=run.asking, members=run.members, refused=run.refused)
    return replace(fresh, phase=Phase.GATHERING, plan=plan, opened_ns=event.at_ns), ""


def _refusal(run: Run, plan: pb.RunStarted) -> str:
    """Why this run cannot begin now; "" if it can."""
    names = list(plan.learners)
    if run.plan is not None and run.phase is not Phase.FINISHED:
        return f"asked for while run {run.plan.run_id} is {run.phase.value}; wait for its end"
    if sorted(set(names)) != names or plan.quorum > len(names):
        return "learners must be sorted and unique, and the quorum at most their number"
    if plan.privacy not in PRIVACY_MODES:
        return f"privacy mode {plan.privacy!r}; this controller has {', '.join(PRIVACY_MODES)}"
    # A learner's part of RoundClosed: twice its name, the run's, numbers and a digest. It leaves
    # some room for a reason where a learner is missing.
    round_bytes = 1_024 + sum(2 * len(name) + len(plan.run_id) + 70 for name in names)
    if round_bytes > PAYLOAD_BYTES_MAX:
        return (
            f"{len(names)} learners with names as long as these need events of {round_bytes} "
            f"bytes; at most {PAYLOAD_BYTES_MAX}: shorten the names or invite fewer"
        )
    return ""


def _learner_joined(run: Run, event: Logged) -> tuple[Run, str]:
    name = _learner(event)
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
        in_vain = all(task.settled and not task.counts for task in run.tasks.values())
        if not (run.round == opened.round == 0 and in_vain):
            return run, f"round {opened.round} opened while round {run.round} is open"
    elif opened.round != (0 if run.phase is Phase.GATHERING else run.round + 1):
        return run, f"round {opened.round} opened after round {run.round}"
    kind = pb.INITIALISE if opened.round == 0 else pb.TRAIN
    return replace(
        run,
        phase=Phase.TRAINING,
        round=opened.round,
        opened_ns=event.at_ns,
        tasks=_tasks(Task(i.task_id, i.learner, kind) for i in opened.invited),
        tried=run.tried | {i.learner for i in opened.invited} if opened.round == 0 else run.tried,
    ), ""


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
    return _put(run, _check_digest(replace(
        task, status=Status.COMPLETED, completion=done, settled_ns=event.at_ns
    ))), ""  # fmt: skip


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
        trained=run.tasks,
        tasks=_tasks(Task(f"{prefix}.{name}", name, pb.EVALUATE) for name in scored),
        closed=closed,
        closed_ns=event.at_ns,
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
            "LeaseEnded": (_RUNNING, _lease_ended),
            "RoundClosed": (frozenset({Phase.TRAINING}), _round_closed),
            "RunFinished": (_ANY, _run_finished),
        }
    )
)


def present(run: Run, plan: pb.RunStarted) -> list[str]:
    """The learners of the plan who are members now, by name."""
    return [name for name in plan.learners if name in run.members]


def _learner(event: Logged) -> str:
    name: str = event.message.learner  # type: ignore[attr-defined]
    return name


def _tasks(tasks: Iterable[Task]) -> Mapping[str, Task]:
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
