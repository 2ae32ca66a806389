"""What becomes of a daemon that has ended: started again, given up, or left as it is.

Rule: who was killed did not choose to end, and goes on where it was; who ended by itself has said
why, and would end the same way again. A full disk is the one reason that passes by itself: who has
ended of it is started again for ever, after a pause. Pure: the owner of the processes passes the
exit code and the time in, and does what it is told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from metisfl.proto.errors import DiskFull

__all__ = ["FULL_PAUSE_S", "KILLS_MAX", "WITHIN_S", "Fate", "Past", "fate_of"]

KILLS_MAX: Final = 5
WITHIN_S: Final = 60.0
FULL_PAUSE_S: Final = 2.0
"""Before a daemon whose disk is full is started again; it costs a look at that disk each time."""
ASKED_TO_END: Final = (2, 15)
"""SIGINT and SIGTERM: they end a daemon like a kill only before it listens to them."""


class Fate(Enum):
    """What its owner does about a daemon that has ended."""

    AGAIN = "start it again, with the same options"
    FULL = "say that its disk is full, and start it again after FULL_PAUSE_S"
    STILL_FULL = "start it again after FULL_PAUSE_S; that was said already"
    GIVEN_UP = "leave it: it was killed too often"
    ENDED = "leave it: it ended by itself"


@dataclass(frozen=True, slots=True)
class Past:
    """How one daemon has ended so far, as far as it still counts, in seconds of a steady clock."""

    killed_s: tuple[float, ...] = ()
    full_s: float = -math.inf
    """When it has last ended of a full disk."""

    def and_killed(self, now_s: float) -> Past:
        """The same with a kill now."""
        lately = (at for at in self.killed_s if now_s - at < WITHIN_S)
        return replace(self, killed_s=(*lately, now_s))


def fate_of(code: int, past: Past, now_s: float) -> tuple[Fate, Past]:
    """Decide about a daemon that ended now; `past` is how it was before, the result has this too.

    `code` is its exit code, or minus the number of the signal that killed it. A disk counts as full
    without a break while the daemon has not lived WITHIN_S in between.
    """
    if code == DiskFull.exit_code:
        fate = Fate.STILL_FULL if now_s - past.full_s < WITHIN_S else Fate.FULL
        return fate, replace(past, full_s=now_s)
    if code >= 0 or -code in ASKED_TO_END:
        return Fate.ENDED, past
    past = past.and_killed(now_s)
    return (Fate.AGAIN if len(past.killed_s) <= KILLS_MAX else Fate.GIVEN_UP), past
