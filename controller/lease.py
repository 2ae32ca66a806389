"""Leases: the one rule for silence.

Rule: a wait that nothing renews for `lease_s` ends, once. Times are monotonic seconds, given by the
caller. Renewals are not logged, so leases start afresh when a controller restarts, and stand still
while it cannot hear anybody: a learner never loses its lease because controller or broker was away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["Ended", "Leases", "Wait"]


@dataclass(frozen=True, slots=True)
class Wait:
    """Somebody is awaited. `task_id` is empty for a learner that has yet to join."""

    learner: str
    task_id: str
    lease_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    wait: Wait
    silent_s: float


@dataclass(frozen=True, slots=True)
class Leases:
    """Who is awaited, and when each was last heard of. Keys are (learner, task_id)."""

    heard: Mapping[tuple[str, str], tuple[Wait, float]] = MappingProxyType({})
    reported: frozenset[tuple[str, str]] = frozenset()

    def watch(self, waits: Iterable[Wait], now: float) -> Leases:
        """Watch exactly `waits`: new ones start now, those no longer awaited are forgotten."""
        heard = {}
        for wait in waits:
            key = (wait.learner, wait.task_id)
            heard[key] = (wait, self.heard[key][1] if key in self.heard else now)
        return Leases(MappingProxyType(heard), self.reported & heard.keys())

    def renew(self, learner: str, task_id: str, now: float) -> Leases:
        """Progress on a task came in. Of a task that is not awaited it changes nothing."""
        key = (learner, task_id)
        if key not in self.heard:
            return self
        heard = {**self.heard, key: (self.heard[key][0], now)}
        return Leases(MappingProxyType(heard), self.reported)

    def afresh(self, now: float) -> Leases:
        """Every lease starts anew: nobody could be heard until now."""
        heard = {key: (wait, now) for key, (wait, _) in self.heard.items()}
        return Leases(MappingProxyType(heard), self.reported)

    def end(self, now: float) -> tuple[Leases, tuple[Ended, ...]]:
        """Return the leases that ended by `now` and were not returned before."""
        ended = {
            key: Ended(wait, now - since)
            for key, (wait, since) in self.heard.items()
            if now - since > wait.lease_s and key not in self.reported
        }
        return Leases(self.heard, self.reported | ended.keys()), tuple(ended.values())

    def next_end(self) -> float | None:
        """When the next lease ends if nothing is heard, or None."""
        return min(
            (
                since + wait.lease_s
                for key, (wait, since) in self.heard.items()
                if key not in self.reported
            ),
            default=None,
        )
