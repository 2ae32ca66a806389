"""The status names everyone who is awaited, since when, and what is left of each lease."""

from __future__ import annotations

from round_world import World, plan

from metisfl.controller.lease import Leases
from metisfl.controller.scheduling import waits
from metisfl.controller.state import Run
from metisfl.controller.status import status_of
from metisfl.proto import events_pb2 as pb
from metisfl.proto.events import encode

NOON_NS = 1_700_000_000_000_000_000


def status(world: World, *, heard: float = 10.0, now: float = 12.0) -> pb.ControllerStatus:
    """The status at `now` of leases that began at `heard`; it can be sent."""
    leases = Leases().watch(waits(world.run), heard)
    found = status_of(world.run, leases, now, NOON_NS)
    assert encode(found)
    return found


def test_a_controller_without_a_run_waits_for_a_driver() -> None:
    found = status_of(Run("f"), Leases(), 0.0, NOON_NS)
    assert (found.phase, found.waits_for) == ("idle", "a driver that asks for a run")


def test_who_has_yet_to_join_is_awaited() -> None:
    world = World()
    world.log_event(plan(), "driver:d")
    world.log_event(pb.LearnerJoined(learner="ada"), "learner:ada")
    world.perform_all()
    found = status(world)
    assert [(one.learner, one.task_id) for one in found.awaited] == [("bob", ""), ("cyd", "")]
    assert found.waits_for == "learners to join: 1 of 3 are here"


def test_each_wait_says_since_when_and_how_long_its_lease_lasts() -> None:
    world = World()
    world.start(plan())
    world.complete("r1.0.initialise.ada")
    world.perform_all()
    world.complete("r1.1.train.bob")
    found = status(world, heard=10.0, now=12.0)
    assert (found.round, found.counted, found.invited, found.quorum) == (1, 1, 3, 2)
    assert [one.learner for one in found.awaited] == ["ada", "cyd"]
    assert [one.since_unix_ns for one in found.awaited] == [NOON_NS - 2 * 10**9] * 2
    assert [one.lease_left_s for one in found.awaited] == [3.0, 3.0]
    assert found.waits_for == "2 learners"


def test_a_round_that_lacks_its_quorum_says_so() -> None:
    world = World()
    world.start(plan(quorum=3, waits_for_quorum=True))
    world.complete("r1.0.initialise.ada")
    world.perform_all()
    world.complete("r1.1.train.ada")
    world.complete("r1.1.train.bob")
    lapsed = pb.LeaseEnded(task_id="r1.1.train.cyd", learner="cyd", silent_s=6)
    world.log_event(lapsed, "controller")
    world.perform_all()
    assert status(world).waits_for == "the quorum: round 1 has 2 of 3 updates"


def test_a_run_that_too_few_have_joined_says_so() -> None:
    world = World()
    world.log_event(plan(quorum=2, waits_for_quorum=True), "driver:d")
    for name in ("ada", "bob", "cyd"):
        world.log_event(pb.LeaseEnded(learner=name, silent_s=6), "controller")
    world.perform_all()
    assert status(world).waits_for == "the quorum: 0 of 2 learners are here"


def test_a_run_that_is_stopped_waits_for_nobody() -> None:
    world = World()
    world.log_event(plan(quorum=3, waits_for_quorum=True), "driver:d")
    world.log_event(pb.LearnerJoined(learner="ada"), "learner:ada")
    world.perform_all()
    world.log_event(pb.RunStopped(run_id="r1"), "driver:d")
    found = status(world)
    assert (found.phase, found.waits_for, found.awaited_total) == ("stopping", "", 0)


def test_a_failed_score_of_the_last_model_does_not_count_against_the_next_round() -> None:
    world = World()
    world.log_event(plan(quorum=2, waits_for_quorum=True), "driver:d")
    for name in ("ada", "bob"):
        world.log_event(pb.LearnerJoined(learner=name), f"learner:{name}")
    world.log_event(pb.LeaseEnded(learner="cyd", silent_s=6), "controller")
    world.perform_all()
    world.complete("r1.0.initialise.ada")
    world.perform_all()
    for name in ("ada", "bob"):
        world.complete(f"r1.1.train.{name}")
    world.perform_all()
    failed = pb.TaskFailed(task_id="r1.1.evaluate.ada", learner="ada", reason="no test data")
    world.log_event(failed, "learner:ada")
    world.log_event(pb.LearnerLeft(learner="bob", reason="reboot"), "learner:bob")
    world.perform_all()
    assert world.run.finished is None, "ada and cyd can still make up the quorum"
    assert status(world).waits_for == "the quorum: 1 of 2 learners are here"
