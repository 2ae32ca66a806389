"""`metisfl stop`: which run it means follows from the log, and what it says from the run's end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf.message import Message

from metisfl.deploy.stop_command import Runs, as_json, chosen, command, line
from metisfl.proto import events_pb2 as pb
from metisfl.proto.errors import UserError

WHY = "stopped by driver:ops: the data are wrong"


def log(*events: tuple[str, Message]) -> Runs:
    runs = Runs()
    for publisher, message in events:
        runs = runs.after(publisher, message)
    return runs


def started(run_id: str) -> tuple[str, Message]:
    return "driver:ops", pb.RunStarted(run_id=run_id)


def ended(run_id: str, outcome: int = pb.RunFinished.COMPLETED) -> tuple[str, Message]:
    return "controller", pb.RunFinished(run_id=run_id, outcome=outcome)  # type: ignore[arg-type]


def test_the_run_under_way_is_the_one_that_was_begun_first_and_has_not_ended() -> None:
    runs = log(started("r1"), ended("r1"), started("r2"), started("r3"))
    assert chosen("f", runs, "", None) == "r2", "r3 is refused, since r2 is under way"
    assert chosen("f", log(started("r1"), started("r2"), ended("r2")), "", None) == "r1"


def test_a_long_run_whose_beginning_the_log_has_forgotten_is_known_by_its_rounds() -> None:
    runs = log(("controller", pb.RoundClosed(run_id="r1", round=7)))
    assert chosen("f", runs, "", None) == "r1"


@pytest.mark.parametrize("phase", ["gathering", "training", "opening", "evaluating", "stopping"])
def test_where_the_log_has_forgotten_all_of_it_the_controller_knows(phase: str) -> None:
    told = pb.ControllerStatus(run_id="r1", phase=phase)
    for wanted in ("", "r1"):
        assert chosen("f", Runs(), wanted, told) == "r1"
    with pytest.raises(UserError, match="under way is r1"):
        chosen("f", Runs(), "r2", told)


def test_what_the_controller_said_before_its_run_ended_is_not_believed() -> None:
    told = pb.ControllerStatus(run_id="r1", phase="training")
    with pytest.raises(UserError, match="no run of f is under way"):
        chosen("f", log(ended("r1")), "", told)


def test_without_a_run_there_is_nothing_to_stop() -> None:
    over = pb.ControllerStatus(run_id="r1", phase="finished")
    for runs, told in ((Runs(), None), (log(started("r1"), ended("r1")), None), (Runs(), over)):
        with pytest.raises(UserError, match="no run of f is under way: there is nothing to stop"):
            chosen("f", runs, "", told)


def test_a_run_is_named_or_not_known_and_then_the_one_under_way_is() -> None:
    runs = log(started("r1"), ended("r1"), started("r2"))
    assert [chosen("f", runs, one, None) for one in ("r1", "r2")] == ["r1", "r2"]
    with pytest.raises(UserError, match="--run r9: f knows no such run; under way is r2"):
        chosen("f", runs, "r9", None)
    with pytest.raises(UserError, match="no run is under way"):
        chosen("f", Runs(), "r9", None)


def test_a_run_is_being_stopped_when_a_driver_has_said_so_while_it_was_under_way() -> None:
    stop = pb.RunStopped(run_id="r1")
    assert log(started("r1"), ("driver:eve", stop)).stopping == {"r1"}
    assert log(started("r1"), ("learner:ada", stop)).stopping == set()
    assert log(("driver:eve", stop), started("r1")).stopping == set(), "that one was in vain"


def test_nobody_but_a_controller_ends_a_run() -> None:
    runs = log(started("r1"), ("driver:eve", ended("r1")[1]), ("learner:ada", ended("r1")[1]))
    assert (runs.open, dict(runs.ended)) == (("r1",), {})


def test_the_end_says_who_stopped_the_run_and_what_is_kept() -> None:
    digest = bytes(range(32))
    end = pb.RunFinished(
        run_id="r1", outcome=pb.RunFinished.STOPPED, reason=WHY, rounds=3, model_digest=digest
    )
    first, second = line(end).splitlines()
    assert first == f"run r1 was {WHY}"
    assert second.startswith("stopped after round 3; the community model of round 3 is 000102")
    assert json.loads(json.dumps(as_json(end))) == {
        "run_id": "r1",
        "outcome": "STOPPED",
        "reason": WHY,
        "rounds": 3,
        "model_digest": digest.hex(),
        "record": "",
    }


def test_a_run_that_had_ended_by_itself_says_how() -> None:
    end = pb.RunFinished(run_id="r1", outcome=pb.RunFinished.COMPLETED, rounds=9)
    assert line(end) == "run r1 had completed before it was stopped, after round 9"
    end = pb.RunFinished(run_id="r1", outcome=pb.RunFinished.FAILED, reason="no quorum")
    assert line(end) == "run r1 had failed before it was stopped, after round 0: no quorum"


def test_a_reason_that_is_too_long_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--reason: at most 2000 characters"):
        command([str(tmp_path / "f.toml"), "--reason", "x" * 2001])
