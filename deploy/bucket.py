"""A token bucket: how often something may happen.

Pure. Time is monotonic seconds.
"""

from __future__ import annotations

__all__ = ["Bucket"]


class Bucket:
    """At most `per_s` a second, in bursts of up to twice that."""

    __slots__ = ("_at", "_level", "_per_s")

    def __init__(self, per_s: float, now: float) -> None:
        self._per_s, self._level, self._at = per_s, 2 * per_s, now

    def is_empty(self, now: float) -> bool:
        self._level = min(2 * self._per_s, self._level + (now - self._at) * self._per_s)
        self._at = now
        return self._level < 1

    def take(self, now: float) -> bool:
        """Take one, if there is one."""
        if self.is_empty(now):
            return False
        self._level -= 1
        return True
