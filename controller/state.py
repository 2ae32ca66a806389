"""The controller's state: a run, its round, and what each learner was asked.

Rule: frozen. Only round.py makes a new one, from a logged event; a restart makes the same again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from google.protobuf.message import Message

from metisfl.proto import events_pb2 as pb
from metisfl.proto.records import Missing

__all__ = ["Logged", "Phase", "Run", "Status", "Task", "Terms", "missing", "present"]


class Phase(Enum):
    IDLE = "idle"
    GATHERING = "gathering"  # waiting for the learners to join
    TRAINING = "training"  # a round is open (round 0 builds the initial model)
    OPENING = "opening"  # a round is closed, the sites of a joint key give their partials
    EVALUATING = "evaluating"  # a round is closed, its model is being scored
    STOPPING = "stopping"  # a driver has stopped the run; nothing more is asked of anyone
    FINISHED = "finished"


class Status(Enum):
    INVITED = "invited"
    ASSIGNED = "assigned"
    COMPLETED = "completed"
    EXCEEDED = "exceeded"  # the update does not fit the round's exponents; it waits at the site
    FAILED = "failed"
    LEFT = "left"  # the learner has, and says why
    LAPSED = "lapsed"
    STOPPED = "stopped"  # the run was, before there was an answer


@dataclass(frozen=True, slots=True)
class Logged:
    """A checked event with what the broker says of it: who sent it and when it was stored."""

    message: Message
    publisher: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class Terms:
    """What the key that updates are encrypted with asks of a round: its sites decrypt no other."""

    weight_sum_max: int
    min_contributors: int = 1
    max_share: float = 1.0
    sites: tuple[str, ...] = ()  # of a joint key: only all of them together open a model


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
    exponents: tuple[int, ...] = ()  # that its update needs
    reason: str = ""
    cancelled: bool = False

    @property
    def settled(self) -> bool:
        """Nothing more is expected: it failed, lapsed, or its answer is complete."""
        if self.status is Status.COMPLETED:
            return self.kind == pb.EVALUATE or bool(self.stored_digest)
        return self.status not in (Status.INVITED, Status.ASSIGNED)

    @property
    def counts(self) -> bool:
        return self.settled and self.status is Status.COMPLETED


@dataclass(frozen=True, slots=True)
class Run:
    """The controller's whole state. Frozen: a new one for every event."""

    federation: str
    terms: Terms | None = None  # of the key that updates are encrypted with; None: they are plain
    phase: Phase = Phase.IDLE
    plan: pb.RunStarted | None = None
    asking: frozenset[str] = frozenset()  # joined, not yet admitted
    members: frozenset[str] = frozenset()
    absent: Mapping[str, str] = MappingProxyType({})  # left or did not join in time: why, by name
    gone: frozenset[str] = frozenset()  # those of the absent that left by themselves
    declared: Mapping[str, int] = MappingProxyType({})  # examples, by name
    round: int = 0
    attempt: int = 0  # of the round: above 0 it was opened again
    rescaled: int = 0  # how often of these for larger exponents
    reference_weight: float = 1.0
    exponents: tuple[int, ...] = ()  # of the open round, or those that the next one begins with
    model_digest: bytes = b""
    partials_digest: bytes = b""  # of what opens that model, under a joint key; empty: not open yet
    opened_digest: bytes = b""  # the newest model that was opened
    initialiser: str = ""  # who built the initial model
    tasks: Mapping[str, Task] = MappingProxyType({})  # of this phase, by task id
    left_out: Mapping[str, Missing] = MappingProxyType({})  # of earlier attempts at this round
    trained: Mapping[str, Task] = MappingProxyType({})  # of the last closed round
    tried: frozenset[str] = frozenset()  # asked in vain for the initial model
    opened_ns: int = 0
    closed_ns: int = 0
    closed: pb.RoundClosed | None = None
    recent_models: tuple[bytes, ...] = ()  # the newest, which a slow learner may still be fetching
    record: bytes = b""  # digest of the newest record of this run
    previous_record: bytes = b""  # of the one before it
    recorded: int = -1  # the round that `record` is of
    stopped: str = ""  # by whom the run is stopped and why, in words
    finished: pb.RunFinished | None = None
    refused: Mapping[str, str] = MappingProxyType({})  # runs asked for in vain, not told yet: why

    @property
    def settled(self) -> bool:
        """Whether nothing more is expected of anyone who was asked."""
        return all(task.settled for task in self.tasks.values())

    @property
    def unopened(self) -> bool:
        """Whether the newest model is one of a joint key that nobody can read yet."""
        joint = self.terms is not None and bool(self.terms.sites)
        return joint and self.closed is not None and not self.partials_digest

    def declared_by(self, learner: str) -> int:
        """The examples that it declared; 0 if it did not say."""
        return self.declared.get(learner, 0)

    def validate(self) -> None:
        """Assert what holds between any two events."""
        assert self.members.isdisjoint(self.asking)
        assert self.absent.keys().isdisjoint(self.asking | self.members)
        assert self.gone <= self.absent.keys()
        assert (self.plan is None) == (self.phase is Phase.IDLE)
        assert (self.finished is not None) == (self.phase is Phase.FINISHED)
        if self.stopped:
            assert self.phase in (Phase.STOPPING, Phase.FINISHED)
            assert self.settled, "who was asked is released"
        assert self.stopped or self.phase is not Phase.STOPPING
        learners = [task.learner for task in self.tasks.values()]
        assert len(set(learners)) == len(learners), "a learner has one task at a time"
        for task in self.tasks.values():
            assert task.status is not Status.COMPLETED or task.completion is not None
        if self.closed is not None:
            counted = [one.learner for one in self.closed.counted]
            missing = [one.learner for one in self.closed.missing]
            assert sorted(counted) == counted, "the fold order is the order of names"
            if self.closed.round == self.round:
                asked = {*self.left_out, *(task.learner for task in self.trained.values())}
                assert sorted(counted + missing) == sorted(asked)


_KINDS: Mapping[Status, str] = MappingProxyType(
    {Status.LAPSED: "late", Status.LEFT: "left", Status.STOPPED: "stopped"}
)


def present(run: Run, plan: pb.RunStarted) -> list[str]:
    """The learners of the plan who are members now, by name."""
    return [name for name in plan.learners if name in run.members]


def missing(task: Task) -> Missing:
    """Why the answer to this task does not count."""
    kind = _KINDS.get(task.status, "failed")
    return Missing(task.learner, kind, task.reason)
