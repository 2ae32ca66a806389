"""A driver stops a run: it ends once, with the last round that was closed, wherever it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from round_world import LEARNERS, World, counted, plan

from metisfl.controller.conductor import Conductor
from metisfl.controller.effects import Fold
from metisfl.controller.record import record_of
from metisfl.controller.scheduling import waits
from metisfl.controller.snapshot import pack, unpack
from metisfl.controller.state import Phase, Run, Status, Terms
from metisfl.proto import events_pb2 as pb
from metisfl.proto.records import pack_record, record_digest

STOP = pb.RunStopped(run_id="r1", reason="the data are wrong")
WHY = "stopped by driver:eve: the data are wrong"
OTHER = bytes(range(1, 33))


def gathering(world: World) -> None:
    world.log_event(plan(), "driver:d")
    world.log_event(pb.LearnerJoined(learner="ada"), "learner:ada")
    world.perform_all()


def initialising(world: World) -> None:
    world.start(plan())


def training(world: World) -> None:
    world.start(plan())
    world.complete("r1.0.initialise.ada")
    world.perform_all()


def folding(world: World) -> None:
    training(world)
    for name in LEARNERS:
        world.complete(f"r1.1.train.{name}")


def evaluating(world: World) -> None:
    folding(world)
    world.perform_all()
    world.complete("r1.1.evaluate.bob")


def next_round(world: World) -> None:
    evaluating(world)
    for name in ("ada", "cyd"):
        world.complete(f"r1.1.evaluate.{name}")
    world.perform_all()
    world.complete("r1.2.train.bob")


STAGES = [
    (gathering, Phase.GATHERING, -1),
    (initialising, Phase.TRAINING, -1),
    (training, Phase.TRAINING, 0),
    (folding, Phase.TRAINING, 1),
    (evaluating, Phase.EVALUATING, 1),
    (next_round, Phase.TRAINING, 1),
]


def ends(world: World) -> list[pb.RunFinished]:
    return [e.message for e in world.log if isinstance(e.message, pb.RunFinished)]


@pytest.mark.parametrize(("stage", "phase", "kept"), STAGES, ids=[s.__name__ for s, *_ in STAGES])
def test_a_run_is_stopped_wherever_it_is_and_keeps_the_last_round_that_was_closed(
    stage: Callable[[World], None], phase: Phase, kept: int
) -> None:
    world = World()
    stage(world)
    assert world.run.phase is phase
    assert world.log_event(STOP, "driver:eve") == ""
    assert (world.run.phase, world.run.stopped) == (Phase.STOPPING, WHY)
    assert waits(world.run) == (), "nobody is awaited"
    world.perform_all()
    (end,) = ends(world)
    closed = counted(world.log)
    assert (end.outcome, end.reason) == (pb.RunFinished.STOPPED, WHY)
    assert (end.rounds, len(closed)) == (max(kept, 0), kept + 1)
    assert end.model_digest == (closed[-1].model_digest if closed else b"")
    assert world.run.finished == end


def test_the_end_names_the_record_of_a_round_whose_scores_did_not_come() -> None:
    world = World()
    evaluating(world)
    before = world.run.record
    world.log_event(STOP, "driver:eve")
    record = record_of(world.run)
    assert record is not None
    assert (record.round, record.previous) == (1, before)
    assert [one.learner for one in record.counted] == list(LEARNERS)
    assert list(record.evaluation) == ["bob"]
    told = [(one.learner, one.kind, one.reason) for one in record.unevaluated]
    assert told == [("ada", "stopped", WHY), ("cyd", "stopped", WHY)]
    world.perform_all()
    assert ends(world)[0].record == record_digest(pack_record(record)) == world.run.record


def test_the_round_that_was_open_has_a_record_without_a_model() -> None:
    world = World()
    next_round(world)
    last = world.run.record
    world.log_event(STOP, "driver:eve")
    world.perform_all()
    assert ends(world)[0].record == last, "what the log holds is the last complete round's"
    record = record_of(world.run)
    assert record is not None
    assert (record.round, record.model_digest, record.previous) == (2, b"", last)
    assert [(one.learner, one.kind, one.reason) for one in record.missing] == [
        ("ada", "stopped", WHY),
        ("bob", "stopped", "answered, but the run was stopped"),
        ("cyd", "stopped", WHY),
    ]


@pytest.mark.parametrize("publisher", ["learner:ada", "controller", "broker"])
def test_nobody_but_a_driver_stops_a_run(publisher: str) -> None:
    world = World()
    training(world)
    before = world.run
    assert "may not send RunStopped" in world.log_event(STOP, publisher)
    assert world.run == before


def test_a_stop_of_another_run_or_of_one_that_ends_or_has_ended_changes_nothing() -> None:
    world = World()
    assert world.log_event(STOP, "driver:eve") == "RunStopped while idle"
    training(world)
    before = world.run
    assert "run r0, which is not under way" in world.log_event(
        pb.RunStopped(run_id="r0"), "driver:d"
    )
    assert world.run == before
    world.log_event(STOP, "driver:eve")
    before = world.run
    again = pb.RunStopped(run_id="r1", reason="me too")
    assert world.log_event(again, "driver:d") == "RunStopped while stopping"
    assert world.run == before
    world.perform_all()
    before = world.run
    assert world.log_event(again, "driver:d") == "RunStopped while finished"
    assert world.run == before
    assert not world.under_way
    assert len(ends(world)) == 1


def test_who_gives_no_reason_is_still_named() -> None:
    world = World()
    training(world)
    world.log_event(pb.RunStopped(run_id="r1"), "driver:d")
    world.perform_all()
    assert ends(world)[0].reason == "stopped by driver:d: no reason given"


def test_whatever_was_on_its_way_when_the_run_was_stopped_is_named_and_dropped() -> None:
    world = World()
    training(world)
    world.log_event(STOP, "driver:eve")
    before, task = world.run, "r1.1.train.ada"
    invited = [pb.Invitation(learner="ada", task_id="x")]
    for late, publisher in (
        (pb.RoundOpened(run_id="r1", round=2, invited=invited), "controller"),
        (pb.TaskAssigned(task_id=task, learner="ada"), "controller"),
        (pb.TaskCancelled(task_id=task), "controller"),
        (pb.UpdateStored(task_id=task, learner="ada", digest=OTHER), "controller"),
        (pb.LeaseEnded(task_id=task, learner="ada", silent_s=6), "controller"),
        (
            pb.RoundClosed(run_id="r1", round=1, counted=[pb.Contribution(learner="ada")]),
            "controller",
        ),
        (pb.TaskCompleted(task_id=task, learner="ada", update_digest=OTHER), "learner:ada"),
        (pb.TaskFailed(task_id=task, learner="ada"), "learner:ada"),
        (pb.ScaleExceeded(task_id=task, learner="ada"), "learner:ada"),
    ):
        assert world.log_event(late, publisher), f"{late} is to be dropped with a reason"
        assert world.run == before
    assert {one.status for one in world.run.tasks.values()} == {Status.STOPPED}


def folding_and_stopped() -> tuple[World, Fold]:
    world = World()
    folding(world)
    (fold,) = (effect for effect in world.under_way.values() if isinstance(effect, Fold))
    world.log_event(STOP, "driver:eve")
    assert list(world.under_way) == [fold.key], (
        "the end waits for the fold: it uses the run's files"
    )
    return world, fold


def test_a_round_that_is_being_folded_still_counts() -> None:
    world, fold = folding_and_stopped()
    world.perform(fold.key)
    assert list(world.under_way) == ["RunFinished:r1"]
    world.perform_all()
    (end,) = ends(world)
    assert (end.rounds, end.model_digest) == (1, counted(world.log)[-1].model_digest)
    assert not [e for e in world.log if isinstance(e.message, pb.TaskAssigned)
                and e.message.kind == pb.EVALUATE], "nobody is asked for scores"  # fmt: skip


def test_a_fold_that_fails_or_finds_no_room_ends_the_wait_too() -> None:
    world, fold = folding_and_stopped()
    del world.under_way[fold.key]
    spoilt = world.conductor.unusable(fold, 1, "the disk has spoilt it")
    world.log_event(spoilt.message, "controller")
    assert list(world.under_way) == ["RunFinished:r1"], "and it is not folded without that one"
    world, fold = folding_and_stopped()
    world.conductor.given_up(fold)
    assert [effect.key for effect in world.conductor.due()] == ["RunFinished:r1"]


@pytest.mark.parametrize("stage", [one for one, *_ in STAGES], ids=[s.__name__ for s, *_ in STAGES])
def test_a_controller_that_is_killed_between_stop_and_end_ends_the_run_as_stopped(
    stage: Callable[[World], None],
) -> None:
    world = World()
    stage(world)
    world.log_event(STOP, "driver:eve")
    again = Conductor(unpack(pack(world.run), world.run.terms))
    (end,) = again.due()
    assert end.message.outcome == pb.RunFinished.STOPPED  # type: ignore[union-attr]
    assert end.message.reason == WHY  # type: ignore[union-attr]
    assert again.due() == (), "once"


def test_a_run_that_had_reached_its_end_by_itself_ends_so_and_once() -> None:
    world = World()
    world.start(plan(rounds=1))
    for kind in ("0.initialise", "1.train", "1.evaluate"):
        for name in LEARNERS:
            if f"r1.{kind}.{name}" in world.run.tasks:
                world.complete(f"r1.{kind}.{name}")
        if kind != "1.evaluate":
            world.perform_all()
    assert list(world.under_way) == ["RunFinished:r1"], "it is on its way to the log"
    world.log_event(STOP, "driver:eve")
    world.perform_all()
    assert [end.outcome for end in ends(world)] == [pb.RunFinished.COMPLETED]


def test_the_next_run_can_begin_when_a_stopped_one_has_ended_and_not_before() -> None:
    world = World()
    training(world)
    world.log_event(STOP, "driver:eve")
    assert "while run r1 is stopping" in world.log_event(plan(run_id="r2"), "driver:d")
    world.perform_all()
    assert world.log_event(plan(run_id="r3"), "driver:d") == ""
    world.perform_all()
    assert (world.run.phase, world.run.stopped) == (Phase.TRAINING, "")


def test_who_joins_while_a_run_ends_does_not_change_what_it_was() -> None:
    world, secret = World(Run("f", Terms(weight_sum_max=9))), plan()
    secret.privacy = "ckks"
    world.start(secret)
    world.complete("r1.0.initialise.ada", exponents=[0])
    world.perform_all()
    world.log_event(STOP, "driver:eve")
    tasks = world.run.tasks
    for examples in (9, 10**6):
        world.log_event(pb.LearnerLeft(learner="bob", reason="reboot"), "learner:bob")
        world.log_event(pb.LearnerJoined(learner="bob", examples=examples), "learner:bob")
    assert {one.status for one in tasks.values()} == {Status.STOPPED}
    assert world.run.tasks == tasks
