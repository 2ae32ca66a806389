"""Packets that get lost, some of them or all of one way: the run goes on, and no bit tells.

Other than a wire that is cut, nobody is told: each end only does not hear the other, or hears it
and is not heard. It is the kernel that loses them, so that its retransmissions are real, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemons import Daemons
from google.protobuf.message import Message
from lossy import Network, own_network
from watched import APP, check, watched

from metisfl.deploy.view import View
from metisfl.proto import events_pb2 as pb

pytestmark = pytest.mark.chaos

Undisturbed = Callable[[Daemons, int], str]
SITES = {"ada": "0.15", "bob": "0.2"}
ROUNDS = 3
LOSSY_ROUNDS = 2  # of some ten seconds each: what is lost is sent again after 0.2 s, 0.4 s, ...
PERCENT = 20
DEAF_IN_ROUND = 2
DEAF_S = 6.0  # longer than a client takes to look for another connection


@pytest.fixture
def daemons(tmp_path: Path) -> Daemons:
    """In the default mode, ckks: what is in a packet is nothing to whoever loses it."""
    return Daemons(tmp_path, SITES, encrypted=True, app=APP, started=False)


@contextmanager
def running(daemons: Daemons, *, percent: int) -> Iterator[Network]:
    """All of them in a network of their own that loses packets from the first handshake on."""
    with own_network() as network:
        try:
            if percent:
                network.lose(ports_of(daemons), percent=percent, to=True, from_=True)
            for name in daemons.names:
                daemons.start(name)
            yield network
        finally:
            network.lose_nothing()
            daemons.stop()


def ports_of(daemons: Daemons) -> list[int]:
    ends = (daemons.ingress, daemons.live, daemons.bulk)
    return [int(end.rpartition(":")[2]) for end in ends]


@pytest.mark.timeout(300)
def test_every_fifth_packet_is_lost(daemons: Daemons, undisturbed: Undisturbed) -> None:
    expected = undisturbed(daemons, LOSSY_ROUNDS)
    with running(daemons, percent=PERCENT) as network:
        # A handshake that is lost again and again may cost a site its lease, and it is asked anew.
        view = asyncio.run(watched(daemons, rounds=LOSSY_ROUNDS, deadline_s=240.0))
        lost = network.lose_nothing()
    print(f"{lost} packets were lost")
    assert lost > 20, "hardly a packet was lost: this test shows nothing"
    check(daemons, view, expected)


@pytest.mark.parametrize("heard", ["servers", "clients"])
def test_only_one_side_is_heard_for_a_while(
    daemons: Daemons, undisturbed: Undisturbed, heard: str
) -> None:
    expected = undisturbed(daemons, ROUNDS)
    lost: list[int] = []
    with running(daemons, percent=0) as network:

        def act(before: View, message: Message) -> None:
            if not isinstance(message, pb.RoundOpened) or message.round != DEAF_IN_ROUND:
                return
            ways = {"to": heard == "servers", "from_": heard == "clients"}
            network.lose(ports_of(daemons), percent=100, **ways)
            loop = asyncio.get_running_loop()
            loop.call_later(DEAF_S, lambda: lost.append(network.lose_nothing()))

        view = asyncio.run(watched(daemons, rounds=ROUNDS, act=act))
    assert [packets > 0 for packets in lost] == [True], f"lost packets: {lost}"
    check(daemons, view, expected)
