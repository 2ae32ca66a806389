"""Virtual time: what happens next, and the nodes it happens to.

Law: everything that happens is an entry in one queue, taken in the order of its time, and every
choice comes from one generator. The same seed gives the same history, event for event.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from typing import Any, Final

__all__ = ["Broken", "Crashed", "Node", "Scheduler"]

STEPS_MAX: Final = 400_000  # of one world; more is a storm of messages
UNIX_NS: Final = 1_700_000_000 * 10**9


class Broken(AssertionError):
    """A law of the system does not hold. `law` is its number in the README."""

    def __init__(self, law: str, story: str) -> None:
        super().__init__(f"{law}: {story}")
        self.law, self.story = law, story


class Crashed(Exception):
    """Raised inside a node at the moment of its death, so that nothing after it is done."""

    def __init__(self, node: Node, *, power_cut: bool, down_s: float) -> None:
        super().__init__(node.name)
        self.node, self.power_cut, self.down_s = node, power_cut, down_s


class Scheduler:
    """The clock and the queue. `calm` is true once all faults are over for good."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.calm = False
        self.crash_chance = 0.0  # at each crash point
        self.history: list[tuple[float, str, str, tuple[Any, ...]]] = []
        self._queue: list[tuple[float, int, Node | None, int, Callable[..., None], Any]] = []
        self._number = 0

    def at(self, time: float, node: Node | None, call: Callable[..., None], *args: Any) -> None:
        """Call it then, unless `node` has died meanwhile; a frozen node does it when it thaws."""
        self._number += 1
        life = node.life if node is not None else 0
        heapq.heappush(self._queue, (time, self._number, node, life, call, args))

    def run(self, done: Callable[[], bool]) -> None:
        """Let things happen until `done`. Raises Broken for a storm or a standstill."""
        steps, queue = 0, self._queue
        while not done():
            if not queue:
                raise Broken("I4", "nothing is left to happen, and the run has not ended")
            time, number, node, life, call, args = heapq.heappop(queue)
            if node is not None:
                if node.life != life:
                    continue
                if node.frozen_until > time:
                    entry = (node.frozen_until, number, node, life, call, args)
                    heapq.heappush(queue, entry)
                    continue
            self.now = time
            steps += 1
            if steps > STEPS_MAX:
                raise Broken("I4", f"{STEPS_MAX} steps and no end: a storm of messages")
            try:
                call(*args)
            except Crashed as crash:
                crash.node.crash(power_cut=crash.power_cut, down_s=crash.down_s)

    def say(self, who: str, what: str, *details: Any) -> None:
        """One line of the history; it is put into words only if somebody reads it."""
        self.history.append((self.now, who, what, details))

    def lines(self, count: int | None = None) -> list[str]:
        """The last `count` lines of the history, or all."""
        told = self.history if count is None else self.history[-count:]
        return [
            f"{time:9.4f} {who:12} {what} {' '.join(map(_word, details))}".rstrip()
            for time, who, what, details in told
        ]

    def digest(self) -> str:
        """What two runs of one seed must have in common."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()


class Node:
    """A process on a machine of its own: it lives, freezes, dies and comes back.

    `life` counts the starts: what was planned in an earlier one does not happen.
    """

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        self.scheduler, self.name = scheduler, name
        self.life = 0
        self.up = False
        self.frozen_until = 0.0
        self.wall_offset_ns = 0
        self.on_death: list[Callable[[Node], None]] = []

    @property
    def now(self) -> float:
        return self.scheduler.now

    def wall_ns(self) -> int:
        """This machine's wall clock, which may jump."""
        return UNIX_NS + self.wall_offset_ns + int(self.scheduler.now * 1e9)

    def later(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        self.scheduler.at(self.scheduler.now + delay_s, self, call, *args)

    def say(self, what: str, *details: Any) -> None:
        self.scheduler.say(self.name, what, *details)

    def crash_point(self, *, likelier: float = 1.0, power_cut_chance: float = 0.3) -> None:
        """A moment at which the node may die."""
        scheduler = self.scheduler
        if scheduler.calm or scheduler.crash_chance == 0.0:
            return
        choose = scheduler.random.random
        if choose() < scheduler.crash_chance * likelier:
            down_s = scheduler.random.uniform(0.05, 4.0)
            raise Crashed(self, power_cut=choose() < power_cut_chance, down_s=down_s)

    def start(self) -> None:
        if not self.up:
            self.up = True
            self.say("starts")
            self.boot()

    def crash(self, *, power_cut: bool = False, down_s: float = 0.0) -> None:
        """End this life; the next one begins `down_s` later."""
        if not self.up:
            return
        self.say("loses power" if power_cut else "is killed")
        self.up = False
        self.life += 1
        self.frozen_until = 0.0
        for told in self.on_death:
            told(self)
        self.died(power_cut=power_cut)
        self.scheduler.at(self.scheduler.now + down_s, self, self.start)

    def boot(self) -> None:
        """Begin a life from what is on disk."""
        raise NotImplementedError

    def died(self, *, power_cut: bool) -> None:
        """Forget what was not on disk."""
        raise NotImplementedError


def _word(detail: Any) -> str:
    if isinstance(detail, bytes):
        return detail.hex()[:8] or "-"
    if isinstance(detail, float):
        return f"{detail:.3f}"
    return str(detail)
