"""Under a joint key a closed round is opened by all sites together before anything goes on."""

from __future__ import annotations

import pytest
from round_world import DIGEST, LEARNERS, World, plan

from metisfl.controller.effects import Fold
from metisfl.controller.scheduling import waits
from metisfl.controller.snapshot import pack, unpack
from metisfl.controller.state import Phase, Run, Terms
from metisfl.proto import events_pb2 as pb

TERMS = Terms(weight_sum_max=3, min_contributors=2, max_share=0.9, sites=LEARNERS)
PARTIALS = bytes(reversed(range(32)))


def joint_plan(**other: object) -> pb.RunStarted:
    asked = plan(**other)  # type: ignore[arg-type]
    asked.privacy = "ckks-threshold"
    return asked


def trained(round_number: int, *, waits_for_quorum: bool = False, rounds: int = 2) -> World:
    """A run of which round `round_number` is closed and not open."""
    world = World(Run("f", TERMS))
    world.log_event(joint_plan(waits_for_quorum=waits_for_quorum, rounds=rounds), "driver:d")
    for name in LEARNERS:
        world.log_event(pb.LearnerJoined(learner=name, examples=10), f"learner:{name}")
    world.perform_all()
    for number in range(round_number + 1):
        names, kind = (LEARNERS, "train") if number else (LEARNERS[:1], "initialise")
        for name in names:
            world.complete(f"r1.{number}.{kind}.{name}", exponents=(1,))
        world.perform_all()
        if number < round_number:
            give(world, number, LEARNERS)
            evaluate(world, number)
    assert world.run.phase is Phase.OPENING
    return world


def give(world: World, number: int, names: tuple[str, ...]) -> None:
    for name in names:
        world.complete(f"r1.{number}.open.{name}", digest=DIGEST)
    world.perform_all()


def evaluate(world: World, number: int) -> None:
    for name in LEARNERS if number else ():
        world.complete(f"r1.{number}.evaluate.{name}", digest=b"")
    world.perform_all()


def assigned(world: World, kind: int) -> list[pb.TaskAssigned]:
    messages = (e.message for e in world.log)
    return [m for m in messages if isinstance(m, pb.TaskAssigned) and m.kind == kind]


def finished(world: World) -> pb.RunFinished:
    assert world.run.finished is not None
    return world.run.finished


def test_all_sites_are_asked_for_their_partials_of_the_closed_model_first() -> None:
    world = trained(1)
    tasks = [task for task in assigned(world, pb.OPEN) if task.round == 1]
    assert [task.learner for task in tasks] == list(LEARNERS)
    assert {task.model_digest for task in tasks} == {world.run.model_digest}
    assert not assigned(world, pb.EVALUATE), "a model that is not open is scored"


def test_only_the_fold_of_all_partials_opens_the_model() -> None:
    world = trained(1)
    give(world, 1, LEARNERS[:2])
    assert world.run.phase is Phase.OPENING
    world.complete("r1.1.open.cyd")
    (fold,) = [one for one in world.under_way.values() if isinstance(one, Fold)]
    assert fold.opens == world.run.model_digest
    assert [(one.learner, one.weight) for one in fold.contributions] == [
        (name, 1.0) for name in LEARNERS
    ], "a partial has no weight"
    message = world.conductor.folded(world.under_way.pop(fold.key), PARTIALS).message
    world.log_event(message, "controller")
    assert world.run.phase is Phase.EVALUATING
    world.perform_all()
    tasks = assigned(world, pb.EVALUATE)
    assert {task.partials_digest for task in tasks} == {PARTIALS}
    evaluate(world, 1)
    trains = [task for task in assigned(world, pb.TRAIN) if task.round == 2]
    assert {task.partials_digest for task in trains} == {PARTIALS}
    assert PARTIALS in world.run.recent_models, "it would be deleted before it is fetched"


def test_a_joint_run_comes_to_its_end() -> None:
    world = trained(2)
    give(world, 2, LEARNERS)
    evaluate(world, 2)
    assert finished(world).outcome == pb.RunFinished.COMPLETED
    assert finished(world).rounds == 2


@pytest.mark.parametrize("number", [0, 1])
def test_a_site_that_is_silent_fails_the_run_by_name_and_earlier_rounds_stay(number: int) -> None:
    world = trained(number)
    opened = world.run.opened_digest
    give(world, number, LEARNERS[:2])
    silent = pb.LeaseEnded(task_id=f"r1.{number}.open.cyd", learner="cyd", silent_s=6.0)
    world.log_event(silent, "controller")
    world.perform_all()
    end = finished(world)
    assert end.outcome == pb.RunFinished.FAILED
    assert "cyd: silent for 6.0 s" in end.reason
    assert "metisfl keys ceremony" in end.reason, "the remedy is not said"
    assert (end.model_digest, end.rounds) == (opened, 0), "a model that nobody can read is named"


def test_a_site_that_refuses_fails_the_run_at_once() -> None:
    world = trained(1)
    told = pb.TaskFailed(task_id="r1.1.open.bob", learner="bob", reason="not my update")
    world.log_event(told, "learner:bob")
    world.perform_all()
    assert finished(world).outcome == pb.RunFinished.FAILED
    assert "bob: not my update" in finished(world).reason


def test_a_run_that_waits_for_its_quorum_waits_for_every_partial() -> None:
    world = trained(1, waits_for_quorum=True)
    give(world, 1, LEARNERS[:2])
    for _ in range(3):
        silent = pb.LeaseEnded(task_id="r1.1.open.cyd", learner="cyd", silent_s=6.0)
        world.log_event(silent, "controller")
        world.perform_all()
    asked = [task for task in assigned(world, pb.OPEN) if task.task_id == "r1.1.open.cyd"]
    assert asked == [asked[0]] * 4, "it is asked again, for the same"
    assert [wait.learner for wait in waits(world.run)] == ["cyd"]
    give(world, 1, LEARNERS[2:])
    assert world.run.phase is Phase.EVALUATING


def test_a_partial_that_is_spoilt_fails_its_site() -> None:
    world = trained(1)
    for name in LEARNERS:
        world.complete(f"r1.1.open.{name}")
    fold = world.under_way.pop("ModelOpened:r1:1")
    assert isinstance(fold, Fold)
    world.log_event(world.conductor.unusable(fold, 1, "of another model").message, "controller")
    world.perform_all()
    assert "bob: of another model" in finished(world).reason


def test_a_stop_while_a_round_is_opened_ends_with_the_round_before() -> None:
    world = trained(2)
    world.log_event(pb.RunStopped(run_id="r1", reason="enough"), "driver:d")
    world.perform_all()
    assert finished(world).outcome == pb.RunFinished.STOPPED
    assert (finished(world).rounds, finished(world).model_digest) == (1, world.run.opened_digest)


def test_who_opens_another_model_than_the_closed_one_opens_nothing() -> None:
    world = trained(1)
    lie = pb.ModelOpened(run_id="r1", round=1, model_digest=PARTIALS, partials_digest=PARTIALS)
    assert "opened while" in world.log_event(lie, "controller")
    mine = pb.ModelOpened(
        run_id="r1", round=1, model_digest=world.run.model_digest, partials_digest=PARTIALS
    )
    assert "may not send" in world.log_event(mine, "learner:ada")
    assert world.run.phase is Phase.OPENING


def test_a_run_of_other_learners_than_the_keys_sites_is_refused_with_both_lists() -> None:
    world = World(Run("f", Terms(3, sites=("ada", "bob"))))
    world.log_event(joint_plan(), "driver:d")
    (refused,) = world.run.refused.values()
    assert "ada, bob, cyd" in refused
    assert "joint key's sites are ada, bob" in refused


def test_a_round_has_its_record_only_when_it_is_open() -> None:
    world = trained(1)
    before = world.run.record
    give(world, 1, LEARNERS)
    assert world.run.record == before
    evaluate(world, 1)
    assert world.run.record != before


def test_a_snapshot_keeps_what_is_being_opened() -> None:
    world = trained(1)
    give(world, 1, LEARNERS[:1])
    assert unpack(pack(world.run), TERMS) == world.run


def test_a_run_that_goes_on_from_another_asks_for_that_ones_model() -> None:
    world, asked = World(Run("f", TERMS)), joint_plan()
    asked.continues = "r0"
    world.start(asked)
    (task,) = assigned(world, pb.INITIALISE)
    assert task.continues == "r0"
    told = pb.TaskFailed(task_id=task.task_id, learner=task.learner, reason="no such run here")
    world.log_event(told, f"learner:{task.learner}")
    world.perform_all()
    assert [task.continues for task in assigned(world, pb.INITIALISE)] == ["r0"] * 2, "the next one"


def test_only_sites_of_a_joint_key_go_on_from_another_run() -> None:
    world, asked = World(), plan()
    asked.continues = "r0"
    world.log_event(asked, "driver:d")
    assert "start without --continue" in next(iter(world.run.refused.values()))
