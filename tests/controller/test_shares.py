"""Who claims to have nearly all the examples is left out of a round, and ends nobody's run."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from round_world import LEARNERS, World, counted, plan

from metisfl.controller.effects import Fold
from metisfl.controller.plan import uncounted
from metisfl.controller.round import apply
from metisfl.controller.state import Phase, Run, Status, Terms
from metisfl.proto import events_pb2 as pb
from metisfl.proto.ckks import check_shares

TERMS = Terms(weight_sum_max=3, min_contributors=2, max_share=0.9)
MILLION = 10**6


def begun(
    declared: Mapping[str, int],
    *,
    terms: Terms | None = TERMS,
    max_examples: int = 0,
    waits: bool = False,
    quorum: int = 2,
) -> World:
    """A run whose initial model is there and whose round 1 is open."""
    world, the_plan = World(Run("f", terms)), plan(quorum=quorum, waits_for_quorum=waits)
    the_plan.privacy = "ckks" if terms else "plain"
    the_plan.max_examples = max_examples
    world.log_event(the_plan, "driver:d")
    for name, examples in declared.items():
        join(world, name, examples)
    world.perform_all()
    complete(world, ["ada"], {"ada": 0}, "r1.0.initialise")
    return world


def join(world: World, name: str, examples: int) -> None:
    world.log_event(pb.LearnerJoined(learner=name, examples=examples), f"learner:{name}")


def complete(
    world: World, names: Iterable[str], examples: Mapping[str, int], task: str = "r1.1.train"
) -> None:
    exponents = (1,) if world.run.terms else ()
    for name in names:
        world.complete(f"{task}.{name}", examples[name], exponents=exponents)
    world.perform_all()


def closed(world: World) -> tuple[list[str], dict[str, str]]:
    """Who counts in the newest closed round, and who does not and why."""
    last = counted(world.log)[-1]
    return [c.learner for c in last.counted], {m.learner: m.reason for m in last.missing}


def assigned(world: World) -> list[pb.TaskAssigned]:
    return [e.message for e in world.log if isinstance(e.message, pb.TaskAssigned)]


def test_who_declares_nearly_everything_is_left_out_and_the_round_goes_on() -> None:
    claims = {"ada": MILLION, "bob": 10, "cyd": 30}
    world = begun(claims)
    trains = [task for task in assigned(world) if task.round == 1]
    assert [task.learner for task in trains] == ["bob", "cyd"], "ada does not train in vain"
    assert {task.reference_weight for task in trains} == {20.0}, "that of those who are in"
    complete(world, ["bob", "cyd"], claims)
    names, missing = closed(world)
    assert names == ["bob", "cyd"]
    assert "declares 1000000 examples" in missing["ada"]
    assert "ada is 100.0% of it" in missing["ada"]
    assert "more than 90.0%" in missing["ada"]
    assert world.run.finished is None, "one member does not end everybody's run"
    assert [task.learner for task in world.run.tasks.values()] == list(LEARNERS), "all may score"


def test_a_run_that_needs_who_dominates_fails_for_want_of_a_quorum_and_says_why() -> None:
    claims = {"ada": 1000, "bob": 1, "cyd": 1}
    world = begun(claims, quorum=3)
    complete(world, ["bob", "cyd"], claims)
    assert world.run.finished is not None
    assert "round 1 has 2 updates; the quorum is 3" in world.run.finished.reason
    assert "ada: declares 1000 examples: of what was declared, ada is 99.8%" in (
        world.run.finished.reason
    )


def test_who_dominates_since_others_are_missing_is_left_out_when_that_is_known() -> None:
    claims = {"ada": 100, "bob": 100, "cyd": 10}
    world = begun(claims)
    complete(world, ["ada", "cyd"], claims)
    silent = pb.LeaseEnded(task_id="r1.1.train.bob", learner="bob", silent_s=6)
    world.log_event(silent, "controller")
    assert not any(isinstance(effect, Fold) for effect in world.under_way.values())
    world.perform_all()
    assert world.run.finished is not None
    assert "round 1 has 1 updates" in world.run.finished.reason
    assert "ada: left out of the sum: ada is 90.9% of it" in world.run.finished.reason


def test_who_was_weighed_down_by_a_claim_seals_again_for_a_reference_without_it() -> None:
    """Nobody else declares anything, so that only the answers show what the claim is worth."""
    says = {"ada": 10, "bob": 30, "cyd": MILLION}
    world = begun({"ada": 0, "bob": 0, "cyd": MILLION})
    complete(world, LEARNERS, says)
    assert (world.run.attempt, world.run.reference_weight) == (1, 30.0)
    again = [task for task in assigned(world) if task.attempt == 1]
    assert [task.learner for task in again] == ["ada", "bob"]
    complete(world, ["ada", "bob"], says, "r1.1.train.again1")
    names, missing = closed(world)
    assert names == ["ada", "bob"]
    assert "cyd is 100.0% of it" in missing["cyd"]
    assert counted(world.log)[-1].reference_weight == 30.0


def test_a_weight_that_is_only_somewhat_too_large_makes_nobody_seal_again() -> None:
    declared = {"ada": 20, "bob": 0, "cyd": 60}
    world = begun(declared, terms=Terms(weight_sum_max=3, max_share=0.55))
    complete(world, LEARNERS, {"ada": 20, "bob": 22, "cyd": 60})
    assert (world.run.attempt, closed(world)[0]) == (0, ["ada", "bob"])


def test_who_declares_more_while_its_round_is_open_takes_nobodys_room() -> None:
    declared = {"ada": 10, "bob": 20, "cyd": 30}
    world = begun(declared)
    join(world, "cyd", 30)
    assert world.run.tasks["r1.1.train.cyd"].status is Status.ASSIGNED, "a restart is no claim"
    join(world, "cyd", 59)
    assert "may weigh 30" in world.run.tasks["r1.1.train.cyd"].reason
    world.complete("r1.1.train.cyd", 59, exponents=(1,))
    complete(world, ["ada", "bob"], declared)
    assert closed(world)[0] == ["ada", "bob"]
    complete(world, LEARNERS, declared, "r1.1.evaluate")
    (weight,) = {task.reference_weight for task in assigned(world) if task.round == 2}
    assert weight == pytest.approx(89 / 3), "from the next round on it weighs what it has"


def test_what_is_in_stays_in_when_its_site_comes_back_with_more() -> None:
    declared = {"ada": 10, "bob": 20, "cyd": 30}
    world = begun(declared)
    complete(world, ["cyd"], declared)
    join(world, "cyd", 59)
    complete(world, ["ada", "bob"], declared)
    assert closed(world)[0] == list(LEARNERS)


@pytest.mark.parametrize("terms", [None, TERMS], ids=["plain", "ckks"])
def test_who_has_more_examples_than_the_operator_allows_does_not_count(
    terms: Terms | None,
) -> None:
    claims = {"ada": MILLION, "bob": 10, "cyd": 30}
    world = begun(claims, terms=terms, max_examples=40)
    trains = [task for task in assigned(world) if task.round == 1]
    assert {task.learner: task.reference_weight for task in trains} == {"bob": 20, "cyd": 20}
    complete(world, ["bob", "cyd"], claims)
    names, missing = closed(world)
    assert names == ["bob", "cyd"]
    assert "declares 1000000 examples" in missing["ada"]
    assert "max_examples, 40" in missing["ada"]


def test_the_bound_holds_for_what_is_reported_and_for_what_a_score_weighs() -> None:
    world = begun(dict.fromkeys(LEARNERS, 0), terms=None, max_examples=40)
    complete(world, LEARNERS, {"ada": 40, "bob": 10, "cyd": 41})
    names, missing = closed(world)
    assert names == ["ada", "bob"], "the bound itself is allowed"
    assert "41 examples" in missing["cyd"]
    scored = pb.TaskCompleted(
        task_id="r1.1.evaluate.cyd", learner="cyd", examples=1, metrics={"test.examples": 41.0}
    )
    world.log_event(scored, "learner:cyd")
    assert "41 examples" in world.run.tasks["r1.1.evaluate.cyd"].reason


def test_without_a_bound_a_plain_run_takes_what_was_declared() -> None:
    claims = {"ada": MILLION, "bob": 10, "cyd": 30}
    world = begun(claims, terms=None)
    complete(world, LEARNERS, claims)
    assert closed(world)[0] == list(LEARNERS)


def test_a_run_that_waits_goes_on_with_those_who_come_instead() -> None:
    claims = {"ada": 1000, "bob": 10, "cyd": 10}
    world = begun(claims, waits=True)
    complete(world, ["bob"], claims)
    silent = pb.LeaseEnded(task_id="r1.1.train.cyd", learner="cyd", silent_s=6)
    world.log_event(silent, "controller")
    world.perform_all()
    asked = [task.learner for task in assigned(world) if task.attempt == 1]
    assert asked == ["cyd"], "whoever was silent, and not who cannot count"
    complete(world, ["cyd"], claims, "r1.1.train.again1")
    assert closed(world)[0] == ["bob", "cyd"]


@given(st.lists(st.integers(0, 10**7), min_size=2, max_size=9), st.floats(0.5, 1.0))
def test_who_is_left_out_in_advance_would_dominate_whatever_came(
    declared: list[int], share: float
) -> None:
    named = {str(place): examples for place, examples in enumerate(declared)}
    the_plan = pb.RunStarted(quorum=2)
    out = uncounted(the_plan, Terms(9, 2, share), named)
    rest = {name: examples for name, examples in named.items() if name not in out}
    assert not out or min(named[name] for name in out) >= max(rest.values()), "the largest are"
    known = [(name, float(examples)) for name, examples in rest.items() if examples]
    if len(known) == len(rest) >= 2:
        assert not check_shares(known, 1, share), "who is left is small enough"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.4, 0.6, 0.9]), st.booleans())
def test_whatever_is_claimed_no_round_closes_that_its_sites_would_not_open(
    seed: int, share: float, waits: bool
) -> None:
    rng = random.Random(seed)
    numbers = (0, 1, 10, 12, 1000, MILLION)
    terms = Terms(weight_sum_max=3, min_contributors=2, max_share=share)
    world = begun({name: rng.choice(numbers) for name in LEARNERS}, terms=terms, waits=waits)
    for _ in range(300):
        if world.run.phase is Phase.FINISHED:
            break
        tasks = [task for task in world.run.tasks.values() if task.status is Status.ASSIGNED]
        choice = rng.random()
        if not tasks or choice < 0.1:
            world.perform_all()
        elif choice < 0.2:
            join(world, rng.choice(LEARNERS), rng.choice(numbers))
        elif choice < 0.25:
            task = rng.choice(tasks)
            silent = pb.LeaseEnded(task_id=task.task_id, learner=task.learner, silent_s=6)
            world.log_event(silent, "controller")
        else:
            task = rng.choice(tasks)
            most = world.run.declared_by(task.learner)
            says = rng.choice([most, most, *numbers])
            world.complete(task.task_id, says, exponents=(1,))
    for one in counted(world.log)[1:]:
        shares = [(c.learner, c.weight) for c in one.counted]
        assert not check_shares(shares, 2, share)
        assert {c.learner for c in one.counted} | {m.learner for m in one.missing} == set(LEARNERS)
    assert waits or world.run.phase is Phase.FINISHED, "it ends, one way or the other"
    again = Run("f", terms)
    for event in world.log:
        again, _ = apply(again, event)
    assert again == world.run, "the log alone gives the state"
