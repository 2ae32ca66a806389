"""A disk that is full for a while: nothing more is accepted, in words, and nothing is lost.

When there is room again the run goes on by itself, and ends with the bits of an undisturbed one.
Who can keep its own state no more ends, and is started again until it can.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from client_stories import until
from daemons import Daemons
from full_disk import SmallDisk, small_disk
from google.protobuf.message import Message
from watched import APP, check, said_by, watched

from metisfl.broker.store import Store
from metisfl.deploy import supervisor as supervisor_module
from metisfl.deploy.database import open_database, transaction
from metisfl.deploy.supervisor import Supervisor
from metisfl.deploy.view import View
from metisfl.proto import events_pb2 as pb
from metisfl.proto.errors import DiskFull

pytestmark = pytest.mark.chaos

SITES = {"ada": "0.3", "bob": "0.3"}
INTO_TRAINING_S = 0.15
ROUNDS = 5
FULL_IN_ROUND = 3
RESERVE_MIB = 64  # what the controller leaves free
LIVES = 2  # that end of a full disk before it is emptied: the second one is told to nobody

Undisturbed = Callable[[Daemons, int], str]
When = Callable[[Message], "float | None"]
"""How many seconds after an event the disk is full, if the event is the one."""


def when_the_round_opens(message: Message) -> float | None:
    opened = isinstance(message, pb.RoundOpened) and message.round == FULL_IN_ROUND
    return 0.0 if opened else None


def when_ada_trains(message: Message) -> float | None:
    if not isinstance(message, pb.TaskAssigned) or message.kind != pb.TRAIN:
        return None
    here = (message.round, message.learner) == (FULL_IN_ROUND, "ada")
    return INTO_TRAINING_S if here else None


in_both_modes = pytest.mark.parametrize("daemons", ["plain", "ckks"], indirect=True)
# What does not know what a model file holds is tried in one mode, the default.
in_one_mode = pytest.mark.parametrize("daemons", ["ckks"], indirect=True)


@pytest.fixture
def daemons(request: pytest.FixtureRequest, tmp_path: Path) -> Daemons:
    return Daemons(tmp_path, SITES, encrypted=request.param == "ckks", app=APP, started=False)


@pytest.fixture
def expected(daemons: Daemons, undisturbed: Undisturbed) -> str:
    return undisturbed(daemons, ROUNDS)


async def survives(
    daemons: Daemons,
    disk: SmallDisk,
    noticed: Callable[[], bool],
    expected: str,
    *,
    when: When = when_the_round_opens,
    also: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Fill the disk in a round, empty it when that was `noticed`, and compare with `expected`."""
    full = asyncio.Event()

    def fill() -> None:
        disk.fill()
        full.set()

    def act(before: View, message: Message) -> None:
        after_s = when(message)
        if after_s is not None:
            asyncio.get_running_loop().call_later(after_s, fill)

    async def empty_once_noticed() -> None:
        await full.wait()
        await until(noticed)
        disk.empty()

    async def meanwhile() -> None:
        await asyncio.gather(empty_once_noticed(), *([also()] if also else []))

    view = await watched(daemons, rounds=ROUNDS, act=act, meanwhile=meanwhile)
    assert full.is_set(), "the disk was never full"
    check(daemons, view, expected)


# --- what a daemon keeps for others: it says that it is full, and lives on


def complaints_of(daemons: Daemons, name: str, words: str) -> list[str]:
    lines = [f"{said['event']} {said}" for said in said_by(daemons, name)]
    return [line for line in lines if words in line.lower()]


def lives_on(
    daemons: Daemons, folder: Path, mib: int, name: str, words: str, expected: str
) -> list[str]:
    """Let `folder` of a daemon be full for a while; return what the daemon said of it."""

    def noticed() -> bool:
        return bool(complaints_of(daemons, name, words))

    with small_disk(folder, mib) as disk:
        try:
            for one in daemons.names:
                daemons.start(one)
            asyncio.run(survives(daemons, disk, noticed, expected))
        finally:
            daemons.stop()
    return complaints_of(daemons, name, words)


@in_one_mode
def test_the_log_of_the_broker(daemons: Daemons, expected: str) -> None:
    log = daemons.homes.broker / "log"
    (told,) = lives_on(daemons, log, 16, "broker", "cannot be stored", expected)
    assert "full" in told


@in_one_mode
@pytest.mark.parametrize("folder", ["spool", "models"])
def test_what_the_controller_keeps(daemons: Daemons, folder: str, expected: str) -> None:
    kept, mib = daemons.homes.controller / folder, RESERVE_MIB + 32
    told = lives_on(daemons, kept, mib, "controller", "make room", expected)
    assert len(told) < 10, f"told again and again: {told}"


# --- a daemon's own state: it ends, and whoever has started it does so again


@in_one_mode
@pytest.mark.parametrize("name", ["controller", "ada"])
def test_whose_state_or_model_finds_no_room_is_started_again(
    daemons: Daemons, name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "FULL_PAUSE_S", 0.3)
    is_started_again(daemons, name, when_the_round_opens, expected)


@in_both_modes
def test_whose_update_finds_no_room_is_started_again(
    daemons: Daemons, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "FULL_PAUSE_S", 0.3)
    is_started_again(daemons, "ada", when_ada_trains, expected)
    assert not complaints_of(daemons, "ada", "task failed"), "a full disk is no failure of a task"


def is_started_again(daemons: Daemons, name: str, when: When, expected: str) -> None:
    home = daemons.homes.learners.get(name, daemons.homes.controller)
    told: list[str] = []

    def ended_twice() -> bool:
        return (daemons.homes.logs / f"{name}.log").read_text().count(": error: ") >= LIVES

    async def story(disk: SmallDisk) -> None:
        supervisor = Supervisor(told.append, spare=0)
        try:
            for one in daemons.names:
                log = daemons.homes.logs / f"{one}.log"
                await supervisor.start(one, *daemons.module_and_options(one), log)
            await survives(daemons, disk, ended_twice, expected, when=when, also=supervisor.watch)
        finally:
            await supervisor.stop()

    with small_disk(home, 16) as disk:
        if name == "controller":  # else what it keeps for others is refused before its own state is
            for kept in ("spool", "models"):
                (daemons.folder / kept).mkdir()
                (home / kept).symlink_to(daemons.folder / kept)
        try:
            asyncio.run(story(disk))
        finally:
            daemons.stop()
    (line,) = told
    assert line.startswith(f"{name} has no room on its disk and goes on by itself"), line
    assert line.endswith("make room on that disk"), line


@pytest.mark.parametrize("state", ["new", "left by one that was killed"])
def test_nothing_is_opened_on_a_full_disk_and_all_of_it_later(tmp_path: Path, state: str) -> None:
    """Neither a database nor the broker's log is taken for a damaged one."""
    with small_disk(tmp_path / "disk", 16) as disk:
        path, log = disk.folder / "state.db", disk.folder / "log"
        if state != "new":
            with closing(open_database(path)) as connection:
                connection.execute("CREATE TABLE fact (x)")
            Store(log).close()
        disk.fill()
        for _ in range(2):
            with pytest.raises(DiskFull, match="make room"):
                commit_one(path)
            with pytest.raises(DiskFull, match=r"make room|cannot be used"):
                Store(log)
        disk.empty()
        assert commit_one(path) == 1
        Store(log).close()


def commit_one(path: Path) -> int:
    with closing(open_database(path)) as connection:
        with transaction(connection):
            connection.execute("CREATE TABLE IF NOT EXISTS fact (x)")
            connection.execute("INSERT INTO fact VALUES (randomblob(100000))")
        (count,) = connection.execute("SELECT count(*) FROM fact").fetchone()
        return int(count)
