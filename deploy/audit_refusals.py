"""Which refusals get a line in the audit log: whoever is refused can be so as often as it likes.

Rule: the log grows by at most LINES_MAX + 1 lines of refusals a day, whatever anybody does, and no
refusal is lost from the count: it has a line, or a later line counts it, or it is `pending`. Pure:
the time is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

__all__ = ["DAY_S", "LINES_MAX", "QUIET_S", "Due", "Refusals"]

LINES_MAX: Final = 1000
DAY_S: Final = 86_400.0
QUIET_S: Final = 3600.0  # between two lines about the same


@dataclass(frozen=True, slots=True)
class Due:
    """A line is due, about this refusal; or, if it is the `last` of the day, about the limit."""

    unwritten: int = 0
    """How often the same was refused since its last line, without one."""
    left_out: int = 0
    """How many other refusals no line tells of."""
    last: bool = False


@dataclass(frozen=True, slots=True)
class _Known:
    written_s: float
    unwritten: int = 0


@dataclass(frozen=True, slots=True)
class Refusals:
    """What was refused lately. A day begins with the first refusal after the last day's end."""

    lines_max: int = LINES_MAX
    """The lines of a day, beside the one that says that there would be more."""
    begun_s: float = float("-inf")
    lines: int = 0
    left_out: int = 0
    known: MappingProxyType[tuple[str, str], _Known] = MappingProxyType({})

    @property
    def pending(self) -> int:
        """How many refusals no line tells of or counts yet."""
        return self.left_out + sum(one.unwritten for one in self.known.values())

    def refused(self, what: str, who: str, now_s: float) -> tuple[Refusals, Due | None]:
        """Somebody was refused something, at `now_s` of a steady clock: the line that is due."""
        today = self if now_s - self.begun_s < DAY_S else self._next_day(now_s)
        one = today.known.get((what, who))
        if one is not None and now_s - one.written_s < QUIET_S:
            return today._counting(what, who, one), None
        if today.lines < self.lines_max:
            due = Due(one.unwritten if one else 0, today.left_out)
            written = today._with(what, who, _Known(now_s))
            return replace(written, lines=today.lines + 1, left_out=0), due
        counted = today._counting(what, who, one)
        if today.lines > self.lines_max:
            return counted, None
        return replace(counted, lines=today.lines + 1), Due(last=True)

    def not_written(self, due: Due) -> Refusals:
        """The line that was due could not be written: what it would have told is left out."""
        told = 0 if due.last else 1 + due.unwritten + due.left_out
        return replace(self, left_out=self.left_out + told)

    def _next_day(self, now_s: float) -> Refusals:
        lately = {k: one for k, one in self.known.items() if now_s - one.written_s < QUIET_S}
        kept = sum(one.unwritten for one in lately.values())
        left_out = self.pending - kept
        known = MappingProxyType(lately)
        return replace(self, begun_s=now_s, lines=0, left_out=left_out, known=known)

    def _counting(self, what: str, who: str, one: _Known | None) -> Refusals:
        if one is None:
            return replace(self, left_out=self.left_out + 1)
        return self._with(what, who, replace(one, unwritten=one.unwritten + 1))

    def _with(self, what: str, who: str, one: _Known) -> Refusals:
        known = self.known.copy()  # quicker than {**known}, and this is done for each refusal
        known[what, who] = one
        return replace(self, known=MappingProxyType(known))
