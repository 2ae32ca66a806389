"""Clocks that jump, forth and back, by days: no lease ends of it, and no bit changes.

Only the wall clock jumps; the monotonic one, by which leases run, cannot on a real machine either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import Daemons
from google.protobuf.message import Message
from watched import APP, check, said_by, watched

from metisfl.deploy.view import View
from metisfl.proto import events_pb2 as pb

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
pytestmark = pytest.mark.chaos

SITES = {"ada": "0.5", "bob": "0.5"}  # three rounds are longer than a jump takes to be seen
JUMPS = {
    1: ("broker", "+1d"),
    2: ("controller", "-1d"),
    3: ("ada", "+400d"),
    4: ("broker", "-1d"),
    5: ("controller", "+1h"),
    6: ("ada", "-400d"),
}
ROUNDS = 8


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    """Encrypted, as is the default: whose clock says what is asked by no privacy mode."""
    assert LIBRARIES, "libfaketime is missing: apt-get install faketime"
    daemons = Daemons(tmp_path, SITES, encrypted=True, app=APP, started=False)
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


def test_jumping_clocks_disturb_nothing(
    daemons: Daemons, undisturbed: Callable[[Daemons, int], str]
) -> None:
    left = dict(JUMPS)

    def act(before: View, message: Message) -> None:
        if isinstance(message, pb.TaskAssigned) and message.round in left:
            set_clock(daemons, *left.pop(message.round))

    view = asyncio.run(watched(daemons, rounds=ROUNDS, act=act))
    assert left == {}
    check(daemons, view, undisturbed(daemons, ROUNDS))
    days = {str(said["timestamp"])[:10] for said in said_by(daemons, "ada")}
    assert len(days) > 1, f"its clock has not jumped: all it said was on {days}"
