"""The rounds as the log tells them, read by other code than the controller's.

Law: a round's model is the fold of exactly those whose completions and updates are in the log; who
was invited either counted or is missing with a reason; and the records of rounds are a chain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from metisfl.controller.state import Phase, Run
from metisfl.proto import events_pb2 as pb
from simulated.scenario import Scenario, folded, sealed, trained
from simulated.scheduler import Broken

__all__ = ["Ledger", "RunLedger"]


@dataclass
class RunLedger:
    """One run."""

    plan: pb.RunStarted
    invited: dict[int, set[str]] = field(default_factory=dict)
    counted: dict[int, tuple[str, ...]] = field(default_factory=dict)
    models: dict[int, bytes] = field(default_factory=dict)
    closed: dict[int, pb.RoundClosed] = field(default_factory=dict)
    opened: dict[int, bytes] = field(default_factory=dict)  # of a joint key: what opens each model
    stopped: bool = False
    finished: pb.RunFinished | None = None


class Ledger:
    """Takes the log's messages in their order."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self.runs: dict[str, RunLedger] = {}
        self._assigned: dict[str, pb.TaskAssigned] = {}
        self._completed: dict[str, pb.TaskCompleted] = {}
        self._stored: dict[str, bytes] = {}
        self.rounds = 0

    def take(self, message: Any) -> None:
        take: Callable[[Any], None] | None = getattr(self, f"_{type(message).__name__}", None)
        if take is not None:
            take(message)

    def check_end(self, message: Any) -> None:
        """A stopped run ends once and for good: not even what is void then follows its end."""
        run = self.runs.get(getattr(message, "run_id", ""))
        if run is None or run.finished is None:
            return
        over = run.finished.outcome == pb.RunFinished.STOPPED
        again = pb.RoundOpened | pb.TaskAssigned | pb.RoundClosed | pb.RunFinished
        if over and isinstance(message, again):
            kind = type(message).__name__
            raise Broken("I10", f"{kind} of {message.run_id}, which was stopped and has ended")

    # ---- Events, by name ---------------------------------------------------------------------

    def _RunStarted(self, plan: pb.RunStarted) -> None:
        if all(run.finished for run in self.runs.values()):
            self.runs.setdefault(plan.run_id, RunLedger(plan))

    def _RunStopped(self, stopped: pb.RunStopped) -> None:
        self.runs[stopped.run_id].stopped = True  # what is void does not come here

    def _RoundOpened(self, opened: pb.RoundOpened) -> None:
        if self.runs[opened.run_id].stopped:
            raise Broken("I10", f"round {opened.round} of {opened.run_id}, which is stopped")
        invited = self.runs[opened.run_id].invited.setdefault(opened.round, set())
        if opened.round == 0 and not opened.attempt:
            invited.clear()  # another one is asked for the initial model
        invited.update(one.learner for one in opened.invited)

    def _TaskAssigned(self, task: pb.TaskAssigned) -> None:
        if self._joint and task.kind in (pb.TRAIN, pb.EVALUATE):
            of = task.round - (task.kind == pb.TRAIN)
            if task.partials_digest != self.runs[task.run_id].opened.get(of):
                raise Broken("I12", f"{task.task_id} is asked for with a model that is not open")
        earlier = self._assigned.setdefault(task.task_id, task)
        if earlier != task:
            raise Broken("I3", f"{task.task_id} was assigned twice, with different content")

    def _TaskCompleted(self, completed: pb.TaskCompleted) -> None:
        self._completed.setdefault(completed.task_id, completed)

    def _UpdateStored(self, stored: pb.UpdateStored) -> None:
        before = self._stored.setdefault(stored.task_id, stored.digest)
        if before != stored.digest:
            raise Broken("I3", f"{stored.task_id} has two stored updates")

    def _RoundClosed(self, closed: pb.RoundClosed) -> None:
        run = self.runs[closed.run_id]
        if closed.round in run.closed:
            raise Broken("I4", f"round {closed.round} of {closed.run_id} was closed twice")
        self.rounds += 1
        run.closed[closed.round] = closed
        counted = [one.learner for one in closed.counted]
        missing = [one.learner for one in closed.missing]
        invited = sorted(run.invited.get(closed.round, ()))
        if sorted(counted + missing) != invited:
            raise Broken(
                "I5",
                f"round {closed.round} of {closed.run_id}: counted {counted}, missing {missing}, "
                f"invited {invited}",
            )
        if closed.round > 0 and len(counted) < run.plan.quorum:
            raise Broken("I5", f"round {closed.round} counts {counted}, fewer than its quorum")
        for one in closed.counted:
            self._check_counted(closed, one)
        base = run.models.get(closed.round - 1, b"")
        parts = [
            (one.learner, one.weight, self._update(one.task_id, base)) for one in closed.counted
        ]
        model = folded(base, parts)
        if model != closed.model_digest:
            raise Broken("I6", f"round {closed.round} has another model than its updates make")
        run.models[closed.round] = model
        run.counted[closed.round] = tuple(counted)

    def _ModelOpened(self, opened: pb.ModelOpened) -> None:
        run, number = self.runs[opened.run_id], opened.round
        if number in run.opened or number not in run.closed:
            raise Broken("I12", f"round {number} of {opened.run_id} opened twice, or while open")
        tasks = [(name, f"{opened.run_id}.{number}.open.{name}") for name in run.plan.learners]
        if not all(task in self._completed and task in self._stored for _, task in tasks):
            raise Broken("I12", f"round {number} is opened without the partials of all sites")
        parts = [(name, 1.0, self._stored[task]) for name, task in tasks]
        if opened.partials_digest != folded(b"", parts):
            raise Broken("I12", f"round {number} is opened by something else than its partials")
        run.opened[number] = opened.partials_digest

    @property
    def _joint(self) -> bool:
        return self._scenario.terms is not None and bool(self._scenario.terms.sites)

    def _readable(self, run: RunLedger) -> list[int]:
        """The rounds whose models can be read."""
        return sorted(run.opened if self._joint else run.closed)

    def _check_counted(self, closed: pb.RoundClosed, one: pb.Contribution) -> None:
        completed = self._completed.get(one.task_id)
        if completed is None or completed.learner != one.learner:
            raise Broken("I5", f"{one.task_id} counts, and {one.learner} has not completed it")
        weight = 1.0 if closed.round == 0 else float(completed.examples)
        if one.weight != weight:
            raise Broken("I5", f"{one.task_id} counts {one.weight}; it reported {weight}")
        for what, digest in (
            ("reported", completed.update_digest),
            ("stored", self._stored.get(one.task_id)),
        ):
            if one.update_digest != digest:
                raise Broken("I5", f"{one.task_id}: the update that counts is not what was {what}")

    def _update(self, task_id: str, base: bytes) -> bytes:
        """The update of a task as it must be, on this base."""
        task = pb.TaskAssigned.FromString(self._assigned[task_id].SerializeToString())
        task.model_digest = base
        plain = trained(task)
        return plain if self._scenario.terms is None else sealed(plain, task.exponents)

    def _RunFinished(self, finished: pb.RunFinished) -> None:
        run = self.runs.get(finished.run_id)
        if run is not None and run.finished is None:
            run.finished = finished

    # ---- The end -----------------------------------------------------------------------------

    def finish(self, state: Run) -> None:
        """Every run has ended; the last state says the same."""
        for run_id, run in self.runs.items():
            if run.finished is None:
                raise Broken("I4", f"run {run_id} has not finished")
            if run.finished.outcome == pb.RunFinished.STOPPED:
                if not run.stopped:
                    raise Broken("I10", f"nobody has stopped run {run_id}")
                readable = self._readable(run)
                last = readable[-1] if readable else 0
                kept = run.finished.rounds, run.finished.model_digest
                if kept != (last, run.models[last] if readable else b""):
                    raise Broken("I10", f"run {run_id} ends with another round than its last")
            if run.finished.outcome == pb.RunFinished.COMPLETED:
                if self._joint and run.plan.rounds not in run.opened:
                    raise Broken("I12", f"run {run_id} is complete, its last model is not open")
                if max(run.closed, default=-1) != run.plan.rounds:
                    raise Broken("I4", f"run {run_id} is complete, its rounds are not")
                if run.finished.model_digest != run.models[run.plan.rounds]:
                    raise Broken("I6", f"run {run_id} ends with another model than its last round")
        if state.phase is not Phase.FINISHED:
            raise Broken("I4", f"the last state is {state.phase.value}")

    def check_records(self, files: dict[Any, tuple[Any, bool]]) -> None:
        """The records on the controller's disk are a chain that the log holds the end of."""
        for run_id, run in self.runs.items():
            previous = b""
            for number in self._readable(run):
                closed = run.closed[number]
                if closed.previous_record != previous:
                    raise Broken("I9", f"round {number} of {run_id} names another record")
                data = files[("record", (run_id, number))][0]
                previous = hashlib.sha256(data).digest()
            assert run.finished is not None
            if run.finished.record != previous:
                raise Broken("I9", f"run {run_id} ends with another record than its last round's")
