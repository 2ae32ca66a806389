"""Defects that the simulation must find: each takes one law out of one core.

Law: a check that has never failed proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from simulated.controller_node import ControllerNode
from simulated.learner_node import LearnerNode

from metisfl.broker.lane import Lane
from metisfl.broker.sequencer import Sequencer
from metisfl.broker.window import Window
from metisfl.controller import conductor, messages, round, scheduling, snapshot
from metisfl.controller.lease import Leases
from metisfl.controller.state import Phase
from metisfl.controller.uploads import Uploads
from metisfl.learner import task
from metisfl.proto import events_pb2 as pb
from metisfl.proto.credit import Receiver

__all__ = ["FIRST_SEEDS", "MUTANTS"]

Patch = pytest.MonkeyPatch


def window_acknowledges_on_silence(patch: Patch) -> None:
    original = Window.reopened

    def reopened(self: Window, now: float) -> None:
        self.acked = self.sent
        original(self, now)

    patch.setattr(Window, "reopened", reopened)


def broker_acknowledges_before_its_disk(patch: Patch) -> None:
    original = Sequencer.seal

    def seal(self: Sequencer, unix_ns: int) -> Any:
        for publisher in self._touched_publishers:
            publisher.durable = publisher.last
        return original(self, unix_ns)

    patch.setattr(Sequencer, "seal", seal)


def sequencer_forgets_a_watermark(patch: Patch) -> None:
    original = Sequencer.__init__

    def init(self: Sequencer, recovered: Any) -> None:
        original(self, recovered)
        self._publishers.pop("controller", None)

    patch.setattr(Sequencer, "__init__", init)


def failed_batch_keeps_its_places(patch: Patch) -> None:
    original = Sequencer.failed

    def failed(self: Sequencer) -> Any:
        head = self._head
        waiting = original(self)
        self._head = head
        return waiting

    patch.setattr(Sequencer, "failed", failed)


def gap_is_taken_for_the_next(patch: Patch) -> None:
    """An event that comes too early gets its place at once."""
    original = Sequencer.order

    def order(self: Sequencer, publisher: Any, epoch: int, sequence: int) -> Any:
        return original(self, publisher, epoch, min(sequence, publisher.last + 1))

    patch.setattr(Sequencer, "order", order)


def lane_believes_every_live_record(patch: Patch) -> None:
    patch.setattr(Lane, "_previous", lambda self, record: 0)


def lane_moves_to_the_head(patch: Patch) -> None:
    original = Lane.batch

    def batch(self: Lane, answer: Any) -> None:
        original(self, answer)
        self.cursor = max(self.cursor, answer.head)

    patch.setattr(Lane, "batch", batch)


def controller_forgets_its_cursor(patch: Patch) -> None:
    original = ControllerNode._snapshot

    def keep(self: ControllerNode, through: int) -> None:
        original(self, self._outbox.cursor("f/"))

    patch.setattr(ControllerNode, "_snapshot", keep)


def snapshot_forgets_who_was_tried(patch: Patch) -> None:
    patch.setattr(snapshot, "RUN", {**snapshot.RUN, "tried": (lambda _: [], frozenset)})


def weights_are_not_what_was_reported(patch: Patch) -> None:
    original = scheduling._contributions

    def contributions(run: Any) -> Any:
        return tuple(replace(one, weight=one.weight + 1) for one in original(run))

    patch.setattr(scheduling, "_contributions", contributions)


def seed_depends_on_the_attempt(patch: Patch) -> None:
    """A task that is asked for again is not the same task."""
    original = messages.seed_of
    count = iter(range(10**9))
    patch.setattr(messages, "seed_of", lambda *of: original(*of) + next(count))


def leases_never_end(patch: Patch) -> None:
    patch.setattr(Leases, "end", lambda self, now: (self, ()))
    patch.setattr(Leases, "next_end", lambda self: None)


def fold_is_asked_for_once(patch: Patch) -> None:
    """A fold that an unusable update broke off is not begun again."""
    original = conductor.Conductor.take

    def take(self: Any, event: Any) -> str:
        folding, self._folding = self._folding, ""
        why = original(self, event)
        self._folding = folding
        return why

    patch.setattr(conductor.Conductor, "take", take)


def stop_is_not_heard(patch: Patch) -> None:
    """It is in the log, and the run goes on."""
    table = {**round._TRANSITIONS, "RunStopped": (frozenset(Phase), lambda run, event: (run, ""))}
    patch.setattr(round, "_TRANSITIONS", table)


def end_of_a_run_overtakes_its_fold(patch: Patch) -> None:
    patch.setattr(conductor.Conductor, "_must_wait", lambda self, effect: False)


def end_names_the_round_that_was_open(patch: Patch) -> None:
    original = messages._finished

    def finished(run: Any, plan: Any, *of: Any) -> Any:
        effect = original(run, plan, *of)
        effect.message.rounds = run.round
        return effect

    patch.setattr(messages, "_finished", finished)


def learner_goes_on_with_a_run_that_is_over(patch: Patch) -> None:
    patch.setattr(task, "_is_over", lambda tasks, assigned: False)


def update_is_announced_before_it_is_durable(patch: Patch) -> None:
    original = Uploads._finish

    def finish(self: Any, upload: Any) -> None:
        self._announce(upload.task_id, upload.staged.digest, upload.staged.file_bytes)
        self._tell_stored(upload.route, upload.task_id, upload.staged.digest)
        original(self, upload)

    patch.setattr(Uploads, "_finish", finish)


def learner_trains_again_after_a_restart(patch: Patch) -> None:
    patch.setattr(
        task,
        "resume",
        lambda tasks: tuple(task.Work(job.assigned) for job in tasks.jobs.values() if job.active),
    )


def credit_is_not_taken_back(patch: Patch) -> None:
    patch.setattr(Receiver, "narrow", lambda self: None)


def site_opens_a_round_again(patch: Patch) -> None:
    patch.setattr(task, "_left", lambda job: False)
    patch.setattr(task, "_marked", lambda tasks, job, outcome: tasks)


def partial_is_noted_without_waiting_for_the_disk(patch: Patch) -> None:
    original = LearnerNode._trained

    def trained(self: LearnerNode, assigned: Any, earlier: Any) -> Any:
        result, _ = original(self, assigned, earlier)
        return result, False

    patch.setattr(LearnerNode, "_trained", trained)


def model_is_opened_by_some_of_its_sites(patch: Patch) -> None:
    original = round._asked

    def asked(run: Any, kind: Any, names: Any) -> Any:
        return original(run, kind, [*names][: 1 if kind == pb.OPEN else None])

    patch.setattr(round, "_asked", asked)


# defect, and the law that it breaks
MUTANTS: list[tuple[Callable[[Patch], None], str]] = [
    (window_acknowledges_on_silence, "I1"),
    (broker_acknowledges_before_its_disk, "I1"),
    (sequencer_forgets_a_watermark, "I1"),
    (failed_batch_keeps_its_places, "I1"),
    (gap_is_taken_for_the_next, "I1"),
    (lane_believes_every_live_record, "I2"),
    (lane_moves_to_the_head, "I2"),
    (controller_forgets_its_cursor, "I7"),
    (snapshot_forgets_who_was_tried, "I7"),
    (weights_are_not_what_was_reported, "I5"),
    (seed_depends_on_the_attempt, "I6"),
    (leases_never_end, "I4"),
    (fold_is_asked_for_once, "I4"),
    (stop_is_not_heard, "I10"),
    (end_of_a_run_overtakes_its_fold, "I10"),
    (end_names_the_round_that_was_open, "I10"),
    (learner_goes_on_with_a_run_that_is_over, "I10"),
    (update_is_announced_before_it_is_durable, "I3"),
    (learner_trains_again_after_a_restart, "I3"),
    (credit_is_not_taken_back, "I8"),
    (site_opens_a_round_again, "I11"),
    (partial_is_noted_without_waiting_for_the_disk, "I11"),
    (model_is_opened_by_some_of_its_sites, "I12"),
]

FIRST_SEEDS = {site_opens_a_round_again: 500, partial_is_noted_without_waiting_for_the_disk: 500}
"""Where to begin to look for what shows in one federation of a thousand."""
