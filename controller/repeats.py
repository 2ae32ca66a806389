"""What a peer can repeat at will must not fill the log.

Rule: the first of a kind from somebody has a line, then each time its count has doubled. Memory is
bounded: beyond WHO_MAX of them, newcomers are counted together.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

__all__ = ["WHO_MAX", "Repeats", "is_worth_a_line"]

WHO_MAX: Final = 4096  # pairs of a peer and a kind; a federation has at most 1000 learners


class Repeats:
    """How often each did each of what it may not. Belongs to one thread."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def line(self, who: str, what: str) -> int:
        """It happened again: how often by now if that is worth a line, else 0.

        `what` is one of a fixed set of kinds.
        """
        key = (who, what)
        if key not in self._counts and len(self._counts) >= WHO_MAX:
            key = ("", what)
        self._counts[key] += 1
        count = self._counts[key]
        return count if is_worth_a_line(count) else 0


def is_worth_a_line(count: int) -> bool:
    """1, 2, 4, 8..."""
    return count & (count - 1) == 0
