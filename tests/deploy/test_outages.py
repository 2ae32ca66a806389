"""What ends an outage: a sign that only the next life can have given."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from google.protobuf.message import Message

from metisfl.deploy.outages import IN_FLIGHT_S, Outage, kill
from metisfl.proto import events_pb2 as pb

KILLED_NS, DEAD_NS = 1_000_000_000, 1_010_000_000
LATE_NS = DEAD_NS + int(IN_FLIGHT_S * 1e9)
DONE = pb.TaskCompleted(task_id="t", learner="ada")
PROGRESS = pb.Progress(task_id="t", learner="ada", state="working")
JOINED = pb.LearnerJoined(learner="ada")


def outage(victim: str) -> Outage:
    return Outage(victim, KILLED_NS, DEAD_NS)


@pytest.mark.parametrize(
    ("victim", "message", "unix_ns"),
    [
        ("broker", DONE, DEAD_NS - 1),  # the old broker has stored it
        ("broker", PROGRESS, 0),  # a beat has no time
        ("controller", DONE, LATE_NS + 1),  # a learner's
        ("controller", pb.RoundOpened(), LATE_NS - 1),  # may have been on its way
        ("controller", pb.ControllerStatus(), 0),
        ("ada", DONE, LATE_NS + 1),  # it has not joined again: this was on its way
        ("ada", JOINED, LATE_NS + 1),
        ("ada", pb.UpdateStored(learner="ada"), LATE_NS + 1),  # the controller's
    ],
)
def test_what_the_former_life_may_have_caused_is_no_sign(
    victim: str, message: Message, unix_ns: int
) -> None:
    found = outage(victim)
    found.saw(message, unix_ns)
    assert not found.over


def test_the_first_record_of_the_next_life_ends_it() -> None:
    for victim, message in (("broker", DONE), ("controller", pb.RoundOpened())):
        found = outage(victim)
        found.saw(message, KILLED_NS + 1_500_000_000)
        found.saw(message, KILLED_NS + 9_000_000_000)
        assert found.seconds == 1.5, victim


@pytest.mark.parametrize("message", [DONE, pb.TaskFailed(learner="ada")])
def test_a_learner_is_back_when_it_has_joined_and_works(message: Message) -> None:
    found = outage("ada")
    found.saw(JOINED, DEAD_NS - 1)  # of the former life
    found.saw(message, LATE_NS)
    assert not found.over
    found.saw(JOINED, LATE_NS)
    found.saw(pb.Heartbeat(learner="ada"), 0)
    found.saw(pb.TaskCompleted(learner="bob"), LATE_NS)
    assert not found.over
    found.saw(message, KILLED_NS + 2_000_000_000)
    assert found.seconds == 2.0


def test_progress_counts_when_it_comes() -> None:
    found = outage("ada")
    found.saw(JOINED, LATE_NS)
    found.saw(PROGRESS, 0)
    assert found.over


def test_who_is_killed_is_dead_then() -> None:
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as process:
        found = kill("ada", {"ada": process.pid})
        assert found is not None
        assert found.victim == "ada"
        assert 0 < found.killed_ns <= found.dead_ns
        assert process.wait() == -signal.SIGKILL
    assert kill("ada", {}) is None, "it is down already"
    assert kill("ada", {"ada": process.pid}) is None, "its process has gone"
