"""Daemons that are killed are back with the same options; what cannot go on ends with its words."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from metisfl.deploy import supervisor as module
from metisfl.deploy.restarts import KILLS_MAX
from metisfl.deploy.supervisor import Supervisor
from metisfl.proto.errors import DiskFull, MachineError, PeerError

# Notes each of its lives in a file; ends as `--end` says, and lives on once it has had `--lives`.
MORTAL = """
import argparse, os, signal
parser = argparse.ArgumentParser()
for name in ("lives", "end", "book"):
    parser.add_argument(f"--{name}")
options = parser.parse_args()
with open(options.book, "a") as book:
    book.write(f"{options.lives} {options.end}\\n")
if len(open(options.book).readlines()) >= int(options.lives):
    signal.pause()
print("what it said last", flush=True)
if options.end.startswith("-"):
    os.kill(os.getpid(), -int(options.end))
raise SystemExit(int(options.end))
"""
FOR_EVER = 1000


class Mortals:
    """Daemons that end, their books of lives, and what the user is told."""

    def __init__(self, folder: Path, spare: int) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.supervisor = Supervisor(self.said.append, spare=spare)

    async def start(self, name: str, *, lives: int, end: int) -> None:
        options = {"lives": str(lives), "end": str(end), "book": str(self.book(name))}
        await self.supervisor.start(name, "mortal", options, self.folder / f"{name}.log")

    def book(self, name: str) -> Path:
        return self.folder / f"{name}.book"

    def lives(self, name: str) -> list[str]:
        return self.book(name).read_text().splitlines()

    async def watch(self) -> None:
        try:
            await asyncio.wait_for(self.supervisor.watch(), 30)
        finally:
            await self.supervisor.stop()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mortal.py").write_text(MORTAL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_who_is_killed_is_back_with_the_same_options_and_the_user_is_told(folder: Path) -> None:
    async def story() -> Mortals:
        mortals = Mortals(folder, spare=0)
        await mortals.start("broker", lives=3, end=-signal.SIGSEGV)
        first = mortals.supervisor.pids["broker"]
        watching = asyncio.ensure_future(mortals.watch())
        while not mortals.book("broker").exists() or len(mortals.lives("broker")) < 3:
            await asyncio.sleep(0.01)
        assert mortals.supervisor.pids["broker"] not in (first, os.getpid())
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        return mortals

    mortals = asyncio.run(story())
    assert mortals.said == ["broker was killed (SIGSEGV); started again"] * 2
    assert mortals.lives("broker") == [f"3 {-signal.SIGSEGV}"] * 3


def test_a_full_disk_is_waited_out_and_told_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even more often than kills are forgiven, and while others are looked after as ever."""
    monkeypatch.setattr(module, "FULL_PAUSE_S", 0.05)
    lives = KILLS_MAX + 3

    async def story() -> Mortals:
        mortals = Mortals(folder, spare=0)
        await mortals.start("controller", lives=lives, end=DiskFull.exit_code)
        await mortals.start("ada", lives=2, end=-signal.SIGKILL)
        watching = asyncio.ensure_future(mortals.watch())
        for name, wanted in (("controller", lives), ("ada", 2)):
            while not mortals.book(name).exists() or len(mortals.lives(name)) < wanted:
                await asyncio.sleep(0.01)
        assert set(mortals.supervisor.pids) == {"controller", "ada"}
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        return mortals

    mortals = asyncio.run(story())
    assert sorted(mortals.said) == [
        "ada was killed (SIGKILL); started again",
        "controller has no room on its disk and goes on by itself when there is some: what it "
        "said last",
    ]


def test_who_waits_for_room_delays_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FULL_PAUSE_S", 3600.0)

    async def story() -> Mortals:
        mortals = Mortals(folder, spare=0)
        await mortals.start("controller", lives=FOR_EVER, end=DiskFull.exit_code)
        await mortals.start("broker", lives=2, end=-signal.SIGKILL)
        watching = asyncio.ensure_future(mortals.watch())
        while len(mortals.said) < 2:
            await asyncio.sleep(0.01)
        assert set(mortals.supervisor.pids) == {"broker"}
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        return mortals

    assert len(asyncio.run(story()).lives("controller")) == 1


def test_a_server_that_ends_by_itself_ends_the_run_with_its_last_words(folder: Path) -> None:
    async def story() -> None:
        mortals = Mortals(folder, spare=5)
        await mortals.start("controller", lives=FOR_EVER, end=4)
        await mortals.watch()

    with pytest.raises(PeerError, match=r"(?s)controller ended \(exit code 4\).*it said last"):
        asyncio.run(story())


def test_who_is_killed_again_and_again_is_given_up(folder: Path) -> None:
    mortals: list[Mortals] = []

    async def story() -> None:
        mortals.append(Mortals(folder, spare=5))
        await mortals[0].start("broker", lives=FOR_EVER, end=-signal.SIGKILL)
        await mortals[0].watch()

    with pytest.raises(MachineError, match=rf"(?s)killed {KILLS_MAX + 1} times .*it said last"):
        asyncio.run(story())
    assert len(mortals[0].lives("broker")) == KILLS_MAX + 1
    assert len(mortals[0].said) == KILLS_MAX


def test_as_many_learners_may_be_lost_as_the_quorum_spares(folder: Path) -> None:
    mortals: list[Mortals] = []

    async def story(learners: int) -> None:
        mortals.append(Mortals(folder, spare=2))
        for name in ("ada", "bob", "cyd")[:learners]:
            await mortals[-1].start(name, lives=FOR_EVER, end=3)
        await mortals[-1].watch()

    asyncio.run(story(2))
    assert len(mortals[-1].said) == 2
    with pytest.raises(MachineError, match=r"ended \(exit code 3\)"):
        asyncio.run(story(3))
    assert [line.partition(" ")[2].partition(";")[0] for line in mortals[-1].said] == [
        "ended (exit code 3)",
        "ended (exit code 3)",
    ]
