"""The bench kills one daemon at a time, and none before the one before is back."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import MappingProxyType
from typing import Any

import pytest
from google.protobuf.message import Message

from metisfl.deploy import recovery_screen
from metisfl.deploy.outages import Outage
from metisfl.deploy.recovery_screen import Strike, Strikes
from metisfl.deploy.view import LearnerView, View
from metisfl.proto import events_pb2 as pb

BACK_NS = 1_000_000_000


class Run:
    def __init__(self, strikes: Strikes) -> None:
        self.strikes = strikes
        self.view = View("r", 100, MappingProxyType({"ada": LearnerView()}), started=True)

    async def show(self, message: Message, unix_ns: int) -> None:
        before, self.view = self.view, self.view.after(message)
        self.strikes.show(before, self.view, message, unix_ns)
        for _ in range(3):
            await asyncio.sleep(0)  # a timer of no time at all fires

    async def open(self, number: int, unix_ns: int = 1) -> None:
        await self.show(pb.RoundOpened(run_id="r", round=number), unix_ns)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def kill(victim: str, pids: dict[str, int]) -> Outage | None:
        if victim not in pids:
            return None
        found.append(victim)
        return Outage(victim, 1, 2)

    monkeypatch.setattr(recovery_screen, "kill", kill)
    return found


def told(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 30))


def test_one_after_the_other_from_round_2_on(killed: list[str]) -> None:
    strikes = Strikes([Strike("broker", 0), Strike("controller", 0)], lambda: None)
    strikes.on_started({"broker": 1, "controller": 2})

    async def story() -> None:
        run = Run(strikes)
        await run.open(0)
        await run.open(1)
        assert killed == []
        await run.open(2)
        assert killed == ["broker"]
        await run.open(3)
        assert killed == ["broker"], "it has shown no sign of life yet"
        await run.open(4, BACK_NS)
        assert killed == ["broker", "controller"]
        await run.open(5, 2 * BACK_NS)
        assert strikes.left == []
        assert all(outage.over for outage in strikes.outages)

    told(story())


def test_in_a_round_without_a_victim_something_else_is_measured(killed: list[str]) -> None:
    measured: list[str] = []
    strikes = Strikes([Strike("", 0), Strike("broker", 0)], lambda: measured.append("now"))
    strikes.on_started({"broker": 1})

    async def story() -> None:
        run = Run(strikes)
        await run.open(2)
        assert (measured, killed) == (["now"], [])
        await run.open(3)
        assert (measured, killed) == (["now"], ["broker"])

    told(story())


def test_who_is_down_by_itself_is_struck_in_the_next_round(killed: list[str]) -> None:
    strikes = Strikes([Strike("ada", 0)], lambda: None)

    async def story() -> None:
        run = Run(strikes)
        await run.open(2)
        assert [strike.victim for strike in strikes.left] == ["ada"]
        strikes.on_started({"ada": 3})
        await run.open(3)
        assert (killed, strikes.left) == (["ada"], [])

    told(story())
