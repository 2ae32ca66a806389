"""What a person watching a run sees, as a fold of the events.

Rule: pure. `View.after` takes events, `lines` and `rows` give text; who prints it, and on what kind
of screen, is not decided here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from google.protobuf.message import Message

from metisfl.proto import events_pb2 as pb
from metisfl.proto.records import pool_metrics

__all__ = [
    "LearnerView",
    "View",
    "lines",
    "readable_bytes",
    "shown_kept",
    "shown_metric",
    "shown_missing",
]


_NO = (pb.TaskFailed, pb.ScaleExceeded)
_ANSWERS = (*_NO, pb.TaskCompleted, pb.LeaseEnded)


@dataclass(frozen=True, slots=True)
class LearnerView:
    """One learner, as last heard of."""

    state: str = "starting"
    fraction: float = 0.0
    update_bytes: int = 0  # sent in this run
    metrics: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class View:
    """The run so far. `evaluated` holds the finished evaluations of the newest model.

    `stored` holds the bytes of the updates that have come in the round that is open, by learner;
    `uploaded` those of the updates in the newest community model, all together.
    """

    run_id: str
    rounds: int
    learners: Mapping[str, LearnerView]
    started: bool = False  # the log has come to this run; what it holds before is of others
    round: int = 0
    stored: Mapping[str, int] = MappingProxyType({})
    closed: pb.RoundClosed | None = None
    uploaded: int = 0
    evaluated: Mapping[str, Mapping[str, float]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    finished: pb.RunFinished | None = None
    missed: Mapping[str, tuple[int, ...]] = MappingProxyType({})  # by learner, rounds without it
    waits_for: str = ""  # in the controller's words
    asked: Mapping[str, str] = MappingProxyType({})  # by learner, its task that is not answered
    failed: frozenset[str] = frozenset()  # learners that have failed in this round
    continues: str = ""  # the run whose newest model this one begins with

    @property
    def metrics(self) -> dict[str, float]:
        """Of the newest model, pooled over the learners that have scored it."""
        return pool_metrics(self.evaluated.values())

    def after(self, message: Message) -> View:
        """Return the view after an event or a beat; what it does not show changes nothing."""
        if isinstance(message, pb.RunStarted) and message.run_id == self.run_id:
            return replace(self, started=True)
        if not self.started and not isinstance(message, (pb.LearnerJoined, pb.LearnerLeft)):
            return self
        if isinstance(message, pb.RoundOpened) and message.run_id == self.run_id:
            stored = self.stored if message.keeps_updates else MappingProxyType({})
            failed = self.failed if message.round == self.round else frozenset()
            return replace(self, round=message.round, stored=stored, failed=failed)
        if isinstance(message, pb.RoundClosed) and message.run_id == self.run_id:
            return self._after_close(message)
        if isinstance(message, pb.RunFinished) and message.run_id == self.run_id:
            return replace(self, finished=message)
        if isinstance(message, pb.ControllerStatus) and message.run_id == self.run_id:
            return replace(self, waits_for=message.waits_for)
        name = getattr(message, "learner", "")
        if name not in self.learners or (isinstance(message, _NO) and not self.awaits(message)):
            return self
        after = self._after_task(message, name)
        if isinstance(message, pb.TaskCompleted) and not message.update_digest:
            evaluated = {**self.evaluated, name: dict(message.metrics)}
            after = replace(after, evaluated=MappingProxyType(evaluated))
        elif isinstance(message, pb.UpdateStored):
            sizes = {**self.stored, name: message.update_bytes}
            after = replace(after, stored=MappingProxyType(sizes))
        learner = _learner_after(self.learners[name], message)
        return replace(after, learners=MappingProxyType({**self.learners, name: learner}))

    def awaits(self, answer: pb.TaskFailed | pb.ScaleExceeded) -> bool:
        """Whether the learner was asked this and has not answered: else it is only talk."""
        return self.asked.get(answer.learner) == answer.task_id

    def _after_task(self, message: Message, name: str) -> View:
        """Who is still awaited, and who has failed."""
        if isinstance(message, pb.TaskAssigned) and message.run_id == self.run_id:
            return replace(self, asked=MappingProxyType({**self.asked, name: message.task_id}))
        if isinstance(message, _ANSWERS) and self.asked.get(name) == message.task_id:
            asked = {other: task_id for other, task_id in self.asked.items() if other != name}
            failed = self.failed | {name} if isinstance(message, pb.TaskFailed) else self.failed
            return replace(self, asked=MappingProxyType(asked), failed=failed)
        return self

    def _after_close(self, closed: pb.RoundClosed) -> View:
        uploaded = sum(self.stored.get(one.learner, 0) for one in closed.counted)
        missed = dict(self.missed)
        for one in closed.missing if closed.round else ():
            missed[one.learner] = (*missed.get(one.learner, ()), closed.round)
        return replace(
            self,
            closed=closed,
            uploaded=uploaded,
            evaluated=MappingProxyType({}),
            missed=MappingProxyType(missed),
        )


def _learner_after(learner: LearnerView, message: Message) -> LearnerView:
    if isinstance(message, pb.LearnerJoined):
        return replace(learner, state="joined")
    if isinstance(message, pb.LearnerLeft):
        return replace(learner, state="left")
    if isinstance(message, pb.TaskAssigned):
        return replace(learner, state="asked", fraction=0.0)
    if isinstance(message, pb.Progress):
        return replace(
            learner,
            state=message.state,
            fraction=message.fraction,
            metrics=dict(message.metrics) or learner.metrics,
        )
    if isinstance(message, pb.UpdateStored):
        return replace(learner, update_bytes=learner.update_bytes + message.update_bytes)
    if isinstance(message, pb.TaskCompleted):
        return replace(learner, state="done", fraction=1.0, metrics=dict(message.metrics))
    if isinstance(message, pb.ScaleExceeded):
        return replace(learner, state="waiting")
    if isinstance(message, pb.TaskFailed):
        return replace(learner, state="failed")
    if isinstance(message, pb.LeaseEnded):
        return replace(learner, state="silent")
    return learner


def lines(before: View, message: Message) -> list[str]:
    """What to print for one event, which came when the view was `before`."""
    if not before.started:
        return []
    if isinstance(message, pb.LearnerJoined):
        return [f"{message.learner} has joined"]
    if isinstance(message, pb.LearnerLeft):
        return [f"{message.learner} has left: {message.reason}"]
    if isinstance(message, _NO) and not before.awaits(message):
        return []
    if isinstance(message, pb.TaskFailed):
        told_before = message.learner in before.failed
        return [] if told_before else [f"{message.learner} failed: {message.reason}"]
    if isinstance(message, pb.ScaleExceeded):
        return [
            f"{message.learner} has values in {message.tensor} beyond the round's scale; the round "
            "is opened again with a larger one"
        ]
    if isinstance(message, pb.RoundClosed):
        return _left_out(before, message)
    if isinstance(message, pb.LeaseEnded):
        return [f"{message.learner} was silent for {message.silent_s:.0f} s"]
    if isinstance(message, pb.RoundOpened) and message.keeps_updates:
        names = ", ".join(one.learner for one in message.invited)
        return [
            f"round {message.round} has {len(before.stored)} updates, fewer than its quorum; asked "
            f"again: {names}"
        ]
    if isinstance(message, pb.ControllerStatus):
        news = message.run_id == before.run_id and message.waits_for != before.waits_for
        return [f"waiting for {message.waits_for}"] if news and _is_stuck(message) else []
    if isinstance(message, pb.RunStopped) and message.run_id == before.run_id:
        return [f"the run is being stopped: {message.reason or 'no reason given'}"]
    over = isinstance(message, (pb.RoundOpened, pb.RunFinished)) and message.run_id == before.run_id
    if over and before.closed is not None and before.closed.round == before.round:
        return [_round_line(before, before.closed)]
    return []


def _left_out(before: View, closed: pb.RoundClosed) -> list[str]:
    """Who does not count for a reason that no line has told yet: once in a run."""
    told = before.failed | before.missed.keys()
    return [
        f"{one.learner} does not count: {one.reason}"
        for one in closed.missing
        if closed.run_id == before.run_id and one.kind == "failed" and one.learner not in told
    ]


def _is_stuck(status: pb.ControllerStatus) -> bool:
    """Whether no learner is at work on what it waits for, as the quorum of a run."""
    return not status.awaited_total and bool(status.waits_for)


def _round_line(view: View, closed: pb.RoundClosed) -> str:
    if closed.round == 0:
        return f"{closed.counted[0].learner} built the initial model"
    asked = len(closed.counted) + len(closed.missing)
    line = f"round {closed.round} of {view.rounds}: {len(closed.counted)} of {asked} counted"
    return ", ".join([line, *filter(None, [shown_metric(view)])])


def shown_missing(rounds: int, missed: Mapping[str, Sequence[int]]) -> list[str]:
    """Who is not in all rounds of a model: a line for each, for the end of a run."""
    return [
        f"{name} is not in {len(without)} of {rounds} rounds: {', '.join(map(str, without))}"
        for name, without in sorted(missed.items())
    ]


def shown_kept(end: pb.RunFinished) -> str:
    """What is left of a run that was stopped."""
    if not end.model_digest:
        return "no round was closed, so there is no model"
    name = end.model_digest.hex()
    model = f"the community model of round {end.rounds}" if end.rounds else "the initial model"
    return (
        f"stopped after round {end.rounds}; {model} is {name}, which the controller has as "
        f"models/{name}.model in its home until another run has a model"
    )


def shown_metric(view: View) -> str:
    """The pooled metrics of the test split, such as "test accuracy 0.783, test loss 0.510"."""
    return ", ".join(
        f"{name.replace('.', ' ')} {value:.3f}"
        for name, value in view.metrics.items()
        if name.startswith("test.") and not name.endswith(".examples")
    )


def readable_bytes(count: int) -> str:
    """A size for people: "18.4 kB", "3.2 MB"; powers of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
