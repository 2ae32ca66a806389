"""An encrypted run: scales and weights are published, and what does not fit opens the round again.

Whatever is asked of the learners is in the log: a restart asks for the same.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from round_world import DIGEST, LEARNERS, World, counted, plan

from metisfl.controller.effects import Fold
from metisfl.controller.plan import largest, reference_weight
from metisfl.controller.round import apply
from metisfl.controller.state import Phase, Run, Status, Terms
from metisfl.proto import events_pb2 as pb

TERMS = Terms(weight_sum_max=8, min_contributors=2, max_share=0.9)
DECLARED = {"ada": 10, "bob": 20, "cyd": 30}


def secret_plan(rounds: int = 2, quorum: int = 2) -> pb.RunStarted:
    the_plan = plan(rounds, quorum)
    the_plan.privacy = "ckks"
    return the_plan


def begun(
    rounds: int = 2,
    terms: Terms = TERMS,
    exponents: tuple[int, ...] = (2, 3),
    declared: Mapping[str, int] = DECLARED,
) -> World:
    """A run whose initial model is there and whose round 1 is open."""
    world = World(Run("f", terms))
    world.log_event(secret_plan(rounds), "driver:d")
    for name, examples in declared.items():
        joined = pb.LearnerJoined(learner=name, examples=examples)
        world.log_event(joined, f"learner:{name}")
    world.perform_all()
    world.complete("r1.0.initialise.ada", examples=0, exponents=exponents)
    world.perform_all()
    return world


def exceed(world: World, task_id: str, *exponents: int) -> str:
    name = task_id.rsplit(".", 1)[1]
    exceeded = pb.ScaleExceeded(task_id=task_id, learner=name, tensor="bias", exponents=exponents)
    return world.log_event(exceeded, f"learner:{name}")


def assigned(world: World) -> list[pb.TaskAssigned]:
    return [e.message for e in world.log if isinstance(e.message, pb.TaskAssigned)]


def test_weights_are_relative_to_the_mean_of_what_the_invited_declared() -> None:
    world = begun()
    tasks = [task for task in assigned(world) if task.round == 1]
    (reference,) = {task.reference_weight for task in tasks}
    assert reference == pytest.approx(20.0, rel=1e-14)
    assert {task.privacy for task in tasks} == {"ckks"}
    assert reference_weight([0, 0]) == 1.0, "who does not say weighs by examples alone"
    assert reference_weight([0, 10, 20]) == pytest.approx(15.0, rel=1e-14)


def test_a_round_begins_with_the_largest_exponents_that_the_last_one_needed() -> None:
    world = begun(rounds=3)
    assert {tuple(task.exponents) for task in assigned(world) if task.round == 1} == {(2, 3)}
    for name, exponents in zip(LEARNERS, [(2, 2), (1, 4), (2, 0)], strict=True):
        world.complete(f"r1.1.train.{name}", DECLARED[name], exponents=exponents)
    world.perform_all()
    for name in LEARNERS:
        world.complete(f"r1.1.evaluate.{name}")
    world.perform_all()
    second = [task for task in assigned(world) if task.round == 2]
    assert {tuple(task.exponents) for task in second} == {(2, 4)}, "they grow, and they shrink"


def test_an_update_that_does_not_fit_opens_the_round_again_for_all_who_have_one() -> None:
    world = begun()
    world.complete("r1.1.train.ada", 10, exponents=(2, 3))
    exceed(world, "r1.1.train.bob", 13, 3)
    assert world.run.attempt == 0, "the others are waited for: they may need more still"
    world.log_event(pb.TaskFailed(task_id="r1.1.train.cyd", learner="cyd"), "learner:cyd")
    world.perform_all()
    assert (world.run.round, world.run.attempt, world.run.exponents) == (1, 1, (13, 3))
    assert sorted(world.run.tasks) == ["r1.1.train.again1.ada", "r1.1.train.again1.bob"]
    weighed = {t.reference_weight for t in assigned(world) if t.round == 1}
    assert weighed == {reference_weight(DECLARED.values())}, "who is asked again weighs as before"
    assert "late" in world.complete("r1.1.train.ada"), "what was sent for smaller ones is void"
    for name in ("ada", "bob"):
        world.complete(f"r1.1.train.again1.{name}", DECLARED[name], exponents=(13, 3))
    world.perform_all()
    closed = counted(world.log)[-1]
    assert [c.learner for c in closed.counted] == ["ada", "bob"]
    assert [m.learner for m in closed.missing] == ["cyd"], "who failed before is not forgotten"


def test_the_initial_model_may_need_larger_exponents_too() -> None:
    world = World(Run("f", TERMS))
    world.start(secret_plan())
    exceed(world, "r1.0.initialise.ada", 0, 12)
    world.perform_all()
    assert list(world.run.tasks) == ["r1.0.initialise.again1.ada"]
    world.complete("r1.0.initialise.again1.ada", 0, exponents=(0, 12))
    world.perform_all()
    assert (world.run.round, world.run.exponents) == (1, (0, 12))


def test_a_site_that_leaves_with_its_model_does_not_keep_the_next_from_building_one() -> None:
    world = World(Run("f", TERMS))
    world.start(secret_plan())
    world.under_way.clear()
    exceed(world, "r1.0.initialise.ada", 0, 12)
    world.under_way.clear()  # what was decided is not done before ada is gone
    world.log_event(pb.LearnerLeft(learner="ada", reason="reboot"), "learner:ada")
    for _ in range(10):
        world.perform_all()
    assert list(world.run.tasks) == ["r1.0.initialise.bob"]


def test_no_site_can_open_a_round_again_for_ever() -> None:
    world = begun()
    for attempt in range(10):
        again = f"again{attempt}." if attempt else ""
        if f"r1.1.train.{again}bob" not in world.run.tasks:
            break
        for name in ("ada", "cyd"):
            world.complete(f"r1.1.train.{again}{name}", DECLARED[name], exponents=(2, 3))
        exceed(world, f"r1.1.train.{again}bob", 4 + attempt, 3)
        world.perform_all()
    closed = counted(world.log)[-1]
    assert [c.learner for c in closed.counted] == ["ada", "cyd"]
    assert "as often as there are learners" in closed.missing[0].reason


def test_a_round_is_not_opened_again_for_someone_who_is_gone() -> None:
    world = begun()
    for name in ("ada", "cyd"):
        world.complete(f"r1.1.train.{name}", DECLARED[name], exponents=(2, 3))
    exceed(world, "r1.1.train.bob", 9, 3)
    world.under_way.clear()
    world.log_event(pb.LearnerLeft(learner="bob", reason="reboot"), "learner:bob")
    world.perform_all()
    assert [c.learner for c in counted(world.log)[-1].counted] == ["ada", "cyd"]


def test_an_update_that_does_not_count_does_not_weigh() -> None:
    world = begun(terms=Terms(weight_sum_max=3, max_share=1.0))
    world.complete("r1.1.train.ada", 20, digest=bytes(32), exponents=(2, 3))  # not what was stored
    world.complete("r1.1.train.bob", 25, exponents=(2, 3))
    world.complete("r1.1.train.cyd", 30, exponents=(2, 3))
    assert world.run.tasks["r1.1.train.cyd"].counts


def test_in_a_plain_run_exponents_are_nobodys_business() -> None:
    world = World()
    world.start(plan())
    world.complete("r1.0.initialise.ada")
    world.perform_all()
    for number, name in enumerate(LEARNERS):
        world.complete(f"r1.1.train.{name}", exponents=[1] * number)
    world.perform_all()
    assert counted(world.log)[-1].round == 1


@pytest.mark.parametrize(
    ("exponents", "why"),
    [((2, 3), "in which it does"), ((9,), "in which it does"), ((9, 9, 9), "in which it does")],
    ids=["no larger", "too few", "too many"],
)
def test_who_reports_exponents_that_cannot_be_fails_alone(
    exponents: tuple[int, ...], why: str
) -> None:
    world = begun()
    exceed(world, "r1.1.train.bob", *exponents)
    task = world.run.tasks["r1.1.train.bob"]
    assert task.status is Status.FAILED
    assert why in task.reason


def test_an_update_that_reports_another_number_of_tensors_does_not_count() -> None:
    world = begun()
    world.complete("r1.1.train.ada", exponents=(2,))
    assert "1 exponents; the model has 2" in world.run.tasks["r1.1.train.ada"].reason


def test_a_plain_run_knows_no_scales() -> None:
    world = World()
    world.start(plan())
    exceed(world, "r1.0.initialise.ada", 5)
    assert "where there is none" in world.run.tasks["r1.0.initialise.ada"].reason


def test_a_weight_that_would_wrap_the_sum_does_not_count() -> None:
    """It can where nobody has declared anything."""
    world = begun(declared=dict.fromkeys(DECLARED, 0))
    world.complete("r1.1.train.ada", 5, exponents=(2, 3))
    world.complete("r1.1.train.bob", 4, exponents=(2, 3))
    task = world.run.tasks["r1.1.train.bob"]
    assert task.status is Status.FAILED
    assert "sum of weights to 9; the key allows 8" in task.reason


@given(st.lists(st.integers(1, 10**6), min_size=3, max_size=3))
@example([100, 74, 31])
def test_weights_that_sum_to_their_number_always_fit(examples: list[int]) -> None:
    """Each is rounded, as is the mean that divides it: the sum may come out a hair above."""
    world = World(Run("f", Terms(weight_sum_max=3, max_share=1.0)))
    world.log_event(secret_plan(), "driver:d")
    for name, count in zip(LEARNERS, examples, strict=True):
        world.log_event(pb.LearnerJoined(learner=name, examples=count), f"learner:{name}")
    world.perform_all()
    world.complete("r1.0.initialise.ada", exponents=(2, 3))
    world.perform_all()
    for name, count in zip(LEARNERS, examples, strict=True):
        world.complete(f"r1.1.train.{name}", count, exponents=(2, 3))
    assert all(task.counts for task in world.run.tasks.values())


@pytest.mark.parametrize(("declared", "most"), [(DECLARED, 10), ({**DECLARED, "ada": 0}, 25)])
def test_who_claims_more_examples_than_it_declared_takes_nobodys_place(
    declared: Mapping[str, int], most: int
) -> None:
    """Who is first with a weight that leaves no room for others would otherwise end the run."""
    world = begun(declared=declared)
    world.complete("r1.1.train.ada", most + 1, exponents=(2, 3))
    claims = world.run.tasks["r1.1.train.ada"]
    assert claims.status is Status.FAILED
    assert f"reports {most + 1} examples, more than the {most}" in claims.reason
    for name in ("bob", "cyd"):
        world.complete(f"r1.1.train.{name}", DECLARED[name], exponents=(2, 3))
    world.perform_all()
    assert world.run.closed is not None
    assert [one.learner for one in world.run.closed.counted] == ["bob", "cyd"]


def test_a_plain_round_takes_no_more_examples_than_were_declared_either() -> None:
    world = World()
    world.log_event(plan(1, 2), "driver:d")
    for name, examples in {**DECLARED, "cyd": 0}.items():
        joined = pb.LearnerJoined(learner=name, examples=examples)
        world.log_event(joined, f"learner:{name}")
    world.perform_all()
    world.complete("r1.0.initialise.ada", examples=0)
    world.perform_all()
    for name, claimed in {"ada": 10**6, "bob": 20, "cyd": 10**6}.items():
        world.complete(f"r1.1.train.{name}", claimed)
    world.perform_all()
    assert world.run.closed is not None
    weights = {one.learner: one.weight for one in world.run.closed.counted}
    assert weights == {"bob": 20, "cyd": 10**6}, "who declares nothing weighs what it says"


def test_an_update_that_cannot_be_folded_is_left_out_and_named() -> None:
    world = begun()
    for name in LEARNERS:
        world.complete(f"r1.1.train.{name}", DECLARED[name], exponents=(2, 3))
    (key,) = [key for key, effect in world.under_way.items() if isinstance(effect, Fold)]
    del world.under_way[key]  # it failed, because of bob's
    unusable = pb.UpdateUnusable(task_id="r1.1.train.bob", learner="bob", reason="checksum")
    assert world.log_event(unusable, "controller") == ""
    assert world.log_event(unusable, "controller"), "told once"
    world.perform_all()
    closed = counted(world.log)[-1]
    assert [c.learner for c in closed.counted] == ["ada", "cyd"]
    assert [(m.learner, m.reason) for m in closed.missing] == [("bob", "checksum")]
    assert world.log_event(unusable, "controller"), "and not after its round"


@pytest.mark.parametrize(
    ("terms", "quorum", "privacy", "why"),
    [
        (None, 2, "ckks", "has no keys/public.ckks"),
        (TERMS, 2, "plain", "holds the public part of a key"),
        (Terms(2), 2, "ckks", "the key is made for at most 2"),
        (TERMS, 1, "ckks", "no model of fewer than 2 updates"),
    ],
    ids=["no key", "plain", "too many learners", "quorum"],
)
def test_a_run_that_the_key_does_not_allow_is_refused(
    terms: Terms | None, quorum: int, privacy: str, why: str
) -> None:
    world, the_plan = World(Run("f", terms)), plan(quorum=quorum)
    the_plan.privacy = privacy
    world.log_event(the_plan, "driver:d")
    world.perform_all()
    (end,) = [e.message for e in world.log if isinstance(e.message, pb.RunFinished)]
    assert why in end.reason


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_whatever_the_sites_report_a_round_closes_with_exponents_that_fit_all(seed: int) -> None:
    rng, world = random.Random(seed), begun()
    for _ in range(200):
        open_tasks = [t for t in world.run.tasks.values() if t.status is Status.ASSIGNED]
        if world.run.phase is Phase.FINISHED:
            break
        if not open_tasks:
            world.perform_all()
            continue
        task = rng.choice(open_tasks)
        needed = tuple(rng.randrange(20) for _ in range(2))
        fits = all(n <= e for n, e in zip(needed, world.run.exponents, strict=True))
        if task.kind == pb.EVALUATE or fits:
            world.complete(task.task_id, 10, exponents=needed)
        elif rng.random() < 0.8:
            exceed(world, task.task_id, *needed)
        else:
            failed = pb.TaskFailed(task_id=task.task_id, learner=task.learner, reason="x")
            world.log_event(failed, f"learner:{task.learner}")
    for one in counted(world.log)[1:]:
        asked = {c.learner for c in one.counted} | {m.learner for m in one.missing}
        assert asked == set(LEARNERS), "everyone who was asked is accounted for"
    assert world.run.phase is Phase.FINISHED, "it ends, one way or the other"
    again = Run("f", TERMS)
    for event in world.log:
        again, _ = apply(again, event)
    assert again == world.run, "the log alone gives the state"


def test_the_largest_exponents_are_taken_tensor_by_tensor() -> None:
    assert largest([(1, 5), (), (3, 2)]) == (3, 5)
    assert largest([]) == ()


def test_a_fold_that_a_reopening_has_overtaken_closes_nothing() -> None:
    """Both were decided, since somebody left in between; the log has the reopening first."""
    world = begun()
    world.complete("r1.1.train.ada", DECLARED["ada"], exponents=(2, 3))
    world.complete("r1.1.train.cyd", DECLARED["cyd"], exponents=(2, 3))
    exceeded = pb.ScaleExceeded(
        task_id="r1.1.train.bob", learner="bob", tensor="w", exponents=(9, 9)
    )
    world.log_event(exceeded, "learner:bob")
    assert "RoundOpened:r1:1:1" in world.under_way
    world.log_event(pb.LearnerLeft(learner="bob", reason="reboot"), "learner:bob")
    assert "RoundClosed:r1:1" in world.under_way
    fold = world.under_way["RoundClosed:r1:1"]
    assert isinstance(fold, Fold)
    overtaken = world.conductor.folded(fold, DIGEST)
    world.perform("RoundOpened:r1:1:1")
    del world.under_way["RoundClosed:r1:1"]
    assert "other updates than count now" in world.log_event(overtaken.message, "controller")
    assert world.run.phase is Phase.TRAINING
