"""Connections that are cut, stall or are left half open: the run goes on over new ones.

Every wire of a federation (to the broker's ingress and live feed, to the controller's bulk end) has
every fault once, at different events of a round, and no bit of the final model tells. What is on a
wire does not depend on the privacy mode: it is the default one, ckks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from daemons import Daemons
from google.protobuf.message import Message
from watched import APP, check, watched
from wire import Wire

from metisfl.deploy.view import View
from metisfl.proto import events_pb2 as pb

pytestmark = pytest.mark.chaos

SITES = {"ada": "0.15", "bob": "0.2"}
NAMES = ("ingress", "live", "bulk")
STALLED_S = 2.0


def cut(wire: Wire) -> None:
    wire.cut()


def stall(wire: Wire) -> None:
    wire.stall()
    asyncio.get_running_loop().call_later(STALLED_S, wire.go_on)


def lose_the_server(wire: Wire) -> None:
    wire.half_open(near=True)


def lose_the_clients(wire: Wire) -> None:
    wire.half_open(near=False)


FAULTS: tuple[Callable[[Wire], None], ...] = (cut, stall, lose_the_server, lose_the_clients)
KINDS = (pb.RoundOpened, pb.TaskCompleted, pb.RoundClosed)
PLACES = [
    (fault, name, KINDS[(number + offset) % len(KINDS)])
    for number, fault in enumerate(FAULTS)
    for offset, name in enumerate(NAMES)
]
FIRST = 2
ROUNDS = FIRST + len(PLACES)


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    daemons = Daemons(tmp_path, SITES, encrypted=True, app=APP, wires=True, started=False)
    try:
        yield daemons
    finally:
        daemons.stop()


def test_every_fault_of_every_wire(
    daemons: Daemons, undisturbed: Callable[[Daemons, int], str]
) -> None:
    far = {"ingress": daemons.ingress, "live": daemons.live, "bulk": daemons.bulk}
    wires = {name: Wire(far[name], daemons.near[name]) for name in NAMES}
    left = dict(enumerate(PLACES, start=FIRST))

    def act(before: View, message: Message) -> None:
        number = getattr(message, "round", before.round)
        if number in left and type(message) is left[number][2]:
            fault, name, _ = left.pop(number)
            print(f"round {number}: {fault.__name__} of {name}")
            fault(wires[name])

    async def story() -> None:
        async with AsyncExitStack() as stack:
            for wire in wires.values():
                await wire.open()
                stack.push_async_callback(wire.close)
            for name in daemons.names:
                daemons.start(name)
            view = await watched(daemons, rounds=ROUNDS, act=act)
            assert left == {}, f"nothing happened in these rounds: {left}"
            check(daemons, view, expected)

    expected = undisturbed(daemons, ROUNDS)
    asyncio.run(story())
