"""What a person sees follows from the events alone."""

from __future__ import annotations

from types import MappingProxyType

from google.protobuf.message import Message

from metisfl.deploy.view import (
    LearnerView,
    View,
    lines,
    readable_bytes,
    shown_kept,
    shown_metric,
    shown_missing,
)
from metisfl.proto import events_pb2 as pb

ASKED = View("r", 3, MappingProxyType({"ada": LearnerView(), "bob": LearnerView()}))
START = ASKED.after(pb.RunStarted(run_id="r"))


def seen(*messages: Message) -> tuple[View, list[str]]:
    view, printed = START, []
    for message in messages:
        before, view = view, view.after(message)
        printed += lines(before, message)
    return view, printed


def scored(learner: str, accuracy: float, examples: int) -> pb.TaskCompleted:
    metrics = {"test.accuracy": accuracy, "test.examples": float(examples)}
    return pb.TaskCompleted(task_id="t", learner=learner, metrics=metrics)


def closed(number: int) -> pb.RoundClosed:
    return pb.RoundClosed(
        run_id="r",
        round=number,
        counted=[pb.Contribution(learner="ada"), pb.Contribution(learner="bob")],
    )


def test_a_round_is_told_in_one_line_when_it_is_over() -> None:
    view, printed = seen(
        pb.RoundOpened(run_id="r", round=1),
        closed(1),
        scored("ada", 1.0, 1),
        scored("bob", 0.5, 3),
    )
    assert printed == []
    assert shown_metric(view) == "test accuracy 0.625"
    line = "round 1 of 3: 2 of 2 counted, test accuracy 0.625"
    assert lines(view, pb.RoundOpened(run_id="r", round=2)) == [line]
    assert lines(view, pb.RunFinished(run_id="r")) == [line]
    later = view.after(pb.RoundOpened(run_id="r", round=2))
    assert lines(later, pb.RunFinished(run_id="r")) == [], "a round is told once"
    assert later.after(closed(2)).evaluated == {}, "nobody has scored the next model yet"


def test_a_stop_is_told_when_it_is_asked_for_and_only_of_this_run() -> None:
    _, printed = seen(
        pb.RunStopped(run_id="other", reason="lunch"),
        pb.RunStopped(run_id="r", reason="the data are wrong"),
        pb.RunStopped(run_id="r"),
    )
    assert printed == [
        "the run is being stopped: the data are wrong",
        "the run is being stopped: no reason given",
    ]


def test_what_a_stopped_run_leaves_is_its_last_closed_round_or_nothing() -> None:
    kept = shown_kept(pb.RunFinished(run_id="r", rounds=3, model_digest=b"\xab" * 32))
    assert kept.startswith(f"stopped after round 3; the community model of round 3 is {'ab' * 32},")
    assert f"models/{'ab' * 32}.model" in kept
    assert "; the initial model is" in shown_kept(pb.RunFinished(model_digest=bytes(32)))
    assert shown_kept(pb.RunFinished()) == "no round was closed, so there is no model"


def test_a_round_that_nobody_scored_is_told_all_the_same() -> None:
    message = closed(2)
    message.missing.add(learner="cyd", reason="silent for 31.0 s, longer than its lease")
    silent = pb.LeaseEnded(task_id="t", learner="cyd", silent_s=31.2)
    opened = pb.RoundOpened(run_id="r", round=2)
    _, printed = seen(opened, silent, message, pb.RunFinished(run_id="r"))
    assert printed == ["cyd was silent for 31 s", "round 2 of 3: 2 of 3 counted"]


def test_a_round_that_waits_for_its_quorum_says_so_and_keeps_what_it_has() -> None:
    again = pb.RoundOpened(run_id="r", round=2, attempt=1, keeps_updates=True)
    again.invited.add(learner="bob", task_id="u")
    view, printed = seen(pb.RoundOpened(run_id="r", round=2), stored("ada", 7), again)
    assert printed == ["round 2 has 1 updates, fewer than its quorum; asked again: bob"]
    assert dict(view.stored) == {"ada": 7}


def test_a_run_that_waits_with_nobody_at_work_says_once_what_for() -> None:
    stuck = pb.ControllerStatus(run_id="r", waits_for="the quorum: 1 of 2 learners are here")
    busy = pb.ControllerStatus(run_id="r", waits_for="2 learners", awaited_total=2)
    other = pb.ControllerStatus(run_id="s", waits_for="a driver that asks for a run")
    view, printed = seen(busy, stuck, stuck, other, busy)
    assert printed == ["waiting for the quorum: 1 of 2 learners are here"]
    assert view.waits_for == "2 learners"


def test_who_was_not_in_all_rounds_is_named_at_the_end() -> None:
    messages = [closed(0), closed(1), closed(2)]
    for message in messages:
        message.missing.add(learner="cyd", reason="silent", kind="late")
    view, _ = seen(pb.RoundOpened(run_id="r", round=2), *messages)
    assert shown_missing(view.round, view.missed) == ["cyd is not in 2 of 2 rounds: 1, 2"], (
        "round 0 asks one only"
    )


def test_learners_are_shown_as_last_heard_of() -> None:
    view, _ = seen(
        pb.LearnerJoined(learner="ada"),
        pb.TaskAssigned(task_id="t", learner="bob"),
        pb.Progress(task_id="t", learner="bob", state="working", fraction=0.5),
        pb.UpdateStored(task_id="t", learner="bob", update_bytes=1500),
        pb.UpdateStored(task_id="u", learner="bob", update_bytes=1500),
    )
    assert view.learners["ada"].state == "joined"
    bob = view.learners["bob"]
    assert (bob.state, bob.fraction, bob.update_bytes) == ("working", 0.5, 3000)


def stored(learner: str, update_bytes: int) -> pb.UpdateStored:
    return pb.UpdateStored(task_id="t", learner=learner, update_bytes=update_bytes)


def test_what_a_round_uploaded_is_what_is_in_its_model() -> None:
    """Not what came for an attempt that was opened again, nor from who did not count."""
    counted = pb.RoundClosed(run_id="r", round=2, counted=[pb.Contribution(learner="ada")])
    view, _ = seen(
        pb.RoundOpened(run_id="r", round=1),
        stored("ada", 100),
        stored("bob", 10),
        closed(1),
    )
    assert view.uploaded == 110
    for message in (
        pb.RoundOpened(run_id="r", round=2),
        stored("ada", 100),
        pb.RoundOpened(run_id="r", round=2, attempt=1),
        stored("ada", 200),
        stored("ada", 200),
        stored("bob", 20),
    ):
        view = view.after(message)
        if isinstance(message, pb.RoundOpened):
            assert view.stored == {}, "what came before is of another round or attempt"
        assert view.uploaded == 110, "the newest model is still that of round 1"
    assert view.after(counted).uploaded == 200
    assert view.learners["ada"].update_bytes == 600, "all that it sent in the run"


def test_an_update_that_does_not_fit_is_told_with_its_tensor() -> None:
    exceeded = pb.ScaleExceeded(task_id="t", learner="bob", tensor="norm/variance", exponents=[13])
    opened = pb.RoundOpened(run_id="r", round=1)
    view, printed = seen(
        opened,
        asked("bob", "t"),
        exceeded,
        exceeded,
        pb.RoundOpened(run_id="r", round=1, attempt=1),
    )
    assert view.learners["bob"].state == "waiting"
    assert printed == [
        "bob has values in norm/variance beyond the round's scale; the round is opened again with "
        "a larger one"
    ]


def asked(learner: str, task_id: str, run_id: str = "r") -> pb.TaskAssigned:
    return pb.TaskAssigned(run_id=run_id, task_id=task_id, learner=learner)


def failed(learner: str, task_id: str, reason: str = "lie") -> pb.TaskFailed:
    return pb.TaskFailed(learner=learner, task_id=task_id, reason=reason)


def test_a_failure_is_told_once_a_round_of_who_was_asked() -> None:
    view, printed = seen(
        failed("ada", "1.ada"),
        pb.RoundOpened(run_id="r", round=1),
        asked("ada", "1.ada"),
        asked("bob", "1.bob"),
        failed("ada", "1.bob"),
        failed("ada", "0.ada"),
        failed("mallory", "1.mallory"),
    )
    assert printed == [], "nobody has failed in what it was asked"
    assert view.learners["ada"].state == "asked"
    view, printed = seen(
        pb.RoundOpened(run_id="r", round=1),
        asked("ada", "1.ada"),
        failed("ada", "1.ada", "disk full"),
        failed("ada", "1.ada"),
        pb.RoundOpened(run_id="r", round=1, attempt=1),
        asked("ada", "1.again1.ada"),
        failed("ada", "1.again1.ada"),
        asked("bob", "1.again1.bob"),
        failed("bob", "1.again1.bob", "no data"),
    )
    assert printed == ["ada failed: disk full", "bob failed: no data"]
    assert view.learners["ada"].state == "failed"
    view = view.after(pb.RoundOpened(run_id="r", round=2)).after(asked("ada", "2.ada"))
    assert lines(view, failed("ada", "2.ada", "again")) == ["ada failed: again"]


def test_who_has_answered_or_was_asked_by_another_run_has_nothing_to_fail_in() -> None:
    _, printed = seen(
        pb.RoundOpened(run_id="r", round=1),
        asked("ada", "1.ada"),
        pb.TaskCompleted(learner="ada", task_id="1.ada", update_digest=bytes(32)),
        failed("ada", "1.ada"),
        asked("bob", "other.bob", run_id="other"),
        failed("bob", "other.bob"),
    )
    assert printed == []


def test_who_is_left_out_without_having_failed_is_told_once_with_the_reason() -> None:
    first, second = closed(1), closed(2)
    for one in (first, second):
        one.missing.add(learner="cyd", kind="failed", reason="declares 1000000 examples")
        one.missing.add(learner="dan", kind="late", reason="silent")
    _, printed = seen(pb.RoundOpened(run_id="r", round=1), first, second)
    assert printed == ["cyd does not count: declares 1000000 examples"]
    third = closed(1)
    third.missing.add(learner="ada", kind="failed", reason="no data")
    opened = pb.RoundOpened(run_id="r", round=1)
    _, printed = seen(opened, asked("ada", "t"), failed("ada", "t", "no data"), third)
    assert printed == ["ada failed: no data"], "it has told that itself"


def test_another_run_and_strangers_change_nothing() -> None:
    other = pb.RoundClosed(run_id="another", round=9)
    end = pb.RunFinished(run_id="another")
    view, printed = seen(other, end, pb.LearnerJoined(learner="mallory"), scored("mallory", 1.0, 9))
    assert view == START
    assert printed == ["mallory has joined"]


def test_what_the_log_holds_of_earlier_runs_is_not_told() -> None:
    view = ASKED
    for message in (
        pb.LearnerJoined(learner="ada"),
        pb.RunStarted(run_id="earlier"),
        pb.TaskFailed(task_id="t", learner="ada", reason="long ago"),
        pb.RunFinished(run_id="earlier"),
    ):
        assert lines(view, message) == []
        view = view.after(message)
    assert (view.started, view.finished) == (False, None)
    assert view.learners["ada"].state == "joined", "who is there is known"


def test_sizes_are_for_people() -> None:
    assert [readable_bytes(n) for n in (999, 18_400, 3_200_000, 10**9)] == [
        "999 B",
        "18.4 kB",
        "3.2 MB",
        "1.0 GB",
    ]
