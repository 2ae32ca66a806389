"""Who was refused what: counted since the start, and told once to whoever writes it down.

Rule: whoever is refused costs a bounded amount of memory and of lines, however often and however
many they are.

Pure.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from metisfl.broker.status import EVENT_REFUSALS, OFFENDERS_MAX, REFUSALS, REQUEST_REFUSALS

__all__ = ["KEPT_MAX", "Offence", "Offences"]

KEPT_MAX: Final = 64
REASON_CHARACTERS_MAX: Final = 500


@dataclass(frozen=True, slots=True)
class Offence:
    """What a principal was refused for: one of the causes of status.py, and the first reason."""

    principal: str
    cause: str
    reason: str
    times: int


class Offences:
    """`events` and `requests` count by cause; `offenders` by principal, those that do it most."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter(dict.fromkeys(EVENT_REFUSALS, 0))
        self.requests: Counter[str] = Counter(dict.fromkeys(REQUEST_REFUSALS, 0))
        self.offenders: dict[str, int] = {}
        self._untold: dict[tuple[str, str], tuple[str, int]] = {}  # reason, times

    def count(self, cause: str, times: int = 1) -> None:
        """Something was refused for no fault of who sent it, for one of REFUSALS."""
        assert cause in REFUSALS, cause
        (self.events if cause in self.events else self.requests)[cause] += times

    def add(self, principal: str, cause: str, reason: str) -> None:
        """A principal was refused something, for one of REFUSALS."""
        self.count(cause)
        if principal not in self.offenders and len(self.offenders) >= OFFENDERS_MAX:
            del self.offenders[min(self.offenders, key=self.offenders.__getitem__)]
        self.offenders[principal] = self.offenders.get(principal, 0) + 1
        key = principal, cause
        if (known := self._untold.get(key)) is not None:
            self._untold[key] = known[0], known[1] + 1
        elif len(self._untold) < KEPT_MAX:
            self._untold[key] = reason[:REASON_CHARACTERS_MAX], 1

    def take(self) -> list[Offence]:
        """What came since the last time: one for each principal and cause, at most 64."""
        taken = [Offence(*key, *what) for key, what in self._untold.items()]
        self._untold.clear()
        return taken
