"""Kill the daemons of a run at moments that a seed chooses, and see how long each is missed.

Rule: broker, controller and two learners are killed once each, with SIGKILL, while the run goes on,
spread over its rounds. The same seed asks for the same victims at the same places of the run; what
they do just then is up to the machine.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import Message

from metisfl.deploy.outages import Outage, kill
from metisfl.deploy.screen import LineScreen
from metisfl.deploy.supervisor import SERVERS
from metisfl.deploy.view import View
from metisfl.proto import events_pb2 as pb

__all__ = ["Chaos", "Moment", "RoundTimes", "moments"]

LEARNERS_KILLED: Final = 2
DOWN_S: Final = 0.01  # between two looks for a victim that something else has ended


@dataclass(frozen=True, slots=True)
class Moment:
    """When to kill whom: `fraction` of an ordinary round's time after the opening of `round`."""

    victim: str
    round: int
    fraction: float


def moments(seed: int, rounds: int, learners: Sequence[str]) -> tuple[Moment, ...]:
    """One for each victim, in order: one in each quarter of the run."""
    luck = random.Random(seed)
    victims = [*SERVERS, *luck.sample(sorted(learners), min(LEARNERS_KILLED, len(learners)))]
    luck.shuffle(victims)
    chosen = []
    for number, victim in enumerate(victims):
        passed = (number + luck.random()) * rounds / len(victims)  # rounds before the kill
        chosen.append(Moment(victim, min(1 + int(passed), rounds), passed % 1.0))
    return tuple(chosen)


class RoundTimes(LineScreen):
    """Plain lines, and how long a round takes: from its opening to the next one's."""

    def __init__(self) -> None:
        self._opened_ns: dict[int, int] = {}

    def show(self, before: View, after: View, message: Message, logged_unix_ns: int) -> None:
        super().show(before, after, message, logged_unix_ns)
        if isinstance(message, pb.RoundOpened):
            self._opened_ns.setdefault(message.round, logged_unix_ns)
        elif isinstance(message, pb.RunFinished):
            self._opened_ns.setdefault(after.round + 1, logged_unix_ns)

    @property
    def median_s(self) -> float:
        """Of all rounds but the first, which builds the model."""
        times = sorted(self._opened_ns[number] for number in self._opened_ns if number > 0)
        return statistics.median(b - a for a, b in itertools.pairwise(times)) / 1e9


class Chaos(LineScreen):
    """Plain lines, and kills. Give `on_started` to `drive`, too."""

    def __init__(self, planned: Sequence[Moment], round_s: float) -> None:
        self.outages: dict[Moment, Outage] = {}
        self._waiting = list(planned)
        self._round_s = round_s
        self._timers: dict[Moment, asyncio.TimerHandle] = {}
        self._pids: Mapping[str, int] = {}

    @property
    def left(self) -> list[str]:
        """Victims that are not killed yet."""
        return [moment.victim for moment in self._waiting]

    def on_started(self, pids: Mapping[str, int]) -> None:
        self._pids = pids

    def show(self, before: View, after: View, message: Message, logged_unix_ns: int) -> None:
        super().show(before, after, message, logged_unix_ns)
        for outage in self.outages.values():
            if outage.saw(message, logged_unix_ns):
                self.say(str(outage))
        if isinstance(message, pb.RoundOpened) and message.round > before.round:
            self._hurry(message.round)
            self._plan(message.round)
        elif isinstance(message, pb.RoundClosed) and message.round == after.rounds:
            self._hurry(message.round + 1)  # the last evaluation: soon there is nothing to disturb

    def _plan(self, round_number: int) -> None:
        loop = asyncio.get_running_loop()
        for moment in self._waiting:
            if moment.round == round_number:
                after_s = moment.fraction * self._round_s
                self._timers[moment] = loop.call_later(after_s, self._kill, moment)

    def _hurry(self, round_number: int) -> None:
        """Rounds were quicker than planned: what was to be before this one is to be now."""
        for moment in [moment for moment in self._waiting if moment.round < round_number]:
            self._kill(moment)

    def _kill(self, moment: Moment) -> None:
        timer = self._timers.pop(moment, None)
        if timer is not None:
            timer.cancel()
        outage = kill(moment.victim, self._pids)
        if outage is None:
            loop = asyncio.get_running_loop()
            self._timers[moment] = loop.call_later(DOWN_S, self._kill, moment)
            return
        self._waiting.remove(moment)
        self.outages[moment] = outage
        self.say(f"SIGKILL for {moment.victim}, {moment.fraction:.2f} into round {moment.round}")
