"""Each daemon is killed, or stopped for a while, at every kind of event of a round.

The run completes with every update of every site, and with the bits of a run that nobody disturbed.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import Daemons
from google.protobuf.message import Message
from watched import APP, ROUND_EVENTS, check, digest_of, watched

from metisfl.deploy.view import View

pytestmark = pytest.mark.chaos

SITES = {"ada": "0.15", "bob": "0.2"}
VICTIMS = ("broker", "controller", "ada")
PLACES = [(kind, victim) for kind in ROUND_EVENTS for victim in VICTIMS]
FIRST = 2  # round 1 is left alone
ROUNDS = FIRST + len(PLACES)
STOPPED_S = 1.5  # longer than a client waits before it looks for another connection


@pytest.fixture(params=["plain", "ckks"])
def daemons(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemons]:
    daemons = Daemons(tmp_path, SITES, encrypted=request.param == "ckks", app=APP)
    try:
        yield daemons
    finally:
        daemons.stop()


class AtEachPlace:
    """Does it to each victim at each kind of event once, one in a round."""

    def __init__(self, do: Callable[[str], None]) -> None:
        self.left = dict(enumerate(PLACES, start=FIRST))
        self._do = do

    def __call__(self, before: View, message: Message) -> None:
        number = getattr(message, "round", before.round)
        kind, victim = self.left.get(number, (None, ""))
        if kind is None or type(message) is not kind:
            return
        if victim in SITES and getattr(message, "learner", victim) != victim:
            return
        del self.left[number]
        print(f"round {number}, {kind.__name__}: {victim}")
        self._do(victim)


async def same_as_undisturbed(daemons: Daemons, act: AtEachPlace) -> None:
    undisturbed = digest_of(daemons, await watched(daemons, rounds=ROUNDS))
    view = await watched(daemons, rounds=ROUNDS, act=act)
    assert act.left == {}, f"nothing was done in these rounds: {act.left}"
    check(daemons, view, undisturbed)


def test_killed_at_every_kind_of_event(daemons: Daemons) -> None:
    asyncio.run(same_as_undisturbed(daemons, AtEachPlace(daemons.restart)))


def test_stopped_for_a_while_at_every_kind_of_event(daemons: Daemons) -> None:
    def stop(victim: str) -> None:
        process = daemons.running[victim]
        process.send_signal(signal.SIGSTOP)
        loop = asyncio.get_running_loop()
        loop.call_later(STOPPED_S, process.send_signal, signal.SIGCONT)

    asyncio.run(same_as_undisturbed(daemons, AtEachPlace(stop)))
