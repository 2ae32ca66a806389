"""Any history of answers, silences, repeats and strangers gives rounds that close once and add up.

The history is a log: the controller's own events come back through it, in any order that the
broker may give them.
"""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from round_world import DIGEST, LEARNERS, World, counted, plan

from metisfl.controller.messages import seed_of
from metisfl.controller.round import apply
from metisfl.controller.scheduling import decide, waits
from metisfl.controller.snapshot import pack, unpack
from metisfl.controller.state import Phase, Run, Status
from metisfl.proto import events_pb2 as pb
from metisfl.proto.events import encode


def test_a_run_without_trouble_counts_everyone_in_every_round() -> None:
    world = World()
    world.start(plan(rounds=3))
    for _ in range(50):
        for task_id in list(world.run.tasks):
            world.complete(task_id)
        world.perform_all()
        if world.run.phase is Phase.FINISHED:
            break
    closed = counted(world.log)
    assert [c.round for c in closed] == [0, 1, 2, 3]
    assert [c.learner for c in closed[0].counted] == ["ada"], "the first name builds the model"
    assert all([c.learner for c in one.counted] == list(LEARNERS) for one in closed[1:])
    assert all(c.weight == 10 for one in closed[1:] for c in one.counted)
    assert world.run.finished is not None
    assert world.run.finished.outcome == pb.RunFinished.COMPLETED


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_every_history_adds_up(seed: int, rounds: int, quorum: int, waits_long: bool) -> None:
    rng, world = random.Random(seed), World()
    world.log_event(plan(rounds, quorum, waits_for_quorum=waits_long), "driver:d")
    for _ in range(400):
        assert unpack(pack(world.run), world.run.terms) == world.run, "a snapshot is the state"
        if world.run.phase is Phase.FINISHED:
            break
        choices = ["perform"] * 4 + ["answer", "answer", "fail", "lapse", "repeat", "join", "leave"]
        choice = rng.choice([*choices, "stranger", "another run", "stop"])
        open_tasks = [t for t in world.run.tasks.values() if t.status is Status.ASSIGNED]
        if choice == "perform" and world.under_way:
            world.perform(rng.choice(sorted(world.under_way)))
        elif choice == "answer" and open_tasks:
            world.complete(rng.choice(open_tasks).task_id, examples=rng.choice([0, 1, 9]))
        elif choice == "fail" and open_tasks and rng.random() < 0.3:
            task = rng.choice(open_tasks)
            world.log_event(
                pb.TaskFailed(task_id=task.task_id, learner=task.learner, reason="x"),
                f"learner:{task.learner}",
            )
        elif choice == "lapse" and waits(world.run) and rng.random() < 0.3:
            wait = rng.choice(waits(world.run))
            world.log_event(
                pb.LeaseEnded(task_id=wait.task_id, learner=wait.learner, silent_s=6),
                "controller",
            )
        elif choice == "repeat":
            old = rng.choice(world.log)
            if not isinstance(old.message, (pb.RoundOpened, pb.RoundClosed, pb.RunFinished)):
                world.log_event(old.message, old.publisher)
        elif choice == "join":
            name = rng.choice(LEARNERS)
            world.log_event(pb.LearnerJoined(learner=name), f"learner:{name}")
        elif choice == "leave" and rng.random() < 0.1:
            name = rng.choice(LEARNERS)
            world.log_event(pb.LearnerLeft(learner=name, reason="gone"), f"learner:{name}")
        elif choice == "stranger":
            dropped = world.log_event(pb.MemberAdmitted(learner="mallory"), "learner:mallory")
            assert "may not send" in dropped
        elif choice == "another run":
            assert "while" in world.log_event(plan(run_id="r2"), "driver:e")
        elif choice == "stop" and rng.random() < 0.1:
            world.log_event(pb.RunStopped(run_id="r1"), "driver:e")
    world.perform_all()
    assert not world.run.refused, "whoever asks in vain is told"
    assert len(finished(world, "r1")) <= 1, "a run ends once"
    closed = counted(world.log)
    assert [c.round for c in closed] == list(range(len(closed))), "rounds close once, in order"
    if world.run.stopped:
        assert world.run.finished is not None, "who is stopped comes to an end"
        assert world.run.finished.rounds == max(len(closed) - 1, 0)
    for one in closed[1:]:
        assert len(one.counted) >= quorum
        assert len({c.learner for c in one.counted}) == len(one.counted)
        assert all(c.weight > 0 for c in one.counted), "an update without examples never counts"
    again = Run("f")
    for event in world.log:
        again, _ = apply(again, event)
    assert again == world.run, "the log alone gives the state"


def test_asking_twice_changes_nothing() -> None:
    world = World()
    world.start(plan())
    assert decide(world.run) == decide(world.run)


def test_a_late_update_is_named_and_dropped() -> None:
    world = World()
    world.start(plan())
    world.complete("r1.0.initialise.ada")
    world.perform_all()
    late = "r1.1.train.cyd"
    world.log_event(pb.LeaseEnded(task_id=late, learner="cyd", silent_s=6), "controller")
    assert "late" in world.complete(late)
    for name in ("ada", "bob"):
        world.complete(f"r1.1.train.{name}")
    world.perform_all()
    closed = counted(world.log)[-1]
    assert [c.learner for c in closed.counted] == ["ada", "bob"]
    assert [(m.learner, "silent" in m.reason) for m in closed.missing] == [("cyd", True)]
    cancelled = [e.message.task_id for e in world.log if isinstance(e.message, pb.TaskCancelled)]
    assert cancelled == [late]
    assert "cyd" in {t.learner for t in world.run.tasks.values()}, "asked again afterwards"


def test_without_quorum_the_run_fails_and_says_who_was_missing() -> None:
    world = World()
    world.start(plan(quorum=3))
    world.complete("r1.0.initialise.ada")
    world.perform_all()
    world.complete("r1.1.train.ada")
    world.complete("r1.1.train.bob")
    world.log_event(
        pb.TaskFailed(task_id="r1.1.train.cyd", learner="cyd", reason="disk full"), "learner:cyd"
    )
    world.perform_all()
    assert world.run.finished is not None
    assert world.run.finished.outcome == pb.RunFinished.FAILED
    assert "2 updates; the quorum is 3" in world.run.finished.reason
    assert "cyd: disk full" in world.run.finished.reason


def test_the_next_learner_builds_the_model_if_the_first_cannot() -> None:
    world = World()
    world.start(plan())
    world.log_event(
        pb.TaskFailed(task_id="r1.0.initialise.ada", learner="ada", reason="no app"), "learner:ada"
    )
    world.perform_all()
    assert list(world.run.tasks) == ["r1.0.initialise.bob"]


def test_an_update_that_is_not_the_one_reported_fails_its_learner_only() -> None:
    world = World()
    world.start(plan())
    world.complete("r1.0.initialise.ada")
    world.perform_all()
    world.complete("r1.1.train.ada", digest=bytes(32))
    world.complete("r1.1.train.bob")
    world.complete("r1.1.train.cyd")
    world.perform_all()
    assert [m.reason for m in counted(world.log)[-1].missing] == [
        "the update that was stored is not the one that was reported"
    ]


def test_a_learner_cannot_answer_for_another() -> None:
    world = World()
    world.start(plan())
    forged = pb.TaskCompleted(task_id="r1.0.initialise.ada", learner="ada", update_digest=DIGEST)
    assert "may not send" in world.log_event(forged, "learner:bob")
    stolen = pb.TaskCompleted(task_id="r1.0.initialise.ada", learner="bob", update_digest=DIGEST)
    assert "does not hold" in world.log_event(stolen, "learner:bob")


def test_seeds_differ_by_round_and_learner_and_fit_63_bits() -> None:
    seeds = {seed_of(s, r, n) for s in (0, 1) for r in range(20) for n in LEARNERS}
    assert len(seeds) == 2 * 20 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def finished(world: World, run_id: str) -> list[pb.RunFinished]:
    ends = [e.message for e in world.log if isinstance(e.message, pb.RunFinished)]
    return [end for end in ends if end.run_id == run_id]


def test_who_asks_for_a_second_run_is_told_and_the_first_goes_on() -> None:
    world = World()
    world.start(plan())
    for _ in range(2):
        world.log_event(plan(run_id="r2"), "driver:other")
        world.perform_all()
        assert "while run r1 is training" in finished(world, "r2")[-1].reason
    assert (world.run.phase, world.run.plan) == (Phase.TRAINING, plan())
    world.log_event(plan(), "driver:other")
    world.perform_all()
    assert not finished(world, "r1"), "asking again for the run that is under way does not end it"


def test_who_left_before_a_run_is_not_waited_for_but_may_come_back() -> None:
    world = World()
    for name in LEARNERS:
        world.log_event(pb.LearnerJoined(learner=name), f"learner:{name}")
    world.log_event(pb.LearnerLeft(learner="cyd", reason="no data"), "learner:cyd")
    world.log_event(plan(), "driver:d")
    world.perform_all()
    assert [wait.learner for wait in waits(world.run)] == ["ada"], "round 0 is open"
    world.log_event(pb.LearnerJoined(learner="cyd"), "learner:cyd")
    world.complete("r1.0.initialise.ada")
    world.perform_all()
    assert sorted(task.learner for task in world.run.tasks.values()) == list(LEARNERS)


def test_who_is_expelled_in_a_round_is_out_of_it_at_once() -> None:
    world = World()
    for name in LEARNERS:
        world.log_event(pb.LearnerJoined(learner=name), f"learner:{name}")
    world.log_event(plan(), "driver:d")
    world.perform_all()
    world.complete("r1.0.initialise.ada")
    world.perform_all()
    key = "x" * 40
    world.log_event(pb.PeerExpelled(principal="learner:cyd", public=key), "learner:ada")
    assert "cyd" in world.run.members, "nobody but the broker says who was expelled"
    world.log_event(pb.PeerExpelled(principal="driver:d", public=key), "broker")
    world.log_event(pb.PeerExpelled(principal="learner:cyd", public=key), "broker")
    (task,) = (task for task in world.run.tasks.values() if task.learner == "cyd")
    assert "expelled" in task.reason
    assert [wait.learner for wait in waits(world.run)] == ["ada", "bob"]


def test_a_plan_that_cannot_be_is_refused_with_the_reason() -> None:
    world = World()
    world.log_event(plan(quorum=4), "driver:d")
    world.perform_all()
    assert "quorum at most their number" in finished(world, "r1")[0].reason
    assert world.run == Run("f"), "nothing is left of it"
    secret = plan(run_id="r2")
    secret.privacy = "ckks"
    world.log_event(secret, "driver:d")
    crowd = plan(run_id="r3")
    crowd.learners[:] = [f"{number:063}" for number in range(1000)]
    world.log_event(crowd, "driver:d")
    world.perform_all()
    assert "privacy mode 'ckks'" in finished(world, "r2")[0].reason
    assert "shorten the names" in finished(world, "r3")[0].reason
    world.start(plan())
    assert world.run.phase is Phase.TRAINING


def test_a_run_that_too_few_join_fails_and_says_who_is_not_there() -> None:
    world = World()
    world.log_event(plan(quorum=2), "driver:d")
    world.log_event(pb.LearnerJoined(learner="ada"), "learner:ada")
    world.log_event(pb.LearnerLeft(learner="bob", reason="no app"), "learner:bob")
    world.perform_all()
    assert [wait.learner for wait in waits(world.run)] == ["cyd"]
    world.log_event(pb.LeaseEnded(learner="cyd", silent_s=6), "controller")
    world.perform_all()
    (end,) = finished(world, "r1")
    assert "1 learners are here; the quorum is 2; bob: left: no app; cyd: has not joined" in (
        end.reason
    )


def test_an_update_that_is_reported_and_never_comes_does_not_stop_the_round() -> None:
    world = World()
    world.start(plan())
    world.complete("r1.0.initialise.ada")
    world.perform_all()
    for name in ("ada", "bob"):
        world.complete(f"r1.1.train.{name}")
    liar = "r1.1.train.cyd"
    done = pb.TaskCompleted(task_id=liar, learner="cyd", update_digest=DIGEST, examples=1)
    world.log_event(done, "learner:cyd")
    assert [wait.task_id for wait in waits(world.run)] == [liar]
    world.log_event(pb.LeaseEnded(task_id=liar, learner="cyd", silent_s=6), "controller")
    world.perform_all()
    (absence,) = counted(world.log)[-1].missing
    assert (absence.learner, "has not come" in absence.reason) == ("cyd", True)


def test_no_reason_however_long_keeps_a_round_from_closing() -> None:
    names = [f"site-{number:03}" for number in range(150)]
    world, the_plan = World(), plan(quorum=1)
    the_plan.learners[:] = names
    world.log_event(the_plan, "driver:d")
    for name in names:
        world.log_event(pb.LearnerJoined(learner=name), f"learner:{name}")
    world.perform_all()
    world.complete("r1.0.initialise.site-000")
    world.perform_all()
    world.complete("r1.1.train.site-000")
    world.log_event(pb.LearnerLeft(learner="site-001", reason="é" * 2000), "learner:site-001")
    for name in names[2:]:
        failed = pb.TaskFailed(task_id=f"r1.1.train.{name}", learner=name, reason="é" * 2000)
        world.log_event(failed, f"learner:{name}")
    world.perform_all()
    closed = counted(world.log)[-1]
    encode(closed)  # raises for what is too long to be an event
    assert all("é" * 20 in absence.reason for absence in closed.missing)


def test_a_learner_that_leaves_is_not_waited_for_and_may_come_back() -> None:
    world = World()
    world.start(plan(rounds=3))
    world.complete("r1.0.initialise.ada")
    world.perform_all()
    assert world.run.model_digest == DIGEST
    world.log_event(pb.LearnerLeft(learner="cyd", reason="reboot"), "learner:cyd")
    for name in ("ada", "bob"):
        world.complete(f"r1.1.train.{name}")
    world.perform_all()
    assert [m.reason for m in counted(world.log)[-1].missing] == ["left: reboot"]
    assert {t.learner for t in world.run.tasks.values()} == {"ada", "bob"}
    world.log_event(pb.LearnerJoined(learner="cyd"), "learner:cyd")
    world.perform_all()
    for name in ("ada", "bob"):
        world.complete(f"r1.1.evaluate.{name}")
    world.perform_all()
    assert {t.learner for t in world.run.tasks.values()} == set(LEARNERS)


def test_what_is_settled_stays_and_what_is_out_of_turn_is_dropped() -> None:
    world = World()
    world.start(plan())
    world.complete("r1.0.initialise.ada")
    world.perform_all()
    done = "r1.1.train.ada"
    world.complete(done)
    before = world.run
    digest = bytes(32)
    invited = [pb.Invitation(learner="ada", task_id="x")]
    for late in (
        pb.LeaseEnded(task_id=done, learner="ada", silent_s=6),
        pb.LeaseEnded(learner="ada", silent_s=6),
        pb.UpdateStored(task_id=done, learner="ada", digest=digest),
        pb.RoundOpened(run_id="r1", round=2, invited=invited),
        pb.RoundOpened(run_id="r1", round=0, invited=invited),
        pb.RoundOpened(run_id="r0", round=2, invited=invited),
        pb.RoundClosed(run_id="r0", round=1, model_digest=digest),
        pb.RoundClosed(run_id="r1", round=1, model_digest=digest),
        pb.RoundClosed(run_id="r1", round=0, model_digest=digest),
        pb.RunFinished(run_id="another", outcome=pb.RunFinished.FAILED),
    ):
        assert world.log_event(late, "controller"), f"{late} is to be dropped with a reason"
        assert world.run == before
    for name in ("bob", "cyd"):
        world.complete(f"r1.1.train.{name}")
    world.perform_all()
    assert world.run.phase is Phase.EVALUATING
    skipping = pb.RoundOpened(run_id="r1", round=3, invited=invited)
    assert "after round 1" in world.log_event(skipping, "controller")
