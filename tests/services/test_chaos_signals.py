"""Each daemon is killed, or stopped for a while, at every kind of event of a round.

The run completes with every update of every site, and with the bits of a run that nobody disturbed.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from daemons import Daemons
from google.protobuf.message import Message
from watched import APP, ROUND_EVENTS, check, watched

from metisfl.deploy.view import View

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

SITES = {"ada": "0.15", "bob": "0.2"}
VICTIMS = {
    "plain": ("broker", "controller", "ada"),
    "ckks": ("controller", "ada"),  # nothing of a broker's depends on the privacy mode
}
DEADLINE_S = 250.0  # for some fifteen kills, one after the other
FIRST = 2  # round 1 is left alone
Undisturbed = Callable[[Daemons, int], str]
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

    def __init__(self, victims: Sequence[str], do: Callable[[str], None]) -> None:
        places = [(kind, victim) for kind in ROUND_EVENTS for victim in victims]
        self.left = dict(enumerate(places, start=FIRST))
        self.rounds = FIRST + len(places)
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


def survives(daemons: Daemons, undisturbed: Undisturbed, do: Callable[[str], None]) -> None:
    act = AtEachPlace(VICTIMS[daemons.privacy], do)
    view = asyncio.run(watched(daemons, rounds=act.rounds, act=act, deadline_s=DEADLINE_S))
    assert act.left == {}, f"nothing was done in these rounds: {act.left}"
    check(daemons, view, undisturbed(daemons, act.rounds))


def test_killed_at_every_kind_of_event(daemons: Daemons, undisturbed: Undisturbed) -> None:
    survives(daemons, undisturbed, daemons.restart)


@pytest.mark.parametrize("daemons", ["plain"], indirect=True)
def test_stopped_for_a_while_at_every_kind_of_event(
    daemons: Daemons, undisturbed: Undisturbed
) -> None:
    """In one mode: who is stopped has lost nothing, encrypted or not."""

    def stop(victim: str) -> None:
        process = daemons.running[victim]
        process.send_signal(signal.SIGSTOP)
        loop = asyncio.get_running_loop()
        loop.call_later(STOPPED_S, process.send_signal, signal.SIGCONT)

    survives(daemons, undisturbed, stop)
