"""A disk that is full for a while: nothing more is accepted, in words, and nothing is lost.

When there is room again the run goes on by itself, and ends with the bits of an undisturbed one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from client_stories import until
from daemons import Daemons
from full_disk import SmallDisk, small_disk
from google.protobuf.message import Message
from watched import APP, check, digest_of, said_by, watched

from metisfl.deploy.view import View
from metisfl.proto import events_pb2 as pb

pytestmark = pytest.mark.chaos

SITES = {"ada": "0.15", "bob": "0.2"}
ROUNDS = 6
FULL_IN_ROUND = 3
RESERVE_MIB = 64  # what the controller leaves free


@pytest.fixture(params=["plain", "ckks"])
def daemons(request: pytest.FixtureRequest, tmp_path: Path) -> Daemons:
    return Daemons(tmp_path, SITES, encrypted=request.param == "ckks", app=APP, started=False)


def complaints_of(daemons: Daemons, name: str, words: str) -> list[str]:
    lines = [f"{said['event']} {said}" for said in said_by(daemons, name)]
    return [line for line in lines if words in line.lower()]


async def survives(daemons: Daemons, disk: SmallDisk, said: Callable[[], bool]) -> None:
    """Fill the disk in a round, empty it when `said` tells that it was noticed, and compare."""
    for name in daemons.names:
        daemons.start(name)
    undisturbed = digest_of(daemons, await watched(daemons, rounds=ROUNDS))
    full = asyncio.Event()

    def act(before: View, message: Message) -> None:
        opened = isinstance(message, pb.RoundOpened) and message.round == FULL_IN_ROUND
        if opened and not full.is_set():
            disk.fill()
            full.set()

    async def empty_once_noticed() -> None:
        await full.wait()
        await until(said)
        disk.empty()

    view = await watched(daemons, rounds=ROUNDS, act=act, meanwhile=empty_once_noticed)
    check(daemons, view, undisturbed)


def test_the_log_of_the_broker(daemons: Daemons) -> None:
    def said() -> bool:
        return bool(complaints_of(daemons, "broker", "cannot be stored"))

    with small_disk(daemons.homes.broker / "log", mib=16) as disk:
        try:
            asyncio.run(survives(daemons, disk, said))
        finally:
            daemons.stop()
    (told,) = complaints_of(daemons, "broker", "cannot be stored")
    assert "full" in told


@pytest.mark.parametrize("folder", ["spool", "models"])
def test_what_the_controller_keeps(daemons: Daemons, folder: str) -> None:
    def said() -> bool:
        return bool(complaints_of(daemons, "controller", "make room"))

    with small_disk(daemons.homes.controller / folder, mib=RESERVE_MIB + 32) as disk:
        try:
            asyncio.run(survives(daemons, disk, said))
        finally:
            daemons.stop()
    told = complaints_of(daemons, "controller", "make room")
    assert len(told) < 10, f"told again and again: {told}"
