"""Clocks that jump, forth and back, by days: no lease ends of it, and no bit changes.

Only the wall clock jumps; the monotonic one, by which leases run, cannot on a real machine either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Daemons
from google.protobuf.message import Message
from watched import APP, check, digest_of, said_by, watched

from metisfl.deploy.view import View
from metisfl.proto import events_pb2 as pb

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
pytestmark = pytest.mark.chaos

SITES = {"ada": "0.15", "bob": "0.2"}
JUMPS = {
    2: ("broker", "+1d"),
    4: ("controller", "-1d"),
    6: ("ada", "+400d"),
    8: ("broker", "-1d"),
    10: ("controller", "+1h"),
    12: ("ada", "-400d"),
}
ROUNDS = 16


@pytest.fixture(params=["plain", "ckks"])
def daemons(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemons]:
    assert LIBRARIES, "libfaketime is missing: apt-get install faketime"
    encrypted = request.param == "ckks"
    daemons = Daemons(tmp_path, SITES, encrypted=encrypted, app=APP, started=False)
    for name in daemons.names:
        set_clock(daemons, name, "+0")
        daemons.environments[name] = {
            "LD_PRELOAD": str(LIBRARIES[-1]),
            "FAKETIME_TIMESTAMP_FILE": str(clock_of(daemons, name)),
            "FAKETIME_CACHE_DURATION": "1",  # seconds until a jump is seen
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        daemons.start(name)
    try:
        yield daemons
    finally:
        daemons.stop()


def clock_of(daemons: Daemons, name: str) -> Path:
    return daemons.folder / f"{name}.clock"


def set_clock(daemons: Daemons, name: str, offset: str) -> None:
    """At once for every reader: the file is replaced, never half written."""
    written = clock_of(daemons, name).with_suffix(".new")
    written.write_text(offset)
    written.replace(clock_of(daemons, name))


def test_jumping_clocks_disturb_nothing(daemons: Daemons) -> None:
    left = dict(JUMPS)

    def act(before: View, message: Message) -> None:
        if isinstance(message, pb.TaskAssigned) and message.round in left:
            set_clock(daemons, *left.pop(message.round))

    async def story() -> None:
        undisturbed = digest_of(daemons, await watched(daemons, rounds=ROUNDS))
        view = await watched(daemons, rounds=ROUNDS, act=act)
        assert left == {}
        check(daemons, view, undisturbed)

    asyncio.run(story())
    days = {str(said["timestamp"])[:10] for said in said_by(daemons, "ada")}
    assert len(days) > 1, f"its clock has not jumped: all it said was on {days}"
