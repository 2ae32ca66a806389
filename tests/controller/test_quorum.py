"""A run that waits for its quorum waits for the silent, and for nobody who has said no."""

from __future__ import annotations

import pytest
from round_world import DIGEST, LEARNERS, World, counted, plan

from metisfl.controller.effects import Fold
from metisfl.controller.state import Phase, Run, Status, Terms
from metisfl.proto import events_pb2 as pb


def opened(quorum: int, *, terms: Terms | None = None) -> World:
    """A world whose round 1 is open, for ada, bob and cyd."""
    world, the_plan = World(Run("f", terms)), plan(quorum=quorum, waits_for_quorum=True)
    if terms:
        the_plan.privacy = "ckks"
    world.start(the_plan)
    world.complete("r1.0.initialise.ada", exponents=[1] if terms else [])
    world.perform_all()
    return world


def lapse(world: World, task_id: str) -> None:
    name = task_id.rsplit(".", 1)[1]
    world.log_event(pb.LeaseEnded(task_id=task_id, learner=name, silent_s=6), "controller")
    world.perform_all()


def fail(world: World, task_id: str) -> None:
    name = task_id.rsplit(".", 1)[1]
    failed = pb.TaskFailed(task_id=task_id, learner=name, reason="no data")
    world.log_event(failed, f"learner:{name}")
    world.perform_all()


def test_who_was_silent_is_asked_again_and_what_is_stored_is_not() -> None:
    world = opened(quorum=3)
    world.complete("r1.1.train.ada")
    lapse(world, "r1.1.train.bob")
    lapse(world, "r1.1.train.cyd")
    assert world.run.round == 1
    assert list(world.run.tasks) == [
        "r1.1.train.ada",
        "r1.1.train.again1.bob",
        "r1.1.train.again1.cyd",
    ]
    lapse(world, "r1.1.train.again1.bob")
    world.complete("r1.1.train.again1.cyd")
    world.perform_all()
    world.complete("r1.1.train.again2.bob")
    world.perform_all()
    closed = counted(world.log)[-1]
    assert [one.task_id for one in closed.counted] == [
        "r1.1.train.ada",
        "r1.1.train.again2.bob",
        "r1.1.train.again1.cyd",
    ]
    asked = [e.message for e in world.log if isinstance(e.message, pb.TaskAssigned)]
    trained = [one for one in asked if one.round == 1 and one.kind == pb.TRAIN]
    assert [one.task_id for one in trained if one.learner == "ada"] == ["r1.1.train.ada"], (
        "an update that was stored is never asked for again"
    )


def test_a_task_that_is_asked_again_is_the_same_task() -> None:
    world = opened(quorum=3)
    world.complete("r1.1.train.ada")
    world.complete("r1.1.train.bob")
    lapse(world, "r1.1.train.cyd")
    first, again = (
        e.message
        for e in world.log
        if isinstance(e.message, pb.TaskAssigned)
        and (e.message.learner, e.message.kind) == ("cyd", pb.TRAIN)
    )
    assert (again.attempt, again.task_id) == (1, "r1.1.train.again1.cyd")
    again.attempt, again.task_id = first.attempt, first.task_id
    assert again == first


def test_who_said_no_is_not_waited_for_and_the_run_fails_when_too_many_did() -> None:
    world = opened(quorum=2)
    fail(world, "r1.1.train.ada")
    lapse(world, "r1.1.train.bob")
    lapse(world, "r1.1.train.cyd")
    assert world.run.phase is Phase.TRAINING
    assert {t.learner for t in world.run.tasks.values() if t.status is Status.ASSIGNED} == {
        "bob",
        "cyd",
    }, "ada is not asked again"
    fail(world, "r1.1.train.again1.bob")
    lapse(world, "r1.1.train.again1.cyd")
    assert world.run.finished is not None
    assert "0 updates; the quorum is 2" in world.run.finished.reason


def test_a_run_that_too_few_have_joined_waits_for_more() -> None:
    world = World()
    world.log_event(plan(quorum=3, waits_for_quorum=True), "driver:d")
    for name in LEARNERS[:2]:
        world.log_event(pb.LearnerJoined(learner=name), f"learner:{name}")
    world.log_event(pb.LeaseEnded(learner="cyd", silent_s=6), "controller")
    world.perform_all()
    assert world.run.phase is Phase.GATHERING
    world.log_event(pb.LearnerJoined(learner="cyd"), "learner:cyd")
    world.perform_all()
    assert world.run.phase is Phase.TRAINING


@pytest.mark.parametrize("first", ["lapse", "leave"])
def test_a_round_that_is_short_of_learners_waits_until_one_comes_back(first: str) -> None:
    world = opened(quorum=3)
    for name in ("ada", "bob"):
        world.complete(f"r1.1.train.{name}")
    if first == "lapse":
        lapse(world, "r1.1.train.cyd")
        world.complete("r1.1.train.again1.cyd")
        world.perform_all()
    else:
        world.log_event(pb.LearnerLeft(learner="cyd", reason="reboot"), "learner:cyd")
        world.perform_all()
        assert world.run.finished is not None, "who left has said that it cannot"
        return
    world.log_event(pb.LearnerLeft(learner="cyd", reason="reboot"), "learner:cyd")
    for name in ("ada", "bob"):
        world.complete(f"r1.1.evaluate.{name}")
    world.perform_all()
    assert world.run.finished is not None, "a learner that left is not waited for"


def test_an_update_that_does_not_fit_waits_with_the_others_for_the_quorum() -> None:
    world = opened(quorum=3, terms=Terms(weight_sum_max=99))
    world.complete("r1.1.train.ada", exponents=[1])
    world.log_event(
        pb.ScaleExceeded(task_id="r1.1.train.bob", learner="bob", tensor="w", exponents=[4]),
        "learner:bob",
    )
    lapse(world, "r1.1.train.cyd")
    assert world.run.exponents == (4,), "the round is open again with the larger exponent"
    assert sorted(t.learner for t in world.run.tasks.values()) == list(LEARNERS)
    for task_id in list(world.run.tasks):
        world.complete(task_id, exponents=[4])
    folds = [one for one in world.under_way.values() if isinstance(one, Fold)]
    assert [one.exponents for one in folds] == [(4,)]
    assert all(one.digest == DIGEST for one in folds[0].contributions)
