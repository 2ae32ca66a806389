"""When chaos kills whom: of each kind the right number, in every part of the run, from the seed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import MappingProxyType

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from metisfl.deploy import chaos
from metisfl.deploy.chaos import Chaos, Moment, RoundTimes, moments
from metisfl.deploy.outages import Outage
from metisfl.deploy.view import LearnerView, View
from metisfl.proto import events_pb2 as pb

LEARNERS = ("ada", "bob", "cyd", "dee")
PIDS = {"broker": 1, "controller": 2, "ada": 3}
ROUNDS = 3


@given(st.integers(0, 2**63 - 1), st.integers(1, 200))
def test_two_servers_and_two_learners_fall_once_each_one_in_each_quarter(
    seed: int, rounds: int
) -> None:
    planned = moments(seed, rounds, LEARNERS)
    assert planned == moments(seed, rounds, tuple(reversed(LEARNERS))), "the seed decides alone"
    victims = [moment.victim for moment in planned]
    assert {"broker", "controller"} < set(victims)
    assert len(set(victims)) == len(victims) == 4
    for number, moment in enumerate(planned):
        passed = moment.round - 1 + moment.fraction
        assert number * rounds / 4 <= passed <= (number + 1) * rounds / 4
        assert 1 <= moment.round <= rounds
        assert 0 <= moment.fraction < 1


def test_every_victim_falls_in_every_quarter_for_some_seed() -> None:
    seen = {
        (number, moment.victim)
        for seed in range(200)
        for number, moment in enumerate(moments(seed, 20, LEARNERS))
    }
    assert len(seen) == 4 * 6


class Run:
    """A run as a screen sees it, and who is killed when."""

    def __init__(self, screen: Chaos | RoundTimes) -> None:
        self.screen = screen
        learners = {name: LearnerView() for name in LEARNERS}
        self.view = View("r", ROUNDS, MappingProxyType(learners), started=True)

    def show(self, message: Message, unix_ns: int = 1) -> None:
        before, self.view = self.view, self.view.after(message)
        self.screen.show(before, self.view, message, unix_ns)

    def open(self, number: int, unix_ns: int = 1) -> None:
        self.show(pb.RoundOpened(run_id="r", round=number), unix_ns)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def kill(victim: str, pids: dict[str, int]) -> Outage | None:
        if victim not in pids:
            return None
        found.append(victim)
        return Outage(victim, 1, 2)

    monkeypatch.setattr(chaos, "kill", kill)
    return found


def story(tell: Callable[[], None]) -> None:
    async def told() -> None:
        tell()

    asyncio.run(told())


def test_a_round_that_ends_too_early_takes_nobody_off_the_list(killed: list[str]) -> None:
    """What was due in it falls at the next opening, and the last at the close of the last round."""

    def tell() -> None:
        screen = Chaos([Moment("broker", 2, 0.9), Moment("ada", 3, 0.9)], round_s=3600)
        screen.on_started(PIDS)
        run = Run(screen)
        run.open(1)
        run.open(2)
        assert killed == []
        run.open(3)
        assert (killed, screen.left) == (["broker"], ["ada"])
        counted = [pb.Contribution(learner="ada")]
        run.show(pb.RoundClosed(run_id="r", round=3, counted=counted))
        assert (killed, screen.left) == (["broker", "ada"], [])

    story(tell)


def test_who_was_killed_early_is_not_killed_again_when_it_was_due(killed: list[str]) -> None:
    async def told() -> None:
        planned = [Moment("broker", 1, 0.1), Moment("ada", 2, 0.1), Moment("controller", 2, 1.0)]
        screen = Chaos(planned, round_s=0.05)
        screen.on_started(PIDS)
        run = Run(screen)
        run.open(1)
        run.open(1)  # again, for a larger scale: nothing is due anew
        run.open(2)
        while "controller" not in killed:  # due later than all others
            await asyncio.sleep(0.001)
        assert killed == ["broker", "ada", "controller"]

    asyncio.run(asyncio.wait_for(told(), 30))


def test_a_kill_comes_so_long_after_the_opening_of_its_round(killed: list[str]) -> None:
    async def told() -> None:
        screen = Chaos([Moment("controller", 1, 0.5), Moment("cyd", 1, 0.5)], round_s=0.02)
        screen.on_started(pids)
        Run(screen).open(1)
        assert killed == [], "not at once"
        while "controller" not in killed:
            await asyncio.sleep(0.001)
        pids["cyd"] = 4  # it was down just then, and is killed when it is back
        while "cyd" not in killed:
            await asyncio.sleep(0.001)
        assert screen.left == []

    pids = dict(PIDS)
    asyncio.run(asyncio.wait_for(told(), 30))


def test_it_says_how_long_each_was_missed(
    killed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def tell() -> None:
        screen = Chaos([Moment("broker", 1, 0.0)], round_s=3600)
        screen.on_started(PIDS)
        run = Run(screen)
        run.open(1)
        run.open(2)
        run.open(3, 1_250_000_001)
        assert [outage.seconds for outage in screen.outages.values()] == [1.25]

    story(tell)
    said = capsys.readouterr().err
    assert "SIGKILL for broker, 0.00 into round 1" in said
    assert said.count("broker was missed for 1.25 s") == 1


def test_the_time_of_a_round_is_from_opening_to_opening() -> None:
    screen = RoundTimes()
    run = Run(screen)
    for number, second in ((0, 0), (1, 10), (2, 12), (2, 15), (3, 16)):  # 2 is opened twice
        run.open(number, second * 1_000_000_000)
    run.show(pb.RunFinished(run_id="r"), 17_000_000_000)
    assert screen.median_s == 2.0
