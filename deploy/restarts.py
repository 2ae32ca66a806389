"""What becomes of a daemon that has ended: started again, given up, or left as it is.

Rule: who was killed did not choose to end, and goes on where it was; who ended by itself has said
why, and would end the same way again. Pure: the owner of the processes passes the exit code and the
time in, and does what it is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

__all__ = ["KILLS_MAX", "WITHIN_S", "Fate", "Kills", "fate_of"]

KILLS_MAX: Final = 5
WITHIN_S: Final = 60.0
ASKED_TO_END: Final = (2, 15)
"""SIGINT and SIGTERM: they end a daemon like a kill only before it listens to them."""


class Fate(Enum):
    """What its owner does about a daemon that has ended."""

    AGAIN = "start it again, with the same options"
    GIVEN_UP = "leave it: it was killed too often"
    ENDED = "leave it: it ended by itself"


@dataclass(frozen=True, slots=True)
class Kills:
    """When one daemon was killed, as far as it still counts, in seconds of a steady clock."""

    at_s: tuple[float, ...] = ()

    def and_at(self, now_s: float) -> Kills:
        """The same with a kill now."""
        return Kills((*(at for at in self.at_s if now_s - at < WITHIN_S), now_s))


def fate_of(code: int, kills: Kills, now_s: float) -> tuple[Fate, Kills]:
    """Decide about a daemon that ended now; `kills` are those before, the result has them all.

    `code` is its exit code, or minus the number of the signal that killed it.
    """
    if code >= 0 or -code in ASKED_TO_END:
        return Fate.ENDED, kills
    kills = kills.and_at(now_s)
    return (Fate.AGAIN if len(kills.at_s) <= KILLS_MAX else Fate.GIVEN_UP), kills
