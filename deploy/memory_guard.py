"""When a server has to cut its connections for the memory that somebody makes it hold, and whose.

Parts of a message that never ends count for no limit of libzmq: they pile up until the last one
comes. Nobody but the kernel sees them, and closing the sockets is what gives them back.

Rule: memory is at most the limit and what arrives between two looks. A cut that did not bring it
below the limit is not tried again for a while, unless memory grows anew.

Pure: what is held and the time are passed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

__all__ = ["LOOK_S", "MEMORY_LIMIT_BYTES", "SUSPECTS_MAX", "MemoryGuard", "suspects"]

MEMORY_LIMIT_BYTES: Final = 768 * 1024**2
"""What a server holds at the most, unless it is told otherwise; a unit lets it have 1 GiB."""

LOOK_S: Final = 0.1
CALM_S: Final = 10.0
SUSPECTS_MAX: Final = 8


@dataclass(frozen=True, slots=True)
class MemoryGuard:
    """What was seen so far of the memory of one process."""

    limit_bytes: int
    calm_until_s: float = float("-inf")
    least_bytes: int = 0
    """The least that was held since the last cut, while that has not brought it below the limit."""

    def look(self, held_bytes: int, now_s: float) -> tuple[MemoryGuard, bool]:
        """So much is held, at `now_s` of a steady clock: whether to cut. Look each LOOK_S."""
        if held_bytes <= self.limit_bytes:
            return MemoryGuard(self.limit_bytes), False
        least = min(self.least_bytes, held_bytes)
        if now_s < self.calm_until_s and held_bytes <= least + self.limit_bytes // 8:
            return replace(self, least_bytes=least), False
        return MemoryGuard(self.limit_bytes, now_s + CALM_S, held_bytes), True


def suspects(let_in: Mapping[str, int], heard: Mapping[str, int]) -> list[str]:
    """Who may be in the middle of a message that does not end; at most 8.

    `let_in`: connections of each principal since the start, `heard`: those of them on which a whole
    message came. It is who never completed one; else who has most connections on which none came.
    """
    silent = {who: n - heard.get(who, 0) for who, n in let_in.items() if n > heard.get(who, 0)}
    never = [who for who in silent if not heard.get(who)]
    return sorted(never or silent, key=lambda who: (-silent[who], who))[:SUSPECTS_MAX]
