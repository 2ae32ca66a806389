"""Kill the daemons of a bench's run one after the other, each at another place of a round.

Rule: one outage at a time. The next victim falls in a round that was opened after the one before
had shown a sign of life, so that every figure is of one daemon's return.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import Message

from metisfl.deploy.outages import Outage, kill
from metisfl.deploy.screen import LineScreen
from metisfl.deploy.view import View
from metisfl.proto import events_pb2 as pb

__all__ = ["Strike", "Strikes"]


@dataclass(frozen=True, slots=True)
class Strike:
    """Kill `victim` so long after a round was opened; "" for a round in which `meanwhile` runs."""

    victim: str
    after_s: float


class Strikes(LineScreen):
    """Says little, and strikes from round 2 on. Give `on_started` to `drive`, too."""

    def __init__(self, planned: Sequence[Strike], meanwhile: Callable[[], None]) -> None:
        self.outages: list[Outage] = []
        self.left = list(planned)
        self._meanwhile = meanwhile
        self._pids: Mapping[str, int] = {}
        self._striking: asyncio.TimerHandle | None = None

    def on_started(self, pids: Mapping[str, int]) -> None:
        self._pids = pids

    def show(self, before: View, after: View, message: Message, logged_unix_ns: int) -> None:
        for outage in self.outages[-1:]:
            if outage.saw(message, logged_unix_ns):
                self.say(str(outage))
        opened = isinstance(message, pb.RoundOpened) and message.round > max(1, before.round)
        if opened and self.left and self._striking is None and self._all_back:
            loop = asyncio.get_running_loop()
            self._striking = loop.call_later(self.left[0].after_s, self._strike)

    @property
    def _all_back(self) -> bool:
        return all(outage.over for outage in self.outages)

    def _strike(self) -> None:
        self._striking = None
        strike = self.left[0]
        if not strike.victim:
            self._meanwhile()
        elif (outage := kill(strike.victim, self._pids)) is not None:
            self.outages.append(outage)
        else:
            return  # it is down by itself: the next round will do
        self.left.pop(0)
